"""How many rows one program takes, so that long ones fit a device too.

The bounds are of one device, whatever it is: what a row needs follows from the
model's shape and the row's length. Small models never reach them.
"""

from collections.abc import Callable

import numpy as np

from sleep_jax import config
from sleep_jax.runtime import sharding

_SCORES = 2**31  # Attention scores of one layer, float32: 8 GiB.
_LOGITS = 2**30  # Logits, float32: 4 GiB.
_CACHE_BYTES = 2**33  # Keys and values of all layers.


def rows_per_pass(
  cfg: config.ModelConfig,
  *,
  width: int,
  columns: int,
  most: int,
  before: int = 0,
) -> int:
  """Rows of a forward pass: `most`, halved until they fit, at least one.

  Args:
    cfg: the model.
    width: tokens of a row.
    columns: for how many of them there are logits.
    most: a power of two.
    before: tokens of a prefix that the rows attend to.
  """

  def fits(rows: int) -> bool:
    return (
      rows * cfg.heads * width * (width + before) <= _SCORES
      and rows * columns * cfg.vocab <= _LOGITS
    )

  return _largest(fits, most)


def rows_per_rollout(
  cfg: config.ModelConfig, *, prompt: int, new: int, most: int
) -> int:
  """The same of a rollout of `new` tokens after prompts of `prompt`."""
  width = prompt + new
  size = np.dtype('float32' if cfg.dtype == 'float32' else 'float16').itemsize
  per_token = cfg.layers * 2 * cfg.num_kv_heads * cfg.resolved_head_dim * size

  def fits(rows: int) -> bool:
    return (
      rows * cfg.heads * prompt * width <= _SCORES
      and rows * width * per_token <= _CACHE_BYTES
      and rows * cfg.vocab <= _LOGITS
    )

  return _largest(fits, most)


def _largest(fits: Callable[[int], bool], most: int) -> int:
  """`most`, halved until a device's part fits."""
  rows, devices = most, sharding.num_shards('batch')
  while rows > 1 and not fits(max(1, rows // devices)):
    rows //= 2
    rows -= rows % devices if rows > devices else 0
  return rows
