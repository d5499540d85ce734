"""Public backbones, full size, by shape alone: nothing is allocated."""

import functools

import jax
import jax.numpy as jnp
import pytest

from experiments.configs import backbones
from sleep_jax import config
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer

# As published: unique parameters, tied embeddings counted once.
TOTALS = {
  'llama3_2_1b': 1_235_814_400,
  'llama3_2_3b': 3_212_749_824,
  'llama3_8b': 8_030_261_248,
  'qwen2_5_7b': 7_615_616_512,
  'qwen3_1_7b': 1_720_574_976,
  'qwen3_8b': 8_190_735_360,
}


def settings(variant):
  c = backbones.get_config(variant).to_dict()
  model = config.ModelConfig.from_mapping(c['model'])
  return (
    model,
    config.from_mapping(wake.WakeConfig, c['wake'], 'wake'),
    config.from_mapping(
      consolidation_config.SeedingConfig, c['sleep'], 'sleep'
    ),
  )


@functools.cache
def born(cfg):
  """Weights in bfloat16 and a fresh memory, as shapes."""
  params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params
  )
  return params, jax.eval_shape(lambda: memory_lib.init_memory(cfg))


def ints(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize('variant', TOTALS)
def test_it_has_the_published_size(variant):
  cfg, *_ = settings(variant)
  params, memory = born(cfg)
  assert transformer.count(params) == TOTALS[variant]
  assert sum(cfg.partition) == cfg.layers
  for level in memory.levels[1:]:
    assert level.bank.experts.a.shape[1:] == (5, cfg.dim, 64)


@pytest.mark.parametrize('variant', TOTALS)
def test_a_forward_pass_lowers(variant):
  cfg, *_ = settings(variant)
  out = jax.jit(transformer.forward, static_argnums=0).lower(
    cfg, *born(cfg)[:1], ints(2, 64), born(cfg)[1]
  )
  assert out.out_info.logits.shape == (2, 64, cfg.vocab)


@pytest.mark.parametrize('variant', TOTALS)
def test_a_day_lowers(variant):
  cfg, how, _ = settings(variant)
  params, memory = born(cfg)
  lowered = wake.wake.lower(
    cfg,
    how,
    params,
    memory,
    ints(),
    ints(2, 2048),
    floats(2, 2048),
    defer_due_update=True,
  )
  after, _, loss = lowered.out_info
  assert loss.shape == (2 * 2048 // 1024,)
  assert jax.tree.structure(after) == jax.tree.structure(memory)


@pytest.mark.parametrize('variant', TOTALS)
def test_a_seeding_step_lowers(variant):
  cfg, _, how = settings(variant)
  params, memory = born(cfg)
  rows, length = 2, 64
  selves = replay_lib.Teachers(awake=memory, old=memory)
  judged, _ = jax.eval_shape(
    functools.partial(teacher_labels.label, cfg, how),
    params,
    selves,
    ints(rows, length),
    ints(rows, length),
    floats(rows, length),
    floats(rows, length),
  )
  expert = jax.eval_shape(lambda m: m.levels[1].bank.expert(0), memory)
  opt_state = jax.eval_shape(seeding.optimizer(how).init, expert)
  lowered = seeding.seed_steps.lower(
    cfg,
    how,
    1,
    expert,
    opt_state,
    params,
    memory,
    ints(),
    judged,
    None,
    ints(1, 2),
    ints(1, 0),
  )
  trained, _, marks = lowered.out_info
  assert trained.a.shape == (cfg.partition[1], cfg.dim, 64)
  assert marks.kl.shape == (1,)


def test_an_unknown_backbone_is_refused():
  with pytest.raises(config.ConfigError, match='qwen3_8b'):
    backbones.get_config('gpt2')
