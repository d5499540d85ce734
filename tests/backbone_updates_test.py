"""A level whose updates change every weight: `fast_weights=backbone`.

Its export is in interop_test.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import padding
from sleep_jax.inference import sampling
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import replay
from sleep_jax.models import flops
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import losses
from tests import conftest


def levels(**changes) -> tuple[config.LevelConfig, ...]:
  fast = dict(optimizer='sgd', learning_rate=0.5, clip=1e9)
  fast |= dict(fast_weights='backbone') | changes
  return (
    config.LevelConfig(16, chunk=4, **fast),
    config.LevelConfig(16, slots=3, rank=4, top_k=2),
  )


@pytest.fixture(name='cfg')
def _cfg() -> config.ModelConfig:
  return conftest.tiny(levels=levels())


@pytest.fixture(name='model')
def _model(cfg) -> model_lib.Model:
  return conftest.build_model(cfg, conftest.random_memory(cfg))


def changed_by_hand(model: model_lib.Model) -> model_lib.Model:
  """The same function, with the change in the weights and not in the memory."""
  delta = model.required_memory().levels[0].fast.delta['backbone']
  fresh = memory_init.init_memory(model.cfg)
  memory = model.required_memory().with_deltas(fresh.deltas())
  params = jax.tree.map(jnp.add, model.params, delta)
  return model.replace(params=params).with_memory(memory)


def test_every_weight_may_change_and_none_has(cfg, params, tokens):
  memory = memory_init.init_memory(cfg)
  chex.assert_trees_all_equal_shapes(
    memory.levels[0].fast.delta['backbone'], params
  )
  np.testing.assert_array_equal(
    transformer.forward(cfg, params, tokens).logits,
    transformer.forward(cfg, params, tokens, memory).logits,
  )


def test_the_change_is_added_to_the_weights(model, tokens):
  by_hand = changed_by_hand(model)
  out = model.forward(tokens)
  np.testing.assert_array_equal(out.logits, by_hand.forward(tokens).logits)
  np.testing.assert_array_equal(model.unembedding(), by_hand.unembedding())
  bare = model.with_memory(None).forward(tokens).logits
  assert not np.allclose(out.logits, bare)


def test_samples_are_of_the_changed_weights(model):
  prompts, lengths = padding.left_pad([[1, 5, 7], [1], [1, 2, 3, 4]], 0)
  sampler = sampling.SamplerConfig(max_new=5)
  key = jax.random.key(0)
  ours, by_hand = (
    sampling.generate(m, prompts, lengths, key, sampler)
    for m in (model, changed_by_hand(model))
  )
  chex.assert_trees_all_equal(ours, by_hand)


def test_a_memory_per_row_equals_row_by_row(model):
  memories = [conftest.random_memory(model.cfg, seed) for seed in (1, 2)]
  batch = jax.tree.map(lambda *x: jnp.stack(x), *memories)
  prompts, lengths = padding.left_pad([[1, 5, 7], [1, 2]], 0)
  sampler = sampling.SamplerConfig(max_new=4)
  keys = jax.random.split(jax.random.key(0), 2)
  out = sampling.generate_per_row(
    model.with_memory(batch), prompts, lengths, keys, sampler
  )
  for i, memory in enumerate(memories):
    row = slice(i, i + 1)
    alone = sampling.generate(
      *(model.with_memory(memory), prompts[row], lengths[row], keys[i]),
      sampler,
    )
    np.testing.assert_array_equal(out.tokens[i], alone.tokens[0])


def test_an_update_is_a_step_of_gradient_descent_on_all_weights(params, tokens):
  cfg = conftest.tiny(levels=levels())
  rows = tokens[:2, :4]
  model = model_lib.Model(cfg, params, memory_init.init_memory(cfg))
  memory, _, loss = wake.read_day(
    wake.WakeConfig(batch=2),
    model,
    jnp.int32(0),
    rows,
    jnp.ones(rows.shape),
    defer_due_update=False,
  )

  def objective(params):
    logits = transformer.forward(cfg, params, rows).logits
    return -losses.token_logprobs(logits, rows)[:, :3].mean()

  first, grads = jax.value_and_grad(objective)(params)
  np.testing.assert_allclose(loss[0], first, rtol=1e-5)
  chex.assert_trees_all_close(
    memory.levels[0].fast.delta['backbone'],
    jax.tree.map(lambda g: -0.5 * g, grads),
    rtol=1e-3,
    atol=1e-6,
  )


def test_each_teacher_predicts_by_its_own_unembedding(model, tokens):
  """The current one's would give the previous model another distribution."""
  previous = conftest.random_memory(model.cfg, 9)
  teachers = replay.Teachers(model, previous)
  models = model, teachers.previous
  outputs = [m.forward(tokens) for m in models]
  logits = teachers.logits_of()([out.hidden for out in outputs])
  for ours, out in zip(logits, outputs, strict=True):
    np.testing.assert_allclose(ours, out.logits, rtol=1e-4, atol=1e-4)
  some = teachers.replace(vocabulary=jnp.array([3, 8]))
  for ours, whole in zip(
    some.logits_of()([out.hidden for out in outputs]), logits, strict=True
  ):
    np.testing.assert_allclose(ours, whole[..., [3, 8]], rtol=1e-4, atol=1e-4)


def test_reading_costs_as_much_as_training_everything(cfg):
  assert flops.wake_flops(cfg, 8) == flops.train_flops(cfg, 8)
  partial = conftest.tiny(levels=(conftest.tiny().levels[0], cfg.levels[1]))
  assert flops.wake_flops(partial, 8) < flops.train_flops(partial, 8)


def test_nothing_is_a_frozen_prefix(cfg):
  mlps = cfg.levels[0], cfg.levels[1]
  changes = dict(levels=mlps, partition=(1, 1), partition_from='output')
  assert conftest.replace(cfg, **changes).frozen_layers == 0


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(levels=conftest.tiny().levels[:2] + levels()[:1]), 'level 3 alone'),
    (
      dict(levels=(levels()[1], *levels()[:1])[::-1], mixers=('gdn',)),
      'mixers',
    ),
  ],
)
def test_what_cannot_be_is_refused(changes, words):
  with pytest.raises(config.ConfigError, match=words):
    conftest.tiny(**changes)


def test_an_unknown_choice_is_refused():
  with pytest.raises(config.ConfigError, match=r'levels\[0\].fast_weights'):
    conftest.tiny(levels=levels(fast_weights='all'))
