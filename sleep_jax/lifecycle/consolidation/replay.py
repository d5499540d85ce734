"""D of Sleep section 4: generative replay, sampled from the teachers.

No outside data enters. The *current* model generates what this day taught; the
*previous* model, the same life before this day, what must not be lost. Splicing
interleaves segments of both in one row, so that new and old are rehearsed in
one context; every token is labelled by the teacher that generated it.
"""

from typing import NamedTuple

import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib


class Teachers(at.Pytree):
  """The teachers S_1..S_k of Knowledge Seeding; they share their weights.

  previous_memory: None where the current model alone teaches.
  head: the rows of the unembedding that are distilled over; None = all.
  """

  current: model_lib.Model
  previous_memory: memory_lib.Memory | None
  head: at.Float[jax.Array, 'M D'] | None = None

  @property
  def previous(self) -> model_lib.Model | None:
    """The model as it was before this day, if it teaches."""
    if self.previous_memory is None:
      return None
    return self.current.with_memory(self.previous_memory)


class Replay(NamedTuple):
  """D: rows that the teachers generated."""

  tokens: np.ndarray  # [N, T]
  lengths: np.ndarray  # [N]
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
  current_key, previous_key, splice_key = jax.random.split(rng, 3)

  def draw(
    model: model_lib.Model, rows: int, key: at.Key
  ) -> generation.Documents:
    return generation.sample(cfg, model, tokenizer, rows, key, day)

  if teachers.previous is None:
    tokens, lengths, _ = draw(teachers.current, cfg.dreams, current_key)
    return Replay(tokens, lengths, np.ones(tokens.shape, np.float32), None)
  least, most = cfg.previous_fraction
  previous_fraction = min(max(least, nights / (nights + 1)), most)
  half = cfg.dreams // 2
  current = draw(teachers.current, half, current_key)
  previous = draw(teachers.previous, half, previous_key)
  if cfg.splice:
    # Where nothing but the end of a document separates, whole documents with
    # their own beginnings are what is interleaved.
    whole = tokenizer.separator == tokenizer.stop
    pool, previous_pool = (
      documents(x) if whole else segments(x, tokenizer.separator)
      for x in (current, previous)
    )
    if cfg.distinct:
      pool, previous_pool = distinct(pool), distinct(previous_pool)
    if pool and previous_pool:
      return splice(
        (previous_pool, pool),
        (cfg.dreams, cfg.dream_length),
        previous_fraction,
        [] if whole else [tokenizer.bos],
        order_lib.numpy_rng(splice_key),
      )
  tokens, lengths, starts = (np.concatenate(x) for x in zip(current, previous))
  is_current = np.arange(2 * half) < half
  source = np.repeat(is_current[:, None], tokens.shape[1], 1)
  source = source.astype(np.float32)
  source[np.arange(2 * half), starts] = 1.0 - previous_fraction
  row_prob = np.where(is_current, 1.0 - previous_fraction, previous_fraction)
  return Replay(tokens, lengths, source, row_prob / row_prob.sum())


class Segment(NamedTuple):
  """Part of a document; `start` is the first token that the model chose."""

  tokens: np.ndarray
  start: int


def documents(generated: generation.Documents) -> list[Segment]:
  """Each document as one segment."""
  return [
    Segment(row[:length], int(start))
    for row, length, start in zip(*generated, strict=True)
  ]


def segments(generated: generation.Documents, separator: int) -> list[Segment]:
  """The whole segments of all rows, each ending with `separator`, BOS cut."""
  parts = []
  for row, length in zip(generated.tokens, generated.lengths, strict=True):
    ends = np.flatnonzero(row[:length] == separator) + 1
    parts += np.split(row[1 : ends[-1]], ends[:-1] - 1) if len(ends) else []
  return [Segment(part, 0) for part in parts]


def distinct(pool: list[Segment]) -> list[Segment]:
  """The pool without those that are equal to an earlier one."""
  return list({segment.tokens.tobytes(): segment for segment in pool}.values())


def splice(
  pools: tuple[list[Segment], list[Segment]],
  shape: tuple[int, int],
  previous_fraction: float,
  begin: list[int],
  rng: np.random.Generator,
) -> Replay:
  """Rows that interleave segments of two teachers.

  Args:
    pools: segments of the previous and of the current model.
    shape: rows, and tokens of a row.
    previous_fraction: probability that a segment is from the previous model.
    begin: the tokens that begin a row.
    rng: draws segments and their order.

  Returns:
    Full rows. `source` is 1 or 0 within a segment; the first token that a model
    chose has the share of both, since either could have been next.
  """
  rows, length = shape
  shuffled = [list(pool) for pool in pools]
  for pool in shuffled:
    rng.shuffle(pool)
  num_used = [0, 0]
  tokens = np.zeros((rows, length), np.int32)
  source = np.zeros((rows, length), np.float32)
  tokens[:, : len(begin)] = begin
  for row in range(rows):
    end = len(begin)
    while end < length:
      teacher = int(rng.random() >= previous_fraction)
      pool = shuffled[teacher]
      segment, start = pool[num_used[teacher] % len(pool)]
      segment = segment[: length - end]
      num_used[teacher] += 1
      tokens[row, end : end + len(segment)] = segment
      source[row, end : end + len(segment)] = teacher
      if end + start < length:
        source[row, end + start] = 1.0 - previous_fraction
      end += len(segment)
  return Replay(tokens, np.full(rows, length), source, None)
