"""Rule 110: what does a string become, after so many steps of an automaton?

The context is some independent, uniformly random strings of bits, one in each
window. Asked for is the first bit of each after `steps` steps. Rule 110 can
compute whatever can be computed, so no shortcut is expected.

The paper does not tell what lies beyond a string's ends. It must be its other
end: with zeros there, the first bit is nearly always 1, while on a ring an
always-guessed 1 gets all four labels right as often as the paper's "about 10%".
"""

import dataclasses

import numpy as np

from sleep_jax.data import windows
from sleep_jax.tasks.algorithmic import base as algorithmic

_DELIMITER = 2  # After the tokens 0 and 1.
# Below so many cells every string is tried for `chances`, else a sample.
_ENUMERABLE = 17
_SAMPLE = 2**18


@dataclasses.dataclass(frozen=True)
class Rule110Config:
  """The paper's strings; its `steps` go from 0 (retrieval) to 32."""

  width: int = 24  # Bits of a string, tokens of a window.
  strings: int = 4  # And as many windows and labels.
  steps: int = 32

  def __post_init__(self):
    algorithmic.require_at_least(self, width=1, strings=1, steps=0)


def evolve(cells: np.ndarray, steps: int) -> np.ndarray:
  """`cells` `[..., W]` of bool, rings of W, after `steps` of Rule 110."""
  for _ in range(steps):
    left, right = np.roll(cells, 1, -1), np.roll(cells, -1, -1)
    cells = (cells | right) & ~(left & cells & right)
  return cells


class Rule110:
  """The puzzle; see the module's docstring."""

  def __init__(self, cfg: Rule110Config):
    self.cfg, self.vocab = cfg, _DELIMITER + 1
    self.windows = self.prediction = cfg.strings
    self.window = cfg.width

  def batch(
    self, rng: np.random.Generator, rows: int, *, exam: bool = False
  ) -> windows.WindowBatch:
    """See `windows.Puzzle`; an exam is like any other batch."""
    del exam
    cfg = self.cfg
    cells = rng.integers(0, 2, (rows, cfg.strings, cfg.width), np.int32)
    labels = evolve(cells.astype(bool), cfg.steps)[..., 0].astype(np.int32)
    inputs = np.roll(labels, 1, axis=1)
    inputs[:, 0] = _DELIMITER
    return windows.WindowBatch(
      context=cells,
      token_mask=np.ones(cells.shape, bool),
      inputs=inputs,
      input_mask=np.ones(labels.shape, bool),
      targets=labels,
      weight=np.ones(labels.shape, np.float32),
      depth=np.full(labels.shape, cfg.steps, np.int32),
    )

  def metrics(
    self, batch: windows.WindowBatch, chosen: np.ndarray, nll: np.ndarray
  ) -> dict[str, float]:
    """`exact`: rows all of whose labels are right; `per_bit`; `loss`.

    The first also under its depth: `exact_t4` after four steps.
    """
    right = chosen == batch.targets
    exact = float(right.all(1).mean())
    return {
      'exact': exact,
      f'exact_t{self.cfg.steps}': exact,
      'per_bit': float(right.mean()),
      'loss': float(nll.mean()),
    }

  def chance_level(self) -> dict[str, float]:
    """Of one who always guesses the commoner bit, or its probability."""
    width = self.cfg.width
    if width < _ENUMERABLE:
      cells = np.arange(2**width)[:, None] >> np.arange(width) & 1 == 1
    else:
      cells = np.random.default_rng(110).random((_SAMPLE, width)) < 0.5
    ones = float(evolve(cells, self.cfg.steps)[:, 0].mean())
    common = max(ones, 1 - ones)
    both = np.array([p for p in (ones, 1 - ones) if p])
    exact = common**self.cfg.strings
    return {
      'exact': exact,
      f'exact_t{self.cfg.steps}': exact,
      'per_bit': common,
      'loss': float(-(both * np.log(both)).sum()),
    }
