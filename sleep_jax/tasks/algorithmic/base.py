"""Tasks whose sequences are read window by window (arXiv 2605.26099)."""

import abc
from typing import Any

import numpy as np

from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data import windows as windows_lib
from sleep_jax.tasks import base as task_lib

# Second entry of the seed of a generator: of the training stream, of every
# evaluation but the last, and of the last.
_STREAM, _EVAL, _LAST_EVAL = 1, 3, 4
_LAST_EVAL_FACTOR = 4  # The last evaluation has so many times more rows.


class WindowTask(task_lib.Task, abc.ABC):
  """A generator of sequences that all have one shape.

  A subclass has `name` and `Config`, the latter with `episodes`, `eval_rows`
  and `eval_passes`, and sets `windows`, `window` and `prediction`.

  windows: J, windows of a context.
  window: L, tokens of a window.
  prediction: P, tokens of the prediction window.

  Args:
    cfg: an instance of the subclass's `Config`.
    seed: of all random draws.
    vocab: tokens are below it.
    bos: the token that begins a sequence or its prediction window.
    headline: see `Task`; the columns are these, the first one at each of
      `eval_passes`, and `passes`.
  """

  windows: int
  window: int
  prediction: int

  def __init__(
    self,
    cfg: Any,
    seed: int,
    *,
    vocab: int,
    bos: int,
    headline: tuple[str, ...],
  ):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    extra = (f'{headline[0]}@{n}' for n in sorted(cfg.eval_passes))
    self.headline, self.columns = headline, (*headline, *extra, 'passes')
    self.tokenizer = tokenizers.IntegerTokenizer(vocab, bos, windows_lib.PAD)

  @property
  def row_length(self) -> int:
    """Tokens of a sequence: its context and its prediction window."""
    return self.windows * self.window + self.prediction

  @property
  def row_length(self) -> int:
    return self.windows * self.window + self.prediction

  @abc.abstractmethod
  def batch(
    self, rng: np.random.Generator, rows: int, *, for_eval: bool = False
  ) -> windows_lib.WindowBatch:
    """`rows` new sequences; a pure function of the generator's state.

    Args:
      rng: randomness.
      rows: B.
      for_eval: whether to draw from the distribution of an evaluation.
    """

  @abc.abstractmethod
  def metrics(
    self, batch: windows_lib.WindowBatch, argmax: np.ndarray, nll: np.ndarray
  ) -> dict[str, float]:
    """Named metrics of one batch; one without any target in it is absent.

    Args:
      batch: the B sequences.
      argmax: `[B, P]` int, the likeliest token after each input.
      nll: `[B, P]` nats, minus the log-probability of each target.
    """

  @abc.abstractmethod
  def chance_level(self) -> dict[str, float]:
    """The metrics of a guess that knows the task but not the context."""

  def experience(self, episode: int) -> experience_lib.WindowStream:
    """Sequences to train on, without end."""
    return experience_lib.WindowStream(
      draw=self.batch, seed=(self._seed, _STREAM, episode)
    )

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """Metrics over new sequences, and `passes`, the mean over windows.

    Before the last episode over `eval_rows` sequences, the same ones in each
    episode. After the last over 4 * `eval_rows`, and over these again with
    each N of `eval_passes`, as `metric@N`. `by_episode` is empty.
    """
    rows = self.cfg.eval_rows
    if episode < self.episodes - 1:
      return experience_lib.EvalResult([], self._eval(student, _EVAL, rows))
    rows *= _LAST_EVAL_FACTOR
    metrics = self._eval(student, _LAST_EVAL, rows)
    for n in self.cfg.eval_passes:
      at_n = self._eval(student, _LAST_EVAL, rows, passes=n)
      metrics |= {f'{name}@{n}': value for name, value in at_n.items()}
    return experience_lib.EvalResult([], metrics)

  def _eval(
    self,
    student: task_lib.Student,
    stream: int,
    rows: int,
    passes: int | None = None,
  ) -> dict[str, float]:
    """Means over batches of `eval_rows` sequences, `rows` in all."""
    rng = np.random.default_rng([self._seed, stream])
    size = min(rows, self.cfg.eval_rows)
    by_batch = []
    for _ in range(-(-rows // size)):
      batch = self.batch(rng, size, for_eval=True)
      predicted = student.predict(batch, passes=passes)
      metrics = self.metrics(
        batch, np.asarray(predicted.argmax), np.asarray(predicted.nll)
      )
      by_batch.append(metrics | {'passes': float(predicted.passes.mean())})
    return {
      name: float(np.mean([m[name] for m in by_batch if name in m]))
      for name in sorted({name for metrics in by_batch for name in metrics})
    }


def check_evaluation(cfg: Any) -> None:
  """Makes `eval_passes` a tuple, and checks the fields that all tasks have.

  Raises:
    ConfigError: if one of them is below 1.
  """
  object.__setattr__(cfg, 'eval_passes', tuple(cfg.eval_passes))
  require_at_least(cfg, episodes=1, eval_rows=1)
  if min(cfg.eval_passes, default=1) < 1:
    raise config.ConfigError(
      f'task.eval_passes={cfg.eval_passes} must be at least 1 each.'
    )


def require_at_least(cfg: Any, **minimum: int) -> None:
  """Raises ConfigError where a field of `cfg` is below its `minimum`."""
  for name, bound in minimum.items():
    if getattr(cfg, name) < bound:
      raise config.ConfigError(
        f'task.{name}={getattr(cfg, name)} must be at least {bound}.'
      )


def check_fits(tokens: int, windows: int, window: int, lower: str) -> None:
  """Raises ConfigError if a context of `tokens` can be too long.

  Args:
    tokens: the longest context.
    windows: how many there are.
    window: tokens of each.
    lower: the setting that makes contexts shorter, for the message.
  """
  if tokens > windows * window:
    raise config.ConfigError(
      f'task: a context can have {tokens} tokens, but task.windows='
      f'{windows} of task.window={window} hold {windows * window}; raise one '
      f'of them or lower {lower}.'
    )


def shuffled_columns(rng: np.random.Generator, valid: np.ndarray) -> np.ndarray:
  """Random orders `[B, T]` of the columns, the `valid` ones first."""
  return np.argsort(np.where(valid, rng.random(valid.shape), 2.0), axis=1)
