"""Dreams of earlier nights, kept with what their teachers predicted.

Each night samples the past anew from a model that has already lost a part of
it, and so passes on a little less every time. What was written down on the
night when it was learnt does not fade. Dark experience replay (arXiv
2004.07211) keeps a model's logits beside rows of the stream; here the rows are
the model's own dreams, so that no text of a day outlives it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import splicing
from sleep_jax.objectives import divergences
from sleep_jax.runtime import sharding

BASE_NIGHT = -1  # Of what the base dreamt before the first day.


class Archive(at.Pytree):
  """Rows of dreams, at most as many of each night as of another."""

  tokens: at.Int[jax.Array, 'N T']
  weight: at.Float[jax.Array, 'N T']  # Weight of the prediction of token t+1.
  teacher: divergences.TopK  # By numbers of the whole vocabulary.
  night: at.Int[jax.Array, 'N']  # When it was dreamt, from 0.

  def __len__(self) -> int:
    return len(self.tokens)

  def rows(self, index: np.ndarray) -> 'Archive':
    """The rows at `index`."""
    # By NumPy: JAX would compile for every number of rows, so every night.
    return jax.tree.map(lambda x: jnp.asarray(x[index]), sharding.fetch(self))

  def padded(self, rows: int) -> 'Archive':
    """So many rows, of which those that are added have no weight."""
    padded = self.rows(np.minimum(np.arange(rows), len(self) - 1))
    inside = jnp.arange(rows) < len(self)
    return padded.replace(weight=padded.weight * inside[:, None])

  def spliced(
    self, rows: int, tokenizer: tokenizers.Tokenizer, rng: np.random.Generator
  ) -> 'Archive':
    """So many rows, of segments of all rows; as if all of one night."""
    own = sharding.fetch(self)
    where = splicing.interleave(
      [self.segments(tokenizer)],
      [1.0],
      (rows, own.tokens.shape[1]),
      own.tokens.shape[1],
      rng,
    )
    tokens, (weight, teacher), there = splicing.take(
      own.tokens, (own.weight, own.teacher), where
    )
    return Archive(tokens, weight * there, teacher, jnp.zeros(rows, jnp.int32))

  def segments(self, tokenizer: tokenizers.Tokenizer) -> splicing.Spans:
    """The segments of its rows, see `splicing.spans`."""
    tokens, weight = (np.asarray(x) for x in (self.tokens, self.weight))
    column = np.arange(1, tokens.shape[1] + 1)
    # Predictions that were contradicted have no weight either.
    written = (tokens != tokenizer.pad) * column
    predicted = (weight > 0) * (column + 1)
    lengths = np.maximum(written, predicted).max(axis=1)
    return splicing.spans(tokens, lengths, tokenizer)

  def likeliest(self) -> at.Int[jax.Array, 'N T']:
    """The token that was predicted for each next one."""
    best = self.teacher.logprobs[..., :-1].argmax(-1)[..., None]
    return jnp.take_along_axis(self.teacher.tokens, best, axis=-1)[..., 0]


def empty(length: int, top_k: int) -> Archive:
  """An archive of no rows of `length` tokens, each with `top_k` predictions."""
  return Archive(
    jnp.zeros((0, length), jnp.int32),
    jnp.zeros((0, length)),
    divergences.TopK(
      jnp.zeros((0, length, top_k), jnp.int32),
      jnp.zeros((0, length, top_k + 1)),
    ),
    jnp.zeros((0,), jnp.int32),
  )


def contradicted(
  threshold: float,
  logits: at.Float[jax.Array, '*B M'],
  past: at.Int[jax.Array, '*B'],
  before: at.Int[jax.Array, '*B'] | None = None,
) -> at.Bool[jax.Array, '*B']:
  """Whether a model has been told something else than `past`.

  It is surer than `threshold` of another token, 1 = never; and if its choice
  `before` the day is given, that was another one. What it said in the morning
  already, instead of what is archived, it has only forgotten, and without
  rehearsal would never know again.
  """
  if threshold == 1.0:
    return jnp.zeros(past.shape, bool)
  choice = logits.argmax(-1)
  told = (jax.nn.softmax(logits).max(-1) > threshold) & (choice != past)
  if before is not None:
    told &= before != choice
  return told


def extend(
  archive: Archive,
  dreams: Archive,
  size: int,
  rng: np.random.Generator,
  *,
  keep_base: bool = False,
) -> Archive:
  """Adds a night's dreams, and keeps at most `size` rows, drawn at random.

  Every night keeps as many; where they do not divide `size`, earlier nights
  keep one more. With `keep_base` the rows of night `BASE_NIGHT` all stay, and
  the others share the rest.
  """
  both = sharding.fetch((archive, dreams))
  both = jax.tree.map(lambda *x: np.concatenate(x), *both)
  of_row = np.asarray(both.night)
  nights, kept = np.unique(of_row), []
  if keep_base:
    kept = [np.flatnonzero(of_row == BASE_NIGHT)]
    nights, size = nights[nights != BASE_NIGHT], size - len(kept[0])
  for i, night in enumerate(nights):
    quota = size // len(nights) + (i < size % len(nights))
    kept.append(rng.permutation(np.flatnonzero(of_row == night))[:quota])
  return both.rows(np.sort(np.concatenate(kept)))
