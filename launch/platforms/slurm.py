"""Slurm: one task a node, from the shared disk's own virtual environment.

`jax.distributed.initialize()` finds the other tasks by Slurm's variables.
Options: https://slurm.schedmd.com/sbatch.html.
"""

import shlex

from launch import job as job_lib
from launch.job import Job
from launch.job import Step

_PYTHON = '.venv/bin/python'
_STOPPED = 143  # A run's exit status after SIGTERM.


def create(job: Job) -> list[Step]:
  """The environment, on the shared disk; nodes come with `run`."""
  job.require_kind('cpu', 'gpu')
  job.refuse_bucket()
  extra = '.[gpu]' if job.machine.kind == 'gpu' else '.'
  return [
    job_lib.command('python3', '-m', 'venv', '.venv'),
    job_lib.command(_PYTHON, '-m', 'pip', 'install', '--editable', extra),
    job_lib.command('mkdir', '-p', job.folder),
  ]


def batch(job: Job) -> str:
  """The batch script.

  Slurm sends SIGTERM to the tasks before the time limit; the job then stands
  in the queue again, as it does after a preemption, until it has ended well.
  """
  gpus = job.machine.count if job.machine.kind == 'gpu' else 0
  options = {
    'job-name': job.name,
    'nodes': job.nodes,
    'ntasks-per-node': 1,
    'gpus-per-node': gpus or None,
    'partition': job.partition or None,
    'account': job.account or None,
    'time': f'{job.hours}:00:00',
    'signal': f'TERM@{job.grace}',
    'output': f'{job.folder}/log',
    'open-mode': 'append',
  }
  head = [f'#SBATCH --{k}={v}' for k, v in options.items() if v is not None]
  return '\n'.join(
    [
      '#!/usr/bin/env bash',
      *head,
      '#SBATCH --requeue',
      'set -euo pipefail',
      job_lib.exports(job.environment),
      'code=0',
      f'srun {shlex.join(job.argv(_PYTHON))} || code=$?',
      '# Stopped by the clock: it is saved, and goes on in another turn.',
      f'if [ "$code" -eq {_STOPPED} ]; then',
      '  scontrol requeue "$SLURM_JOB_ID"',
      'fi',
      'exit "$code"',
    ]
  )


def run(job: Job) -> list[Step]:
  """Hands the batch script in, unless the job is there already."""
  job.require_kind('cpu', 'gpu')
  job.refuse_bucket()
  path = f'{job.files}/job.sbatch'
  return [
    job_lib.Shell(f"""
if [ -n "$(squeue --noheader --me --name={job.name})" ]; then
  echo "{job.name} is in the queue already" >&2
  exit 1
fi"""),
    job_lib.File(path, batch(job)),
    job_lib.command('sbatch', path),
  ]


def logs(job: Job) -> list[Step]:
  """Follows its output."""
  return [job_lib.command('tail', '-n', '100', '-F', f'{job.folder}/log')]


def resume(job: Job) -> list[Step]:
  """The same command goes on where it stopped."""
  return run(job)


def delete(job: Job) -> list[Step]:
  """SIGTERM to its tasks, and SIGKILL after the cluster's KillWait."""
  return [job_lib.command('scancel', '--me', f'--name={job.name}')]
