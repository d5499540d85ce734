"""The memory report, on eight host devices in place of a TPU's."""

import dataclasses
import functools
import re

import jax
import pytest

from launch import aot
from launch import hardware
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
  return aot.Program(settings(), sharding.mesh({'fsdp': 4, 'tensor': 2}))


@pytest.fixture(name='said', scope='module')
def _said(program):
  lines = []
  fits = aot.table(program, 'v5e:2x4', NAMES, lines.append)
  return fits, [line for line in lines if line.startswith('| ')]


def test_a_step_compiles_and_is_told_of(said):
  fits, (heads, *rows) = said
  assert fits and [row.split(' | ')[0] for row in rows] == [
    f'| {name}' for name in NAMES
  ]
  assert {row.count('|') for row in rows} == {heads.count('|')}
  for row in rows:
    assert re.search(r'\d+ all-(gather|reduce)', row), row


@pytest.mark.parametrize('name', ['seeding', 'rollout'])
def test_what_is_slow_to_compile_lowers(program, name):
  step = program.step(name)
  assert aot.lowered(step).collectives == 'not compiled'
  life = program.local((program.params, program.memory))
  assert program.local(step.arguments()) > life  # Nothing of it is elsewhere.


def test_what_does_not_fit_is_said(program, monkeypatch):
  chip = dataclasses.replace(hardware.CHIPS['v5e'], hbm=1000)
  monkeypatch.setitem(hardware.CHIPS, 'v5e', chip)
  lines = []
  assert not aot.table(program, 'v5e:2x4', ['trials'], lines.append)
  assert 'does not fit' in lines[-1]


def test_a_device_holds_its_part(program):
  """Large leaves in eight parts, norms and counters whole."""
  whole = sum(x.size * 4 for x in jax.tree.leaves(program.params))
  assert whole / 8 < program.local(program.params) < whole / 4
  deltas = jax.tree.leaves(program.memory.deltas())
  assert program.rested() == sum(x.size * 4 for x in deltas) / 8


def test_flops_are_those_of_the_accounts(program):
  step = program.step('wake')
  # One lane becomes four, so that the mesh can split the batch.
  assert step.flops == 4 * 8 * flops.wake_flops(program.cfg, 4)
  assert step.passes == 2


def test_the_bound_is_the_slower_of_computing_and_reading():
  chip = hardware.CHIPS['v5e']
  step = aot.Step(functools.partial(int), None, flops=8 * chip.flops, passes=3)
  assert aot.bound(step, int(0.1 * chip.bandwidth), chip, 8) == '1 s, compute'
  assert aot.bound(step, int(chip.bandwidth), chip, 8) == '3 s, memory'


@pytest.mark.parametrize(
  'text, sizes',
  [
    ('', {'fsdp': 4, 'tensor': 2}),  # Two key heads.
    ('fsdp=8', {'fsdp': 8, 'tensor': 1}),
  ],
)
def test_a_mesh_is_read_or_chosen(text, sizes):
  found = aot.mesh_of(conftest.tiny(), text, jax.devices()).shape
  assert {k: found[k] for k in sizes} == sizes


@pytest.mark.parametrize(
  'call, words',
  [
    (lambda: aot.absent('gpu:8'), "--topology='gpu:8' must be of a TPU"),
    (lambda: aot.absent('v5e:4x4x4'), "accelerator='v5e:4x4x4'"),
    (
      lambda: aot.mesh_of(conftest.tiny(), 'fsdp', jax.devices()),
      "--mesh='fsdp': write axis=size",
    ),
  ],
)
def test_bad_input_is_refused(call, words):
  with pytest.raises(config.ConfigError, match=re.escape(words)):
    call()
