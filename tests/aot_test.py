"""The report of a run that is compiled, on eight host devices for a TPU's."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import backbones
from experiments.configs import quickstart
from launch import aot
from launch import compilation
from launch import hardware
from launch import mesh as mesh_lib
from launch import programs
from sleep_jax import config
from sleep_jax.harness import build
from sleep_jax.inference import sampling
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import imitation
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.models import flops

NAMES = ['wake', 'evaluation']
MESH = 'fsdp=4,tensor=2'
SETTINGS = (
  wake_lib.WakeConfig,
  consolidation_config.SeedingConfig,
  sampling.SamplerConfig,
)


def settings(**sleep):
  """The quickstart with small nights; the runner would take it as it is."""
  c = json.loads(quickstart.get_config().to_json())
  c['base'] = ''
  c['sleep'] |= dict(dreams=32, batch=8, steps=20, teacher_top_k=4) | sleep
  return c


@pytest.fixture(name='run', scope='module')
def _run():
  return programs.build_run(settings())


@pytest.fixture(name='program', scope='module')
def _program(run):
  return programs.Program(run, run.mesh(MESH, jax.devices()))


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


@pytest.mark.slow
def test_every_other_step_of_a_life_lowers(program):
  life = program.local_bytes(program.model)
  for name in set(program.steps()) - set(NAMES):
    step = program.step(name)
    assert compilation.lowered(step).collectives == 'not compiled', name
    assert program.local_bytes(step.arguments()) > life, name


def test_table_reports_a_step_that_does_not_fit(program, monkeypatch):
  chip = dataclasses.replace(hardware.CHIPS['v5e'], hbm=1000)
  monkeypatch.setitem(hardware.CHIPS, 'v5e', chip)
  lines = []
  assert not aot.table(program, 'v5e:2x4', ['evaluation'], lines.append)
  assert 'does not fit' in lines[-1]


def shapes(args):
  """Of the arrays and numbers among a program's arguments."""
  leaves = jax.tree.leaves(args)
  return [
    np.shape(x) for x in leaves if isinstance(x, int) or hasattr(x, 'shape')
  ]


PROGRAMS = {
  'wake': (wake_lib, 'read_day'),
  'rollout': (sampling, 'generate'),
  'labelling': (teacher_labels, 'label'),
  'scoring': (imitation, 'score_rollouts'),
  'seeding': (seeding, 'seed_steps'),
}


class SeedingReached(Exception):
  """All programs before it have been called."""


def test_the_runner_calls_these_programs_with_these_shapes(monkeypatch):
  """One life of the runner, until its first seeding step; nothing is run."""
  c = settings(dream_length=16, continuation=8)
  c['task']['rows'] = programs.DAY_BATCHES * c['wake']['batch']
  c['model']['levels'][0]['sleep_every'] = programs.DAY_BATCHES
  calls = {}

  def recorded(name, program):
    def call(*args, **kwargs):
      calls.setdefault(name, (args, kwargs))
      if name == 'seeding':
        raise SeedingReached
      outputs = program.eval_shape(*args, **kwargs)
      # A memory without experts, and rows of one token.
      fill = 0 if name == 'wake' else 1
      return jax.tree.map(lambda x: jnp.full(x.shape, fill, x.dtype), outputs)

    return call

  for name, (module, attribute) in PROGRAMS.items():
    program = getattr(module, attribute)
    monkeypatch.setattr(module, attribute, recorded(name, program))
  task, learner, _ = build.build(build.arm_config(c, 'sleep'), 1)
  life = learner.init(jax.random.key(0))
  # Its last night is the dearest: all slots are in use.
  life = life.with_memory(life.memory.with_all_slots(life.model.cfg))
  life, _ = learner.wake(life, task.experience(0))
  read = jnp.int32(programs.DAY_BATCHES * c['task']['length'])
  life = life.replace(clock=life.clock.replace(tokens=read))
  with pytest.raises(SeedingReached):
    learner.sleep(life)
  monkeypatch.undo()
  run = programs.build_run(c)
  program = programs.Program(run, run.mesh('', jax.devices()[:1]))
  for name, (args, kwargs) in calls.items():
    lower = program.step(name).lower
    assert shapes(lower.args) == shapes(args), name
    assert lower.keywords == kwargs, name
    for mine, theirs in zip(lower.args, args):
      if isinstance(theirs, SETTINGS):
        assert mine == theirs, name


def test_rollouts_have_the_rows_of_a_night():
  c = json.loads(backbones.get_config('clinc-llama3_2_1b').to_json())
  run = programs.build_run(c)
  program = programs.Program(run, run.mesh('', jax.devices()[:1]))
  prompts = program.step('rollout').lower.args[1]
  assert prompts.shape == (c['sleep']['dreams'] // 2, 1)


@pytest.mark.parametrize(
  'rows, words',
  [
    (dict(batch=6), "sleep.batch: 'batch' has size 6"),
    (dict(dreams=20), "half of sleep.dreams: 'batch' has size 10"),
  ],
)
def test_a_mesh_that_the_runner_refuses_is_refused(rows, words):
  run = programs.build_run(settings(**rows))
  with pytest.raises(config.ConfigError, match=re.escape(words)):
    run.mesh(MESH, jax.devices())


def test_the_default_mesh_is_the_launchers(run):
  mesh = run.mesh('', jax.devices())
  sizes = mesh_lib.choose(mesh_lib.demand(settings()), 1, 8)
  assert {k: v for k, v in mesh.shape.items() if v > 1} == sizes


def test_a_device_holds_its_shards(program):
  """Large leaves in eight parts, norms and counters whole."""
  whole = sum(x.size * 4 for x in jax.tree.leaves(program.model.params))
  assert whole / 8 < program.local_bytes(program.model.params) < whole / 4
  deltas = jax.tree.leaves(program.model.memory.deltas())
  assert program.previous_memory_bytes() == sum(x.size * 4 for x in deltas) / 8


def test_flops_equal_those_of_the_cost_tracker(program):
  step = program.step('wake')
  assert step.flops == step.tokens * flops.wake_flops(program.cfg, 32)
  assert step.passes == programs.DAY_BATCHES


def test_bound_is_the_larger_of_compute_and_memory_time():
  chip = hardware.CHIPS['v5e']
  step = programs.Step(
    functools.partial(int), None, flops=8 * chip.flops, passes=3, tokens=1
  )
  least = compilation.bound(step, int(0.1 * chip.bandwidth), chip, 8)
  assert str(least) == '1 s, compute'
  least = compilation.bound(step, int(chip.bandwidth), chip, 8)
  assert str(least) == '3 s, memory'


@pytest.mark.parametrize('topology', ['v5p:1x1x1', 'v6e:1x1'])
def test_one_chip_is_a_slice_too(topology):
  pytest.importorskip('libtpu')
  assert len(programs.absent_devices(topology)) == 1


@pytest.mark.parametrize(
  'call, words',
  [
    (
      lambda: programs.absent_devices('gpu:8'),
      "--topology='gpu:8' must be of a TPU",
    ),
    (lambda: programs.absent_devices('v5e:4x4x4'), "accelerator='v5e:4x4x4'"),
    (
      lambda: programs.build_run(settings()).mesh('fsdp', jax.devices()),
      "--mesh='fsdp': write axis=size",
    ),
    (
      lambda: programs.build_run(settings(), 'sft'),
      '--arm=sft is of the learner sft',
    ),
  ],
)
def test_bad_input_is_refused(call, words):
  with pytest.raises(config.ConfigError, match=re.escape(words)):
    call()
