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

from sleep_jax import config
from sleep_jax import sampling
from sleep_jax import typing as t
from sleep_jax.data import tokenizers
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import divergences
from sleep_jax.runtime import sharding

_MOST_NEWS = 4.0  # Nats; a single token must not carry a batch.
_JUDGE_BATCH = 64  # Rows judged at a time; bounds the memory of a pass.


@struct.dataclass
class Selves:
  """The teachers S_1..S_k of Knowledge Seeding."""

  awake: memory_lib.Memory
  old: memory_lib.Memory | None  # None: `teachers = awake`.


@struct.dataclass
class Judged:
  """Token rows with their teacher's verdicts.

  Column t holds what concerns the prediction of token t+1.
  """

  tokens: t.Int[jax.Array, 'N T']
  positions: t.Int[jax.Array, 'N T']
  weight: t.Float[jax.Array, 'N T']  # Weight of the prediction; 0 = padding.
  # Logits of the owner `[N, T, V]`, or the likeliest of them.
  teacher: jax.Array | divergences.TopK
  gate: t.Float[jax.Array, 'N T']  # Where the new expert belongs: 1 or 0,
  gate_weight: t.Float[jax.Array, 'N T']  # and how much that is known.

  def rows(self, index: jax.Array) -> 'Judged':
    """The rows at `index`."""
    return jax.tree.map(lambda x: x[index], self)


def host_rng(key: t.Key) -> np.random.Generator:
  """A NumPy generator that follows from a JAX key."""
  return np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))


