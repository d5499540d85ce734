"""Softmax attention: one function, and its form for each length and device.

Short rows compute the matrix of all scores. Long rows never hold it: on a TPU
they are read by splash attention, in half precision on a GPU by cuDNN's flash
attention, and otherwise block by block in plain JAX (`blockwise`).
"""

import jax

from sleep_jax.models import mesh_axes
from sleep_jax.models import positions as positions_lib
from sleep_jax.models.kernels import blockwise
from sleep_jax.models.kernels import flash
from sleep_jax.models.kernels import materialized

Mask = jax.Array | positions_lib.PositionMask

# Queries times keys of a row up to which all scores are computed at once; where
# that becomes slower is measured by `benchmarks.run --only=attention`.
MATERIALIZED = 1024**2
# The same where a TPU's kernel can have the row. Scores of rows of 1,024 tokens
# went through HBM; for shorter ones nothing was estimated or measured.
_MATERIALIZED_TPU = 256**2


def materializes(
  queries: int, keys: int, *, rows: int = 1, cached: bool = False
) -> bool:
  """Whether the scores of a row exist all at once.

  Args:
    queries: of a row.
    keys: of a row.
    rows: of the batch. Fewer than a mesh has parts for are those of instances
      under `vmap`, whose axis the kernel does not split.
    cached: whether keys are in a cache, whose end no kernel knows.
  """
  limit = MATERIALIZED
  if _platform() == 'tpu' and not cached and mesh_axes.divides(rows):
    limit = min(_MATERIALIZED_TPU, limit)
  return queries * keys <= limit


def mask(visible: positions_lib.PositionMask, *, cached: bool = False) -> Mask:
  """The mask as `attend` takes it: a matrix `[B, T, C]` for short rows."""
  (rows, queries), keys = visible.queries.shape, visible.keys.shape[-1]
  cached = cached or bool(visible.sinks)
  if materializes(queries, keys, rows=rows, cached=cached):
    return visible.dense()
  return visible


def attend(
  q_BxTxHxE: jax.Array,
  k_BxKxExC: jax.Array,
  v_BxKxCxE: jax.Array,
  mask: Mask,
  cache_index: jax.Array | int | None = None,
) -> jax.Array:
  """Softmax attention of grouped queries, `[B, T, H, E]`.

  What a query that sees no key gets is finite and means nothing.

  Args:
    q_BxTxHxE: queries.
    k_BxKxExC: keys, each shared by H / K query heads.
    v_BxKxCxE: values.
    mask: which keys a query sees, as a matrix `[B, T, C]` or by positions, see
      `mask`. A matrix has all scores computed at once.
    cache_index: the column of the first query's own key; None if the columns
      are the queries' tokens.
  """
  if not isinstance(mask, positions_lib.PositionMask):
    return materialized.attend(q_BxTxHxE, k_BxKxExC, v_BxKxCxE, mask)
  args = q_BxTxHxE, k_BxKxExC, v_BxKxCxE, mask
  platform, first = _platform(), 0 if cache_index is None else cache_index
  # The kernel's mask is known when it is compiled.
  if platform == 'tpu' and isinstance(first, int) and not mask.sinks:
    return flash.splash(*args, first)
  if platform in ('gpu', 'cuda') and flash.cudnn_takes(*args):
    return flash.cudnn(*args)
  return blockwise.attend(*args)


def _platform() -> str:
  """What is compiled for: the mesh's devices, which may be absent, or ours."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
