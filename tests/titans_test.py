"""Titans' neural memory: against its equations, one token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.models.mixers import base
from sleep_jax.models.mixers import titans
from tests import conftest

SMALL = titans.TitansConfig(heads=2, width=4, chunk=4, max_rate=0.5)


def random_tokens(r: titans.TitansConfig, rows=3, length=11) -> titans.Tokens:
  keys = iter(jax.random.split(jax.random.key(3), 6))
  shape = (rows, r.heads, length)
  q, k, v = (jax.random.normal(next(keys), (*shape, r.width)) for _ in range(3))
  gates = [jax.random.uniform(next(keys), shape) for _ in range(3)]
  k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
  theta, eta, alpha = gates
  return titans.Tokens(
    *(q, k, v, 0.3 * theta, jnp.log(eta), jnp.log1p(-0.5 * alpha)),
    real=jnp.ones(shape),
  )


def initial(r: titans.TitansConfig, rows=3) -> titans.Weights:
  def matrices(seed):
    return tuple(
      0.4 * jax.random.normal(jax.random.key(seed + i), (rows, r.heads, *shape))
      for i, shape in enumerate(r.matrices())
    )

  now = matrices(10)
  return titans.Weights(now, matrices(20), now)


def one_chunk(r, weights, tokens):
  """Titans section 3.1 within a chunk of one row and head, by JAX's gradient.

  Returns:
    Memory, momentum, and the answers.
  """

  def answer(memory, x):
    y = x
    for matrix in memory[:-1]:
      y = jax.nn.silu(y @ matrix)
    return y @ memory[-1]

  def loss(memory, k, v):
    return ((answer(memory, k) - v) ** 2).sum()

  (memory, momentum, began), outs = weights, []
  for q, k, v, theta, log_eta, log_keep, _ in zip(*tokens):
    grads = jax.grad(loss)(began, k, v)
    eta = jnp.exp(log_eta) if r.momentum else 0.0
    momentum, memory = list(momentum), list(memory)
    for j, g in enumerate(grads):
      g = g * jnp.minimum(1.0, r.clip / jnp.linalg.norm(g))
      momentum[j] = eta * momentum[j] - theta * g
      memory[j] = jnp.exp(log_keep) * memory[j] + momentum[j]
    outs.append(answer(memory, q))
  return tuple(memory), tuple(momentum), jnp.stack(outs)


def by_the_equations(r, weights, tokens):
  """The same, chunk by chunk."""
  (memory, momentum, _), outs = weights, []
  for first in range(0, len(tokens.q), r.chunk):
    of_chunk = jax.tree.map(lambda x, i=first: x[i : i + r.chunk], tokens)
    memory, momentum, out = one_chunk(r, (memory, momentum, memory), of_chunk)
    outs.append(out)
  return memory, momentum, jnp.concatenate(outs)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    dict(depth=1),
    dict(depth=3, expansion=3, chunk=3),
    dict(momentum=False),
    dict(chunk=1),
    dict(chunk=64, clip=0.3),
  ],
)
def test_chunks_equal_the_equations_token_by_token(changes):
  r = dataclasses.replace(SMALL, **changes)
  weights, tokens = initial(r), random_tokens(r)
  with jax.default_matmul_precision('highest'):
    after, out = titans.read(r, weights, jnp.zeros(3, int), tokens)
  for row, head in ((0, 0), (2, 1)):
    of_head = jax.tree.map(lambda x, i=row, j=head: x[i, j], (weights, tokens))
    memory, momentum, want = by_the_equations(r, *of_head)
    np.testing.assert_allclose(out[row, head], want, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
      after.now + after.momentum, [*memory, *momentum], strict=True
    ):
      np.testing.assert_allclose(ours[row, head], theirs, rtol=1e-4, atol=1e-5)


def test_its_flops_grow_with_the_memory():
  shallow, deep = (
    base.find('titans').flops(
      conftest.tiny(
        mixers=('titans',),
        recurrent=dataclasses.replace(SMALL, depth=depth),
      ),
      9.0,
    )
    for depth in (1, 2)
  )
  k = SMALL.width
  # One matrix of K x K against two of K x 2K, and their sides.
  more = 6 * 3 * k * k + SMALL.chunk * (6 * k - 2 * k)
  assert deep - shallow == 2.0 * SMALL.heads * more
