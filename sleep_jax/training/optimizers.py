"""sleep_jax.training.optimizers."""

from typing import Any

import jax
import optax
import optax.contrib

from sleep_jax import array_typing as at
from sleep_jax.lifecycle.recurrence import config as recurrence_config

_MATRIX = optax.contrib.MuonDimensionNumbers(0, 1)
# Of attention's kernels, which have an axis for heads.
_INTO_HEADS = optax.contrib.MuonDimensionNumbers(0, (1, 2))
_FROM_HEADS = optax.contrib.MuonDimensionNumbers((0, 1), 2)


def _muon_rule(path: tuple[Any, ...], leaf: jax.Array) -> Any:
  """How Muon sees a leaf as a matrix; None leaves it to AdamW."""
  names = [key.key for key in path]
  if names[0] != 'blocks':
    return None
  inside = names[2].startswith('level') or names[-2] in 'qkvgo'
  if leaf.ndim < 2 or not inside:
    return None
  if leaf.ndim == 2:
    return _MATRIX
  return _FROM_HEADS if names[-2] == 'o' else _INTO_HEADS


def muon_dimensions(params: at.Params) -> at.Tree:
  """Which leaves Muon trains, and along which axes they are matrices."""
  return jax.tree_util.tree_map_with_path(_muon_rule, params)


def warmup_stable_decay(
  how: recurrence_config.TrainingConfig, peak: float
) -> optax.Schedule:
  """Warm-up, plateau, and a linear decay to a thousandth."""
  warm = max(1, round(how.warmup * how.steps))
  fall = max(1, round(how.decay * how.steps))
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, peak, warm),
      optax.constant_schedule(peak),
      optax.linear_schedule(peak, peak / 1000, fall),
    ],
    [warm, how.steps - fall],
  )


def muon_adamw(
  how: recurrence_config.TrainingConfig,
) -> optax.GradientTransformation:
  """Muon and AdamW under a global-norm clip of 1."""
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(
      warmup_stable_decay(how, how.muon_learning_rate),
      weight_decay=how.weight_decay,
      adam_learning_rate=warmup_stable_decay(how, how.adam_learning_rate),
      adam_b2=0.95,
      muon_weight_dimension_numbers=muon_dimensions,
    ),
  )


def adamw(
  learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0
) -> optax.GradientTransformation:
  """AdamW under a global-norm clip of 1."""
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(learning_rate, b2=0.98, weight_decay=weight_decay),
  )
