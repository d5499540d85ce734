"""Steps on eight devices: each computes its own rows, as one device would."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sleep_jax.inference import budget
from sleep_jax.lifecycle.dreaming import importance
from sleep_jax.lifecycle.dreaming import rest_em
from sleep_jax.models import lora
from sleep_jax.models import model as model_lib
from sleep_jax.objectives import divergences
from sleep_jax.runtime import sharding
from sleep_jax.training import fisher
from tests import conftest
from tests import sharding_test

_MESH = {'data': 4, 'fsdp': 2}
_ONE_LAYER = dict(layers=1, vocab=64)


@pytest.fixture(name='model', scope='module')
def _model() -> model_lib.Model:
  cfg = conftest.tiny(**_ONE_LAYER)
  params = conftest.weights(cfg)
  return model_lib.Model(cfg, params, adapter=_adapter(cfg, params))


def _adapter(cfg, params) -> lora.Adapter:
  """One that changes something: B of a fresh one is zero."""
  lora_cfg = lora.LoraConfig(rank=2, alpha=4.0, targets=('q', 'v'))
  adapter = lora.init_adapter(cfg, lora_cfg, params, jax.random.key(1))
  return jax.tree.map(lambda x: x + 0.01, adapter)


def rows(*shape: int) -> tuple[jax.Array, jax.Array]:
  """Tokens and their weights as targets."""
  tokens = jax.random.randint(jax.random.key(2), shape, 0, 64)
  weight = jax.random.uniform(jax.random.key(3), shape) > 0.3
  return tokens, weight.astype(jnp.float32)


def on_mesh(step, model: model_lib.Model, *args: Any) -> tuple[Any, float]:
  """What a jitted step returns on the mesh, and the FLOPs of a device."""
  with sharding.use_mesh(_MESH):
    placed = sharding.shard_params(jax.tree.map(np.asarray, model))
    args = [np.asarray(x) for x in args]
    program = step.lower(placed, *args).compile()
    return program(placed, *args), program.cost_analysis()['flops']


def compare(step, model: model_lib.Model, *args: Any, share: float) -> None:
  """One device and eight agree, and each of these computes a share."""
  alone = step.lower(model, *args).compile()
  got, flops = on_mesh(step, model, *args)
  for a, b in zip(
    jax.tree.leaves(got), jax.tree.leaves(alone(model, *args)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert flops < share * alone.cost_analysis()['flops']


@pytest.mark.slow
def test_gradients_of_dreams_are_split_by_sets(model):
  compare(importance.gradients, model, *rows(11, 2, 16), share=0.3)


def test_a_set_that_does_not_fit_is_read_in_parts(model, monkeypatch):
  tokens, weight = rows(2, 5, 16)
  want = jax.jit(importance.gradients.__wrapped__)(model, tokens, weight)
  monkeypatch.setattr(budget, 'rows_per_pass', lambda *_, **__: 2)
  got = jax.jit(importance.gradients.__wrapped__)(model, tokens, weight)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'trains', [pytest.param('adapter', marks=pytest.mark.slow), 'all']
)
def test_the_fisher_is_split_by_rows(model, trains):
  if trains == 'all':
    model = model.replace(adapter=None)
  # A loop's body counts once: of one device it is a row's, and of a mesh that
  # of a row of each group of devices.
  compare(fisher.diagonal_fisher, model, *rows(10, 16), share=1.5)
  fisher_of = functools.partial(jax.make_jaxpr, fisher.diagonal_fisher)
  with sharding.use_mesh(_MESH):
    text = str(fisher_of()(model, *rows(10, 16)))
  steps = {'adapter': 2, 'all': 3}[trains]  # Of eight, or of four rows.
  assert f'length={steps}' in text


def test_the_update_of_dreams_is_split_by_rows(model):
  optimizer, target = optax.sgd(0.1), rest_em.UpdateTarget()
  order = jnp.arange(16).reshape(2, 8)

  @jax.jit
  def step(model, tokens, weight):
    return rest_em.finetune_steps(
      optimizer,
      target,
      model.replace(adapter=None),
      model.adapter,
      *((tokens, weight), order),
    )

  compare(step, model, *rows(16, 16), share=0.3)


def test_logits_in_chunks_stay_with_their_rows():
  """`chunk` tokens of each device: none would be busy alone."""
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (16, 10, 8))
  teacher = jax.random.normal(keys[1], (16, 10, 8))
  matrix = jax.random.normal(keys[2], (64, 8))

  def divergence(hidden):
    hidden = sharding.shard_batch(hidden, 'batch')
    of_tokens = divergences.from_hidden(
      divergences.forward_kl, (teacher, matrix), (hidden, matrix), chunk=4
    )
    return of_tokens.sum(), of_tokens

  step = jax.jit(jax.value_and_grad(divergence, has_aux=True))
  want = step(hidden)
  with sharding.use_mesh(_MESH):
    placed = sharding.shard_batch(np.asarray(hidden), 'batch')
    program = step.lower(placed).compile()
    got = program(placed)
  sharding_test.assert_close(got, want)
  # No device is sent the hidden states of another's rows.
  assert 'all-gather' not in program.as_text()
  assert got[0][1].sharding.spec[0] == ('data', 'fsdp')
