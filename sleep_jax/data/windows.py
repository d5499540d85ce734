"""Sequences that are read window by window, slept on, and then asked about.

A puzzle of "offline recurrence" (arXiv 2605.26099) is a context, cut in windows
of one length that are read one after the other and forgotten, and a prediction
window, in which alone something is asked for.

The paper does not tell how the first label is asked for. Under the usual shift
by one it would be predicted at the last token of the context, in a window that
is slept on. Here the prediction window begins with a token that asks (a
delimiter or a query), the gold labels follow it, and `targets` are shifted
already: nothing is predicted in the context, and no layout depends on how many
passes a sleep makes.
"""

import dataclasses

import jax
import numpy as np

PAD = 0  # Of every puzzle.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowBatch:
  """A batch of B sequences: J windows of L tokens, and the one that predicts.

  context: `[B, J, L]` int32, to be read and slept on.
  present: `[B, J, L]` bool, False on padding, which no layer may see.
  inputs: `[B, P]` int32, the prediction window.
  asked: `[B, P]` bool, `present` of the inputs.
  targets: `[B, P]` int32, the token that is right after each input.
  weight: `[B, P]` float32, 1 where the target is asked for.
  depth: `[B, P]` int32, steps of reasoning behind each weighted target; 0 where
    there are none, and where nothing is asked for.
  """

  context: np.ndarray
  token_mask: np.ndarray
  inputs: np.ndarray
  input_mask: np.ndarray
  targets: np.ndarray
  weight: np.ndarray
  depth: np.ndarray


def pack(
  tokens: np.ndarray, keep: np.ndarray, length: int, *, at_end: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Closes the gaps of every row.

  Args:
    tokens: `[B, T]`.
    keep: `[B, T]` bool; the other tokens are gaps.
    length: of the result; what does not fit is cut off where padding would be.
    at_end: whether what is kept ends (or begins) the row.

  Returns:
    `[B, length]` int32 tokens with PAD for the rest, and where they are kept.
  """
  if (lack := length - tokens.shape[1]) > 0:
    sides = (0, 0), ((lack, 0) if at_end else (0, lack))
    tokens, keep = np.pad(tokens, sides), np.pad(keep, sides)
  order = np.argsort(keep if at_end else ~keep, axis=1, kind='stable')
  order = order[:, -length:] if at_end else order[:, :length]
  kept = np.take_along_axis(keep, order, axis=1)
  packed = np.take_along_axis(tokens, order, axis=1)
  return np.where(kept, packed, PAD).astype(np.int32), kept
