"""D of Sleep section 4: generative replay, sampled from the teachers.

No outside data enters. The *current* model generates what this day taught; the
*previous* model, the same life before this day, what must not be lost. Splicing
interleaves segments of both in one row, so that new and old are rehearsed in
one context; every token is labelled by the teacher that generated it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import order as order_lib
from sleep_jax.data import tokenizers
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding


class Teachers(at.Pytree):
  """The teachers S_1..S_k of Knowledge Seeding; they share their weights.

  previous_memory: None where the current model alone teaches.
  """

  current: model_lib.Model
  previous_memory: memory_lib.Memory | None

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


def sample(
  cfg: consolidation_config.SeedingConfig,
  model: model_lib.Model,
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  rng: at.Key,
) -> tuple[np.ndarray, np.ndarray]:
  """Documents generated from BOS: tokens `[rows, T]` and lengths `[rows]`."""
  prompts = jnp.full((rows, 1), tokenizer.bos), jnp.ones((rows,), jnp.int32)
  out = sampling.generate(
    model,
    *sharding.shard_batch(prompts, 'batch'),
    rng,
    sampling.SamplerConfig(
      max_new=cfg.dream_length - 1,
      temperature=cfg.temperature,
      min_p=cfg.min_p,
      stop=tokenizer.stop,
      pad=tokenizer.pad,
    ),
  )
  out = sharding.fetch(out)
  bos = np.full((rows, 1), tokenizer.bos, np.int32)
  return np.concatenate([bos, out.tokens], 1), out.lengths + 1


def sample_replay(
  cfg: consolidation_config.SeedingConfig,
  teachers: Teachers,
  tokenizer: tokenizers.Tokenizer,
  nights: int,
  rng: at.Key,
) -> Replay:
  """Samples D: `cfg.dreams` rows, half of them from each teacher.

  The previous model stands for all `nights` so far, the current one for one
  day, so the previous model's fraction of what is rehearsed grows with the
  nights; at a constant fraction each night would halve how often the first is
  rehearsed. How many different rows each teacher has does not follow that
  fraction: coverage needs them.
  """
  current_key, previous_key, splice_key = jax.random.split(rng, 3)
  draw = functools.partial(sample, cfg, tokenizer=tokenizer)
  if teachers.previous is None:
    tokens, lengths = draw(teachers.current, rows=cfg.dreams, rng=current_key)
    return Replay(tokens, lengths, np.ones(tokens.shape, np.float32), None)
  least, most = cfg.previous_fraction
  previous_fraction = min(max(least, nights / (nights + 1)), most)
  half = cfg.dreams // 2
  current = draw(teachers.current, rows=half, rng=current_key)
  previous = draw(teachers.previous, rows=half, rng=previous_key)
  if cfg.splice:
    pool, previous_pool = (
      segments(*x, tokenizer.separator) for x in (current, previous)
    )
    if pool and previous_pool:
      return splice(
        pool,
        previous_pool,
        (cfg.dreams, cfg.dream_length),
        previous_fraction,
        tokenizer.bos,
        order_lib.numpy_rng(splice_key),
      )
  tokens, lengths = (np.concatenate(x) for x in zip(current, previous))
  is_current = np.arange(2 * half) < half
  source = np.repeat(is_current[:, None], tokens.shape[1], 1)
  source = source.astype(np.float32)
  source[:, 1] = 1.0 - previous_fraction
  row_prob = np.where(is_current, 1.0 - previous_fraction, previous_fraction)
  return Replay(tokens, lengths, source, row_prob / row_prob.sum())


def segments(
  tokens: np.ndarray, lengths: np.ndarray, separator: int
) -> list[np.ndarray]:
  """The whole segments of all rows, each ending with `separator`, BOS cut."""
  parts = []
  for row, length in zip(tokens, lengths, strict=True):
    ends = np.flatnonzero(row[:length] == separator) + 1
    parts += np.split(row[1 : ends[-1]], ends[:-1] - 1) if len(ends) else []
  return parts


def splice(
  current: list[np.ndarray],
  previous: list[np.ndarray],
  shape: tuple[int, int],
  previous_fraction: float,
  bos: int,
  rng: np.random.Generator,
) -> Replay:
  """Rows that interleave segments of two teachers.

  Args:
    current, previous: segments of each.
    shape: rows, and tokens of a row.
    previous_fraction: probability that a segment is from the previous model.
    bos: the token that begins a row.
    rng: draws segments and their order.

  Returns:
    Full rows. `source` is 1 or 0 within a segment; a segment's first token has
    the share of both, since either could have been next.
  """
  rows, length = shape
  pools = [list(pool) for pool in (previous, current)]
  for pool in pools:
    rng.shuffle(pool)
  num_used = [0, 0]
  tokens = np.zeros((rows, length), np.int32)
  source = np.zeros((rows, length), np.float32)
  for row in range(rows):
    tokens[row, 0], end = bos, 1
    while end < length:
      teacher = int(rng.random() >= previous_fraction)
      pool = pools[teacher]
      segment = pool[num_used[teacher] % len(pool)][: length - end]
      num_used[teacher] += 1
      tokens[row, end : end + len(segment)] = segment
      source[row, end : end + len(segment)] = teacher
      source[row, end] = 1.0 - previous_fraction
      end += len(segment)
  return Replay(tokens, np.full(rows, length), source, None)
