"""sleep_jax.models.block."""

import functools

from flax import linen as nn

from sleep_jax import config
from sleep_jax.models import cms
from sleep_jax.models import layers as layers_lib
from sleep_jax.models.mixers import attention
from sleep_jax.models.mixers import deltanet


class Block(nn.Module):
  """A mixer, then the chain of levels from fast to slow (Sleep Eq. 1)."""

  cfg: config.ModelConfig
  levels: tuple[config.LevelConfig, ...]
  mixer: str = 'attention'

  @nn.compact
  def __call__(self, x, scanned, turn, seen, start, token_mask=None):
    views, past, adapter = scanned
    norm = functools.partial(layers_lib.RMSNorm, self.cfg.norm_eps)
    if self.mixer == 'attention':
      past = None if past is None else (*past, start)
      y, kept = attention.Attention(self.cfg, name='attention')(
        norm(name='attention_norm')(x), turn, seen, past, adapter
      )
    else:
      y, kept = deltanet.GatedDelta(self.cfg, self.mixer, name='recurrence')(
        norm(name='recurrence_norm')(x), past, present
      )
    x = x + y
    routes = []
    for i, level in enumerate(self.levels, 1):
      y, logits = cms.Level(self.cfg, level, name=f'level_{i}')(
        norm(name=f'level_{i}_norm')(x),
        None if views is None else views[i - 1],
        adapter,
      )
      x = x + y
      routes.append(logits)
    return x, (kept, tuple(routes))
