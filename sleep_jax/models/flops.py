"""Analytic FLOPs: 2 per multiply-add; norms, softmax and rotations left out.

XLA's own count sees a scan's body once, so the accounts are kept by formula.
"""

from sleep_jax import config
from sleep_jax.models.mixers import base as mixers_base


def forward_flops(
  cfg: config.ModelConfig, context: float, first_layer: int = 0
) -> float:
  """FLOPs of one token's forward pass.

  Args:
    cfg: the model. Banks are computed for all slots, so all slots count.
    context: mean number of keys a query sees.
    first_layer: earlier layers do not count.
  """
  mixers = mixers_base.of_layers(cfg)[first_layer:]
  mixing = sum(mixer.flops(cfg, context) for mixer in mixers)
  levels = sum(
    sum(layer >= first_layer for layer in cfg.layers_of(i))
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
  if cfg.updates_backbone:
    return train_flops(cfg, context)
  layers = [
    cfg.layers_of(i) for i, level in enumerate(cfg.levels) if level.chunk
  ]
  if not layers:
    return forward_flops(cfg, context)
  moving = sum(
    cfg.num_layers(i) * 3 * cfg.dim * level.hidden
    for i, level in enumerate(cfg.levels)
    if level.chunk
  )
  first = min(layer.start for layer in layers)
  return partial_train_flops(cfg, context, first) + 2.0 * moving


def partial_train_flops(
  cfg: config.ModelConfig, context: float, first_layer: int = 0
) -> float:
  """FLOPs of one token when only a small part trains.

  The backward pass computes hardly any weight gradient, but runs through all
  activations from the output down to `first_layer`, where the part begins.
  """
  return forward_flops(cfg, context) + forward_flops(cfg, context, first_layer)
