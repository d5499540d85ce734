"""Sequences of context windows and a prediction window (arXiv 2605.26099).

A context is cut into windows of one length, which are read one after the other;
each is evicted from the cache after it is read. All targets are in the
prediction window that follows.

The paper does not state the input at which the first label is predicted. Under
the usual shift by one it would be the last token of the context, in a window
that is evicted. Here the prediction window begins with a delimiter or a query,
the gold labels follow it, and `targets` are shifted already: nothing is
predicted in the context, and no layout depends on the number of passes.
"""

import dataclasses

import jax
import numpy as np

from sleep_jax import array_typing as at

PAD = 0  # Of all window tasks.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowBatch:
  """A batch of B sequences: J windows of L tokens, and a prediction window.

  context: `[B, J, L]` int32.
  token_mask: `[B, J, L]` bool, False on padding, which no layer may use.
  inputs: `[B, P]` int32, the prediction window.
  input_mask: `[B, P]` bool, False on the padding of `inputs`.
  targets: `[B, P]` int32, the token after each input.
  weight: `[B, P]` float32, 1 where the target counts, else 0.
  depth: `[B, P]` int32, steps of computation behind each weighted target; 0
    where there are none, and where the weight is 0.
  """

  context: at.HostLeaf
  token_mask: at.HostLeaf
  inputs: at.HostLeaf
  input_mask: at.HostLeaf
  targets: at.HostLeaf
  weight: at.HostLeaf
  depth: at.HostLeaf


def pack(
  tokens: np.ndarray, keep: np.ndarray, length: int, *, at_end: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Moves the kept tokens of each row together, in order.

  Args:
    tokens: `[B, T]`.
    keep: `[B, T]` bool; the other tokens are dropped.
    length: of the result; excess tokens are cut on the side of the padding.
    at_end: whether kept tokens end the row; else they begin it.

  Returns:
    `[B, length]` int32 tokens with PAD for the rest, and their bool mask.
  """
  if (missing := length - tokens.shape[1]) > 0:
    sides = (0, 0), ((missing, 0) if at_end else (0, missing))
    tokens, keep = np.pad(tokens, sides), np.pad(keep, sides)
  order = np.argsort(keep if at_end else ~keep, axis=1, kind='stable')
  order = order[:, -length:] if at_end else order[:, :length]
  mask = np.take_along_axis(keep, order, axis=1)
  packed = np.take_along_axis(tokens, order, axis=1)
  return np.where(mask, packed, PAD).astype(np.int32), mask
