"""Attention block by block against the matrix of all scores.

Time of a layer's attention, forward and backward, over lengths: where blocks
become faster is `kernels.attention.MATERIALIZED`.
"""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from sleep_jax.models import positions as positions_lib
from sleep_jax.models.kernels import attention
from sleep_jax.models.kernels import blockwise

_HEADS = (9, 3, 64)  # Query heads, key heads and their size: SmolLM2-135M.


def run(plan: timing.Plan) -> Iterator[dict[str, Any]]:
  """A forward pass and its gradient, length by length."""
  for length in plan.choose((512, 1024, 2048, 4096), (32,)):
    for gradient in (False, True):
      yield _time(plan, length, gradient)


def _time(plan: timing.Plan, length: int, gradient: bool) -> dict[str, Any]:
  """Seconds of one row; equal to 1e-5 of the largest entry before."""
  heads, kv_heads, size = _HEADS
  rng = np.random.default_rng(0)
  shapes = (
    (1, length, heads, size),
    (1, kv_heads, size, length),
    (1, kv_heads, length, size),
  )
  args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
  positions = jnp.arange(length)[None]
  mask = positions_lib.PositionMask(positions, positions)
  dense = mask.dense()

  def side(attend: Callable[..., jax.Array]) -> Callable[[], Any]:
    fn = attend
    if gradient:
      fn = jax.grad(lambda *args: (attend(*args) ** 2).sum(), (0, 1, 2))
    fn = jax.jit(fn)
    return lambda: jax.block_until_ready(fn(*args))

  sides = {
    'sleep_jax': side(functools.partial(blockwise.attend, mask=mask)),
    'all scores': side(functools.partial(attention.attend, mask=dense)),
  }
  for ours, theirs in zip(
    *(jax.tree.leaves(one()) for one in sides.values()), strict=True
  ):
    scale = float(jnp.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)
  seconds = timing.interleave(sides, plan)
  return {
    'bench': 'attention',
    'model': f'heads {heads}/{kv_heads} of {size}',
    'rows': 1,
    'length': length,
    'pass': 'gradient' if gradient else 'forward',
    'seconds': seconds,
    'speedup': timing.speedup(seconds),
  }
