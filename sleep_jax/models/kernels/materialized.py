"""Attention by the matrix of all scores, for short rows.

The gradient is written out: what JAX derives of a softmax between two products
passes over the scores more often.
"""

import functools

import jax
import jax.numpy as jnp


@jax.custom_vjp
def attend(
  q_BxTxHxE: jax.Array,
  k_BxKxExC: jax.Array,
  v_BxKxCxE: jax.Array,
  mask_BxTxC: jax.Array,
) -> jax.Array:
  """Softmax attention, `[B, T, H, E]`; scores are float32 `[B, K, G T, C]`.

  What a query that sees no key gets is finite and means nothing.

  Args:
    q_BxTxHxE: queries.
    k_BxKxExC: keys, each shared by G = H / K query heads.
    v_BxKxCxE: values.
    mask_BxTxC: which keys a query sees.
  """
  return _forward(q_BxTxHxE, k_BxKxExC, v_BxKxCxE, mask_BxTxC)[0]


def _split(x_BxTxHxE: jax.Array, kv_heads: int) -> jax.Array:
  """`[B, K, G T, E]`: the queries that share keys as one matrix.

  So a decode step reads its cache in order.
  """
  b, t, h, e = x_BxTxHxE.shape
  x = x_BxTxHxE.reshape(b, t, kv_heads, h // kv_heads, e)
  return x.transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, e)


def _join(x_BxKxQxE: jax.Array, t: int) -> jax.Array:
  """The inverse of `_split` for T = `t`."""
  b, _, _, e = x_BxKxQxE.shape
  return x_BxKxQxE.reshape(b, -1, t, e).swapaxes(1, 2)


def _where(
  mask_BxTxC: jax.Array, x_BxKxQxC: jax.Array, fill: float
) -> jax.Array:
  """`x` where a query sees a key, else `fill`."""
  b, t, c = mask_BxTxC.shape
  x = x_BxKxQxC.reshape(b, -1, t, c)
  return jnp.where(mask_BxTxC[:, None], x, fill).reshape(x_BxKxQxC.shape)


def _forward(q, k, v, mask):
  q = _split(q * q.shape[-1] ** -0.5, k.shape[1])
  s = jnp.einsum('bkqe,bkec->bkqc', q, k, preferred_element_type=jnp.float32)
  # A padded query sees nothing; a finite floor keeps its softmax finite.
  s = _where(mask, s, -1e30)
  p = jnp.exp(s - s.max(-1, keepdims=True))
  total = p.sum(-1, keepdims=True)
  p = p.astype(v.dtype)
  y = jnp.einsum('bkqc,bkce->bkqe', p, v, preferred_element_type=jnp.float32)
  y = (y / total).astype(v.dtype)  # E columns are divided, not C.
  return _join(y, mask.shape[1]), (q, k, v, mask, p, total, y)


def _backward(residuals, dy):
  q, k, v, mask, p, total, y = residuals
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  dy = (_split(dy, k.shape[1]) / total).astype(v.dtype)
  dot = (dy.astype(jnp.float32) * y).sum(-1, keepdims=True)
  dp = product('bkqe,bkce->bkqc', dy, v)
  ds = _where(mask, p * (dp - dot), 0.0).astype(q.dtype)
  dq = product('bkqc,bkec->bkqe', ds, k) * q.shape[-1] ** -0.5
  dk = product('bkqc,bkqe->bkec', ds, q)
  dv = product('bkqc,bkqe->bkce', p, dy)
  dq = _join(dq.astype(q.dtype), mask.shape[1])
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


attend.defvjp(_forward, _backward)
