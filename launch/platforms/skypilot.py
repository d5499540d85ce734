"""SkyPilot: a managed job, which SkyPilot restarts after preemptions.

Fields: https://docs.skypilot.co/en/latest/reference/yaml-spec.html.
"""

import shlex
from typing import Any

from launch import job as job_lib
from launch.job import Job
from launch.job import Probe
from launch.job import Step


def _check(job: Job) -> None:
  job.require('bucket')
  if job.machine.kind == 'gpu':
    job.require('gpu_type')


def create(job: Job) -> list[job_lib.Command]:
  """Checks access to the cloud; a managed job allocates its machines."""
  _check(job)
  cloud = 'gcp' if job.machine.kind == 'tpu' else None
  return [job_lib.command('sky', 'check', cloud)]


def _resources(job: Job) -> dict[str, Any]:
  out: dict[str, Any] = {'use_spot': job.spot}
  if job.zone:
    region = job.zone.rpartition('-')[0]
    out['infra'] = f'gcp/{region}/{job.zone}'
  if job.machine.kind == 'tpu':
    out['accelerators'] = f'tpu-{job.machine.gcloud}:1'
    out['accelerator_args'] = {'runtime_version': job.machine.chip.runtime}
  elif job.machine.kind == 'gpu':
    out['accelerators'] = f'{job.gpu_type}:{job.machine.count}'
  # Lost machines are replaced; an error of the run's own would come again.
  out['job_recovery'] = {'max_restarts_on_errors': 0}
  return out


def _command(job: Job) -> str:
  """The command; without a TPU, SkyPilot gives the coordinator's address."""
  line = shlex.join(job.argv())
  if job.machine.kind == 'tpu':
    return line
  return line.replace(
    '--coordinator=auto',
    '--coordinator="$(head -n 1 <<<"$SKYPILOT_NODE_IPS")":8476 '
    '--processes="$SKYPILOT_NUM_NODES" --process_id="$SKYPILOT_NODE_RANK"',
  )


def task(job: Job) -> dict[str, Any]:
  """The task: this folder is installed and run on every node."""
  extra = {'cpu': '.', 'gpu': '.[gpu]', 'tpu': '.[tpu]'}[job.machine.kind]
  return {
    'name': job.name,
    'workdir': '.',
    'num_nodes': job.nodes,
    'resources': _resources(job),
    'envs': job.environment,
    'file_mounts': {'/bucket': {'source': job.bucket, 'mode': 'MOUNT'}},
    'setup': (
      'set -eu\n'
      'uv venv --python 3.12 --seed ~/sleep_jax\n'
      f'uv pip install --python ~/sleep_jax --editable {shlex.quote(extra)}\n'
    ),
    'run': f'exec ~/sleep_jax/bin/{_command(job)}\n',
  }


def run(job: Job) -> list[Step]:
  """Launches the managed job, or one for every share."""
  _check(job)
  return [step for share in job.shares() for step in _launch(share)]


def _launch(job: Job) -> list[Step]:
  path = f'{job.files}/task.yaml'
  return [
    job_lib.File(path, job_lib.as_yaml(task(job))),
    job_lib.command(
      'sky',
      'jobs',
      'launch',
      f'--name={job.name}',
      '--detach-run',
      '--yes',
      path,
    ),
  ]


def logs(job: Job) -> list[Step]:
  """Follows the output of the job; of several, the first."""
  name = job.shares()[0].name
  return [job_lib.command('sky', 'jobs', 'logs', f'--name={name}')]


def resume(job: Job) -> list[Step]:
  """Runs the same command, which resumes the run."""
  return run(job)


def delete(job: Job) -> list[Step]:
  """Cancels every job and releases its machines."""
  return [
    job_lib.command('sky', 'jobs', 'cancel', f'--name={share.name}', '--yes')
    for share in job.shares()
  ]


def probes(job: Job) -> dict[str, Probe]:
  """Whether SkyPilot may use the cloud, and which GPUs there are."""
  (check,) = create(job)
  out = {'cloud': Probe(check.argv, 'Log in to a cloud, as it says')}
  if job.machine.kind == 'gpu':
    out['gpu'] = Probe(
      ('sky', 'gpus', 'list', f'{job.gpu_type}:{job.machine.count}'),
      'Give another --gpu-type',
    )
  return out
