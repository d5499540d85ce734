"""D of Sleep section 4: the data that a night samples from its own selves.

No outside data enters. The *awake* self tells what this day taught; the *old
self*, the same life before this day, tells what must not be lost. Splicing
interleaves segments of both, so that new and old are rehearsed in one context,
and every token is judged by the self that owns it.
"""

import functools
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import order as order_lib
from sleep_jax.data import tokenizers
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.models import memory as memory_lib
from sleep_jax.runtime import sharding


@struct.dataclass
class Teachers:
  """The teachers S_1..S_k of Knowledge Seeding."""

  awake: memory_lib.Memory
  old: memory_lib.Memory | None  # None: `teachers = awake`.


def sample(
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  params: at.Params,
  memory: memory_lib.Memory,
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  rng: at.Key,
) -> tuple[np.ndarray, np.ndarray]:
  """Documents a self makes up from BOS alone: tokens `[rows, T]`, lengths."""
  out = sampling.generate(
    cfg,
    params,
    memory,
    *sharding.shard_batch(
      (jnp.full((rows, 1), tokenizer.bos), jnp.ones((rows,), jnp.int32)),
      'batch',
    ),
    rng,
    sampling.SamplerConfig(
      max_new=how.dream_length - 1,
      temperature=how.temperature,
      min_p=how.min_p,
      stop=tokenizer.stop,
      pad=tokenizer.pad,
    ),
  )
  out = sharding.fetch(out)
  bos = np.full((rows, 1), tokenizer.bos, np.int32)
  return np.concatenate([bos, out.tokens], 1), out.lengths + 1


def segments(
  tokens: np.ndarray, lengths: np.ndarray, separator: int
) -> list[np.ndarray]:
  """The whole segments of all rows, each ending with `separator`, BOS cut."""
  found = []
  for row, length in zip(tokens, lengths, strict=True):
    ends = np.flatnonzero(row[:length] == separator) + 1
    found += np.split(row[1 : ends[-1]], ends[:-1] - 1) if len(ends) else []
  return found


def splice(
  awake: list[np.ndarray],
  old: list[np.ndarray],
  rows: int,
  length: int,
  previous_fraction: float,
  bos: int,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """Rows that interleave segments of two selves.

  Returns:
    Tokens `[rows, length]` and, per token, how much of it the awake self owns:
    1 or 0 within a segment; its first token is a toss between both.
  """
  pools = [[s for s in pool] for pool in (old, awake)]
  for pool in pools:
    rng.shuffle(pool)
  taken = [0, 0]
  tokens = np.zeros((rows, length), np.int32)
  owner = np.zeros((rows, length), np.float32)
  for row in range(rows):
    tokens[row, 0], end = bos, 1
    while end < length:
      who = int(rng.random() >= old_share)
      segment = pools[who][taken[who] % len(pools[who])][: length - end]
      taken[who] += 1
      tokens[row, end : end + len(segment)] = segment
      owner[row, end : end + len(segment)] = who
      owner[row, end] = 1.0 - old_share
      end += len(segment)
  return tokens, owner


class Replay(NamedTuple):
  """D: what the selves made up."""

  tokens: np.ndarray  # [N, T]
  lengths: np.ndarray  # [N]
  source: np.ndarray  # [N, T], the awake self's share in each token.
  row_prob: np.ndarray | None  # [N], probability of a row; None = evenly.

  def sample_rows(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Row numbers drawn by share, `[*shape]`."""
    if self.row_prob is None:
      return rng.integers(0, len(self.tokens), shape)
    return rng.choice(len(self.tokens), shape, p=self.row_prob)


def sample_replay(
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  params: at.Params,
  selves: Teachers,
  tokenizer: tokenizers.Tokenizer,
  nights: int,
  rng: at.Key,
) -> Replay:
  """Samples D: `how.dreams` rows, half of them from each self.

  The old self speaks for all nights so far, the awake self for one, so the
  share of the old self in what is rehearsed grows with the nights: otherwise
  each night would halve how often the first is dreamt of. How many different
  dreams each self has does not follow that share: coverage needs them.
  """
  awake_key, old_key, mix_key = jax.random.split(rng, 3)
  draw = functools.partial(sample, cfg, how, params, tokenizer=tokenizer)
  if selves.old is None:
    tokens, lengths = draw(selves.awake, rows=how.dreams, rng=awake_key)
    return Replay(tokens, lengths, np.ones(tokens.shape, np.float32), None)
  least, most = how.previous_fraction
  old_share = min(max(least, nights / (nights + 1)), most)
  half = how.dreams // 2
  awake = draw(selves.awake, rows=half, rng=awake_key)
  old = draw(selves.old, rows=half, rng=old_key)
  if how.splice:
    pools = [segments(*x, tokenizer.separator) for x in (awake, old)]
    if all(pools):
      rows, length = how.dreams, how.dream_length
      tokens, owner = splice(
        *pools,
        rows,
        length,
        old_share,
        tokenizer.bos,
        order_lib.numpy_rng(mix_key),
      )
      return Replay(tokens, np.full(rows, length), owner, None)
  tokens, lengths = (np.concatenate(x) for x in zip(awake, old))
  is_awake = np.arange(2 * half) < half
  owner = np.repeat(is_awake[:, None], tokens.shape[1], 1).astype(np.float32)
  owner[:, 1] = 1.0 - old_share
  share = np.where(is_awake, 1.0 - old_share, old_share)
  return Replay(tokens, lengths, owner, share / share.sum())
