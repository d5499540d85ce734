"""Analytic FLOPs: 2 per multiply-add; norms, softmax and rotations left out.

XLA's own count sees a scan's body once, so the accounts are kept by formula.
"""

from sleep_jax import config


def forward_flops(cfg: config.ModelConfig, context: float) -> float:
  """FLOPs of one token's forward pass.

  Args:
    cfg: the model. Banks are computed for all slots, so all slots count.
    context: mean number of keys a query sees.
  """
  heads, kv, e = cfg.heads, cfg.num_kv_heads, cfg.resolved_head_dim
  attention = cfg.dim * e * (2 * heads + 2 * kv) + 2 * heads * e * context
  attention *= len(cfg.layers_with(attention=True))
  recurrence = sum(
    _recurrence(cfg, cfg.mixer(i)) for i in cfg.layers_with(attention=False)
  )
  levels = sum(
    cfg.num_layers(i)
    * (
      3 * cfg.dim * level.hidden
      + level.slots * (2 * cfg.dim * level.rank + cfg.dim)
    )
    for i, level in enumerate(cfg.levels)
  )
  return 2.0 * (attention + recurrence + levels + cfg.dim * cfg.vocab)


def _recurrence(cfg: config.ModelConfig, mixer: str) -> float:
  """Multiply-adds of a gated delta rule's token, as the recurrence needs them.

  The chunked form computes some more, within a chunk, as attention would.
  """
  r = cfg.recurrent
  keys, values = r.heads * r.key, r.heads * r.value
  convolved = values if mixer == 'jet' else 2 * keys + values
  made = 0
  if mixer == 'jet':  # Two layers that make every token's kernel.
    hidden = max(1, values // 8)
    made = hidden * (cfg.dim + r.conv * values)
  projections = cfg.dim * (2 * keys + 3 * values + 2 * r.heads)
  return projections + r.conv * convolved + made + 3 * keys * r.value


def train_flops(cfg: config.ModelConfig, context: float) -> float:
  """FLOPs of one token when every weight trains: backward costs twice."""
  return 3.0 * forward_flops(cfg, context)


def wake_flops(cfg: config.ModelConfig, context: float) -> float:
  """FLOPs of one token read awake: only levels with a clock get gradients."""
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
