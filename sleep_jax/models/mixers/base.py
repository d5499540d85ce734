"""What a sequence mixer is, and which mixer each layer of a model has.

A mixer is one file of this package with a subclass of `Mixer`, which
`model.mixers` names by its `name`; one outside the package is named
`module:Class`, or by an entry point in the group `sleep_jax.models.mixers`.
"""

import abc
import functools
from typing import Any, ClassVar, NamedTuple

from flax import linen as nn
import jax

from sleep_jax import config
from sleep_jax.config import registry
from sleep_jax.models.kernels import attention


class MixerInputs(NamedTuple):
  """What the mixers of all layers share in one forward pass.

  rope: cosine and sine of the rotary angles, `[B, T, 1, E/2]` each.
  mask: which of the C columns a token may attend to: a matrix `[B, T, C]`, or
    for long rows the positions it follows from, see `kernels.attention.mask`.
  cache_index: the column that the first new key is written to; None without
    a cache, where the columns are the T tokens themselves.
  token_mask: `[B, T]`, False where a token is padding.
  """

  rope: tuple[jax.Array, jax.Array]
  mask: attention.Mask
  cache_index: jax.Array | int | None
  token_mask: jax.Array


class Mixer(abc.ABC):
  """A way to mix tokens; the class itself is used, it has no instances.

  name: what `model.mixers` calls it.
  Config: the dataclass of its settings, which it reads from `cfg.recurrent`;
    `ModelConfig` if it has none but the model's own.
  recurrent: whether it carries a state of constant size. If so, the state is
    a pytree dataclass whose field `s`, float32 `[B, H, K, V]`, outlives the
    window (`Memory.states`), while its other fields end with the window. If
    not, the state is the pair of its keys and values, see `init_state`.
  segmented: whether it reads segment by segment with memory tokens behind each
    (`models.segments`), as all mixers of the model must then. Its settings have
    `segment` and `memory`, its state `count`, `[B]` tokens of the segment so
    far, and its module two more methods: `read(x, state)`, what the layer gets
    for `x`, and `write(x, inputs, state)`, the state after what it made of it.
  """

  name: ClassVar[str]
  Config: ClassVar[type]
  recurrent: ClassVar[bool]
  segmented: ClassVar[bool] = False

  @classmethod
  @abc.abstractmethod
  def module(cls, cfg: config.ModelConfig, name: str | None) -> nn.Module:
    """The Flax module, whose parameters are those of one layer.

    It is called with `(x, inputs, state, adapter)`: `[B, T, D]` tokens, the
    `MixerInputs`, the state or None (nothing was read, nothing is kept), and
    the layer's `lora.Adapter` or None. It returns `[B, T, D]` and the state
    after the last token; a mixer that attends returns None for None.
    """

  @classmethod
  @abc.abstractmethod
  def init_state(cls, cfg: config.ModelConfig, rows: int, capacity: int) -> Any:
    """The state of one layer that has read nothing.

    Args:
      cfg: the model.
      rows: B.
      capacity: C, how many tokens a row may have. A mixer that attends keeps
        keys `[B, kv_heads, E, C]` and values `[B, kv_heads, C, E]`.
    """

  @classmethod
  @abc.abstractmethod
  def flops(cls, cfg: config.ModelConfig, context: float) -> float:
    """FLOPs of one token in one layer, at `context` keys a query (mean)."""

  @classmethod
  def scope(cls) -> str:
    """The name of its parameters in a block."""
    return 'recurrence' if cls.recurrent else 'attention'


def find(name: str) -> type[Mixer]:
  """The mixer called `name`.

  Raises:
    config.ConfigError: there is none.
  """
  return registry.find(name, config.MIXERS_PACKAGE, 'model.mixers')[0]


@functools.lru_cache
def of_layers(cfg: config.ModelConfig) -> tuple[type[Mixer], ...]:
  """The mixer of every layer."""
  return tuple(map(find, cfg.mixer_names))
