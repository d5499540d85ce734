"""Slurm: one task per node, in a virtual environment on the shared disk.

`jax.distributed.initialize()` reads the other tasks from Slurm's variables.
Options: https://slurm.schedmd.com/sbatch.html.
"""

import shlex

from launch import job as job_lib
from launch.job import Job
from launch.job import Step

_PYTHON = '.venv/bin/python'
_STOPPED = 143  # `termination.EXIT_CODE`: the exit status after SIGTERM.


def create(job: Job) -> list[Step]:
  """Creates the environment on the shared disk; `run` allocates nodes."""
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

  Slurm sends SIGTERM to the tasks before the time limit; the job is then
  requeued, as after a preemption, until the run is complete.
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
      '# Stopped at the time limit: the saved run is requeued.',
      f'if [ "$code" -eq {_STOPPED} ]; then',
      '  scontrol requeue "$SLURM_JOB_ID"',
      'fi',
      'exit "$code"',
    ]
  )


def run(job: Job) -> list[Step]:
  """Submits the batch script, unless the job is in the queue."""
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
  """Follows the output of the job."""
  return [job_lib.command('tail', '-n', '100', '-F', f'{job.folder}/log')]


def resume(job: Job) -> list[Step]:
  """Runs the same command, which resumes the run."""
  return run(job)


def delete(job: Job) -> list[Step]:
  """Sends SIGTERM to the tasks, and SIGKILL after the cluster's KillWait."""
  return [job_lib.command('scancel', '--me', f'--name={job.name}')]
