"""One block: a mixer and the chain of levels, each with norm and residual."""

from typing import Any, NamedTuple

from flax import linen as nn
import jax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import cms
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import lora
from sleep_jax.models.mixers import base as mixers_base


class LayerInputs(NamedTuple):
  """What is a layer's own; stacked over layers, leaves are `[L, ...]`.

  memory: one `cms.LayerMemory` for each level that the layer has a part in;
    with buffers per layer, a tuple over layers of these; or None.
  cache: the mixer's state, see `Mixer.init_state`, or None.
  adapter: low-rank changes of the layer's matrices, or None.
  """

  memory: at.Tree
  cache: Any
  adapter: lora.Adapter | None


class Block(nn.Module):
  """A mixer, then the chain of levels from fast to slow (Sleep Eq. 1)."""

  cfg: config.ModelConfig
  levels: tuple[config.LevelConfig, ...]
  mixer: type[mixers_base.Mixer]

  @nn.compact
  def __call__(
    self, x: jax.Array, layer: LayerInputs, inputs: mixers_base.MixerInputs
  ) -> tuple[jax.Array, tuple[Any, tuple[jax.Array | None, ...]]]:
    """`[B, T, D]`; the mixer's new state; each level's router logits."""

    def norm(x: jax.Array, name: str) -> jax.Array:
      y = layers_lib.RMSNorm(self.cfg.norm_eps, name=name)(x)
      # Else a TPU computes it anew for every tile of the products that read it;
      # of one token there is one tile.
      return y if x.shape[1] == 1 else jax.lax.optimization_barrier(y)

    scope = self.mixer.scope()
    mixer: Any = self.mixer.module(self.cfg, scope)
    if self.mixer.segmented:
      x = mixer.read(x, layer.cache)
    y, new_cache = mixer(
      norm(x, f'{scope}_norm'), inputs, layer.cache, layer.adapter
    )
    x = x + y
    routes = []
    for i, level in enumerate(self.levels, 1):
      y, logits = cms.Level(self.cfg, level, name=f'level_{i}')(
        norm(x, f'level_{i}_norm'),
        None if layer.memory is None else layer.memory[i - 1],
        layer.adapter,
      )
      x = x + y
      routes.append(logits)
    if self.mixer.segmented:
      new_cache = mixer.write(x, inputs, new_cache)
    return x, (new_cache, tuple(routes))
