"""The mesh that the launcher chooses divides what the config has."""

import jax
import pytest

from launch import cli
from launch import job as job_lib
from launch import mesh
from sleep_jax import config
from sleep_jax.data.datasets import download
from sleep_jax.harness import build as build_lib

_CONFIG = 'tests/small_life.py:wake_only'


def demand(rows: int, vocab: int = 64) -> mesh.Demand:
  embedding = jax.ShapeDtypeStruct((vocab, 64), 'float32')
  model = {'embed': {'embedding': embedding}}
  return mesh.Demand({'wake.batch': rows}, [model], key_heads=4)


@pytest.mark.parametrize(
  'rows, nodes, devices, sizes',
  [
    (16, 1, 1, {}),
    (16, 1, 8, {'fsdp': 2, 'tensor': 4}),
    (16, 2, 16, {'data': 2, 'fsdp': 2, 'tensor': 4}),
    (16, 4, 4, {'data': 4}),  # One device a machine.
    (2, 1, 16, {'fsdp': 2, 'tensor': 8}),  # Rows are in two parts at most.
    (1, 2, 8, {'data': 2, 'tensor': 4}),  # A single row is not split.
  ],
)
def test_a_mesh_that_divides_everything_is_chosen(rows, nodes, devices, sizes):
  assert mesh.choose(demand(rows), nodes, devices) == sizes


def test_where_none_fits_the_setting_is_named():
  with pytest.raises(
    config.ConfigError, match='no mesh of 4 devices fits'
  ) as e:
    mesh.choose(demand(3, vocab=65), 1, 4)
  assert "'vocab' has size 65" in str(e.value) or 'wake.batch' in str(e.value)


@pytest.mark.parametrize('text', ['', 'fsdp=2,tensor=8', 'data=3'])
def test_sizes_are_read_as_they_are_written(text):
  assert mesh.text_of(mesh.parse(text)) == text


@pytest.mark.parametrize('text', ['fsdp', 'fsdp=0', 'rows=2', 'fsdp=-2', '8'])
def test_another_form_is_refused(text):
  with pytest.raises(config.ConfigError, match='write axis=size'):
    mesh.parse(text)


def test_a_given_mesh_is_checked_against_the_batches():
  job = job_lib.Job('a', _CONFIG, accelerator='gpu:16', mesh='data=16')
  with pytest.raises(config.ConfigError, match='which 16 devices'):
    cli.with_mesh(job)
  job, line = cli.with_mesh(job_lib.Job('a', _CONFIG, accelerator='gpu:16'))
  assert job.mesh and line == (
    f'1 x gpu:16: mesh {job.mesh}, one life at a time'
  )


def test_without_the_data_the_line_says_what_is_not_known(monkeypatch):
  def build(*_, **__):
    raise download.DataError('clinc.csv is not here')

  monkeypatch.setattr(build_lib, 'build', build)
  job, line = cli.with_mesh(job_lib.Job('a', _CONFIG, accelerator='gpu:8'))
  assert job.mesh
  assert 'the machines alone: the data is not (clinc.csv is not here)' in line


def test_a_public_base_is_not_fetched_to_choose_a_mesh():
  file = 'experiments/configs/backbones.py:squad-llama3_2_1b'
  job, line = cli.with_mesh(job_lib.Job('a', file, accelerator='v5e:4x4'))
  assert job.mesh == 'fsdp=2,tensor=8'  # As `launch.aot` has it.
  assert "base 'bases/llama3_2_1b' is not here" in line


def test_a_config_that_cannot_be_read_is_named_in_a_line():
  with pytest.raises(config.ConfigError, match='no_such_setting') as e:
    mesh.load_config(_CONFIG, ('--config.no_such_setting=1',))
  assert '\n' not in str(e.value)
