"""This machine: a background process that survives the terminal."""

from launch import job as job_lib
from launch.job import Job
from launch.job import Step
from sleep_jax import config


def create(job: Job) -> list[Step]:
  """Runs the preflight checks; there is nothing to allocate."""
  return [
    job_lib.command('python', '-m', 'launch.preflight', *_preflight_args(job))
  ]


def _preflight_args(job: Job) -> tuple[str, ...]:
  data = (f'--data-dir={job.data_dir}',) if job.data_dir else ()
  mesh = (f'--mesh={job.mesh}',) if job.mesh else ()
  return (
    f'--accelerator={job.accelerator}',
    f'--workdir={job.folder}',
    *mesh,
    *data,
  )


def run(job: Job) -> list[Step]:
  """Starts the job in the background, unless it is running."""
  job.require_kind('cpu', 'gpu')
  if job.nodes > 1:
    raise config.ConfigError(
      f'--nodes={job.nodes}: this platform is one machine; use slurm, gke, '
      'xpk, tpu_vm or skypilot.'
    )
  job.refuse_bucket()
  if job.share or (job.jobs > 1 and job.machine.kind == 'gpu'):
    raise config.ConfigError(
      f'--jobs={job.jobs} is the number of lives at a time on this platform, '
      'of CPUs alone, in one process; leave --share out, and with GPUs --jobs.'
    )
  return [
    job_lib.Shell(job_lib.exports(job.environment)),
    _background('start', job, *job.argv()),
  ]


def _background(verb: str, job: Job, *argv: str) -> Step:
  return job_lib.command(
    'python', '-m', 'launch.background', verb, job.folder, *argv
  )


def logs(job: Job) -> list[Step]:
  """Follows the output of the job."""
  return [job_lib.command('tail', '-n', '100', '-F', job.log)]


def resume(job: Job) -> list[Step]:
  """Runs the same command, which resumes the run."""
  return run(job)


def delete(job: Job) -> list[Step]:
  """Sends SIGTERM, on which the run ends."""
  return [_background('stop', job)]
