"""Rows of one length from texts of many, and whole batches from rows."""

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax.data import contexts

_MULTIPLE = 16  # Rows of prompt and dream are padded to it: few shapes.


def pad_to_batches(
  tokens: np.ndarray, weight: np.ndarray, rows: int
) -> tuple[jax.Array, jax.Array]:
  """Rows `[N, T]` and their weights, filled up to whole batches of `rows`.

  Returns:
    Tokens and weights `[N', T]`; rows that were added weigh nothing.
  """
  extra = ((0, -len(tokens) % rows), (0, 0))
  return jnp.asarray(np.pad(tokens, extra)), jnp.asarray(np.pad(weight, extra))


def prompt_rows(
  pairs: list[tuple[contexts.TokenIds, contexts.TokenIds]], pad: int
) -> contexts.TrainingRows:
  """(what is read, what is learnt) as rows."""
  longest = max(len(a) + len(b) for a, b in pairs)
  tokens = np.full((len(pairs), -(-longest // _MULTIPLE) * _MULTIPLE), pad)
  weight = np.zeros(tokens.shape, np.float32)
  for i, (read, learnt) in enumerate(pairs):
    tokens[i, : len(read) + len(learnt)] = read + learnt
    weight[i, len(read) : len(read) + len(learnt)] = 1.0
  return contexts.TrainingRows(tokens.astype(np.int32), weight)


def left_pad(
  prompts: list[list[int]], pad: int, multiple: int = 8
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts of unequal length as `[B, P]`, right-aligned, and lengths `[B]`.

  P is rounded up to a `multiple`, so that few shapes are ever compiled.
  """
  lengths = np.array([len(p) for p in prompts], np.int32)
  width = -(-int(lengths.max()) // multiple) * multiple
  out = np.full((len(prompts), width), pad, np.int32)
  for row, prompt in zip(out, prompts, strict=True):
    row[width - len(prompt) :] = prompt
  return out, lengths
