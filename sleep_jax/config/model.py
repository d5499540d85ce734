"""What a model is: its dimensions, levels and mixers."""

import dataclasses
from typing import Any

from sleep_jax.config import base
from sleep_jax.config import registry


@dataclasses.dataclass(frozen=True)
class LevelConfig:
  """One level of the Continuum Memory System (Sleep section 2 and 3)."""

  hidden: int  # Width of the level's dense SwiGLU base.
  # Eq. 2: tokens (per lane) between two updates; 0 = frozen (frequency 0).
  chunk: int = 0
  # The weights that these updates change: the level's own MLPs (mlp), or every
  # weight of the backbone (backbone), which then no other level updates.
  fast_weights: str = 'mlp'
  # Sleep steps are b * C^(l): the level is a sender every b-th update.
  sleep_every: int = 0
  optimizer: str = 'adam'  # f(.) of Eq. 2: sgd | momentum | adam.
  learning_rate: float = 1e-3
  weight_decay: float = 0.0  # Pulls the fast change back to zero.
  clip: base.Positive = 1.0  # Global-norm clip of the chunk's gradient.
  slots: int = 0  # Pre-allocated low-rank experts.
  rank: int = 0  # Width d_low of one expert.
  # Active experts a token may use; null is always a choice.
  top_k: base.Count = 1
  # Whether the dense base may take in what its experts know, and so has a
  # change of its own: see `sleep.slot_policy=fold`.
  folds: bool = False


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretching of RoPE: slow frequencies are divided by `factor`.

  A frequency counts as slow if it turns fewer than `low_freq_factor` times in
  `original_max_len` tokens, as fast if more than `high_freq_factor` times.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_len: base.Count

  def __post_init__(self):
    if not 0 < self.low_freq_factor < self.high_freq_factor:
      raise base.ConfigError(
        f'model.rope_scaling: low_freq_factor={self.low_freq_factor} must be '
        f'positive and below high_freq_factor={self.high_freq_factor}.'
      )
    if self.factor <= 0:
      raise base.ConfigError(
        f'model.rope_scaling.factor={self.factor} must be positive.'
      )


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
  """The linear-recurrent mixers: `gdn` and `jet` (Gated DeltaNet)."""

  heads: base.Count = 4
  key: base.Count = 32  # Width of a head's key.
  value: base.Count = 64  # And of its value: fast weights are [key, value].
  conv: base.Count = 4  # Tokens that the short convolution sees.
  chunk: base.Count = 64  # Tokens computed at a time.

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise base.ConfigError(
          f'model.recurrent.{field.name}={getattr(self, field.name)} must be '
          'at least 1.'
        )


