"""GKE: a JobSet on TPU node pools, admitted by Kueue.

The cluster must have the JobSet and Kueue controllers, Workload Identity and
the GCS FUSE driver (docs/launch.md). Sources: https://jobset.sigs.k8s.io/docs/tasks/
tpu_multislice and https://cloud.google.com/kubernetes-engine/docs/tutorials/
tpu-multislice-kueue.
"""

from typing import Any

from launch import job as job_lib
from launch.job import Job
from launch.job import Probe
from launch.job import Step
from launch.platforms import google

_TPU = 'google.com/tpu'
_CONTAINER = 'sleep-jax'


def _check(job: Job) -> None:
  job.require('project', 'zone', 'cluster')
  job.require_kind('tpu')


def _pools(job: Job) -> list[str]:
  return [f'{job.name}-{i}' for i in range(job.nodes * job.jobs)]


def create(job: Job) -> list[Step]:
  """Creates one node pool per slice of every job, and a Kueue queue."""
  _check(job)
  job.require('image', 'bucket')  # Of `run`: known before pools are paid for.
  machine = job.machine
  pools = [
    job_lib.command(
      'gcloud',
      'container',
      'node-pools',
      'create',
      pool,
      f'--project={job.project}',
      f'--location={google.region(job)}',
      f'--node-locations={job.zone}',
      f'--cluster={job.cluster}',
      f'--machine-type={machine.machine}',
      f'--tpu-topology={machine.topology}' if machine.hosts > 1 else None,
      f'--num-nodes={machine.hosts}',
      '--workload-metadata=GKE_METADATA',
      '--spot' if job.spot else None,
    )
    for pool in _pools(job)
  ]
  path = f'{job.files}/kueue.yaml'
  return [
    google.credentials(job),
    job_lib.command(
      'kubectl',
      'get',
      'crd',
      'jobsets.jobset.x-k8s.io',
      'localqueues.kueue.x-k8s.io',
    ),
    *pools,
    job_lib.File(path, job_lib.as_yaml(*queues(job))),
    job_lib.command('kubectl', 'apply', '--server-side', f'--filename={path}'),
  ]


def _selector(job: Job) -> dict[str, str]:
  prefix = 'cloud.google.com/gke-tpu'
  return {
    f'{prefix}-accelerator': job.machine.chip.gke,
    f'{prefix}-topology': job.machine.topology,
  }


def queues(job: Job) -> list[dict[str, Any]]:
  """Kueue's objects: a flavor and quota of the chips, and the queue."""
  api = 'kueue.x-k8s.io/v1beta2'
  flavor = f'{job.name}-{job.machine.generation}'
  chips = job.machine.count * job.nodes * job.jobs
  return [
    {
      'apiVersion': api,
      'kind': 'ResourceFlavor',
      'metadata': {'name': flavor},
      'spec': {'nodeLabels': _selector(job)},
    },
    {
      'apiVersion': api,
      'kind': 'ClusterQueue',
      'metadata': {'name': job.queue},
      'spec': {
        'namespaceSelector': {},
        'queueingStrategy': 'BestEffortFIFO',
        'resourceGroups': [
          {
            'coveredResources': [_TPU],
            'flavors': [
              {
                'name': flavor,
                'resources': [{'name': _TPU, 'nominalQuota': str(chips)}],
              }
            ],
          }
        ],
      },
    },
    {
      'apiVersion': api,
      'kind': 'LocalQueue',
      'metadata': {'name': job.queue, 'namespace': 'default'},
      'spec': {'clusterQueue': job.queue},
    },
  ]


def jobset(job: Job) -> dict[str, Any]:
  """The JobSet: one Job per slice, one pod per host, restarted together."""
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': {
      'name': job.name,
      'namespace': 'default',
      'labels': {'kueue.x-k8s.io/queue-name': job.queue},
      # All pods of a Job run on one node pool, so a slice is not split.
      'annotations': {
        'alpha.jobset.sigs.k8s.io/exclusive-topology': (
          'cloud.google.com/gke-nodepool'
        )
      },
    },
    'spec': {
      'suspend': True,  # Kueue starts it.
      'failurePolicy': {
        'maxRestarts': job.restarts,  # Every preemption of a slice is one.
        'rules': [
          {
            'name': 'sameErrorAgain',
            'action': 'FailJobSet',
            'onJobFailureReasons': ['PodFailurePolicy'],
          }
        ],
      },
      'replicatedJobs': [
        {
          'name': 'slice',
          'replicas': job.nodes,
          'template': {
            'spec': {
              'parallelism': job.machine.hosts,
              'completions': job.machine.hosts,
              'backoffLimit': 0,
              'podFailurePolicy': {'rules': [_failure_rule()]},
              'template': _pod(job),
            }
          },
        }
      ],
    },
  }


