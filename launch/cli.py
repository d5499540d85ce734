"""The command line of the launcher: five verbs, the same on every platform.

  python -m launch.cli --platform=tpu_vm run --dry-run \\
      --config=experiments/configs/quickstart.py --accelerator=v5e:4x4 \\
      --project=my-project --zone=us-west4-a --bucket=gs://my-bucket \\
      --image=us-docker.pkg.dev/my-project/images/sleep-jax:tpu

With --grid, --arms, --seeds or --jobs=N it runs `experiments.sweep`, as N jobs.

Verbs: create, run, logs, resume, delete; see docs/launch.md.
`--config.section.name=value` is passed to the experiment. `--dry-run` prints
the bash script and does not run it. On accelerators lives run one at a time, on
a mesh of all devices, which is printed; `--mesh` chooses another.
"""

import argparse
import dataclasses
import pathlib
import re
import subprocess
import sys

from experiments import command_line
from experiments import grid
from launch import job as job_lib
from launch import mesh
from launch import platforms
from sleep_jax import config
from sleep_jax.harness import build as build_lib

_HELP = {
  'name': 'of the job and its machines; default: the config file',
  'config': 'the experiment, NAME[:VARIANT] or FILE.py[:VARIANT]',
  'grid': 'tries settings, SECTION.NAME=VALUE,VALUE; may be repeated',
  'arms': 'of the config, with commas; default all',
  'seeds': "with commas; default the config's",
  'jobs': 'that share the lives and the work directory; local: at a time',
  'share': 'run, logs, resume: of the jobs, this one alone; 1 is the first',
  'workdir': "the run's work directory; default runs/NAME, in the bucket",
  'data_dir': 'becomes $SLEEP_JAX_DATA',
  'accelerator': 'cpu, gpu:8 or a TPU such as v5e:4x4',
  'gpu_type': 'such as H100; SkyPilot needs it, Slurm may',
  'nodes': 'machines; of TPU: slices',
  'mesh': 'such as fsdp=2,tensor=8; default: one that divides the config',
  'spot': 'preemptible machines',
  'restarts': 'at most, after preemptions and lost machines',
  'image': 'container image, built from launch/Dockerfile',
  'bucket': 'gs://NAME, mounted at /bucket',
  'bucket_gb': 'xpk: size of the volume of the bucket, in GB',
  'project': 'of Google Cloud',
  'zone': 'of Google Cloud',
  'cluster': 'of GKE',
  'queue': 'of Kueue',
  'partition': 'of Slurm',
  'account': 'of Slurm',
  'sbatch': 'one more option of sbatch, KEY=VAL or KEY; may be repeated',
  'hours': 'Slurm: time limit before the job is requeued',
  'grace': 'seconds between SIGTERM and SIGKILL',
}


