"""Attention by the kernels of accelerators, for rows without a cache."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from sleep_jax.models import mesh_axes
from sleep_jax.models import positions as positions_lib

_BLOCK = 512  # Queries, and keys, of a block of splash attention.
_LANES = 128  # Blocks are multiples of it.
RESIDUALS = 'attention'  # Name of what a backward pass needs of the forward's.


def splash(
  q_BxTxHxE: jax.Array,
  k_BxKxExC: jax.Array,
  v_BxKxCxE: jax.Array,
  mask: positions_lib.PositionMask,
  first: int,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Splash attention (Pallas, TPU), `[B, T, H, E]`.

  The compiler cannot split the kernel: on a mesh each device runs it on its own
  rows and heads.

  Args:
    q_BxTxHxE: queries.
    k_BxKxExC: keys, each shared by H / K query heads.
    v_BxKxCxE: values.
    mask: without sinks.
    first: the column of the first query's own key.
    interpret: run without a TPU, for tests.
  """
  # Slow to import, and of no use elsewhere.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

  b, t, _, e = q_BxTxHxE.shape
  pad = positions_lib.PAD_POSITION
  q = _fill((q_BxTxHxE * e**-0.5).swapaxes(1, 2), 2)
  k, v = _fill(k_BxKxExC.swapaxes(2, 3), 2), _fill(v_BxKxCxE, 2)
  q_real, k_real = (
    _fill(positions != pad, 1).astype(jnp.int32)
    for positions in (mask.queries, mask.keys)
  )
  scores = q.shape[2], k.shape[2]
  visible = splash_lib.CausalMask(scores, first)
  if mask.window is not None:
    visible = splash_lib.LocalMask(scores, (mask.window - 1, 0), first)
  local = functools.partial(_splash, visible, interpret)
  if not jax.sharding.get_abstract_mesh().empty:
    rows = mesh_axes.that_split(b, mesh_axes.ROWS)
    split = mesh_axes.that_split(k.shape[1], mesh_axes.INNER)
    of_heads, of_rows = jax.P(rows, split), jax.P(rows)
    local = jax.shard_map(
      local,
      in_specs=(of_heads, of_heads, of_heads, of_rows, of_rows),
      out_specs=of_heads,
      check_vma=False,
    )
  return local(q, k, v, q_real, k_real)[:, :, :t].swapaxes(1, 2)


def _splash(visible, interpret, q, k, v, q_real, k_real) -> jax.Array:
  """The kernel on one device's rows and heads, `[B, H, T, E]`."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

  size = math.gcd(_BLOCK, *visible.shape)
  blocks = dict.fromkeys(
    (
      *('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv'),
      *('block_kv_dkv', 'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq'),
    ),
    size,
  )
  kernel = splash_lib.make_splash_mha(
    splash_lib.MultiHeadMask([visible] * q.shape[1]),
    block_sizes=splash_lib.BlockSizes(**blocks),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=RESIDUALS,
    interpret=interpret,
  )
  # Padding is a segment of its own.
  segments = splash_lib.SegmentIds(q_real, k_real)
  y = jax.vmap(kernel)(q, k, v, segments)
  assert isinstance(y, jax.Array)  # It returns a pair if asked for residuals.
  return y


def _fill(x: jax.Array, axis: int) -> jax.Array:
  """The axis with zeros up to a whole number of blocks."""
  size = x.shape[axis]
  multiple = _BLOCK if size >= _BLOCK else _LANES
  extra = [(0, 0)] * x.ndim
  extra[axis] = (0, -size % multiple)
  return jnp.pad(x, extra)


def cudnn_takes(
  q_BxTxHxE: jax.Array,
  k_BxKxExC: jax.Array,
  v_BxKxCxE: jax.Array,
  mask: positions_lib.PositionMask,
) -> bool:
  """Whether cuDNN's kernel has it: half precision, no cache, no sinks."""
  half = q_BxTxHxE.dtype in (jnp.bfloat16, jnp.float16)
  t, e = q_BxTxHxE.shape[1], q_BxTxHxE.shape[3]
  no_cache = t == v_BxKxCxE.shape[2]
  return half and no_cache and not mask.sinks and e <= 128 and e % 8 == 0


def cudnn(
  q_BxTxHxE: jax.Array,
  k_BxKxExC: jax.Array,
  v_BxKxCxE: jax.Array,
  mask: positions_lib.PositionMask,
  *,
  implementation: Literal['cudnn', 'xla'] = 'cudnn',
) -> jax.Array:
  """Flash attention of cuDNN (GPU), `[B, T, H, E]`.

  It takes rows whose padding comes last: each row is sorted, and put back.

  Args:
    q_BxTxHxE: queries.
    k_BxKxExC: keys, each shared by H / K query heads, in the same columns.
    v_BxKxCxE: values.
    mask: of queries and keys in the same columns.
    implementation: of `jax.nn.dot_product_attention`, for tests.
  """
  is_pad = mask.queries == positions_lib.PAD_POSITION
  order = jnp.argsort(is_pad, axis=1, stable=True)
  lengths = (~is_pad).sum(axis=1).astype(jnp.int32)

  def take(x_BxTxHxE: jax.Array, index_BxT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BxTxHxE, index_BxT[..., None, None], axis=1)

  q, k, v = (
    take(x, order)
    for x in (
      q_BxTxHxE,
      k_BxKxExC.transpose(0, 3, 1, 2),
      v_BxKxCxE.swapaxes(1, 2),
    )
  )
  y = jax.nn.dot_product_attention(
    q,
    k,
    v,
    is_causal=True,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    local_window_size=None if mask.window is None else (mask.window - 1, 0),
    implementation=implementation,
  )
  return take(y, jnp.argsort(order, axis=1))