DTYPES = ('float32', 'bfloat16', 'float16')  # Of weights and computation.
MIXERS_PACKAGE = 'sleep_jax.models.mixers'  # Where mixers are looked up.


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Llama-shaped decoder with k CMS levels; k = 1 is a Transformer.

  Without `partition` every block holds the whole chain of levels (the reading
  `stack`). With it every block holds one MLP, and the blocks stand at different
  clocks: the first `partition[0]`, next to the embedding, are level 1, the next
  `partition[1]` are level 2, and so on, in the order of Sleep Eq. 1. Counted
  from the output, level 1 is the last `partition[0]` blocks, level 2 those
  before, and so on: a fast level's gradient then ends where its blocks begin,
  as in TTT-E2E (arXiv 2512.23675), and need not reach the embedding.
  """

  vocab: base.Count
  dim: base.Count
  layers: base.Count
  heads: base.Count
  levels: tuple[LevelConfig, ...]  # Fast to slow.
  kv_heads: int = 0  # 0: as many as `heads`.
  head_dim: int = 0  # 0: dim / heads.
  max_len: base.Count = 2048
  rope_theta: base.Positive = 10_000.0
  rope_scaling: RopeScaling | None = None
  qkv_bias: bool = False  # Qwen2.5: q, k and v have a bias, o has none.
  qk_norm: bool = False  # Qwen3: RMS norm of every query and key head.
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  partition: tuple[int, ...] = ()  # Layers of each level; () = `stack`.
  partition_from: str = 'input'  # Where level 1 is: input | output.
  # What mixes tokens, layer by layer, repeated to the end: names of
  # `sleep_jax.models.mixers` (attention | gdn | jet) or `module:Class`;
  # () = attention throughout. `recurrent` has their settings: the `Config` of
  # the mixers that have one, which is `RecurrentConfig` for gdn and jet.
  mixers: tuple[str, ...] = ()
  recurrent: Any = RecurrentConfig()
  # Layers unrolled per scan step; CPU likes all of them.
  unroll: base.Count = 1
  # Whether a backward pass computes a block again from its input, and what of
  # it is kept: nothing, or the products with weights (products), which are most
  # of its FLOPs.
  remat: bool = False
  remat_saves: str = 'nothing'
  # Of the computation. Fresh parameters are float32; converted ones keep the
  # type of their file.
  dtype: str = 'float32'

  def __post_init__(self):
    if not self.levels:
      raise base.ConfigError(
        'model.levels is empty; a Transformer has one level.'
      )
    if self.dim % self.heads and not self.head_dim:
      raise base.ConfigError(
        f'model.dim={self.dim} is not divisible by model.heads='
        f'{self.heads}; set model.head_dim or change one of them.'
      )
    if self.heads % self.num_kv_heads:
      raise base.ConfigError(
        f'model.heads={self.heads} is not a multiple of model.kv_heads='
        f'{self.num_kv_heads}.'
      )
    if self.resolved_head_dim % 2:
      raise base.ConfigError(
        f'model.head_dim={self.resolved_head_dim} (dim / heads if it is not '
        'set) must be even: RoPE rotates pairs of entries.'
      )
    base.lookup(self.dtype, dict.fromkeys(DTYPES), 'model.dtype')
    base.lookup(
      self.partition_from, {'input': 0, 'output': 0}, 'model.partition_from'
    )
    base.lookup(
      self.remat_saves, {'nothing': 0, 'products': 0}, 'model.remat_saves'
    )
    if self.partition:
      _check_partition(self)
    if self.mixers:
      _check_mixers(self)
    _check_clocks(self.levels)
    if self.updates_backbone and self.mixers:
      raise base.ConfigError(
        'model.levels: fast_weights=backbone is for attention alone, but '
        f'model.mixers={self.mixers}; set fast_weights=mlp, or no mixers.'
      )

  @property
  def mixer_names(self) -> tuple[str, ...]:
    """What mixes tokens in each layer."""
    mixers = self.mixers or ('attention',)
    return tuple(mixers[i % len(mixers)] for i in range(self.layers))

  @property
  def recurrent_layers(self) -> tuple[int, ...]:
    """The layers whose mixer carries a state of constant size."""
    return _layers(self, recurrent=True)

  @property
  def attention_layers(self) -> tuple[int, ...]:
    """The layers whose mixer attends to keys and values."""
    return _layers(self, recurrent=False)

  @property
  def segmented(self) -> bool:
    """Whether mixers read segments with memory tokens, see `Mixer`."""
    return any(_find_mixer(name)[0].segmented for name in self.mixers)

  @property
  def updates_backbone(self) -> bool:
    """Whether reading changes every weight, see `LevelConfig.fast_weights`."""
    return any(level.fast_weights == 'backbone' for level in self.levels)

  @property
  def levels_per_block(self) -> tuple[LevelConfig, ...]:
    """The levels whose dense weights every block holds."""
    return self.levels[:1] if self.partition else self.levels

  def layers_of(self, level: int) -> range:
    """The layers that have a part in `level` (0 = fastest)."""
    if not self.partition:
      return range(self.layers)
    first = sum(self.partition[:level])
    if self.partition_from == 'output':
      first = self.layers - first - self.partition[level]
    return range(first, first + self.partition[level])

  @property
  def frozen_layers(self) -> int:
    """How many layers next to the embedding no level ever changes."""
    if not self.partition or self.updates_backbone:
      return 0
    changing = [
      self.layers_of(i).start
      for i, level in enumerate(self.levels)
      if level.chunk or level.slots
    ]
    return min(changing, default=self.layers)

  def num_layers(self, level: int) -> int:
    """How many layers have a part in `level` (0 = fastest)."""
    return len(self.layers_of(level))

  def levels_at(self, layer: int) -> tuple[int, ...]:
    """The levels that `layer` has a part in (0 = fastest)."""
    levels = range(len(self.levels))
    return tuple(i for i in levels if layer in self.layers_of(i))

  @property
  def num_kv_heads(self) -> int:
    return self.kv_heads or self.heads

  @property
  def resolved_head_dim(self) -> int:
    return self.head_dim or self.dim // self.heads

  @classmethod
  def from_mapping(cls, values: Any) -> 'ModelConfig':
    """From a nested mapping such as a ConfigDict's `model`.

    Raises:
      ConfigError: naming the first setting that is missing, or cannot be.
    """
    base.check_mapping(values, 'model')
    values = dict(values)
    for name in ('levels', 'partition', 'mixers'):
      base.check_value(tuple[Any, ...], values.get(name, ()), f'model.{name}')
      values[name] = tuple(values.get(name, ()))
    values['levels'] = tuple(
      base.from_mapping(LevelConfig, level, f'model.levels[{i}]')
      for i, level in enumerate(values['levels'])
    )
    base.check_value(tuple[str, ...], values['mixers'], 'model.mixers')
    if (recurrent := values.get('recurrent')) is not None:
      values['recurrent'] = base.from_mapping(
        _settings_class(values['mixers']), recurrent, 'model.recurrent'
      )
    if (scaling := values.get('rope_scaling')) is not None:
      values['rope_scaling'] = base.from_mapping(
        RopeScaling, scaling, 'model.rope_scaling'
      )
    return base.from_mapping(cls, values, 'model')


def _check_partition(cfg: ModelConfig) -> None:
  """Every layer belongs to one level, and all MLPs have one shape."""
  parts, levels = cfg.partition, cfg.levels
  if len(parts) != len(levels) or min(parts) < 1 or sum(parts) != cfg.layers:
    raise base.ConfigError(
      f'model.partition={parts} must give each of the {len(levels)} levels at '
      f'least one layer, and {cfg.layers} (model.layers) in all.'
    )
  if len(widths := sorted({level.hidden for level in levels})) > 1:
    raise base.ConfigError(
      f'model.levels: under model.partition all levels have the hidden width '
      f"of the backbone's MLP, but they have {widths}."
    )


def _find_mixer(name: str) -> tuple[type[Any], type[Any]]:
  """The mixer class and that of its settings."""
  return registry.find(name, MIXERS_PACKAGE, 'model.mixers')


def _layers(cfg: ModelConfig, recurrent: bool) -> tuple[int, ...]:
  return tuple(
    i
    for i, name in enumerate(cfg.mixer_names)
    if _find_mixer(name)[0].recurrent == recurrent
  )


def _settings_class(mixers: tuple[str, ...]) -> type[Any]:
  """The one class of settings that these mixers have beside the model's."""
  classes = {_find_mixer(name)[1] for name in mixers} - {ModelConfig}
  if len(classes) > 1:
    raise base.ConfigError(
      f'model.mixers={mixers} have settings of different classes '
      f'({", ".join(sorted(c.__name__ for c in classes))}), and '
      'model.recurrent holds one; leave one of them out.'
    )
  return classes.pop() if classes else RecurrentConfig


