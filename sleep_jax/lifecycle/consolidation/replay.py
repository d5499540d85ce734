"""D of Sleep section 4: generative replay, sampled from the teachers.

No outside data enters. The *current* model generates what this day taught; the
*previous* model, the same life before this day, what must not be lost. Every
token is labelled by the teacher that generated it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding
from sleep_jax.training import loss as loss_lib

# Nats per token by which a last turn must be likelier to be of the day.
_NEW = 1.0
_SCORED = 64  # Rows scored at a time; bounds the memory of their logits.


class Teachers(at.Pytree):
  """The teachers S_1..S_k of Knowledge Seeding; they share their weights.

  previous_memory: None where the current model alone teaches.
  vocabulary: the tokens that are distilled over; None = all.
  """

  current: model_lib.Model
  previous_memory: memory_lib.Memory | None
  vocabulary: at.Int[at.Array, 'M'] | None = None

  @property
  def previous(self) -> model_lib.Model | None:
    """The model as it was before this day, if it teaches."""
    if self.previous_memory is None:
      return None
    return self.current.with_memory(self.previous_memory)

  def logits_of(self) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
    """From the hidden states of each teacher, current first, to its logits."""
    models = [m for m in (self.current, self.previous) if m is not None]
    heads = [head(model, self.vocabulary) for model in models]

    def logits_of(hidden: Sequence[jax.Array]) -> list[jax.Array]:
      return [
        h @ matrix.T.astype(h.dtype)
        for h, matrix in zip(hidden, heads, strict=True)
      ]

    return logits_of


def head(
  model: model_lib.Model, vocabulary: at.Int[at.Array, 'M'] | None
) -> at.Float[jax.Array, 'M D']:
  """The rows of a model's unembedding for these tokens; None = all."""
  matrix = model.unembedding()
  return matrix if vocabulary is None else matrix[vocabulary]


class Replay(NamedTuple):
  """D: rows that the teachers generated."""

  tokens: np.ndarray  # [N, T]
  lengths: np.ndarray  # [N]
  weight: np.ndarray  # [N, T], of each token as a target; 0 = padding.
  source: np.ndarray  # [N, T], the current model's share in each token.
  row_prob: np.ndarray | None  # [N], probability of a row; None = uniform.

  def sample_rows(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Row numbers `[*shape]`, drawn by `row_prob`."""
    if self.row_prob is None:
      return rng.integers(0, len(self.tokens), shape)
    return rng.choice(len(self.tokens), shape, p=self.row_prob)


def sample_replay(
  cfg: consolidation_config.SeedingConfig,
  teachers: Teachers,
  tokenizer: tokenizers.Tokenizer,
  nights: int,
  rng: at.Key,
  day: tuple[experience_lib.Frame, ...] = (),
) -> Replay:
  """Samples D: `cfg.dreams` rows, half of them from each teacher.

  The previous model stands for all `nights` so far, the current one for one
  day, so the previous model's fraction of what is rehearsed grows with the
  nights; at a constant fraction each night would halve how often the first is
  rehearsed. How many different rows each teacher has does not follow that
  fraction: coverage needs them. `day` are frames of what the life has read.
  """
  current_key, previous_key = jax.random.split(rng, 3)[:2]
  if teachers.previous is None:
    drawn = generation.sample(
      cfg, teachers.current, tokenizer, cfg.dreams, current_key, day
    )
    return of_one_teacher(cfg, drawn)
  least, most = cfg.previous_fraction
  previous_fraction = min(max(least, nights / (nights + 1)), most)
  half = cfg.dreams // 2
  models = teachers.current, teachers.previous
  current = sample_new(cfg, models, tokenizer, half, current_key, day)
  previous = generation.sample(
    cfg, teachers.previous, tokenizer, half, previous_key, day
  )
  return _side_by_side(cfg, current, previous, previous_fraction)


def of_one_teacher(
  cfg: consolidation_config.SeedingConfig, drawn: generation.Documents
) -> Replay:
  """Whole documents of the current model as rows."""
  source = np.ones(drawn.tokens.shape, np.float32)
  return Replay(drawn.tokens, drawn.lengths, _weight(cfg, drawn), source, None)


def _side_by_side(
  cfg: consolidation_config.SeedingConfig,
  current: generation.Documents,
  previous: generation.Documents,
  previous_fraction: float,
) -> Replay:
  """Whole documents as rows, as many of each model, drawn by its fraction."""
  both = generation.Documents(
    *(np.concatenate(x) for x in zip(current, previous))
  )
  rows = np.arange(len(both.tokens))
  is_current = rows < len(current.tokens)
  source = np.repeat(is_current[:, None], both.tokens.shape[1], 1)
  source = source.astype(np.float32)
  source[rows, both.starts] = 1.0 - previous_fraction
  row_prob = np.where(is_current, 1.0 - previous_fraction, previous_fraction)
  return Replay(
    both.tokens,
    both.lengths,
    _weight(cfg, both),
    source,
    row_prob / row_prob.sum(),
  )


def _weight(
  cfg: consolidation_config.SeedingConfig, drawn: generation.Documents
) -> np.ndarray:
  """1 on a document's tokens, `question_weight` on those of its questions."""
  column = np.arange(drawn.tokens.shape[1])
  inside = column < drawn.lengths[:, None]
  question = column < drawn.last_turns[:, None]
  weight = np.where(question, cfg.question_weight, 1.0) * inside
  return weight.astype(np.float32)


def sample_new(
  cfg: consolidation_config.SeedingConfig,
  models: tuple[model_lib.Model, model_lib.Model],
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  rng: at.Key,
  day: tuple[experience_lib.Frame, ...],
) -> generation.Documents:
  """`rows` documents of the current model.

  Where there are more to choose from, of those that the day taught: whose last
  turn the current model finds likelier than the previous one does.

  Args:
    cfg: how they are sampled, and how many to choose from.
    models: the current and the previous one.
    tokenizer: see `generation.sample`, as for all that follow.
    rows: how many.
    rng: random key.
    day: frames of the day's documents.
  """
  current, previous = models
  if cfg.oversample == 1:
    return generation.sample(cfg, current, tokenizer, rows, rng, day)
  drafts = generation.oversample(cfg, current, tokenizer, rows, rng, day)
  gain = _ending_logprobs(current, drafts) - _ending_logprobs(previous, drafts)
  new = np.flatnonzero(gain > _NEW)
  if len(new):
    drafts = drafts.rows(new)
  return generation.keep(drafts, rows, tokenizer.stop, rng)


def _ending_logprobs(
  model: model_lib.Model, drawn: generation.Documents
) -> np.ndarray:
  """`[N]`, nats per token of the last turns."""
  parts = []
  for i in range(0, len(drawn.tokens), _SCORED):
    rows = drawn.rows(np.arange(i, min(i + _SCORED, len(drawn.tokens))))
    spans = rows.last_turns, rows.lengths
    batch = sharding.shard_batch((rows.tokens, *spans), 'batch')
    parts.append(sharding.fetch(_mean_logprob(model, *batch)))
  return np.concatenate(parts)


@jax.jit
def _mean_logprob(
  model: model_lib.Model, tokens: jax.Array, first: jax.Array, end: jax.Array
) -> at.Float[jax.Array, 'B']:
  """Mean log-probability of the tokens in columns `first` to `end`."""
  logprobs = loss_lib.token_logprobs(model, tokens)
  column = jnp.arange(1, tokens.shape[1])
  inside = (column >= first[:, None]) & (column < end[:, None])
  return (logprobs * inside).sum(1) / jnp.maximum(inside.sum(1), 1)
