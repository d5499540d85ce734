"""`rule110`: the state of a cellular automaton after a number of steps.

The context is `strings` independent, uniformly random bit strings, one in each
window. The targets are the first bit of each string after `steps` steps of
Rule 110. Rule 110 is Turing complete, so no shortcut is expected.

arXiv 2605.26099 does not state the boundary condition. Strings are rings here:
with zeros beyond the ends the first bit is nearly always 1, while on a ring a
constant guess of 1 gets all four labels right as often as the paper's "about
10%".
"""

import dataclasses

import numpy as np

from sleep_jax.data import windows
from sleep_jax.tasks.algorithmic import base as algorithmic

_DELIMITER = 2  # After the tokens 0 and 1.
# `chance_level` enumerates all strings below this width, else draws a sample.
_ENUMERABLE = 17
_SAMPLE = 2**18


@dataclasses.dataclass(frozen=True)
class Rule110Config:
  """The paper's strings; its `steps` go from 0 (retrieval) to 32."""

  width: int = 24  # Bits of a string, tokens of a window.
  strings: int = 4  # And as many windows and labels.
  steps: int = 32
  episodes: int = 10  # Evaluations.
  eval_rows: int = 512  # Sequences of an evaluation; of the last 4 times more.
  eval_passes: tuple[int, ...] = ()  # Further N of the last evaluation.

  def __post_init__(self):
    algorithmic.check_evaluation(self)
    algorithmic.require_at_least(self, width=1, strings=1, steps=0)


def evolve(cells: np.ndarray, steps: int) -> np.ndarray:
  """`cells` `[..., W]` of bool, rings of W, after `steps` of Rule 110."""
  for _ in range(steps):
    left, right = np.roll(cells, 1, -1), np.roll(cells, -1, -1)
    cells = (cells | right) & ~(left & cells & right)
  return cells


class Rule110(algorithmic.WindowTask):
  """The task; see the module's docstring."""

  name = 'rule110'
  Config = Rule110Config

  def __init__(self, cfg: Rule110Config, seed: int):
    super().__init__(
      cfg,
      seed,
      vocab=_DELIMITER + 1,
      bos=_DELIMITER,
      headline=('exact', 'per_bit', 'loss'),
    )
    self.windows = self.prediction = cfg.strings
    self.window = cfg.width

  def batch(
    self, rng: np.random.Generator, rows: int, *, for_eval: bool = False
  ) -> windows.WindowBatch:
    """See `WindowTask.batch`; evaluation and training do not differ."""
    del for_eval
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
    self, batch: windows.WindowBatch, argmax: np.ndarray, nll: np.ndarray
  ) -> dict[str, float]:
    """`exact`: rows all of whose labels are right; `per_bit`; `loss` in nats.

    The first also by its depth: `exact_t4` after four steps.
    """
    right = argmax == batch.targets
    exact = float(right.all(1).mean())
    return {
      'exact': exact,
      f'exact_t{self.cfg.steps}': exact,
      'per_bit': float(right.mean()),
      'loss': float(nll.mean()),
    }

  def chance_level(self) -> dict[str, float]:
    """Of a constant guess of the commoner bit; `loss` of its probability."""
    width = self.cfg.width
    if width < _ENUMERABLE:
      cells = np.arange(2**width)[:, None] >> np.arange(width) & 1 == 1
    else:
      cells = np.random.default_rng(110).random((_SAMPLE, width)) < 0.5
    ones = float(evolve(cells, self.cfg.steps)[:, 0].mean())
    commoner = max(ones, 1 - ones)
    probs = np.array([p for p in (ones, 1 - ones) if p])
    exact = commoner**self.cfg.strings
    return {
      'exact': exact,
      f'exact_t{self.cfg.steps}': exact,
      'per_bit': commoner,
      'loss': float(-(probs * np.log(probs)).sum()),
    }
