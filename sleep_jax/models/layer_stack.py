"""sleep_jax.models.layer_stack."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import config
from sleep_jax.models import block as block_lib
from sleep_jax.models import cms


class Stack(nn.Module):
  """The blocks of a hybrid, one after the other: each has its own mixer."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    views: tuple[cms.LayerMemory, ...] | None,
    pasts: tuple[Any, ...],
    turn: tuple[jax.Array, jax.Array],
    seen: jax.Array,
    start: jax.Array | None,
    present: jax.Array,
    span: range | None = None,
  ) -> tuple[jax.Array, tuple[Any, ...], tuple[jax.Array | None, ...]]:
    """The layers of `span` (all), which is how a part is looped.

    `pasts` has one entry for every layer of the model: keys and values, or the
    state; what replaces it comes back, beside x and the routes.
    """
    c, kept, routes = self.cfg, list(pasts), []
    block = (
      nn.remat(block_lib.Block, prevent_cse=False)
      if c.remat
      else block_lib.Block
    )
    for i in span or range(c.layers):
      view = None
      if views is not None:
        view = jax.tree.map(lambda leaf, i=i: leaf[i], views)
      x, (kept[i], logits) = block(c, c.levels, c.mixer(i), name=f'block_{i}')(
        x, (view, pasts[i], None), turn, seen, start, present
      )
      routes.append(logits)
    routes = tuple(
      None if level[0] is None else jnp.stack(level)
      for level in zip(*routes, strict=True)
    )
    return x, tuple(kept), routes
