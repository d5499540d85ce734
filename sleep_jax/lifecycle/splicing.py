"""Rows that interleave segments of dreams.

A segment (a sentence, say) ends with the tokenizer's separator. It is labelled
in the document that it was dreamt in, where its teacher knows it, and learnt
among segments of other documents: what is recalled must not depend on the
company that it was read in.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import tokenizers

Spans = np.ndarray  # [segments, 3]: row, first column, end.


def spans(
  tokens: np.ndarray, lengths: np.ndarray, tokenizer: tokenizers.Tokenizer
) -> Spans:
  """The whole segments of rows, BOS cut.

  Where nothing but the end of a document separates, whole documents, with their
  own beginnings and even if they were cut.

  Args:
    tokens: `[N, T]`.
    lengths: `[N]`.
    tokenizer: has the separator.
  """
  if tokenizer.separator == tokenizer.stop:
    rows = np.arange(len(tokens))
    return np.stack([rows, np.zeros_like(rows), lengths], axis=1)
  out = []
  for row, (of_row, length) in enumerate(zip(tokens, lengths, strict=True)):
    ends = np.flatnonzero(of_row[1:length] == tokenizer.separator) + 2
    starts = np.concatenate([[1], ends[:-1]])
    out += [(row, start, end) for start, end in zip(starts, ends)]
  return np.array(out, int).reshape(-1, 3)


def distinct(of_rows: Spans, tokens: np.ndarray) -> Spans:
  """Those that are not equal to an earlier one."""
  seen = {tokens[r, a:b].tobytes(): i for i, (r, a, b) in enumerate(of_rows)}
  return of_rows[sorted(seen.values())]


def interleave(
  pools: list[Spans],
  shares: list[float],
  shape: tuple[int, int],
  width: int,
  rng: np.random.Generator,
) -> at.Int[np.ndarray, 'N T']:
  """Where the tokens of new rows come from, as row * width + column.

  Args:
    pools: segments of each source, none of them empty.
    shares: of each source, the probability that a segment is of it.
    shape: of the new rows, which are full: `[N, T]`.
    width: of the rows that the segments are in.
    rng: draws segments and their order.
  """
  pools = [rng.permutation(pool) for pool in pools]
  used = [0] * len(pools)
  out = np.zeros(shape, int)
  # Column 0 of any row is the BOS, unless segments bring their beginnings.
  begin = int(min(pool[:, 1].min() for pool in pools) > 0)
  for row in out:
    end = begin
    while end < len(row):
      source = int(rng.choice(len(pools), p=shares))
      of_row, start, stop = pools[source][used[source] % len(pools[source])]
      used[source] += 1
      part = of_row * width + np.arange(start, stop)[: len(row) - end]
      row[end : end + len(part)] = part
      end += len(part)
  return out


def take(
  tokens: at.Array, predictions: Any, where: at.Int[np.ndarray, 'N T']
) -> tuple[jax.Array, Any, at.Float[np.ndarray, 'N T']]:
  """Rows as `interleave` has them.

  Args:
    tokens: `[n, t]`.
    predictions: a tree of `[n, t, ...]`, of which column c is about the token
      in column c + 1.
    where: the places of the new rows' tokens.

  Returns:
    The tokens; the predictions, each taken along with the token that it is
    about; and where there is one, 1 or 0: a row's first token has none.
  """
  width = tokens.shape[1]
  after = np.pad(where[:, 1:], ((0, 0), (0, 1)))
  there = (after % width > 0).astype(np.float32)
  about = np.maximum(after - 1, 0)

  def rows(x: at.Array, index: np.ndarray) -> jax.Array:
    # By NumPy: JAX would compile for every number of rows, so every night.
    return jnp.asarray(np.asarray(x).reshape(-1, *x.shape[2:])[index])

  taken = jax.tree.map(lambda x: rows(x, about), predictions)
  return rows(tokens, where), taken, there
