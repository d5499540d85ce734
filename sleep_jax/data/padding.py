"""Sequences of unequal length as arrays of few shapes."""

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import contexts

MULTIPLE = 16  # Rows are padded to it, so that few shapes are compiled.


def left_pad(
  prompts: list[list[int]], pad: int, multiple: int = 8, width: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts of unequal length as `[B, P]`, right-aligned, and lengths `[B]`.

  P is `width`, or the longest prompt's length rounded up to a `multiple`, so
  that few shapes are compiled.
  """
  lengths = np.array([len(p) for p in prompts], np.int32)
  width = width or -(-int(lengths.max()) // multiple) * multiple
  out = np.full((len(prompts), width), pad, np.int32)
  for row, prompt in zip(out, prompts, strict=True):
    row[width - len(prompt) :] = prompt
  return out, lengths


def pad_to_batches(
  tokens: np.ndarray, weight: np.ndarray, rows: int
) -> tuple[jax.Array, jax.Array]:
  """Rows `[N, T]` and their weights, filled up to whole batches of `rows`.

  Returns:
    Tokens and weights `[N', T]`; added rows have weight 0.
  """
  extra = ((0, -len(tokens) % rows), (0, 0))
  return jnp.asarray(np.pad(tokens, extra)), jnp.asarray(np.pad(weight, extra))


def groups(tree: at.Tree, size: int) -> at.Tree:
  """Rows `[N, ...]` as `[K, size, ...]`; the last group ends with zeros."""

  def split(x: at.Array) -> jax.Array:
    extra = [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, extra).reshape(-1, size, *x.shape[1:])

  return jax.tree.map(split, tree)


def prompt_rows(
  pairs: list[tuple[contexts.TokenIds, contexts.TokenIds]],
  pad: int,
  width: int = 0,
) -> contexts.TrainingRows:
  """(prompt, completion) pairs as rows; the completions are the targets.

  Rows have `width` tokens, or as many as the longest pair needs.
  """
  longest = width or max(len(a) + len(b) for a, b in pairs)
  tokens = np.full((len(pairs), -(-longest // MULTIPLE) * MULTIPLE), pad)
  weight = np.zeros(tokens.shape, np.float32)
  for i, (prompt, completion) in enumerate(pairs):
    end = len(prompt) + len(completion)
    tokens[i, :end] = prompt + completion
    weight[i, len(prompt) : end] = 1.0
  return contexts.TrainingRows(tokens.astype(np.int32), weight)
