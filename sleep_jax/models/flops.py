"""Analytic FLOPs: 2 per multiply-add; norms, softmax and rotations left out.

XLA's own count sees a scan's body once, so the accounts are kept by formula.
"""

import collections

from sleep_jax import config
from sleep_jax.models.mixers import base as mixers_base


def forward_flops(cfg: config.ModelConfig, context: float) -> float:
  """FLOPs of one token's forward pass.

  Args:
    cfg: the model. Banks are computed for all slots, so all slots count.
    context: mean number of keys a query sees.
  """
  mixers = collections.Counter(mixers_base.of_layers(cfg))
  mixing = sum(n * mixer.flops(cfg, context) for mixer, n in mixers.items())
  levels = sum(
    cfg.num_layers(i)
    * (
      3 * cfg.dim * level.hidden
      + level.slots * (2 * cfg.dim * level.rank + cfg.dim)
    )
    for i, level in enumerate(cfg.levels)
  )
  return mixing + 2.0 * levels + 2.0 * cfg.dim * cfg.vocab


def train_flops(cfg: config.ModelConfig, context: float) -> float:
  """FLOPs of one token when every weight trains: backward costs twice."""
  return 3.0 * forward_flops(cfg, context)


def wake_flops(cfg: config.ModelConfig, context: float) -> float:
  """FLOPs of one token awake: only levels with a clock get gradients."""
  moving = sum(
    cfg.num_layers(i) * 3 * cfg.dim * level.hidden
    for i, level in enumerate(cfg.levels)
    if level.chunk
  )
  return 2.0 * forward_flops(cfg, context) + 2.0 * moving


def partial_train_flops(cfg: config.ModelConfig, context: float) -> float:
  """FLOPs of one token when only a small part trains.

  The backward pass still runs through all activations (one forward's worth),
  but computes hardly any weight gradient.
  """
  return 2.0 * forward_flops(cfg, context)