def parser() -> argparse.ArgumentParser:
  """The argument parser; its flags are the fields of a `Job`."""
  out = argparse.ArgumentParser(
    'launch.cli',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  out.add_argument('verb', choices=job_lib.VERBS)
  out.add_argument(
    '--platform', required=True, choices=sorted(platforms.PLATFORMS)
  )
  out.add_argument(
    '--dry-run', action='store_true', help='print the script; run nothing'
  )
  add_job_flags(out)
  return out


def add_job_flags(
  parser: argparse.ArgumentParser, *, config_required: bool = True
) -> None:
  """Adds a flag for every field of a `Job`."""
  for field in dataclasses.fields(job_lib.Job):
    if field.name == 'overrides':
      continue
    flag, help_text = f'--{field.name.replace("_", "-")}', _HELP[field.name]
    if field.type is bool:
      parser.add_argument(flag, action='store_true', help=help_text)
    elif field.name in ('grid', 'sbatch'):
      parser.add_argument(flag, action='append', default=[], help=help_text)
    elif field.name == 'config':
      parser.add_argument(flag, required=config_required, help=help_text)
    elif field.name == 'name':
      parser.add_argument(flag, help=help_text)
    else:
      parser.add_argument(
        flag, type=field.type, default=field.default, help=help_text
      )


def parse(argv: list[str]) -> tuple[job_lib.Job, argparse.Namespace]:
  """The job that a command line describes, and all of its arguments.

  Raises:
    ConfigError: if the job is invalid.
  """
  args, overrides = parser().parse_known_args(argv)
  return job_of(args, overrides), args


def job_of(args: argparse.Namespace, overrides: list[str]) -> job_lib.Job:
  """The job of parsed flags; without a config it is called `job`.

  Raises:
    ConfigError: if the job is invalid.
  """
  names = [f.name for f in dataclasses.fields(job_lib.Job)]
  fields = {k: v for k, v in vars(args).items() if k in names}
  fields |= {name: tuple(fields[name]) for name in ('grid', 'sbatch')}
  fields['config'] = args.config or ''
  file = fields['config'].partition(':')[0]
  shipped = file in command_line.names()
  if file and not shipped and not pathlib.Path(file).is_file():
    raise config.ConfigError(
      f'--config={args.config!r}: there is no file {file!r}; launch from the '
      'root of the repository, or give one of '
      f'{", ".join(command_line.names())}.'
    )
  if not args.name:
    stem = re.sub(r'\.py\b', '', fields['config'].rpartition('/')[2])
    name = re.sub(r'[^a-z0-9]+', '-', stem.lower()).strip('-')
    fields['name'] = name or 'job'
  return job_lib.Job(overrides=tuple(overrides), **fields)


def _experiment(job: job_lib.Job) -> build_lib.Settings:
  """The settings of all jobs together.

  Raises:
    ConfigError: if they cannot be read, or there are more jobs than lives.
  """
  c = mesh.load_config(job.config, job.overrides)
  if job.sweep:
    build_lib.check_sections(c)
    arms, seeds = (
      text.split(',') if text else () for text in (job.arms, job.seeds)
    )
    c = grid.swept(c, job.grid, arms, seeds)
  if job.jobs > (lives := len(c['arms']) * len(c['seeds'])):
    raise config.ConfigError(
      f'--jobs={job.jobs} share {lives} lives (arms and seeds); give at most '
      f'--jobs={lives}.'
    )
  return c


def with_mesh(job: job_lib.Job) -> tuple[job_lib.Job, str]:
  """The job on a mesh of its devices, and a line that says which.

  The config is built by shapes, so that a setting that cannot work is refused
  before a machine is paid for.

  Raises:
    ConfigError: if the config cannot work, or does not fit its mesh.
  """
  c = _experiment(job)
  needed = mesh.demand(c)
  if job.mesh:
    sizes = mesh.parse(job.mesh)
    needed.check(sizes)
  else:
    sizes = mesh.choose(needed, job.nodes, job.devices)
  text = mesh.text_of(sizes)
  line = f'{job.where}: mesh {text or "of one device"}'
  if job.jobs > 1:
    line = f'{job.jobs} jobs, each on {line}'
  if job.settings:
    line += ', one life at a time'
  if needed.unknown:
    line += (
      '; whether it divides the batches is known on the machines alone: '
      f'{needed.unknown} here'
    )
  return dataclasses.replace(job, mesh=text), line


def plan(platform: str, verb: str, job: job_lib.Job) -> str:
  """The bash script of one verb.

  Raises:
    ConfigError: if the platform cannot run this job.
  """
  if job.share and verb in ('create', 'delete'):
    raise config.ConfigError(
      f'--share={job.share} goes with run, logs and resume; {verb} is for all '
      'jobs.'
    )
  return job_lib.script(getattr(platforms.PLATFORMS[platform], verb)(job))


def main(argv: list[str] | None = None) -> int:
  """Prints or runs the plan; returns the exit status."""
  try:
    job, args = parse(sys.argv[1:] if argv is None else argv)
    if args.verb in ('create', 'run', 'resume'):
      job, line = with_mesh(job)
      print(line, file=sys.stderr)
    script = plan(args.platform, args.verb, job)
  except config.ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  if args.dry_run:
    print(script, end='')
    return 0
  return subprocess.run(['bash', '-c', script], check=False).returncode


if __name__ == '__main__':
  sys.exit(main())
