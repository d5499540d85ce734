"""What a model's days and nights are to be, from how much there is to read.

`plan` is a pure function of the model's dimensions and of the documents'
lengths; every field of the `Plan` may be given instead.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from sleep_jax import config
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.models import flops

_WINDOWS = (32, 64, 96, 128, 192, 256)  # Lengths of a row to choose from.
_MOST_LANES = 8
_PASSES = 3
_LEAST_UPDATES = 40  # Of the fast level in a day; fewer teach it little.
_MOST_PASSES = 12
_TOKENS_A_DAY = 16_384  # Of documents; more are spread over several days.
_MOST_NIGHTS = 8
_DREAM_TOKENS = 32_768  # Of a night's dreams, or four times those of the day.
_STEP_TOKENS = 512  # Of dreams in one step, where that is 2 to 8 rows.
_EPOCHS = 3  # Over the dreams.
# Shares of the dreams that begin as the day's documents did, and as a chat.
_DAY_DREAMS, _CHAT_DREAMS = 0.75, 0.25
_LEAST_TURNS = 48  # Tokens of a question and its answer that a row must hold.
_MIN_P = 0.1  # Of `SeedingConfig`: on real text, noise is most of the tail.
# From here on, logits of likely tokens alone count, few enough to archive.
_LARGE_VOCABULARY, _TEACHER_TOP_K = 4096, 64


@dataclasses.dataclass(frozen=True)
class Plan:
  """The settings that depend on the model and on the amount of text.

  Where things are learnt. The last `fast_layers` change while the model reads;
  the `expert_layers` below them gain one expert a night; the rest is frozen.
  """

  fast_layers: int
  expert_layers: int
  # A day: `passes` times over its documents, in rows of `window` tokens, of
  # which `batch` are read side by side. Every `chunk` tokens of a row the fast
  # level is updated (Sleep Eq. 2).
  nights: int  # How many days and nights the documents are spread over.
  window: int
  chunk: int
  batch: int
  passes: int
  fast_learning_rate: float
  # A night follows so many updates. It is one less than a day has, so that
  # none is left pending.
  sleep_every: int
  # A night: `dreams` rows of `window` tokens, half of them of the model before
  # the day; `steps` of the new expert on `dream_batch` of them.
  dreams: int
  steps: int
  dream_batch: int
  expert_learning_rate: float
  slots: int  # Experts that there is room for, one a night.
  rank: int  # Width of an expert.

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) <= 0:
        raise config.ConfigError(
          f'plan: {field.name}={getattr(self, field.name)} must be positive.'
        )
    if self.window % self.chunk:
      raise config.ConfigError(
        f'plan: window={self.window} is not a multiple of chunk={self.chunk}.'
      )
    if self.dreams % 2:
      raise config.ConfigError(
        f'plan: dreams={self.dreams} must be even: half of them are from the '
        'model before the day.'
      )

  def model_config(self, cfg: config.ModelConfig) -> config.ModelConfig:
    """The plain model `cfg` with this plan's levels.

    Raises:
      ConfigError: if the model has fewer layers than the plan needs.
    """
    rest = cfg.layers - self.fast_layers - self.expert_layers
    if rest < 0:
      raise config.ConfigError(
        f'plan: fast_layers={self.fast_layers} and expert_layers='
        f'{self.expert_layers} are more than the {cfg.layers} layers of the '
        'model.'
      )
    hidden = cfg.levels[-1].hidden
    levels = [
      config.LevelConfig(
        hidden,
        chunk=self.chunk,
        sleep_every=self.sleep_every,
        learning_rate=self.fast_learning_rate,
      ),
      config.LevelConfig(
        hidden, slots=self.slots, rank=self.rank, top_k=self.slots
      ),
      *[config.LevelConfig(hidden)] * (rest > 0),
    ]
    split = [self.fast_layers, self.expert_layers, *[rest] * (rest > 0)]
    return dataclasses.replace(
      cfg,
      levels=tuple(levels),
      partition=tuple(split),
      partition_from='output',
    )

  def wake(self) -> wake_lib.WakeConfig:
    """How a day is read."""
    return wake_lib.WakeConfig(batch=self.batch)

  def seeding(
    self, vocab: int, chat_tokens: int = 0
  ) -> consolidation_config.SeedingConfig:
    """How a night consolidates.

    Args:
      vocab: pieces of the model.
      chat_tokens: of the frame of its chat template; 0 = it has none.
    """
    large = vocab >= _LARGE_VOCABULARY
    has_chat = 0 < chat_tokens <= self.window - _LEAST_TURNS
    return consolidation_config.SeedingConfig(
      dreams=self.dreams,
      dream_length=self.window,
      min_p=_MIN_P,
      splice=False,  # Prose has no segments that could be shuffled.
      day_dreams=_DAY_DREAMS,
      chat_dreams=_CHAT_DREAMS if has_chat else 0.0,
      steps=self.steps,
      batch=self.dream_batch,
      learning_rate=self.expert_learning_rate,
      alpha=1.0,
      lam=0.0,
      optimizer='muon',
      teacher_top_k=_TEACHER_TOP_K if large else 0,
      dream_vocab=large,
      archive=self.dreams if large else 0,
    )

  def night_flops(self, cfg: config.ModelConfig) -> float:
    """FLOPs of a night by formula: dreams, their labels, and training."""
    context = self.window / 2
    forward = flops.forward_flops(cfg, context)
    training = flops.partial_train_flops(cfg, context)
    # Every dream is generated once, and labelled by both teachers.
    return self.window * (
      3 * self.dreams * forward + self.steps * self.dream_batch * training
    )

  def __str__(self) -> str:
    """Lines for people, each with the names of what may be overridden."""
    updates = self.sleep_every + 1
    return '\n'.join(
      [
        f'  levels  the last fast_layers={self.fast_layers} change while it '
        f'reads; the expert_layers={self.expert_layers} below them have '
        f'slots={self.slots} for experts of rank={self.rank}',
        f'  day     passes={self.passes} over the documents in rows of window='
        f'{self.window} tokens, batch={self.batch} at a time, an update every '
        f'chunk={self.chunk} tokens: {updates} updates at '
        f'fast_learning_rate={self.fast_learning_rate:g}',
        f'  night   sleep_every={self.sleep_every} updates (nights='
        f'{self.nights}): dreams={self.dreams} rows, steps={self.steps} of '
        f'dream_batch={self.dream_batch} at expert_learning_rate='
        f'{self.expert_learning_rate:g}',
      ]
    )


def plan(
  cfg: config.ModelConfig,
  lengths: Sequence[int] = (),
  *,
  chat_tokens: int = 0,
  **overrides: Any,
) -> Plan:
  """Settings for a model and the documents that it is to read.

  Args:
    cfg: the model, as its checkpoint has it.
    lengths: tokens of each document; none where they are not known yet.
    chat_tokens: of the frame of the chat template; 0 = there is none.
    **overrides: fields of `Plan`; those that are not given follow from these.

  Raises:
    ConfigError: for an unknown field, one that cannot be, or a model that has
      fewer than two layers, or mixers other than attention.
  """
  check_fields(overrides)
  _check_model(cfg)
  quarter = max(1, round(cfg.layers / 4))
  values: dict[str, Any] = {}

  def choose(name: str, value: Any) -> Any:
    values[name] = overrides.get(name, value)
    return values[name]

  choose('fast_layers', quarter)
  choose('expert_layers', quarter)
  days = choose('nights', nights(lengths))
  window = choose('window', _window(cfg, lengths, chat_tokens))
  chunk = choose('chunk', window)
  rows = max(1, math.ceil(_rows(lengths, window, chat_tokens) / max(1, days)))
  batch = choose('batch', _batch(rows))
  groups = -(-rows // max(1, batch)) * max(1, window // max(1, chunk))
  passes = min(_MOST_PASSES, max(_PASSES, -(-_LEAST_UPDATES // groups)))
  passes = choose('passes', passes)
  choose('fast_learning_rate', 3e-4)
  choose('sleep_every', max(2, groups * passes - 1))
  least = 2 * (_DREAM_TOKENS // 2 // max(1, window))
  dreams = choose('dreams', max(4 * rows, least))
  some = next((n for n in (8, 4) if n * window <= _STEP_TOKENS), 2)
  dream_batch = max(1, choose('dream_batch', some))
  choose('steps', -(-_EPOCHS * dreams // dream_batch))
  choose('expert_learning_rate', 0.03)
  choose('slots', max(_MOST_NIGHTS, days + 1))
  choose('rank', min(64, cfg.dim // 2))
  out = Plan(**values)
  out.model_config(cfg)  # Refuses levels that the model cannot have.
  return out


def nights(lengths: Sequence[int]) -> int:
  """How many days documents of so many tokens each are spread over."""
  return min(_MOST_NIGHTS, max(1, -(-sum(lengths) // _TOKENS_A_DAY)))


def plain(cfg: config.ModelConfig) -> config.ModelConfig:
  """The same model with one level, which nothing changes."""
  level = config.LevelConfig(cfg.levels[-1].hidden)
  return dataclasses.replace(cfg, levels=(level,), partition=())


def check_fields(values: Mapping[str, Any]) -> None:
  """Refuses what is no field of a plan, or not of its type.

  Raises:
    ConfigError: naming the first one.
  """
  fields = {f.name: f.type for f in dataclasses.fields(Plan)}
  for name, value in values.items():
    if name not in fields:
      raise config.ConfigError(
        f'plan: unknown setting {name!r}; known are '
        f'{", ".join(sorted(fields))}.'
      )
    config.check_value(fields[name], value, f'plan: {name}')


def _check_model(cfg: config.ModelConfig) -> None:
  if cfg.layers < 2:
    raise config.ConfigError(
      f'a model of {cfg.layers} layer cannot have a fast level and one with '
      'experts; it needs two layers.'
    )
  if len(cfg.levels) > 1 or cfg.mixers:
    raise config.ConfigError(
      f'a plan is for a plain model of attention, but this one has '
      f'{len(cfg.levels)} levels and mixers={cfg.mixers}; give cfg=.'
    )


def _window(
  cfg: config.ModelConfig, lengths: Sequence[int], chat_tokens: int
) -> int:
  """The shortest row that holds nine documents of ten, and a short chat."""
  longest = float(np.percentile(lengths, 90)) if len(lengths) else 64
  if chat_tokens:
    longest = max(longest, chat_tokens + _LEAST_TURNS)
  most = cfg.max_len // 2
  allowed = [w for w in _WINDOWS if w <= most] or [most]
  return next((w for w in allowed if w >= longest), allowed[-1])


def _rows(lengths: Sequence[int], window: int, head: int) -> float:
  """Rows that documents fill; every piece of a long one has a head."""
  return sum(
    n / window if n <= window else math.ceil(n / max(1, window - head))
    for n in lengths
  )


def _batch(rows: int) -> int:
  """Rows side by side: a power of two that leaves four updates a pass."""
  batch = 1
  while batch < _MOST_LANES and rows >= 8 * batch:
    batch *= 2
  return batch
