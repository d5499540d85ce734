"""What the platforms on Google Cloud share."""

from launch import job as job_lib
from launch.job import Job
from launch.job import Probe
from launch.job import Step


def region(job: Job) -> str:
  """The region of the zone."""
  return job.zone.rpartition('-')[0]


def credentials(job: Job) -> Step:
  """Credentials of `kubectl` for the cluster, in the region of the zone."""
  return job_lib.command(
    'gcloud',
    'container',
    'clusters',
    'get-credentials',
    job.cluster,
    f'--project={job.project}',
    f'--location={region(job)}',
  )


def probes(job: Job) -> dict[str, Probe]:
  """Whether account, project, bucket and image are there."""
  out = {
    'account': Probe(
      ('gcloud', 'auth', 'print-access-token', '--quiet'),
      'Log in by gcloud auth login',
    ),
    'project': Probe(
      ('gcloud', 'projects', 'describe', job.project),
      'Give a --project that this account may use',
    ),
    'bucket': Probe(
      ('gcloud', 'storage', 'buckets', 'describe', job.bucket),
      f'Create it by gcloud storage buckets create {job.bucket}',
    ),
  }
  if '.pkg.dev/' in job.image:
    out['image'] = Probe(
      ('gcloud', 'artifacts', 'docker', 'images', 'describe', job.image),
      'Build it by docker build -f launch/Dockerfile, and push it',
    )
  return out