def _check_mixers(cfg: ModelConfig) -> None:
  """Known mixers with their settings, repeated a whole number of times."""
  settings = _settings_class(cfg.mixers)
  if not isinstance(cfg.recurrent, settings):
    if cfg.recurrent != RecurrentConfig():
      raise base.ConfigError(
        f'model.recurrent={cfg.recurrent} must be of class '
        f'{settings.__name__}, the settings of model.mixers={cfg.mixers}.'
      )
    object.__setattr__(cfg, 'recurrent', settings())
  if cfg.layers % len(cfg.mixers):
    raise base.ConfigError(
      f'model.layers={cfg.layers} is not a multiple of the '
      f'{len(cfg.mixers)} model.mixers={cfg.mixers}.'
    )
  segmented = {_find_mixer(name)[0].segmented for name in cfg.mixers}
  if len(segmented) > 1:
    raise base.ConfigError(
      f'model.mixers={cfg.mixers}: a mixer that reads segments with memory '
      'tokens must be that of every layer; leave out the others.'
    )
  if cfg.partition:
    raise base.ConfigError(
      f'model.partition={cfg.partition} and model.mixers={cfg.mixers} do not '
      'go together; leave one of them empty.'
    )


def _check_clocks(levels: tuple[LevelConfig, ...]) -> None:
  """Chunk sizes must nest, and a sender needs a receiver with slots."""
  moving = [(i, l) for i, l in enumerate(levels, 1) if l.chunk]
  for i, level in enumerate(levels, 1):
    path = f'model.levels[{i - 1}].fast_weights'
    known = {'mlp': False, 'backbone': True}
    if base.lookup(level.fast_weights, known, path):
      if [j for j, _ in moving] != [i]:
        raise base.ConfigError(
          f'{path}=backbone: level {i} alone must have a chunk then, since its '
          'updates change the weights of every level; set the others to 0.'
        )
  for (i, fast), (j, slow) in zip(moving, moving[1:]):
    if slow.chunk % fast.chunk:
      raise base.ConfigError(
        f'model.levels: chunk sizes must divide: level {j} updates every '
        f"{slow.chunk} tokens, which is not a multiple of level {i}'s "
        f'{fast.chunk} (Sleep Eq. 2).'
      )
  for i, level in enumerate(levels, 1):
    if level.sleep_every and not level.chunk:
      raise base.ConfigError(
        f'model.levels: level {i} has sleep_every={level.sleep_every} but '
        'chunk=0, so it never updates and has nothing to send.'
      )
    if level.sleep_every and i == len(levels):
      raise base.ConfigError(
        f'model.levels: level {i} is the slowest; there is no level above '
        'to consolidate it into. Set its sleep_every=0 or add a level.'
      )
    if level.sleep_every and not (levels[i].slots and levels[i].rank):
      raise base.ConfigError(
        f'model.levels: level {i} sends to level {i + 1}, which has '
        f'slots={levels[i].slots}, rank={levels[i].rank}; give it both.'
      )
    if level.folds and not level.slots:
      raise base.ConfigError(
        f'model.levels: level {i} has folds=True but slots=0, so there is no '
        'expert that its base could take in; set slots, or folds=False.'
      )