def sample(
  cfg: config.ModelConfig,
  how: config.SeedingConfig,
  params: t.Params,
  memory: memory_lib.Memory,
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  rng: t.Key,
) -> tuple[np.ndarray, np.ndarray]:
  """Documents a self makes up from BOS alone: tokens `[rows, T]`, lengths."""
  out = sampling.generate(
    cfg,
    params,
    memory,
    *sharding.split(
      (jnp.full((rows, 1), tokenizer.bos), jnp.ones((rows,), jnp.int32)),
      'batch',
    ),
    rng,
    sampling.Sampling(
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
  old_share: float,
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


class Dreams(NamedTuple):
  """D: what the selves made up."""

  tokens: np.ndarray  # [N, T]
  lengths: np.ndarray  # [N]
  owner: np.ndarray  # [N, T], the awake self's share in each token.
  share: np.ndarray | None  # [N], probability of a row; None = evenly.

  def pick(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Row numbers drawn by share, `[*shape]`."""
    if self.share is None:
      return rng.integers(0, len(self.tokens), shape)
    return rng.choice(len(self.tokens), shape, p=self.share)


def dream(
  cfg: config.ModelConfig,
  how: config.SeedingConfig,
  params: t.Params,
  selves: Selves,
  tokenizer: tokenizers.Tokenizer,
  nights: int,
  rng: t.Key,
) -> Dreams:
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
    return Dreams(tokens, lengths, np.ones(tokens.shape, np.float32), None)
  least, most = how.old_share
  old_share = min(max(least, nights / (nights + 1)), most)
  half = how.dreams // 2
  awake = draw(selves.awake, rows=half, rng=awake_key)
  old = draw(selves.old, rows=half, rng=old_key)
  if how.splice:
    pools = [segments(*x, tokenizer.separator) for x in (awake, old)]
    if all(pools):
      rows, length = how.dreams, how.dream_length
      tokens, owner = splice(
        *pools, rows, length, old_share, tokenizer.bos, host_rng(mix_key)
      )
      return Dreams(tokens, np.full(rows, length), owner, None)
  tokens, lengths = (np.concatenate(x) for x in zip(awake, old))
  is_awake = np.arange(2 * half) < half
  owner = np.repeat(is_awake[:, None], tokens.shape[1], 1).astype(np.float32)
  owner[:, 1] = 1.0 - old_share
  share = np.where(is_awake, 1.0 - old_share, old_share)
  return Dreams(tokens, lengths, owner, share / share.sum())


def mixture(share: jax.Array, awake: jax.Array, old: jax.Array) -> jax.Array:
  """Log of share * softmax(awake) + (1 - share) * softmax(old)."""
  return jnp.logaddexp(
    jax.nn.log_softmax(awake) + jnp.log(share),
    jax.nn.log_softmax(old) + jnp.log1p(-share),
  )


def _verdict(
  how: config.SeedingConfig,
  share: jax.Array,
  awake: jax.Array,
  old: jax.Array | None = None,
) -> tuple[jax.Array | divergences.TopK, jax.Array]:
  """The teacher of each token, and the nats that the selves are apart.

  `share` is how much of the next token the awake self owns.
  """
  # What is copied every night flattens: a sharper teacher counters it.
  teacher, apart = awake / how.teacher_temperature, jnp.zeros(share.shape)
  if old is not None:
    apart = divergences.forward_kl(awake, old)
    teacher = mixture(share[..., None], teacher, old / how.teacher_temperature)
  if how.teacher_top_k:
    teacher = divergences.top_k(teacher, how.teacher_top_k)
  return teacher, apart


@functools.partial(jax.jit, static_argnums=(0, 1))
def judge(
  cfg: config.ModelConfig,
  how: config.SeedingConfig,
  params: t.Params,
  selves: Selves,
  tokens: t.Int[jax.Array, 'B T'],
  positions: t.Int[jax.Array, 'B T'],
  weight: t.Float[jax.Array, 'B T'],
  owner: t.Float[jax.Array, 'B T'],
) -> tuple[Judged, jax.Array]:
  """Teacher logits of every token, by the self that owns it.

  The new expert belongs where the awake self owns the target and the two
  selves disagree by more than `how.router_margin` nats; it must keep off where
  the old self owns; elsewhere nothing is known.

  Returns:
    The verdicts, and the awake self's hidden states `[B, T, D]`.
  """

  def think(memory: memory_lib.Memory) -> transformer.Output:
    return transformer.forward(cfg, params, tokens, memory, positions=positions)

  out = think(selves.awake)
  old = None if selves.old is None else think(selves.old)
  ahead = jnp.pad(owner[:, 1:], ((0, 0), (0, 1)))
  rule = functools.partial(_verdict, how)
  if how.teacher_top_k:
    matrix = transformer.head(cfg, params)

    def per_token(rows):
      hidden, share = rows
      return rule(share, *(h @ matrix.T.astype(h.dtype) for h in hidden))

    hidden = [x.hidden for x in (out, old) if x is not None]
    teacher, apart = divergences.chunked(
      per_token, (hidden, ahead), how.tokens_in_flight
    )
  else:
    teacher, apart = rule(
      ahead, *(x.logits for x in (out, old) if x is not None)
    )
  gate, known = jnp.ones(tokens.shape), owner
  ahead_weight = jnp.pad(weight[:, 1:], ((0, 0), (0, 1)))
  if old is not None:
    gate = ahead
    known = jnp.where(ahead > 0, apart > how.router_margin, 1.0)
    # Where the selves disagree lies what must be moved, or must be kept.
    owned = jnp.where(ahead > 0.5, how.emphasis[0], how.emphasis[1])
    ahead_weight *= 1.0 + owned * jnp.minimum(apart, _MOST_NEWS)
  return (
    Judged(
      tokens, positions, ahead_weight, teacher, gate, known * ahead_weight
    ),
    out.hidden,
  )


def judge_all(
  cfg: config.ModelConfig,
  how: config.SeedingConfig,
  params: t.Params,
  selves: Selves,
  dreamt: Dreams,
) -> Judged:
  """`judge` over all dreams, a batch at a time."""
  tokens, lengths, owner, _ = dreamt
  columns = np.arange(tokens.shape[1])
  inside = (columns < lengths[:, None]).astype(np.float32)
  positions = np.broadcast_to(columns, tokens.shape)
  rows = tokens, positions, inside, owner
  batches = []
  for i in range(0, len(tokens), _JUDGE_BATCH):
    some = tuple(x[i : i + _JUDGE_BATCH] for x in rows)
    judged, _ = judge(cfg, how, params, selves, *sharding.split(some, 'batch'))
    batches.append(judged)
  return jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
