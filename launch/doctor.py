"""What would fail, found before a machine is paid for.

  python -m launch.doctor --platform=gke --config=C --accelerator=v5e:4x4 ...

The flags are those of `launch.cli`, without a verb; alone, it looks at this
machine. Nothing is changed or downloaded: tools are looked up and asked, and
the config is built of shapes on the mesh that it would have. One line for each
check; exits with 1 if any fails.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
import re
import shutil
import subprocess
import sys

from launch import cli
from launch import job as job_lib
from launch import mesh
from launch import platforms
from launch import preflight
from sleep_jax import config
from sleep_jax.weights import load

_TIMEOUT = 60  # Seconds that a tool may take to answer.
_INSTALL = {
  'gcloud': 'see https://cloud.google.com/sdk/docs/install',
  'kubectl': 'gcloud components install kubectl',
  'sbatch': 'launch from a login node of the cluster',
  'sky': "pip install 'skypilot[gcp]', in an environment of its own",
  'xpk': 'pip install xpk, in an environment of its own',
}
Checks = dict[str, Callable[[], str]]


def check_tool(name: str) -> str:
  """Checks that a command is installed."""
  path = shutil.which(name)
  if path is None:
    raise preflight.NotReady(f'{name} is not installed; {_INSTALL[name]}.')
  return path


def ask(probe: job_lib.Probe) -> str:
  """Checks that a command that changes nothing succeeds."""
  command = ' '.join(probe.argv)
  try:
    done = subprocess.run(
      probe.argv,
      input=probe.text,
      capture_output=True,
      text=True,
      timeout=_TIMEOUT,
      check=False,
    )
  except FileNotFoundError:
    raise preflight.NotReady(f'not known without {probe.argv[0]}.') from None
  except subprocess.TimeoutExpired:
    raise preflight.NotReady(
      f'{command} has not answered in {_TIMEOUT} s.'
    ) from None
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ['no reason given']
    errors = [line for line in lines if 'error' in line.lower()]
    reason = errors[0] if errors else lines[-1]
    raise preflight.NotReady(f'{command}: {reason.strip()} {probe.advice}.')
  return command


def _on_any_mesh(job: job_lib.Job) -> job_lib.Job:
  """The job with some mesh of its devices; the config's is another check."""
  sizes = {'data': job.devices} if job.devices > 1 else {}
  return dataclasses.replace(job, mesh=job.mesh or mesh.text_of(sizes))


def _plans(platform: str, job: job_lib.Job) -> list[str]:
  """The scripts of all verbs.

  Raises:
    ConfigError: if the platform does not have what the job asks for.
  """
  return [cli.plan(platform, verb, job) for verb in job_lib.VERBS]


def check_flags(platform: str, job: job_lib.Job) -> str:
  """Checks that the platform has what the job asks for."""
  _plans(platform, _on_any_mesh(job))
  return f'{platform}, {job.where}'


def check_config(job: job_lib.Job) -> str:
  """Checks every arm of the config, and its mesh."""
  return cli.with_mesh(job)[1]


def check_base(job: job_lib.Job) -> str:
  """Checks that the pretrained base is there, or will be."""
  c = mesh.load_config(job.config, job.overrides)
  base = c.get('base', '')
  if not base:
    return 'none: lives begin with fresh weights'
  path = pathlib.Path(base)
  if base.startswith('/bucket/') or not (path.exists() or path.suffix):
    return f'{base}: not here; the machines must have it, or fetch it by name'
  load.model_config(base, c['task'].get('data_dir'))
  return base


def checks(platform: str, job: job_lib.Job) -> Checks:
  """The checks of a job on a platform, by name."""
  out: Checks = {'flags': functools.partial(check_flags, platform, job)}
  if job.config:
    out['config'] = functools.partial(check_config, job)
    out['base'] = functools.partial(check_base, job)
  if platform == 'local':
    here = [f'--accelerator={job.accelerator}']
    here += [f'--workdir={job.folder}'] if job.config or job.workdir else []
    here += [f'--data-dir={job.data_dir}'] if job.data_dir else []
    return out | preflight.checks(preflight.parser().parse_args(here))
  try:
    job = _on_any_mesh(job)
    scripts = '\n'.join(_plans(platform, job))
  except config.ConfigError:
    return out  # The check of the flags says why; the tools are not known.
  for tool in _INSTALL:
    if re.search(rf'(^|["(]){tool} ', scripts, re.MULTILINE):
      out[tool] = functools.partial(check_tool, tool)
  for name, probe in platforms.PLATFORMS[platform].probes(job).items():
    out[name] = functools.partial(ask, probe)
  return out


def parser() -> argparse.ArgumentParser:
  """The argument parser."""
  out = argparse.ArgumentParser(
    'launch.doctor',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  out.add_argument(
    '--platform', default='local', choices=sorted(platforms.PLATFORMS)
  )
  cli.add_job_flags(out, config_required=False)
  return out


def main(argv: Sequence[str] | None = None) -> int:
  """Runs all checks, prints a line for each, and returns the exit status."""
  args, overrides = parser().parse_known_args(argv)
  try:
    job = cli.job_of(args, overrides)
  except config.ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  return preflight.report(checks(args.platform, job))


if __name__ == '__main__':
  sys.exit(main())
