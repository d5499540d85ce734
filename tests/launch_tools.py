"""Stubs of the tools that launchers call, and dry starts of the runner.

The scripts of the launcher run in bash with these stubs alone on the path, so
that what a tool is given is what bash makes of the script, quotes and all.
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import importlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import traceback

ROOT = pathlib.Path(__file__).parent.parent
_RECORD = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >>"$CALLS"
"""
# What a stub does after it has recorded its arguments.
_STUBS = {
  # Runs `--command=...` of ssh, and says that a queued resource is there.
  'gcloud': """
for word; do case "$word" in
  --command=*) bash -c "${word#--command=}" ;;
  describe) echo ACTIVE ;;
esac; done""",
  # So does a workload, in a container.
  'xpk': """
for word; do case "$word" in --command=*) bash -c "${word#--command=}" ;; esac
done""",
  'sbatch': '\nif [ -f "$1" ]; then bash "$1"; fi',
  'sudo': '\nif [ "$1" = tee ]; then cat >/dev/null; fi',
}
_PLAIN = (
  *('curl', 'kubectl', 'lsb_release', 'mountpoint', 'python', 'python3'),
  *('scancel', 'scontrol', 'sky', 'squeue', 'srun', 'tail'),
)
# What the system has, and may be called for real.
_SYSTEM = ('bash', 'cat', 'dirname', 'head', 'mkdir', 'rm', 'sleep')
_RUNNERS = ('experiments.run', 'experiments.sweep')


@dataclasses.dataclass(frozen=True)
class Calls:
  """What a script did: its exit status, and the calls of stubs, in order."""

  status: int
  errors: str
  argv: list[list[str]]

  def of(self, tool: str) -> list[list[str]]:
    """Calls of one tool."""
    return [call for call in self.argv if call[0] == tool]

  def runs(self) -> list[tuple[str, ...]]:
    """Runners and what they are given, wherever they are in a call."""
    return [
      tuple(call[i:])
      for call in self.argv
      for i, word in enumerate(call)
      if word in _RUNNERS and call[i - 1] == '-m'
    ]


def run(script: str, folder: pathlib.Path, **environment: str) -> Calls:
  """Runs a bash script in a folder, with stubs in place of all tools.

  YAML that it gives to `kubectl` or `sky` is followed: what a container, or a
  node, would run is run as well.
  """
  tools, calls = folder / 'tools', folder / 'calls'
  if not tools.exists():
    _install(tools)
  (folder / '.venv').mkdir(exist_ok=True)
  if not (folder / '.venv' / 'bin').exists():
    (folder / '.venv' / 'bin').symlink_to(tools)
  calls.write_bytes(b'')
  settings = dict(PATH=str(tools), CALLS=str(calls), HOME=str(folder))
  done = subprocess.run(
    [str(tools / 'bash'), '-c', script],
    cwd=folder,
    env=settings | environment,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  words, found = calls.read_bytes().decode().split('\0'), [[]]
  for word in words[:-1]:
    if word == '\n':
      found.append([])
    else:
      found[-1].append(word)
  return Calls(done.returncode, done.stderr, found[:-1])


def _install(tools: pathlib.Path) -> None:
  tools.mkdir(parents=True)
  for name in _PLAIN + tuple(_STUBS):
    (tools / name).write_text(_RECORD + _STUBS.get(name, ''))
    (tools / name).chmod(0o755)
  for name in _SYSTEM:
    (tools / name).symlink_to(str(shutil.which(name)))


def container_runs(documents: Iterable[dict]) -> list[tuple[str, ...]]:
  """Runners and what they are given by the containers of JobSets."""
  out = []
  for document in documents:
    for replicated in document['spec'].get('replicatedJobs', ()):
      pod = replicated['template']['spec']['template']['spec']
      for container in pod['containers']:
        assert container['args'][1] == '-m'
        out.append(tuple(container['args'][2:]))
  return out


def node_runs(task: dict, folder: pathlib.Path) -> list[tuple[str, ...]]:
  """Runners and what they are given by the first node of a SkyPilot task."""
  home = folder / 'home'
  if not (home / 'sleep_jax').exists():
    run('true', folder)
    (home / 'sleep_jax').mkdir(parents=True)
    (home / 'sleep_jax' / 'bin').symlink_to(folder / 'tools')
  nodes = task['num_nodes']
  return run(
    task['run'],
    folder,
    HOME=str(home),
    SKYPILOT_NODE_IPS='\n'.join(f'10.0.0.{i}' for i in range(nodes)),
    SKYPILOT_NUM_NODES=str(nodes),
    SKYPILOT_NODE_RANK='0',
  ).runs()


def dry_starts(
  argvs: list[tuple[str, ...]],
) -> dict[tuple[str, ...], tuple[int, str]]:
  """Exit status and last line of dry starts, by runner and its arguments.

  All of them share one process that has imported it; each is a fork.
  """
  done = subprocess.run(
    [sys.executable, '-m', 'tests.launch_tools'],
    input=json.dumps(argvs),
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
    capture_output=True,
    text=True,
    timeout=600,
    check=True,
  )
  results = json.loads(done.stdout.splitlines()[-1])
  return {argv: tuple(result) for argv, result in zip(argvs, results)}


def _dry_start(argv: list[str]) -> tuple[int, str]:
  """Of this process, which must not have run the runner before."""
  from absl import app

  from experiments import command_line

  module, *flags = argv
  runner = importlib.import_module(module)
  sys.argv = [module, '--dry_start', *flags]
  output, status = io.StringIO(), 0
  with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
    try:
      app.run(runner.main, argv=sys.argv, flags_parser=command_line.parse)
    except SystemExit as e:
      if isinstance(e.code, str):
        print(e.code)
      status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
      traceback.print_exc(file=output)
      status = -1
  return status, (output.getvalue().strip().splitlines() or [''])[-1]


def _serve() -> None:
  results = []
  importlib.import_module('experiments.run')  # Once; a fork lists devices.
  for argv in json.load(sys.stdin):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
      os.write(write, json.dumps(_dry_start(argv)).encode())
      os._exit(0)
    os.close(write)
    with os.fdopen(read) as source:
      results.append(json.loads(source.read() or '[-1, "no answer"]'))
    os.waitpid(child, 0)
  print(json.dumps(results))


if __name__ == '__main__':
  _serve()
