"""Short documents packed into rows of one length."""

import numpy as np


def pack(
  documents: list[list[int]], length: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
  """Documents in their order, as many to a row as fit.

  A document longer than a row continues in the next rows; no other is split.
  Nothing keeps a document from attending to those before it in its row, as in
  the pretraining of most models; its stop token tells them apart.

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
