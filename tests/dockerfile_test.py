"""The image: its file is linted, and its steps are run without Docker."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCKERFILE = ROOT / 'launch' / 'Dockerfile'


def instructions() -> list[tuple[str, str]]:
  """The instructions, each with its text on one line."""
  lines = DOCKERFILE.read_text().splitlines()
  text = '\n'.join(l for l in lines if not l.lstrip().startswith('#'))
  joined = re.sub(r'\\\n', ' ', text)
  pairs = [l.split(None, 1) for l in joined.splitlines() if l.strip()]
  return [(name, rest) for name, rest in pairs]


def test_hadolint_finds_nothing():
  here = pathlib.Path(sys.executable).parent
  hadolint = shutil.which(
    'hadolint', path=f'{here}{os.pathsep}{os.environ["PATH"]}'
  )
  if hadolint is None:
    pytest.skip('hadolint is not installed')
  done = subprocess.run(
    [hadolint, '--failure-threshold=style', DOCKERFILE],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout


def test_all_that_is_copied_is_there():
  copied = [
    shlex.split(text) for name, text in instructions() if name == 'COPY'
  ]
  for *sources, _ in copied:
    for source in sources:
      assert (ROOT / source).exists(), source


@pytest.mark.slow
def test_every_step_runs_in_a_fresh_environment(tmp_path):
  """COPY and RUN, in an empty environment, and then the image's command."""
  entry: list[str] = []
  folder, python = tmp_path / 'image', tmp_path / 'venv'
  folder.mkdir()
  subprocess.run([sys.executable, '-m', 'venv', python], check=True)
  environment = {
    'PATH': f'{python / "bin"}:{os.defpath}',
    'HOME': str(tmp_path),
    'ACCELERATOR': 'cpu',
  }
  for name, text in instructions():
    if name == 'ENV':
      environment |= dict(pair.split('=', 1) for pair in shlex.split(text))
    elif name == 'COPY':
      *sources, target = shlex.split(text)
      for source in sources:
        path = ROOT / source
        to = folder / target
        if path.is_dir():
          shutil.copytree(
            path, to, ignore=shutil.ignore_patterns('__pycache__')
          )
        else:
          shutil.copy(path, to)
    elif name == 'ENTRYPOINT':
      entry = json.loads(text)
    elif name in ('RUN', 'CMD'):
      argv = ['/bin/sh', '-c', text]
      if name == 'CMD':
        argv = [*entry, *json.loads(text)]
      done = subprocess.run(
        argv,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
      )
      assert done.returncode == 0, (argv, done.stdout, done.stderr[-3000:])
  _check_signals(entry, environment)


def _check_signals(entry: list[str], environment: dict[str, str]) -> None:
  """A SIGTERM ends a process that handles none, behind the entry point."""
  code = 'import time; print("importing", flush=True); time.sleep(60)'
  outer = subprocess.Popen(
    ['unshare', '--pid', '--fork', '--kill-child']
    + [*entry, 'python', '-c', code],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert outer.stdout is not None
  assert outer.stdout.readline() == 'importing\n'
  children = pathlib.Path(f'/proc/{outer.pid}/task/{outer.pid}/children')
  os.kill(int(children.read_text()), signal.SIGTERM)
  assert outer.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize('name', ['gpuz', ''])
def test_an_unknown_accelerator_ends_the_build(name):
  (run,) = [text for kind, text in instructions() if kind == 'RUN']
  done = subprocess.run(
    ['/bin/sh', '-c', run],
    env={'PATH': '', 'ACCELERATOR': name},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1 and 'choose cpu, cuda or tpu' in done.stderr
