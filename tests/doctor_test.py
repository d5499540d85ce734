"""The doctor says what would fail before a machine is paid for."""

import pathlib

import pytest

from launch import doctor
from tests import launch_tools

_SMALL = '--config=tests/small_life.py:wake_only'
_GKE = (
  '--platform=gke',
  '--accelerator=v5e:2x2',
  '--project=my-project',
  '--zone=us-west4-a',
  '--cluster=pods',
  '--bucket=gs://my-bucket',
  '--image=us-docker.pkg.dev/my-project/images/sleep-jax:tpu',
)
_SLURM = ('--platform=slurm', '--accelerator=gpu:2')


@pytest.fixture(name='tools')
def _tools(tmp_path, monkeypatch) -> pathlib.Path:
  """Stubs of all tools, which answer that everything is there."""
  launch_tools.run('true', tmp_path)
  monkeypatch.setenv('PATH', str(tmp_path / 'tools'))
  monkeypatch.setenv('CALLS', str(tmp_path / 'calls'))
  return tmp_path / 'tools'


def replace(tool: pathlib.Path, script: str) -> None:
  """Another stub; the old one may be a link into the system."""
  tool.write_text(f'#!/bin/bash\n{script}\n')


def test_a_job_that_would_start_passes(tools, tmp_path, capsys):
  assert doctor.main([*_GKE, _SMALL]) == 0, capsys.readouterr().out
  assert 'ok    config: 1 x v5e:2x2: mesh tensor=4' in capsys.readouterr().out
  calls = (tmp_path / 'calls').read_bytes().decode().split('\0')
  for asked in ('gs://my-bucket', 'pods', 'print-access-token'):
    assert asked in calls
  assert not {'create', 'apply', 'delete', 'submit'} & {*calls}


@pytest.mark.parametrize(
  'tool, script, line',
  [
    ('gcloud', None, 'FAIL  gcloud: gcloud is not installed; see https://'),
    ('kubectl', None, 'FAIL  kubectl: kubectl is not installed; gcloud'),
    (
      'gcloud',
      'case "$*" in *buckets*) echo "ERROR: not found: 404" >&2; exit 1; esac',
      'FAIL  bucket: gcloud storage buckets describe gs://my-bucket: ERROR: '
      'not found: 404 Create it',
    ),
    (
      'gcloud',
      'case "$*" in *token*) echo "ERROR: no account" >&2; exit 1; esac',
      'FAIL  account: gcloud auth print-access-token --quiet: ERROR: no '
      'account Log in',
    ),
  ],
)
def test_what_is_missing_is_named(tools, capsys, tool, script, line):
  if script is None:
    (tools / tool).unlink()
  else:
    replace(tools / tool, script)
  assert doctor.main(_GKE) == 1
  assert line in capsys.readouterr().out


@pytest.mark.parametrize(
  'argv, line',
  [
    (
      (*_SLURM, _SMALL, '--config.task.name=factz'),
      "FAIL  config: task.name='factz' is unknown",
    ),
    (
      (*_SLURM, _SMALL, '--accelerator=gpu:7'),
      'FAIL  config: no mesh of 7 devices fits this config',
    ),
    ((*_SLURM, _SMALL, '--config.base=no/such.npz'), 'FAIL  base: '),
    ((*_SLURM, '--bucket=gs://my-bucket'), 'FAIL  flags: --bucket'),
    (_GKE[:-1], 'FAIL  flags: this platform needs --image'),
  ],
)
def test_a_config_that_cannot_run_fails(tools, capsys, argv, line):
  del tools
  assert doctor.main(argv) == 1
  assert line in capsys.readouterr().out


def test_slurm_is_asked_whether_it_would_take_the_job(tools, capsys):
  assert doctor.main(_SLURM) == 0, capsys.readouterr().out
  script = (
    'grep -q "gpus-per-node=2" || exit 0\necho "error: no gpu" >&2\nexit 1'
  )
  replace(tools / 'sbatch', script)
  (tools / 'grep').symlink_to('/usr/bin/grep')
  assert doctor.main(_SLURM) == 1
  assert (
    'FAIL  job: sbatch --test-only: error: no gpu' in capsys.readouterr().out
  )


def test_alone_it_looks_at_this_machine(capsys):
  assert doctor.main([]) == 0, capsys.readouterr().out
  out = capsys.readouterr().out
  assert 'ok    versions: jax' in out and 'ok    devices: 8 x cpu' in out


def test_a_bad_flag_is_an_error(capsys):
  assert doctor.main(['--zone=west', '--hours=0']) == 2
  assert '--zone' in capsys.readouterr().err
