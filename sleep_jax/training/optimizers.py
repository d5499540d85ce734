"""Optimizers of whole models: AdamW, and Muon with AdamW for the rest."""

from typing import Any

import jax
import optax
import optax.contrib

from sleep_jax import array_typing as at

# Attention's kernels have an axis for heads; all may have one for layers first.
_MATRIX, _INTO_HEADS, _FROM_HEADS = (0, 1), (0, (1, 2)), ((0, 1), 2)


def adamw(
  learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0
) -> optax.GradientTransformation:
  """AdamW under a global-norm clip of 1."""
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(learning_rate, b2=0.98, weight_decay=weight_decay),
  )


def warmup_stable_decay(
  peak: float, steps: int, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
  """Warm-up, plateau, and a linear decay to a thousandth of the peak."""
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, peak, warmup_steps),
      optax.constant_schedule(peak),
      optax.linear_schedule(peak, peak / 1000, decay_steps),
    ],
    [warmup_steps, steps - decay_steps],
  )


def muon_adamw(
  muon_rate: optax.ScalarOrSchedule,
  adam_rate: optax.ScalarOrSchedule,
  weight_decay: float,
) -> optax.GradientTransformation:
  """Muon for matrices inside the blocks, AdamW for the rest; clipped at 1."""
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(
      muon_rate,
      weight_decay=weight_decay,
      adam_learning_rate=adam_rate,
      adam_b2=0.95,
      muon_weight_dimension_numbers=muon_dimensions,
    ),
  )


def muon_dimensions(params: at.Tree) -> at.Tree:
  """Which leaves Muon trains, and along which axes."""
  return jax.tree_util.tree_map_with_path(_muon_dimension, params)


def _muon_dimension(path: tuple[Any, ...], leaf: jax.Array) -> Any:
  """How Muon sees a leaf as a matrix; None leaves it to AdamW."""
  names = [key.key for key in path]
  if names[0] != 'blocks' or len(names) < 3:  # Memory tokens are of no layer.
    return None
  # A hybrid's layers are not stacked; their names come first.
  stacked = names[1] == 'attention' or names[1].startswith('level')
  inside = names[2 - stacked].startswith('level') or names[-2] in 'qkvgo'
  if leaf.ndim - stacked < 2 or not inside:
    return None
  axes = _FROM_HEADS if names[-2] == 'o' else _INTO_HEADS
  if leaf.ndim - stacked == 2:
    axes = _MATRIX
  return optax.contrib.MuonDimensionNumbers(
    *jax.tree.map(lambda axis: axis + stacked, axes)
  )
