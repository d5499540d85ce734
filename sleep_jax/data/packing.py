"""Short documents packed into rows of one length.

A level with a clock of a thousand tokens cannot read rows of thirty: it would
never tick within one. Packed, a row holds many documents, one after another.
**Attention sees across documents**, and positions run on: a row is one text to
the model, and a document is read in the light of those before it, as in the
pretraining of most models.
"""

import dataclasses
from typing import TypeVar

import numpy as np

from sleep_jax import config
from sleep_jax.data import contexts as contexts_lib
from sleep_jax.data import experience as experience_lib

Rows = TypeVar('Rows', experience_lib.Experience, contexts_lib.TrainingRows)


def pack(
  documents: list[list[int]], length: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
  """Documents in their order, as many to a row as fit.

  A document longer than a row continues in the next rows; no other is split.
  Its stop token tells a document from the next.

  Args:
    documents: token ids, each with its own beginning and end.
    length: T, tokens of a row.
    pad: fills a row after its last document.

  Returns:
    tokens: `[N, T]` int32.
    weight: `[N, T]` float32, 1 on documents and 0 on padding.
  """
  rows: list[list[int]] = []
  for document in documents:
    pieces = [document[i : i + length] for i in range(0, len(document), length)]
    for piece in pieces:
      if rows and len(rows[-1]) + len(piece) <= length:
        rows[-1].extend(piece)
      else:
        rows.append(list(piece))
  tokens = np.full((len(rows), length), pad, np.int32)
  weight = np.zeros((len(rows), length), np.float32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
    weight[i, : len(row)] = 1.0
  return tokens, weight


def lengths(weight: np.ndarray) -> np.ndarray:
  """Tokens of each document, `[N]`: up to the last that is a target.

  What follows teaches nothing, and nothing reads it.

  Args:
    weight: `[N, T]`, of every token as a target.
  """
  is_target = np.asarray(weight) > 0
  last = weight.shape[1] - is_target[:, ::-1].argmax(axis=1)
  return np.where(is_target.any(axis=1), last, 0)


def repack(rows: Rows, length: int, pad: int) -> Rows:
  """The same documents in the same order, in fewer rows of `length` tokens.

  A document that does not fit behind the others begins the next row; one that
  is longer than a row is cut into pieces. No document is told to predict the
  beginning of the next: the weight of its first token is 0.

  Args:
    rows: `[N, T]`, of one document each.
    length: tokens of a new row.
    pad: the token that fills a row's end, at weight 0.

  Raises:
    ConfigError: if `length` is too small for any document.
  """
  if length < 2:
    raise config.ConfigError(
      f'rows of {length} tokens (wake.window, trial.window) have no target; '
      'use 2 or more.'
    )
  new: list[list[tuple[np.ndarray, np.ndarray]]] = []
  used = length  # So that the first piece begins a row.
  sizes = lengths(rows.weight)
  for tokens, weight, size in zip(rows.tokens, rows.weight, sizes, strict=True):
    for start in range(0, size, length):
      part = slice(start, min(start + length, size))
      part_weight = np.array(weight[part], np.float32)
      if not start:
        part_weight[0] = 0.0
      if used + len(part_weight) > length:
        new.append([])
        used = 0
      new[-1].append((tokens[part], part_weight))
      used += len(part_weight)
  out = np.full((len(new), length), pad, np.int32)
  out_weight = np.zeros(out.shape, np.float32)
  for i, pieces in enumerate(new):
    row, row_weight = (np.concatenate(x) for x in zip(*pieces, strict=True))
    out[i, : len(row)], out_weight[i, : len(row)] = row, row_weight
  return dataclasses.replace(rows, tokens=out, weight=out_weight)
