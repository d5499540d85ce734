"""Logits of few tokens at a time give what all of them give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sleep_jax import config
from sleep_jax.inference import scoring
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import token_logits
from sleep_jax.objectives import losses
from sleep_jax.training import fit
from sleep_jax.training import loss as loss_lib
from tests import conftest

ROWS, LENGTH = 3, 11
# One layer and one level with a clock: quick to compile.
SMALL = dict(layers=1, levels=(config.LevelConfig(16, chunk=4),))


def rows(model):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, model.cfg.vocab, (ROWS, LENGTH))
  return jnp.asarray(tokens), jnp.asarray(rng.random((ROWS, LENGTH)) > 0.3)


def few(monkeypatch, model, columns=4):
  """Lets logits of four columns exist, so that the last chunk is short."""
  size = ROWS * columns * model.cfg.vocab
  monkeypatch.setattr(token_logits, 'MOST', size)


@pytest.mark.slow
def test_the_loss_and_its_gradients_do_not_depend_on_the_chunks(monkeypatch):
  model = conftest.build_model(conftest.tiny(**SMALL))
  tokens, mask = rows(model)

  def loss(params):
    model_of = model_lib.Model(model.cfg, params)
    return loss_lib.next_token_loss(model_of, tokens, mask)

  want, want_grads = jax.jit(jax.value_and_grad(loss))(model.params)
  at_once = jax.jit(
    lambda: losses.next_token_loss(model.forward(tokens).logits, tokens, mask)
  )()
  np.testing.assert_allclose(want, at_once, rtol=1e-6)
  few(monkeypatch, model)
  got, grads = jax.jit(jax.value_and_grad(lambda p: loss(p)))(model.params)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  for x, y in zip(*map(jax.tree.leaves, (grads, want_grads)), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-6)


def test_log_probabilities_do_not_depend_on_the_chunks(monkeypatch):
  model = conftest.build_model(conftest.tiny(**SMALL))
  tokens, _ = rows(model)
  want = jax.jit(loss_lib.token_logprobs)(model, tokens)
  assert want.shape == (ROWS, LENGTH - 1)
  few(monkeypatch, model)
  got = jax.jit(lambda: loss_lib.token_logprobs(model, tokens))()
  np.testing.assert_allclose(got, want, atol=1e-5)


VOCAB = 8192  # So that logits would be the largest arrays.


def train(model, tokens, weight):
  optimizer = optax.sgd(0.1)
  opt_state = optimizer.init(model.params)
  bare = model.with_memory(None)
  rows = tokens[None], weight[None]
  return fit.train_steps.lower(optimizer, bare, opt_state, *rows)


def wake(model, tokens, weight):
  cache = cache_lib.init_cache(model.cfg, *tokens.shape)
  deltas = model.memory.deltas()
  grad = jax.jit(jax.grad(wake_lib.chunk_loss, has_aux=True))
  return grad.lower(deltas, model, cache, (tokens, tokens, weight))


def score(model, tokens, weight):
  lengths = jnp.full(len(tokens), tokens.shape[1])
  is_answer = weight > 0
  longest = tokens.shape[1]
  return scoring.score_batch.lower(
    model, tokens, lengths, is_answer, None, longest
  )


def token_logprobs(model, tokens, _):
  return jax.jit(loss_lib.token_logprobs).lower(model, tokens)


@pytest.mark.parametrize(
  'step',
  [
    pytest.param(train, marks=pytest.mark.slow),
    pytest.param(wake, marks=pytest.mark.slow),
    score,
    token_logprobs,
  ],
)
def test_a_program_holds_few_logits(monkeypatch, step):
  """By the compiler's account, against one that holds them all."""
  cfg = conftest.tiny(vocab=VOCAB, **SMALL)
  model = conftest.build_model(cfg, memory_init.init_memory(cfg))

  def temporary(length):
    tokens = jnp.zeros((16, length), jnp.int32)
    program = step(model, tokens, jnp.ones(tokens.shape)).compile()
    return program.memory_analysis().temp_size_in_bytes

  all_at_once = temporary(17)
  assert all_at_once >= 16 * 16 * VOCAB * 4
  monkeypatch.setattr(token_logits, 'MOST', 16 * VOCAB)
  assert temporary(18) < all_at_once / 2
