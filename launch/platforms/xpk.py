"""GKE by xpk, which creates cluster, node pools, queue and JobSet.

Flags: https://github.com/AI-Hypercomputer/xpk (docs/usage).
"""

import shlex

from launch import job as job_lib
from launch.job import Job
from launch.job import Probe
from launch.job import Step
from launch.platforms import google
from sleep_jax import config

_SMALLEST = {'v5e': 8}  # Chips of a slice that xpk has a `--tpu-type` for.


def _check(job: Job) -> None:
  job.require('project', 'zone', 'cluster')
  job.require_kind('tpu')
  smallest = _SMALLEST.get(job.machine.generation, 1)
  if job.machine.count < smallest:
    raise config.ConfigError(
      f'--accelerator={job.accelerator}: of {job.machine.generation}, xpk has '
      f'slices of {smallest} chips or more; use gke or tpu_vm.'
    )


def _cluster_args(job: Job) -> tuple[str, ...]:
  return (
    f'--cluster={job.cluster}',
    f'--project={job.project}',
    f'--zone={job.zone}',
  )


def create(job: Job) -> list[Step]:
  """Creates the cluster, and attaches the bucket to every workload."""
  _check(job)
  job.require('image', 'bucket')
  cluster = job_lib.command(
    'xpk',
    'cluster',
    'create',
    *_cluster_args(job),
    f'--tpu-type={job.machine.gcloud}',
    f'--num-slices={job.nodes * job.jobs}',
    '--spot' if job.spot else '--on-demand',
    '--enable-workload-identity',
    '--enable-gcsfuse-csi-driver',
    '--quiet',  # Without it, xpk asks at the terminal.
  )
  storage = job_lib.command(
    'xpk',
    'storage',
    'attach',
    'bucket',
    *_cluster_args(job),
    '--type=gcsfuse',
    f'--bucket={job.bucket.removeprefix("gs://")}',
    f'--size={job.bucket_gb}',
    '--mount-point=/bucket',
    '--readonly=false',
    '--auto-mount=true',
  )
  return [cluster, storage]


def run(job: Job) -> list[Step]:
  """Creates the workload of every job; a preemption of a slice restarts it."""
  _check(job)
  job.require('image', 'bucket')
  return [_submit(share) for share in job.shares()]


def _submit(job: Job) -> Step:
  return job_lib.command(
    'xpk',
    'workload',
    'create',
    *_cluster_args(job),
    f'--workload={job.name}',
    f'--tpu-type={job.machine.gcloud}',
    f'--num-slices={job.nodes}',
    f'--docker-image={job.image}',
    # Of exit codes that xpk restarts: 42, and 127 to 255.
    f'--max-restarts={job.restarts}',
    f'--termination-grace-period-seconds={job.grace}',
    *(f'--env={k}={v}' for k, v in job.environment.items()),
    f'--command={shlex.join(job.argv())}',
  )


def logs(job: Job) -> list[Step]:
  """Follows the first pod of every slice, of several jobs of the first.

  xpk has no command for logs.
  """
  _check(job)
  labels = (
    f'xpk.google.com/workload={job.shares()[0].name},'
    'batch.kubernetes.io/job-completion-index=0'
  )
  return [
    google.credentials(job),
    job_lib.command(
      'kubectl',
      'logs',
      '--follow',
      '--tail=100',
      '--all-containers',
      f'--selector={labels}',
    ),
  ]


def _stop(job: Job) -> list[Step]:
  return [
    job_lib.command(
      'xpk',
      'workload',
      'delete',
      *_cluster_args(job),
      f'--workload={share.name}',
      '--force',
    )
    for share in job.shares()
  ]


def resume(job: Job) -> list[Step]:
  """Deletes the old workloads and creates them again."""
  return [*_stop(job), *run(job)]


def delete(job: Job) -> list[Step]:
  """Ends every job and deletes the cluster."""
  _check(job)
  cluster = job_lib.command(
    'xpk', 'cluster', 'delete', *_cluster_args(job), '--force'
  )
  return [*_stop(job), cluster]


def probes(job: Job) -> dict[str, Probe]:
  """Whether what the job needs is there; `create` makes the cluster."""
  return google.probes(job)
