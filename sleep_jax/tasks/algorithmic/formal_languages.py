"""`formal_languages`: after every symbol, what the language allows next.

The protocol of arXiv 2009.11264, on the languages of Nested Learning's Table 5:
a model reads words up to a length, and is then asked about longer ones too. The
target after a symbol is the set of symbols that may follow, the end among them,
as one class; of `parity` it is whether the number of ones is even.

A word is read in the prediction window, so that nothing of it is evicted; the
context is one window of padding.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from sleep_jax import config
from sleep_jax.data import windows
from sleep_jax.tasks.algorithmic import base as algorithmic

_BEGIN, _SYMBOLS, _SETS = 1, 2, 4  # Of each of the latter two there are four.
_VOCAB = _SYMBOLS + _SETS + 4
_SAMPLE = 4096  # Words from which `chance_level` counts.

# Symbols and classes of B words of a length from the first to the second
# number, `[B, T]` each; both are -1 behind a word.
_Words = tuple[np.ndarray, np.ndarray]
_Language = Callable[[np.random.Generator, int, tuple[int, int]], _Words]


def parity(
  rng: np.random.Generator, rows: int, lengths: tuple[int, int]
) -> _Words:
  """Bits; the class is the parity of those so far. All words are longest."""
  bits = rng.integers(0, 2, (rows, lengths[1]))
  return bits, bits.cumsum(1) % 2


def aa_star(
  rng: np.random.Generator, rows: int, lengths: tuple[int, int]
) -> _Words:
  """`(aa)*`: the class is whether the word may end. All words are longest."""
  del rng  # Every word begins the longest one.
  read = np.broadcast_to(np.arange(1, lengths[1] + 1), (rows, lengths[1]))
  return np.zeros_like(read), read % 2


def abab_star(
  rng: np.random.Generator, rows: int, lengths: tuple[int, int]
) -> _Words:
  """`(abab)*`: a b follows, or an a, or an a or the end."""
  _, odd = aa_star(rng, rows, lengths)
  read = odd.cumsum(1)  # Letters a.
  return 1 - odd, np.where(odd, 1, np.where(read % 2, 2, 0))


def _blocks(number: int) -> _Language:
  """`a^n b^n` and so on: as many of each of `number` symbols, in order."""

  def words(
    rng: np.random.Generator, rows: int, lengths: tuple[int, int]
  ) -> _Words:
    shortest, longest = -(-lengths[0] // number), lengths[1] // number
    n = rng.integers(shortest, longest + 1, rows)[:, None]
    at = np.arange(lengths[1])[None]
    symbols = np.where(at < number * n, at // n, -1)
    # An a may be followed by another; of the others n says how many.
    classes = np.where(at < n, 0, (at + 1) // n)
    return symbols, np.where(symbols < 0, -1, classes)

  return words


def shuffle_2(
  rng: np.random.Generator, rows: int, lengths: tuple[int, int]
) -> _Words:
  """Two kinds of brackets, each balanced, in any order among each other.

  The class has a bit for each kind that may be closed; all may be opened.
  """
  symbols = np.zeros((rows, lengths[1]), int)
  depth = np.zeros((rows, 2), int)
  classes = np.zeros_like(symbols)
  everyone = np.arange(rows)
  for t in range(lengths[1]):
    kind = rng.integers(0, 2, rows)
    closes = (rng.random(rows) < 0.5) & (depth[everyone, kind] > 0)
    depth[everyone, kind] += np.where(closes, -1, 1)
    symbols[:, t] = 2 * kind + closes
    classes[:, t] = (depth > 0) @ np.array([1, 2])
  return symbols, classes


LANGUAGES: dict[str, _Language] = {
  'parity': parity,
  'aa_star': aa_star,
  'abab_star': abab_star,
  'a_n_b_n': _blocks(2),
  'a_n_b_n_c_n': _blocks(3),
  'shuffle_2': shuffle_2,
}


@dataclasses.dataclass(frozen=True)
class FormalLanguagesConfig:
  """A language, and the lengths of its words."""

  language: str = 'parity'
  length: int = 40  # Longest word to train on.
  long_length: int = 80  # Longest word to be asked about.
  episodes: int = 10  # Evaluations.
  eval_rows: int = 512  # Words of an evaluation, half of them long ones.
  eval_passes: tuple[int, ...] = ()  # Further N of the last evaluation.

  def __post_init__(self):
    algorithmic.check_evaluation(self)
    config.lookup(self.language, LANGUAGES, 'task.language')
    algorithmic.require_at_least(self, length=6, eval_rows=2)
    algorithmic.require_at_least(self, long_length=self.length + 6)


class FormalLanguages(algorithmic.WindowTask):
  """The task; see the module's docstring."""

  name = 'formal_languages'
  Config = FormalLanguagesConfig

  def __init__(self, cfg: FormalLanguagesConfig, seed: int):
    super().__init__(
      cfg,
      seed,
      vocab=_VOCAB,
      bos=_BEGIN,
      headline=('exact_long', 'exact', 'accuracy_long', 'accuracy', 'loss'),
    )
    self.windows = self.window = 1
    self.prediction = cfg.long_length

  def batch(
    self, rng: np.random.Generator, rows: int, *, for_eval: bool = False
  ) -> windows.WindowBatch:
    """See `WindowTask.batch`; half of the rows `for_eval` are longer.

    `depth` is 1 in words of at most `length`, and 2 in longer ones.
    """
    c = self.cfg
    size = c.long_length if for_eval else c.length
    words = LANGUAGES[c.language]
    parts = [words(rng, rows - rows // 2 * for_eval, (1, c.length))]
    if for_eval:
      parts.append(words(rng, rows // 2, (c.length + 1, size)))
    symbols, classes = (
      np.concatenate([_widened(x, size) for x in side])
      for side in zip(*parts, strict=True)
    )
    there = symbols >= 0
    long = (np.arange(rows) >= len(parts[0][0]))[:, None]
    return windows.WindowBatch(
      context=np.full((rows, 1, 1), windows.PAD, np.int32),
      token_mask=np.zeros((rows, 1, 1), bool),
      inputs=np.where(there, _SYMBOLS + symbols, windows.PAD).astype(np.int32),
      input_mask=there,
      targets=np.where(there, _SYMBOLS + _SETS + classes, 0).astype(np.int32),
      weight=there.astype(np.float32),
      depth=np.where(there, 1 + long, 0).astype(np.int32),
    )

  def metrics(
    self, batch: windows.WindowBatch, argmax: np.ndarray, nll: np.ndarray
  ) -> dict[str, float]:
    """`exact`: words with every class right; `accuracy`: of single ones.

    Both again as `_long`, of longer words than were read; `loss` in nats is of
    the words of at most that length.
    """
    there = batch.weight > 0
    right = (argmax == batch.targets) | ~there
    found = {}
    for depth, suffix in ((1, ''), (2, '_long')):
      rows = batch.depth[:, 0] == depth
      if rows.any():
        found[f'exact{suffix}'] = float(right[rows].all(1).mean())
        found[f'accuracy{suffix}'] = float(right[rows][there[rows]].mean())
    counted = there & (batch.depth == 1)
    return found | {'loss': float(nll[counted].mean())}

  def chance_level(self) -> dict[str, float]:
    """Of guessing the commonest class always, counted in a sample."""
    batch = self.batch(np.random.default_rng(0), _SAMPLE, for_eval=True)
    counts = np.bincount(batch.targets[batch.depth == 1])
    probs = counts / counts.sum()
    nll = np.full(batch.targets.shape, -(probs * np.log(probs + 1e-12)).sum())
    guess = np.full_like(batch.targets, counts.argmax())
    return self.metrics(batch, guess, nll)


def _widened(x_BxT: np.ndarray, size: int) -> np.ndarray:
  """As many columns as `size`; -1 in those behind a word."""
  return np.pad(x_BxT, ((0, 0), (0, size - x_BxT.shape[1])), constant_values=-1)