def _failure_rule() -> dict[str, Any]:
  """A run that ends by an error of its own is not started again."""
  return {
    'action': 'FailJob',
    'onExitCodes': {
      'containerName': _CONTAINER,
      'operator': 'NotIn',
      'values': list(job_lib.RESTARTED),
    },
  }


def _pod(job: Job) -> dict[str, Any]:
  container = {
    'name': _CONTAINER,
    'image': job.image,
    'args': list(job.argv()),  # Of the image's entry point.
    'env': [{'name': k, 'value': v} for k, v in job.environment.items()],
    # Ports of the slice builder and of the metrics of libtpu.
    'ports': [{'containerPort': 8471}, {'containerPort': 8431}],
    'resources': {'limits': {_TPU: job.machine.chips_per_host}},
    'volumeMounts': [{'name': 'bucket', 'mountPath': '/bucket'}],
  }
  bucket = {
    'name': 'bucket',
    'csi': {
      'driver': 'gcsfuse.csi.storage.gke.io',
      'volumeAttributes': {
        'bucketName': job.bucket.removeprefix('gs://'),
        'mountOptions': 'implicit-dirs',
      },
    },
  }
  return {
    'metadata': {'annotations': {'gke-gcsfuse/volumes': 'true'}},
    'spec': {
      'serviceAccountName': 'sleep-jax',
      'restartPolicy': 'Never',
      'terminationGracePeriodSeconds': job.grace,
      'nodeSelector': _selector(job),
      'containers': [container],
      'volumes': [bucket],
    },
  }


def run(job: Job) -> list[Step]:
  """Submits the JobSet of every job to the queue."""
  _check(job)
  job.require('image', 'bucket')
  submitted = [step for share in job.shares() for step in _submit(share)]
  return [google.credentials(job), *submitted]


def _submit(job: Job) -> list[Step]:
  path = f'{job.files}/jobset.yaml'
  return [
    job_lib.File(path, job_lib.as_yaml(jobset(job))),
    job_lib.command('kubectl', 'create', f'--filename={path}'),
  ]


def logs(job: Job) -> list[Step]:
  """Follows the first pod of every slice; of several jobs, of the first."""
  _check(job)
  labels = (
    f'jobset.sigs.k8s.io/jobset-name={job.shares()[0].name},'
    'batch.kubernetes.io/job-completion-index=0'
  )
  return [
    google.credentials(job),
    job_lib.command(
      'kubectl',
      'logs',
      '--follow',
      '--tail=100',
      f'--container={_CONTAINER}',
      f'--selector={labels}',
    ),
  ]


def _stop(job: Job) -> Step:
  names = [share.name for share in job.shares()]
  return job_lib.command(
    'kubectl', 'delete', 'jobset', *names, '--ignore-not-found'
  )


def resume(job: Job) -> list[Step]:
  """Deletes the old JobSets and submits them again."""
  steps = run(job)
  return [steps[0], _stop(job), *steps[1:]]


def delete(job: Job) -> list[Step]:
  """Ends all jobs and deletes their node pools; the queue remains."""
  _check(job)
  pools = [
    job_lib.command(
      'gcloud',
      'container',
      'node-pools',
      'delete',
      pool,
      f'--project={job.project}',
      f'--location={google.region(job)}',
      f'--cluster={job.cluster}',
      '--quiet',
    )
    for pool in _pools(job)
  ]
  return [google.credentials(job), _stop(job), *pools]


def probes(job: Job) -> dict[str, Probe]:
  """Whether what the job needs is there."""
  return google.probes(job) | {
    'cluster': Probe(
      (
        'gcloud',
        'container',
        'clusters',
        'describe',
        job.cluster,
        f'--project={job.project}',
        f'--location={google.region(job)}',
      ),
      'Create it, with JobSet, Kueue and the GCS FUSE driver',
    )
  }
