"""Low-rank adapters: W + alpha / rank A B (LoRA, Hu et al. 2021, Eq. 3).

An adapter is not part of the backbone's weights, so that many instances of one
model can be trained at once: under `jax.vmap` over adapters every product
with a backbone matrix is still one product, and only A and B are per instance.
"""

import dataclasses
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.config import base


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters of the backbone's matrices: W + alpha / rank A B."""

  rank: base.Count = 32
  alpha: base.Positive = 64.0
  # Of q | k | v | o of the attention and gate | up | down of every level.
  targets: tuple[str, ...] = ('q', 'v')
  slowest_only: bool = False  # Of the levels, only the last has adapters.

  def __post_init__(self):
    object.__setattr__(self, 'targets', tuple(self.targets))
    known = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
    if not self.targets:
      raise base.ConfigError(f'lora.targets is empty; choose among {known}.')
    for target in self.targets:
      base.lookup(target, dict.fromkeys(known), 'lora.targets')


_ATTENTION = ('q', 'k', 'v', 'o')


class LowRankPair(at.Pytree):
  """A and B of one matrix, stacked over layers; axes of heads are flat."""

  a: at.Float[jax.Array, 'L I R']
  b: at.Float[jax.Array, 'L R O']


class Adapter(at.Pytree):
  """Pairs by module (`attention`, `level_1`, ...) and matrix."""

  pairs: dict[str, dict[str, LowRankPair]]
  scale: float = struct.field(pytree_node=False)  # alpha / rank.

  def for_module(self, module: str) -> dict[str, LowRankPair]:
    """The pairs of one module."""
    return self.pairs.get(module, {})


def _matrix(params: at.Params, module: str, target: str) -> Any:
  weights = params['blocks'][module][target]
  return weights['kernel'] if module == 'attention' else weights


def _in_out_dims(weights: Any, target: str) -> tuple[int, int]:
  """Flat sizes of a stacked matrix's input and output."""
  _, *shape = weights.shape
  num_in = len(shape) - 1 if target == 'o' else 1
  return math.prod(shape[:num_in]), math.prod(shape[num_in:])


def init_adapter(
  model: config.ModelConfig, cfg: LoraConfig, params: at.Params, rng: at.Key
) -> Adapter:
  """A new adapter: A is drawn, B is zero, so it changes nothing yet."""
  modules = {'attention': [x for x in cfg.targets if x in _ATTENTION]}
  levels = range(1, len(model.levels_per_block) + 1)
  for i in levels[-1:] if cfg.slowest_only else levels:
    modules[f'level_{i}'] = [x for x in cfg.targets if x not in _ATTENTION]

  def pair(module: str, target: str, rng: at.Key) -> LowRankPair:
    size, out = _in_out_dims(_matrix(params, module, target), target)
    bound = size**-0.5
    shape = (model.layers, size, cfg.rank)
    return LowRankPair(
      a=jax.random.uniform(rng, shape, minval=-bound, maxval=bound),
      b=jnp.zeros((model.layers, cfg.rank, out)),
    )

  names = [(m, x) for m, targets in modules.items() for x in targets]
  keys = jax.random.split(rng, len(names))
  pairs = {module: {} for module in modules if modules[module]}
  for (module, target), key in zip(names, keys, strict=True):
    pairs[module][target] = pair(module, target, key)
  return Adapter(pairs, cfg.alpha / cfg.rank)


def apply(
  y: jax.Array, adapter: Adapter | None, module: str, target: str, x: jax.Array
) -> jax.Array:
  """`y`, which is `x` times a matrix, plus what the adapter adds to it.

  `x` is `[B, T, I]`; `y` may have its last axes split over heads.
  """
  if adapter is None:
    return y
  pair = adapter.for_module(module).get(target)
  if pair is None:
    return y
  a, b = (w.astype(x.dtype) for w in (pair.a, pair.b))
  return y + adapter.scale * ((x @ a) @ b).reshape(y.shape)


def merge(params: at.Params, adapter: Adapter) -> at.Params:
  """The backbone with the adapter added to its matrices."""
  blocks = dict(params['blocks'])
  for module, pairs in adapter.pairs.items():
    changed = dict(blocks[module])
    for target, pair in pairs.items():
      weights = _matrix(params, module, target)
      product = adapter.scale * jnp.einsum('lir,lro->lio', pair.a, pair.b)
      merged = (weights + product.reshape(weights.shape)).astype(weights.dtype)
      changed[target] = (
        changed[target] | {'kernel': merged}
        if module == 'attention'
        else merged
      )
    blocks[module] = changed
  return params | {'blocks': blocks}
