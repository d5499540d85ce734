"""The memory and the minutes of a night, by formula."""

import dataclasses
import functools
import json
import math

import jax
import pytest

from experiments.configs import backbones
from launch import night
from launch import programs
from sleep_jax import config
from sleep_jax.harness import build
from sleep_jax.models import memory_init
from sleep_jax.runtime import sharding
from tests import aot_test


def test_bytes_are_those_of_the_compiled_programs_arguments():
  run = programs.build_run(aot_test.settings())
  mesh = sharding.mesh({}, jax.devices()[:1])
  program = programs.Program(run, mesh)
  life = night.sizes(program.cfg)
  assert life.weights + life.memory == program.local_bytes(program.model)
  assert life.previous == program.previous_memory_bytes()


def test_a_save_grows_with_what_moves_and_not_with_the_backbone():
  c = json.loads(backbones.get_config('clinc-llama3_2_1b').to_json())
  cfg = build.model_config(c, absent=True)
  levels = [dataclasses.replace(x, chunk=0, sleep_every=0) for x in cfg.levels]
  moving = [i for i, x in enumerate(cfg.levels) if x.chunk]
  frozen = night.sizes(dataclasses.replace(cfg, levels=tuple(levels))).saved
  # Change, gradient, two moments and the last night's change, in float32.
  changes = [
    jax.eval_shape(functools.partial(memory_init.init_change, cfg, i))
    for i in moving
  ]
  weights = sum(math.prod(x.shape) for x in jax.tree.leaves(changes))
  grown = night.sizes(cfg).saved - frozen
  assert 20 * weights <= grown < 20 * weights + 100


def lines(variant, **model):
  c = json.loads(backbones.get_config(variant).to_json())
  c['model'] |= model
  return night.table(c, 50_000, 8, ['h100'])


def test_a_frozen_level_takes_no_memory_and_a_larger_model_more():
  def gb(rows) -> float:
    return float(rows[0].split('at most ')[1].split(' GB')[0])

  small, large = lines('squad-smollm2'), lines('squad-qwen2_5_7b')
  assert 1 < gb(small) < 5 and 200 < gb(large) < 240
  assert small[-1].startswith('| h100 | 1 |')
  assert large[-1].startswith('| h100 | 4 |')
  c = json.loads(backbones.get_config('squad-qwen2_5_7b').to_json())
  c['model']['levels'][2]['chunk'] = 0
  frozen = night.table(c, 50_000, 8, ['h100'])
  assert gb(frozen) < 0.6 * gb(large)


def test_twice_the_devices_take_half_the_time_and_a_bad_name_is_refused():
  phase = night.Phase('x', flops=1e15, passes=10)
  device = night.DEVICES['h100']
  one, two = (phase.seconds(device, n, 1e9) for n in (1, 2))
  assert one == pytest.approx(2 * two) and one == pytest.approx(1e15 / 989e12)
  slow = dataclasses.replace(phase, flops=0.0)
  assert slow.seconds(device, 1, 1e9) == pytest.approx(10e9 / 3350e9)
  with pytest.raises(config.ConfigError, match='--devices'):
    c = json.loads(backbones.get_config('clinc-smollm2').to_json())
    night.table(c, 1000, 8, ['h1000'])
