"""Attention in plain JAX without a matrix of scores: block by block.

The online softmax of FlashAttention (arXiv 2205.14135) as scans over blocks of
queries and keys. Forward and backward pass hold the scores of one block of
queries against one block of keys, so memory grows with the number of tokens and
not with its square. Blocks that no query sees are skipped.
"""

import functools

import jax
import jax.numpy as jnp

from sleep_jax.models import positions as positions_lib

_BLOCK = 512  # Queries, and keys, of a block.
_SCORES = 2**26  # Most scores of a block, all rows and heads: 256 MiB.
_MASKED = -1e30  # Finite, so that the softmax over nothing is.


def attend(
  q_BxTxHxE: jax.Array,
  k_BxKxExC: jax.Array,
  v_BxKxCxE: jax.Array,
  mask: positions_lib.PositionMask,
) -> jax.Array:
  """Softmax attention, `[B, T, H, E]`; 0 for a query that sees no key.

  Reverse mode works to any order, and under `vmap`; forward mode does not.

  Args:
    q_BxTxHxE: queries.
    k_BxKxExC: keys, each shared by H / K query heads.
    v_BxKxCxE: values.
    mask: which keys a query sees.
  """
  b, t, h, e = q_BxTxHxE.shape
  kv_heads, c = v_BxKxCxE.shape[1:3]
  size = _BLOCK
  while size > 128 and b * h * size**2 > _SCORES:
    size //= 2
  q_size, k_size = min(size, t), min(size, c)
  q = q_BxTxHxE.reshape(b, t, kv_heads, h // kv_heads, e)
  q = _split(q, 1, q_size).transpose(1, 0, 3, 4, 2, 5)  # [n, B, K, G, q, E]
  k = jnp.moveaxis(_split(k_BxKxExC, 3, k_size), 3, 0)
  v = jnp.moveaxis(_split(v_BxKxCxE, 2, k_size), 2, 0)
  pad = positions_lib.PAD_POSITION
  blocks = mask.replace(
    queries=jnp.moveaxis(_split(mask.queries, 1, q_size, pad), 1, 0),
    keys=jnp.moveaxis(_split(mask.keys, 1, k_size, pad), 1, 0),
  )
  y = _attend(q, k, v, blocks)
  y = y.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, h, e)
  return y[:, :t]


def _split(x: jax.Array, axis: int, size: int, fill: int = 0) -> jax.Array:
  """The axis as blocks `[blocks, size]`, filled up at its end."""
  extra = [(0, 0)] * x.ndim
  extra[axis] = (0, -x.shape[axis] % size)
  x = jnp.pad(x, extra, constant_values=fill)
  return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


@jax.custom_vjp
def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: positions_lib.PositionMask
) -> jax.Array:
  return _forward(q, k, v, mask)[0]


def _forward(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: positions_lib.PositionMask
) -> tuple[jax.Array, jax.Array]:
  """What blocks of queries read, and the log of their softmax's sum."""
  q, mask = _tied(q, mask)

  def one_query_block(inputs):
    q, queries = inputs

    def add(carry, block):
      y, total, largest = carry
      k, v, visible = block
      s = _scores(q, k, visible)
      # The result does not depend on what is subtracted, so neither does its
      # gradient.
      new = jnp.maximum(largest, jax.lax.stop_gradient(s.max(-1)))
      p = jnp.where(visible, jnp.exp(s - new[..., None]), 0.0)
      kept = jnp.exp(largest - new)
      read = jnp.einsum(
        'bkgqc,bkce->bkgqe',
        p.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
      )
      return y * kept[..., None] + read, total * kept + p.sum(-1), new

    def step(carry, block):
      k, v, keys = block
      visible = mask.replace(queries=queries, keys=keys).dense()
      return _where_any(add, carry, (k, v, visible)), None

    start = (
      jnp.zeros(q.shape, jnp.float32),
      jnp.zeros(q.shape[:-1], jnp.float32),
      jnp.full(q.shape[:-1], _MASKED, jnp.float32),
    )
    (y, total, largest), _ = jax.lax.scan(step, start, (k, v, mask.keys))
    total = jnp.where(total > 0, total, 1.0)
    y = (y / total[..., None]).astype(q.dtype)
    return y, largest + jnp.log(total)

  return jax.lax.map(one_query_block, (q, mask.queries))


def _tied(
  x: jax.Array, mask: positions_lib.PositionMask
) -> tuple[jax.Array, positions_lib.PositionMask]:
  """The same, with a mask that is not known before `x`.

  A scan over layers computes once, and keeps, what does not depend on the
  layer: the masks of all pairs of blocks.
  """
  return jax.lax.optimization_barrier((x, mask))


def _scores(q: jax.Array, k: jax.Array, visible: jax.Array) -> jax.Array:
  """Scaled scores of a block of queries against one of keys, float32."""
  s = jnp.einsum('bkgqe,bkec->bkgqc', q, k, preferred_element_type=jnp.float32)
  return jnp.where(visible, s * q.shape[-1] ** -0.5, _MASKED)


def _where_any(add, carry, block):
  """`add(carry, block)` where a query of the block sees a key of it."""
  *arrays, visible = block
  return jax.lax.cond(
    visible.any(),
    lambda carry: add(carry, (*arrays, visible[:, None, None])),
    lambda carry: carry,
    carry,
  )


def _attend_fwd(q, k, v, mask):
  y, log_total = _forward(q, k, v, mask)
  return y, (q, k, v, mask, y, log_total)


def _attend_bwd(residuals, dy):
  """Gradients: the scores are computed again, one pair of blocks at a time."""
  q, k, v, mask, y, log_total = residuals
  dy, mask = _tied(dy, mask)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  dot = (dy.astype(jnp.float32) * y).sum(-1)

  def one_key_block(dq, inputs):
    k, v, keys = inputs

    def add(carry, block):
      (dk, dv, dq), (q, dy, log_total, dot, visible) = carry, block
      p = jnp.exp(_scores(q, k, visible) - log_total[..., None])
      p = jnp.where(visible, p, 0.0)
      dp = product('bkgqe,bkce->bkgqc', dy, v)
      ds = p * (dp - dot[..., None]) * q.shape[-1] ** -0.5
      ds, p = ds.astype(q.dtype), p.astype(q.dtype)
      return (
        dk + product('bkgqc,bkgqe->bkec', ds, q),
        dv + product('bkgqc,bkgqe->bkce', p, dy),
        dq + product('bkgqc,bkec->bkgqe', ds, k),
      )

    def step(carry, block):
      dq, *arrays, queries = block
      visible = mask.replace(queries=queries, keys=keys).dense()
      *carry, dq = _where_any(add, (*carry, dq), (*arrays, visible))
      return tuple(carry), dq

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(
      step, start, (dq, q, dy, log_total, dot, mask.queries)
    )
    return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

  dq = jnp.zeros(q.shape, jnp.float32)
  dq, (dk, dv) = jax.lax.scan(one_key_block, dq, (k, v, mask.keys))
  return dq.astype(q.dtype), dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)
