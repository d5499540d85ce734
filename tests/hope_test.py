"""Self-modifying Titans: against the equations, one token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.models.mixers import hope

SMALL = hope.HopeConfig(heads=2, width=4, chunk=4)


def random_tokens(length=11, rows=3) -> hope.Tokens:
  shape = (rows, SMALL.heads, length, SMALL.width)
  x, q = (jax.random.normal(jax.random.key(i), shape) for i in (1, 2))
  x, q = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (x, q))
  return hope.Tokens(x, q, jnp.ones(shape[:3]))


def random_memory(rows=3) -> jax.Array:
  shape = (rows, SMALL.heads, SMALL.width, SMALL.columns)
  return 0.7 * jax.random.normal(jax.random.key(3), shape)


def by_the_equations(r, memory, tokens):
  """NL Eq. 83 to 93 for one row and head: five memories, JAX's gradient.

  Each is a matrix of its own, of inputs to outputs.
  """
  k = r.width
  names = 'key', 'value', 'memory', 'rate', 'decay'
  sizes = k, k, k, 1, 1
  cuts = np.cumsum(sizes)[:-1]
  memories = dict(zip(names, jnp.split(memory, cuts, axis=1), strict=True))

  def loss(matrix, key, value):
    return ((key @ matrix - value) ** 2).sum() / 2

  def unit(y):
    return y / jnp.sqrt((y * y).sum() + 1e-6)

  outs, began = [], memories
  for i, (x, q) in enumerate(zip(tokens.x, tokens.q)):
    if i % r.chunk == 0:
      began = memories
    key, value = unit(x @ began['key']), unit(x @ began['value'])
    alpha = jax.nn.sigmoid(x @ began['decay'] + 4.0)[0]
    most = (1 + alpha) / 2 if r.negative else alpha / 2
    eta = most * jax.nn.sigmoid(x @ began['rate'])[0]
    own = {name: value @ began[name] for name in names}
    memories = {
      name: (alpha * jnp.eye(k) - eta * jnp.outer(key, key)) @ matrix
      - eta * jax.grad(loss)(began[name], key, own[name])
      for name, matrix in memories.items()
    }
    outs.append(q @ memories['memory'])
  return jnp.concatenate([memories[n] for n in names], axis=1), jnp.stack(outs)


@pytest.mark.parametrize(
  'changes', [{}, dict(negative=True), dict(chunk=1), dict(chunk=64)]
)
def test_chunks_equal_the_equations_token_by_token(changes):
  r = dataclasses.replace(SMALL, **changes)
  memory, tokens = random_memory(), random_tokens()
  with jax.default_matmul_precision('highest'):
    (now, _), out = hope.read(
      r, hope.Memories(memory, memory), jnp.zeros(3, int), tokens
    )
  for row, head in ((0, 0), (2, 1)):
    of_head = jax.tree.map(lambda x, i=row, j=head: x[i, j], (memory, tokens))
    want, outs = by_the_equations(r, *of_head)
    np.testing.assert_allclose(out[row, head], outs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(now[row, head], want, rtol=1e-4, atol=1e-5)
