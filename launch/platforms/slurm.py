"""Slurm: one task per node, in a virtual environment on the shared disk.

`jax.distributed.initialize()` reads the other tasks from Slurm's variables.
Options: https://slurm.schedmd.com/sbatch.html.
"""

import re
import shlex

from launch import job as job_lib
from launch.job import Job
from launch.job import Probe
from launch.job import Step
from sleep_jax import config

_PYTHON = '.venv/bin/python'
# Options that other flags of the launcher give, or that its script relies on.
_OWN = {
  'job-name': '--name',
  'nodes': '--nodes',
  'ntasks-per-node': 'one process a node',
  'gpus-per-node': '--accelerator and --gpu-type',
  'partition': '--partition',
  'account': '--account',
  'time': '--hours',
  'signal': '--grace',
  'output': '--workdir',
  'open-mode': '--workdir',
  'requeue': '--restarts',
}


def create(job: Job) -> list[Step]:
  """Creates the environment on the shared disk; `run` allocates nodes."""
  _check(job)
  extra = '.[gpu]' if job.machine.kind == 'gpu' else '.'
  return [
    job_lib.command('python3', '-m', 'venv', '.venv'),
    job_lib.command(_PYTHON, '-m', 'pip', 'install', '--editable', extra),
  ]


def _check(job: Job) -> None:
  job.require_kind('cpu', 'gpu')
  job.refuse_bucket()
  for option in job.sbatch:
    key = option.partition('=')[0]
    if not re.fullmatch(r'[a-z][a-z-]+[a-z]', key):
      raise config.ConfigError(
        f'--sbatch={option!r} must be KEY=VAL or KEY, such as '
        'cpus-per-task=16; keys are the long options of sbatch.'
      )
    if key in _OWN:
      raise config.ConfigError(
        f'--sbatch={option!r}: the launcher sets {key} ({_OWN[key]}).'
      )


def _options(job: Job) -> dict[str, str]:
  """Options of sbatch; '' has no value."""
  out = {
    'job-name': job.name,
    'nodes': f'{job.nodes}',
    'ntasks-per-node': '1',
    'time': f'{job.hours}:00:00',
    'signal': f'TERM@{job.grace}',
    # A file name of Slurm is a pattern, in which %% is %.
    'output': job.log.replace('%', '%%'),
    'open-mode': 'append',
    'requeue': '',
  }
  if job.machine.kind == 'gpu':
    count = f'{job.machine.count}'
    out['gpus-per-node'] = f'{job.gpu_type}:{count}' if job.gpu_type else count
  for key in ('partition', 'account'):
    if value := getattr(job, key):
      out[key] = value
  for option in job.sbatch:
    key, _, out[key] = option.partition('=')
  return out


def batch(job: Job) -> str:
  """The batch script.

  Slurm sends SIGTERM to the tasks before the time limit; the job is then
  requeued, as after a preemption, until the run is complete.
  """
  codes = ' | '.join(map(str, job_lib.RESTARTED))
  return '\n'.join(
    [
      '#!/usr/bin/env bash',
      *(
        f'#SBATCH --{key}={shlex.quote(value)}' if value else f'#SBATCH --{key}'
        for key, value in _options(job).items()
      ),
      'set -euo pipefail',
      job_lib.exports(job.environment),
      '# srun does not take it from sbatch since Slurm 22.05.',
      'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then',
      '  export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
      'fi',
      'code=0',
      f'srun {shlex.join(job.argv(_PYTHON))} || code=$?',
      '# Stopped at the time limit, or a task was lost: the run is requeued.',
      'case "$code" in',
      f'  {codes})',
      f'    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ]; then',
      '      scontrol requeue "$SLURM_JOB_ID"',
      '    fi ;;',
      'esac',
      'exit "$code"',
    ]
  )


def run(job: Job) -> list[Step]:
  """Submits the batch script of every job, unless it is in the queue."""
  _check(job)
  return [step for share in job.shares() for step in _submit(share)]


def _submit(job: Job) -> list[Step]:
  path = f'{job.files}/job.sbatch'
  return [
    job_lib.Shell(f"""
if [ -n "$(squeue --noheader --me --name={job.name})" ]; then
  echo "{job.name} is in the queue already" >&2
  exit 1
fi"""),
    # Slurm makes no folder for the output, and a job without one fails.
    job_lib.command('mkdir', '-p', job.folder),
    job_lib.File(path, batch(job)),
    job_lib.command('sbatch', path),
  ]


def logs(job: Job) -> list[Step]:
  """Follows the output of every job."""
  files = [share.log for share in job.shares()]
  return [job_lib.command('tail', '-n', '100', '-F', *files)]


def resume(job: Job) -> list[Step]:
  """Runs the same command, which resumes the run."""
  return run(job)


def delete(job: Job) -> list[Step]:
  """Sends SIGTERM to the tasks, and SIGKILL after the cluster's KillWait."""
  return [
    job_lib.command('scancel', '--me', f'--name={share.name}')
    for share in job.shares()
  ]


def probes(job: Job) -> dict[str, Probe]:
  """Whether the cluster would take the job."""
  return {
    'job': Probe(
      ('sbatch', '--test-only'),
      'Change --partition, --account, --hours, --accelerator or --sbatch',
      text=batch(job.shares()[0]),
    )
  }
