"""This machine: a background process that survives the terminal."""

import shlex

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
  return (
    f'--accelerator={job.accelerator}',
    f'--workdir={job.folder}',
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
  folder = shlex.quote(job.folder)
  return [
    job_lib.Shell(f"""
mkdir -p {folder}
if [ -f {folder}/pid ] && kill -0 "$(cat {folder}/pid)" 2>/dev/null; then
  echo "{job.name} runs already, as process $(cat {folder}/pid)" >&2
  exit 1
fi
{job_lib.exports(job.environment)}
nohup {shlex.join(job.argv())} \\
  >>{folder}/log 2>&1 </dev/null &
echo $! >{folder}/pid""")
  ]


def logs(job: Job) -> list[Step]:
  """Follows the output of the job."""
  return [job_lib.command('tail', '-n', '100', '-F', f'{job.folder}/log')]


def resume(job: Job) -> list[Step]:
  """Runs the same command, which resumes the run."""
  return run(job)


def delete(job: Job) -> list[Step]:
  """Sends SIGTERM, on which the run ends."""
  pid = shlex.quote(f'{job.folder}/pid')
  return [job_lib.Shell(f'kill -TERM "$(cat {pid})"\nrm {pid}')]
