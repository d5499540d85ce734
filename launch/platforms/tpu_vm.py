"""Cloud TPU VMs as queued resources; a container runs on every worker.

Flags: https://cloud.google.com/sdk/gcloud/reference/compute/tpus/
queued-resources and https://cloud.google.com/tpu/docs/run-in-container.
"""

import shlex

from launch import job as job_lib
from launch.job import Job
from launch.job import Probe
from launch.job import Step
from launch.platforms import google
from sleep_jax import config


def _check(job: Job) -> None:
  job.require('project', 'zone', 'image', 'bucket')
  job.require_kind('tpu')
  if job.jobs > 1:
    raise config.ConfigError(
      f'--jobs={job.jobs}: this platform has no queue of jobs; use gke, xpk or '
      'skypilot, or leave it out to live all in one job.'
    )


def _queued_resources(
  job: Job, verb: str, *flags: str | None
) -> job_lib.Command:
  return job_lib.command(
    'gcloud',
    'compute',
    'tpus',
    'queued-resources',
    verb,
    job.name,
    f'--project={job.project}',
    f'--zone={job.zone}',
    *flags,
  )


def _on_all_workers(job: Job, name: str, text: str) -> list[Step]:
  """Runs a script on every worker of every slice (`node` in gcloud)."""
  path = f'{job.files}/{name}'
  ssh = _queued_resources(job, 'ssh', '--node=all', '--worker=all').script()
  return [
    job_lib.File(path, f'#!/usr/bin/env bash\nset -euo pipefail\n{text}'),
    job_lib.Shell(
      f'{ssh} \\\n  --command="bash -c $(printf %q "$(cat {path})")"'
    ),
  ]


def _request(job: Job) -> job_lib.Command:
  multislice = job.nodes > 1
  return _queued_resources(
    job,
    'create',
    f'--accelerator-type={job.machine.gcloud}',
    f'--runtime-version={job.machine.chip.runtime}',
    f'--node-count={job.nodes}' if multislice else f'--node-id={job.name}',
    f'--node-prefix={job.name}' if multislice else None,
    '--spot' if job.spot else None,
  )


def _state(job: Job) -> str:
  return _queued_resources(
    job, 'describe', '--format=value(state.state)'
  ).script()


def create(job: Job) -> list[Step]:
  """Requests the slices, waits for them, and prepares every worker."""
  _check(job)
  return [_request(job), _wait(job), *_prepare(job)]


def _wait(job: Job) -> Step:
  return job_lib.Shell(f"""
while state="$({_state(job)})" || exit 1
  [ "$state" != ACTIVE ]; do
  case "$state" in
    FAILED | SUSPENDING | SUSPENDED)
      echo "{job.name} is $state; 'resume' asks for it anew" >&2
      exit 1 ;;
  esac
  echo "{job.name}: $state"
  sleep 30
done""")


def _prepare(job: Job) -> list[Step]:
  """Mounts the bucket and pulls the image on every worker; idempotent."""
  registry = job.image.partition('/')[0]
  packages = 'https://packages.cloud.google.com/apt'
  key = '/usr/share/keyrings/cloud.google.asc'
  setup = f"""
sudo gcloud auth configure-docker {shlex.quote(registry)} --quiet
sudo docker pull --quiet {shlex.quote(job.image)}
if ! command -v gcsfuse >/dev/null; then
  curl -fsSL {packages}/doc/apt-key.gpg | sudo tee {key} >/dev/null
  echo "deb [signed-by={key}] {packages} gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq -y gcsfuse
fi
sudo mkdir -p /bucket
mountpoint -q /bucket ||
  sudo gcsfuse --implicit-dirs {job.bucket.removeprefix('gs://')} /bucket"""
  # The first connection creates the SSH key that the others use.
  key_maker = _queued_resources(
    job, 'ssh', '--node=0', '--worker=0', '--command=true'
  )
  return [key_maker, *_on_all_workers(job, 'setup.sh', setup.strip())]


def run(job: Job) -> list[Step]:
  """Starts the container on every worker."""
  _check(job)
  docker = job_lib.command(
    'sudo',
    'docker',
    'run',
    '--detach',
    f'--name={job.name}',
    '--privileged',
    '--net=host',
    '--volume=/bucket:/bucket',
    *(f'--env={k}={v}' for k, v in job.environment.items()),
    job.image,
    *job.argv(),
  )
  text = f"""
if sudo docker stop --time={job.grace} {job.name} 2>/dev/null; then
  sudo docker rm {job.name}
fi
{docker.script()}"""
  return _on_all_workers(job, 'run.sh', text.strip())


def logs(job: Job) -> list[Step]:
  """Follows the output of the first worker of the first slice."""
  job.require('project', 'zone')
  follow = f'sudo docker logs --follow --tail=100 {job.name}'
  return [
    _queued_resources(
      job, 'ssh', '--node=0', '--worker=0', f'--command={follow}'
    )
  ]


def resume(job: Job) -> list[Step]:
  """Requests new slices if the old ones are lost, and runs again."""
  _check(job)
  lost = job_lib.Shell(f"""
state="$({_state(job)})" || state=NONE
if [ "$state" = FAILED ] || [ "$state" = SUSPENDED ]; then
  {_indented(delete(job)[0])}
  state=NONE
fi
if [ "$state" = NONE ]; then
  {_indented(_request(job))}
fi""")
  return [lost, _wait(job), *_prepare(job), *run(job)]


def _indented(step: Step) -> str:
  return step.script().replace('\n', '\n  ')


def delete(job: Job) -> list[Step]:
  """Deletes the slices, and with them the containers."""
  job.require('project', 'zone')
  return [_queued_resources(job, 'delete', '--force', '--quiet')]


def probes(job: Job) -> dict[str, Probe]:
  """Whether what the job needs is there."""
  return google.probes(job) | {
    'accelerator': Probe(
      (
        'gcloud',
        'compute',
        'tpus',
        'accelerator-types',
        'describe',
        job.machine.gcloud,
        f'--project={job.project}',
        f'--zone={job.zone}',
      ),
      'Give a --zone that has it',
    )
  }
