"""The memory report, on eight host devices in place of a TPU's."""

import dataclasses
import functools
import re

import jax
import pytest

from launch import aot
from launch import hardware
from launch import programs
from sleep_jax import config
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.models import flops
from sleep_jax.runtime import sharding
from tests import conftest

NAMES = ['wake', 'trials']


def settings(**sleep):
  small = dict(
    dreams=16,
    dream_length=16,
    batch=8,
    prefixes=4,
    group=2,
    rollout_groups=4,
    teacher_top_k=4,
    tokens_in_flight=16,
  )
  return {
    'name': 'tiny',
    'model': dataclasses.asdict(conftest.tiny()),
    'wake': dataclasses.asdict(wake_lib.WakeConfig(batch=1)),
    'sleep': dataclasses.asdict(
      consolidation_config.SeedingConfig(**(small | sleep))
    ),
    'lora': {'rank': 2, 'alpha': 4.0, 'learning_rate': 1e-3},
  }


@pytest.fixture(name='program', scope='module')
def _program():
  return programs.Program(settings(), sharding.mesh({'fsdp': 4, 'tensor': 2}))


@pytest.fixture(name='measured', scope='module')
def _measured(program):
  lines = []
  fits = aot.table(program, 'v5e:2x4', NAMES, lines.append)
  return fits, [line for line in lines if line.startswith('| ')]


def test_steps_compile_and_have_table_rows(measured):
  fits, (header, *rows) = measured
  assert fits and [row.split(' | ')[0] for row in rows] == [
    f'| {name}' for name in NAMES
  ]
  assert {row.count('|') for row in rows} == {header.count('|')}
  for row in rows:
    assert re.search(r'\d+ all-(gather|reduce)', row), row


@pytest.mark.parametrize('name', ['seeding', 'rollout'])
def test_steps_that_compile_slowly_lower(program, name):
  step = program.step(name)
  assert programs.lowered(step).collectives == 'not compiled'
  life = program.local_bytes(program.model)
  arguments = program.local_bytes(step.arguments())
  assert arguments > life  # All of the model is an argument.


def test_table_reports_a_step_that_does_not_fit(program, monkeypatch):
  chip = dataclasses.replace(hardware.CHIPS['v5e'], hbm=1000)
  monkeypatch.setitem(hardware.CHIPS, 'v5e', chip)
  lines = []
  assert not aot.table(program, 'v5e:2x4', ['trials'], lines.append)
  assert 'does not fit' in lines[-1]


def test_a_device_holds_its_shards(program):
  """Large leaves in eight parts, norms and counters whole."""
  whole = sum(x.size * 4 for x in jax.tree.leaves(program.model.params))
  assert whole / 8 < program.local_bytes(program.model.params) < whole / 4
  deltas = jax.tree.leaves(program.model.memory.deltas())
  assert program.previous_memory_bytes() == sum(x.size * 4 for x in deltas) / 8


def test_flops_equal_those_of_the_cost_tracker(program):
  step = program.step('wake')
  # A single row is on every device; the mesh splits the weights.
  assert step.flops == 8 * flops.wake_flops(program.cfg, 4)
  assert step.passes == 2


def test_bound_is_the_larger_of_compute_and_memory_time():
  chip = hardware.CHIPS['v5e']
  step = programs.Step(
    functools.partial(int), None, flops=8 * chip.flops, passes=3
  )
  assert (
    programs.bound(step, int(0.1 * chip.bandwidth), chip, 8) == '1 s, compute'
  )
  assert programs.bound(step, int(chip.bandwidth), chip, 8) == '3 s, memory'


@pytest.mark.parametrize(
  'text, sizes',
  [
    ('', {'fsdp': 4, 'tensor': 2}),  # Two key heads.
    ('fsdp=8', {'fsdp': 8, 'tensor': 1}),
  ],
)
def test_mesh_is_parsed_or_chosen(text, sizes):
  shape = programs.mesh_of(conftest.tiny(), text, jax.devices()).shape
  assert {k: shape[k] for k in sizes} == sizes


@pytest.mark.parametrize(
  'call, words',
  [
    (
      lambda: programs.absent_devices('gpu:8'),
      "--topology='gpu:8' must be of a TPU",
    ),
    (lambda: programs.absent_devices('v5e:4x4x4'), "accelerator='v5e:4x4x4'"),
    (
      lambda: programs.mesh_of(conftest.tiny(), 'fsdp', jax.devices()),
      "--mesh='fsdp': write axis=size",
    ),
  ],
)
def test_bad_input_is_refused(call, words):
  with pytest.raises(config.ConfigError, match=re.escape(words)):
    call()
