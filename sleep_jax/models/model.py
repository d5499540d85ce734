"""A model as one value: its config, weights, memory and adapter.

Teacher, student and trial instance are Models. The config is static, so a
compiled function takes a Model like any other pytree.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import memory_init
from sleep_jax.models import token_logits
from sleep_jax.models import transformer


class Model(at.Pytree):
  """Everything that turns tokens into logits.

  cfg: its dimensions, levels and mixers (static).
  params: backbone weights; only fine-tuning changes them.
  memory: fast weights, experts, recurrent states; None is the bare backbone.
  adapter: low-rank changes beside the backbone's matrices.
  """

  cfg: config.ModelConfig = struct.field(pytree_node=False)
  params: at.Params
  memory: memory_lib.Memory | None = None
  adapter: lora.Adapter | None = None

  def forward(
    self,
    tokens: at.Array,
    *,
    positions: at.Array | None = None,
    cache: cache_lib.Cache | None = None,
  ) -> transformer.Output:
    """One forward pass over tokens; see `transformer.forward`."""
    return transformer.forward(
      self.cfg,
      self.params,
      tokens,
      self.memory,
      positions=positions,
      cache=cache,
      adapter=self.adapter,
    )

  def frozen_prefix(
    self, tokens: at.Array, positions: at.Array
  ) -> jax.Array | None:
    """`transformer.frozen_prefix`; None where the first layers may change."""
    if not self.cfg.frozen_layers or self.memory is None or self.adapter:
      return None
    return transformer.frozen_prefix(
      self.cfg, self.params, tokens, self.memory, positions
    )

  def unembedding(self) -> at.Float[jax.Array, 'V D']:
    """The matrix that turns `Output.hidden` into logits."""
    return transformer.unembedding(self.cfg, self.weights())

  def weights(self) -> at.Params:
    """The backbone's, with the fast change of all of them, if there is one."""
    return memory_lib.with_backbone_delta(self.cfg, self.params, self.memory)

  def map_logits(
    self, fn: Callable[..., at.Tree], out: transformer.Output, *rows: at.Tree
  ) -> at.Tree:
    """`fn(logits, *rows)` of what the model put out, token by token.

    Where logits are many, those of few tokens exist at a time; see
    `token_logits.map_tokens`.
    """
    return token_logits.map_tokens(
      fn, out.hidden, self.unembedding(), *rows, logits=out.logits
    )

  def merged(self) -> 'Model':
    """The same model with its adapter added to the backbone's matrices."""
    if self.adapter is None:
      return self
    params = lora.merge(self.params, self.adapter)
    return self.replace(params=params, adapter=None)

  def required_memory(self) -> memory_lib.Memory:
    """The memory of a model that must have one.

    Raises:
      ValueError: if this is a bare backbone.
    """
    if self.memory is None:
      raise ValueError('A bare backbone has no memory to read or change.')
    return self.memory

  def bank(self, level: int) -> memory_lib.Bank:
    """The experts of level number `level` (0 = fastest)."""
    return self.required_memory().bank(level)

  def with_level(self, level: int, **changes: Any) -> 'Model':
    """The same model with parts of one level replaced."""
    memory = self.required_memory().with_level(level, **changes)
    return self.replace(memory=memory)

  def with_memory(self, memory: memory_lib.Memory | None) -> 'Model':
    """The same weights with another memory."""
    return self.replace(memory=memory)


def init(cfg: config.ModelConfig, rng: at.Key) -> Model:
  """A model with fresh weights, and a memory that holds nothing."""
  return Model(cfg, transformer.init(cfg, rng), memory_init.init_memory(cfg))
