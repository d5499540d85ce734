"""Public backbones, full size, by shape alone: nothing is allocated."""

import functools

import jax
import jax.numpy as jnp
import pytest

from experiments.configs import backbones
from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer

# As published: unique parameters, tied embeddings counted once.
TOTALS = {
  'llama3_2_1b': 1_235_814_400,
  'llama3_2_3b': 3_212_749_824,
  'llama3_8b': 8_030_261_248,
  'qwen2_5_7b': 7_615_616_512,
  'qwen3_1_7b': 1_720_574_976,
  'qwen3_8b': 8_190_735_360,
  'smollm2': 134_515_008,
}


def settings(variant):
  c = backbones.get_config(variant).to_dict()
  return (
    build_lib.model_config(c, absent=True),
    config.from_mapping(wake.WakeConfig, c['wake'], 'wake'),
    config.from_mapping(
      consolidation_config.SeedingConfig, c['sleep'], 'sleep'
    ),
  )


@functools.cache
def init_shapes(cfg):
  """A model with weights in bfloat16 and an empty memory, as shapes."""
  model = jax.eval_shape(lambda: model_lib.init(cfg, jax.random.key(0)))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), model.params
  )
  return model.replace(params=params)


def ints(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize('variant', TOTALS)
def test_backbone_has_the_published_size(variant):
  cfg, *_ = settings(variant)
  model = init_shapes(cfg)
  assert transformer.count(model.params) == TOTALS[variant]
  assert sum(cfg.partition) == cfg.layers
  for level in model.memory.levels[1:]:
    assert level.bank.experts.a.shape[1:] == (5, cfg.dim, 64)


@pytest.mark.parametrize('variant', TOTALS)
def test_a_forward_pass_lowers(variant):
  cfg, *_ = settings(variant)
  out = jax.jit(model_lib.Model.forward).lower(init_shapes(cfg), ints(2, 64))
  assert out.out_info.logits.shape == (2, 64, cfg.vocab)


@pytest.mark.parametrize('variant', TOTALS)
def test_a_day_lowers(variant):
  cfg, wake_cfg, _ = settings(variant)
  model = init_shapes(cfg)
  lowered = wake.read_day.lower(
    wake_cfg,
    model,
    ints(),
    ints(2, 2048),
    floats(2, 2048),
    defer_due_update=True,
  )
  after, _, loss = lowered.out_info
  assert loss.shape == (2 * 2048 // 1024,)
  assert jax.tree.structure(after) == jax.tree.structure(model.memory)


@pytest.mark.parametrize('variant', TOTALS)
def test_a_seeding_step_lowers(variant):
  cfg, _, seeding_cfg = settings(variant)
  model = init_shapes(cfg)
  rows, length = 2, 64
  labels, _ = jax.eval_shape(
    functools.partial(teacher_labels.label, seeding_cfg),
    replay_lib.Teachers(current=model, previous_memory=model.memory),
    ints(rows, length),
    ints(rows, length),
    floats(rows, length),
    floats(rows, length),
  )
  expert = jax.eval_shape(lambda m: m.levels[1].bank.expert(0), model.memory)
  opt_state = jax.eval_shape(seeding.optimizer(seeding_cfg).init, expert)
  lowered = seeding.seed_steps.lower(
    seeding_cfg,
    (expert, opt_state),
    model,
    job_lib.SlotId(1, ints()),
    (labels, None),
    (ints(1, 2), ints(1, 0)),
  )
  (trained, _), metrics = lowered.out_info
  assert trained.a.shape == (cfg.partition[1], cfg.dim, 64)
  assert metrics.kl.shape == (1,)


def test_an_unknown_backbone_is_refused():
  with pytest.raises(config.ConfigError, match='qwen3_8b'):
    backbones.get_config('gpt2')
