"""`recall`: the values of keys that stood in windows now evicted.

Multi-query associative recall (MQAR, arXiv 2312.04927), read window by window:
the context is pairs of a key and a value, all keys different, and the
prediction window asks for keys in random order. With `rewritten` pairs some
keys come again in a later window with another value, and the newest is right: a
memory that only adds keeps both.
"""

import dataclasses

import numpy as np

from sleep_jax import config
from sleep_jax.data import windows
from sleep_jax.tasks.algorithmic import base as algorithmic

_FIRST = 1  # Below it is padding.


@dataclasses.dataclass(frozen=True)
class RecallConfig:
  """Sizes of a context; a window holds `pairs / windows` pairs."""

  windows: int = 4
  pairs: int = 32  # Of a context, rewritten ones among them.
  rewritten: int = 0
  keys: int = 64  # Keys that there are.
  values: int = 64
  queries: int = 16
  episodes: int = 10  # Evaluations.
  eval_rows: int = 512  # Sequences of an evaluation; of the last 4 times more.
  eval_passes: tuple[int, ...] = ()  # Further N of the last evaluation.

  def __post_init__(self):
    algorithmic.check_evaluation(self)
    algorithmic.require_at_least(
      self, windows=1, pairs=1, rewritten=0, keys=1, values=2, queries=1
    )
    if self.pairs % self.windows:
      raise config.ConfigError(
        f'task.pairs={self.pairs} is not a multiple of task.windows='
        f'{self.windows}; every window holds as many.'
      )
    per_window, different = self.pairs // self.windows, self.different
    if self.rewritten > per_window or self.rewritten and self.windows == 1:
      raise config.ConfigError(
        f'task.rewritten={self.rewritten} pairs stand in the last of '
        f'task.windows={self.windows}, which holds {per_window} and must not '
        'be the only one; lower it.'
      )
    if not self.queries <= different <= self.keys:
      raise config.ConfigError(
        f'task.queries={self.queries} of {different} different keys (task.pairs'
        f' - task.rewritten) of task.keys={self.keys}: each must be at most '
        'the next.'
      )

  @property
  def different(self) -> int:
    """Keys of a context."""
    return self.pairs - self.rewritten


class Recall(algorithmic.WindowTask):
  """The task; see the module's docstring."""

  name = 'recall'
  Config = RecallConfig

  def __init__(self, cfg: RecallConfig, seed: int):
    super().__init__(
      cfg,
      seed,
      vocab=_FIRST + cfg.keys + cfg.values,
      bos=_FIRST,  # Nothing stands before the first key.
      headline=('accuracy', 'exact', 'loss'),
    )
    self.windows, self.prediction = cfg.windows, 2 * cfg.queries
    self.window = 2 * cfg.pairs // cfg.windows

  def batch(
    self, rng: np.random.Generator, rows: int, *, for_eval: bool = False
  ) -> windows.WindowBatch:
    """See `WindowTask.batch`; evaluation and training do not differ.

    `depth` is how many windows ago the value was told, 1 for the last.
    """
    del for_eval
    cfg, row = self.cfg, np.arange(rows)[:, None]
    keys = rng.random((rows, cfg.keys)).argsort(1)[:, : cfg.different]
    first = cfg.pairs // cfg.windows * (cfg.windows - 1)
    again = rng.random((rows, first)).argsort(1)
    # Those of the last window that are told again take the places at its end.
    places = np.concatenate(
      [
        np.broadcast_to(np.arange(cfg.different), keys.shape),
        again[:, : cfg.rewritten],
      ],
      axis=1,
    )
    values = rng.integers(0, cfg.values, (rows, cfg.pairs))
    told = np.stack(
      [_FIRST + keys[row, places], _FIRST + cfg.keys + values], axis=2
    )
    asked = rng.random(keys.shape).argsort(1)[:, : cfg.queries]
    newest = np.broadcast_to(np.arange(cfg.different), keys.shape).copy()
    if cfg.rewritten:
      last = np.arange(cfg.different, cfg.pairs)
      newest[row, places[:, cfg.different :]] = last
    where = newest[row, asked]
    answers = told[row, where].reshape(rows, -1)  # A key, its value, and so on.
    depth = cfg.windows - where * cfg.windows // cfg.pairs
    depth = np.stack([depth, np.zeros_like(depth)], axis=2).reshape(rows, -1)
    return windows.WindowBatch(
      context=told.reshape(rows, cfg.windows, -1).astype(np.int32),
      token_mask=np.ones((rows, cfg.windows, self.window), bool),
      inputs=answers.astype(np.int32),
      input_mask=np.ones(answers.shape, bool),
      targets=np.pad(answers[:, 1:], ((0, 0), (0, 1))).astype(np.int32),
      weight=(depth > 0).astype(np.float32),
      depth=depth.astype(np.int32),
    )

  def metrics(
    self, batch: windows.WindowBatch, argmax: np.ndarray, nll: np.ndarray
  ) -> dict[str, float]:
    """`accuracy`, `exact` (rows with all answers right), `loss` in nats.

    The first also by its depth: `accuracy_w4` four windows after the telling.
    """
    right, counts = argmax == batch.targets, batch.weight > 0
    by_depth = {
      f'accuracy_w{depth}': float(right[batch.depth == depth].mean())
      for depth in np.unique(batch.depth[counts])
    }
    return {
      'accuracy': float(right[counts].mean()),
      'exact': float((right | ~counts).all(1).mean()),
      'loss': float(nll[counts].mean()),
    } | by_depth

  def chance_level(self) -> dict[str, float]:
    """Of a guess among all values."""
    chance = 1.0 / self.cfg.values
    by_depth = {f'accuracy_w{i + 1}': chance for i in range(self.cfg.windows)}
    return by_depth | {
      'accuracy': chance,
      'exact': chance**self.cfg.queries,
      'loss': float(np.log(self.cfg.values)),
    }
