"""`arc_few_shot`: few-shot puzzles, and dreams that say how to learn them.

A context is a puzzle: a few pairs of grids under a hidden rule. A dream is a
*self-edit* (SEAL): JSON that says which augmentations make training rows of the
shown pairs, which tokens are targets, the learning rate and the epochs. What is
asked are the puzzle's further inputs, with the shown pairs before them, after
the update; so the question is the same for who learns nothing.

`source='real'` are the puzzles of SEAL's experiment, the same ones every night:
of its 12 training puzzles the first `train` by id (the paper took 11 and does
not say which), of its 10 test puzzles first the 8 of its results file.
`source='twin'` generates puzzles that a small model can learn, new ones every
night (`sleep_jax/data/twin.py`); for each night's and for the test's, rules are
drawn by seed without repetition.
"""

import dataclasses
import json
import math
import zlib

import numpy as np

from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.tasks import base as task_lib
from sleep_jax.tasks.arc import dataset as arc_dataset
from sleep_jax.tasks.arc import grids
from sleep_jax.tasks.arc import synthetic

_STRATEGIES = ('train_using_all_tokens', 'train_using_output_tokens')
_REQUEST = """
The pairs above are a puzzle: one hidden rule leads from left to right. Choose \
how a model is trained on them. Answer with one JSON object and nothing else:
{"data_generation": {"use_basic_augmentations": BOOL, \
"use_size_augmentations": BOOL, "use_chain_augmentations": BOOL, \
"use_repeat_augmentations": BOOL}, "training": {"strategy": \
"train_using_all_tokens" or "train_using_output_tokens", "learning_rate": \
FLOAT, "num_train_epochs": INT}}
"""


@dataclasses.dataclass(frozen=True)
class ArcConfig:
  """Which puzzles, and what a self-edit may ask for."""

  source: str = 'twin'  # or real.
  tokenizer: str = ''  # Of source=real, see `tokenizers.load`.
  episodes: int = 2  # Nights, and so rounds of ReST^EM.
  train: int = 11  # Puzzles of an episode.
  test: int = 8  # Puzzles of the last exam.
  # Ids of real puzzles to use in place of the first `train` and `test`.
  train_ids: tuple[str, ...] = ()
  test_ids: tuple[str, ...] = ()
  attempts: int = 5  # Self-edits of each, applied independently.
  asked: int = 1  # Test inputs of a generated puzzle.
  rows: int = 264  # Rows of an episode's stream.
  length: int = 104  # Tokens of a row.
  leave_out: tuple[int, ...] = (1,)  # Pairs that pseudo-tasks leave out.
  permutations: int = 0  # Copies of each with other colours and order.
  max_rows: int = 250  # Of an edit; a random choice of more.
  max_row_passes: int = 750  # Rows times epochs; more is `too long`.
  max_dream: int = synthetic.MAX_EDIT  # Tokens.
  probes: int = 64  # Puzzles of the base's own rules in an exam of the twin.
  data_dir: str = ''

  def __post_init__(self):
    for name in ('leave_out', 'train_ids', 'test_ids'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    config.lookup(self.source, dict.fromkeys(('twin', 'real')), 'task.source')
    if self.source == 'real' and not self.tokenizer:
      raise config.ConfigError(
        "task.source='real' needs task.tokenizer, that of the backbone."
      )


@dataclasses.dataclass(frozen=True)
class SelfEdit:
  """A parsed dream; `families` are those of `grids.AUGMENTATIONS`."""

  families: tuple[str, ...] = ()
  all_tokens: bool = False
  epochs: int = 0
  learning_rate: float = 0.0


def parse(words: str) -> SelfEdit | None:
  """The self-edit that `words` are, to the letter of its JSON, or None."""
  try:
    found = json.loads(words)
  except (ValueError, RecursionError):
    return None
  flags = {f'use_{family}_augmentations': family for family in _FAMILIES}
  keys = {'strategy', 'learning_rate', 'num_train_epochs'}
  if not _has(found, {'data_generation', 'training'}):
    return None
  data, training = found['data_generation'], found['training']
  if not _has(data, set(flags)) or not _has(training, keys):
    return None
  rate, epochs = training['learning_rate'], training['num_train_epochs']
  if (
    not all(isinstance(value, bool) for value in data.values())
    or training['strategy'] not in _STRATEGIES
    or type(rate) not in (int, float)
    or type(epochs) is not int
    or not (0 < rate < math.inf and epochs > 0)
  ):
    return None
  return SelfEdit(
    families=tuple(family for flag, family in flags.items() if data[flag]),
    all_tokens=training['strategy'] == _STRATEGIES[0],
    epochs=epochs,
    learning_rate=float(rate),
  )


_FAMILIES = tuple(grids.AUGMENTATIONS)


def _has(found: object, keys: set[str]) -> bool:
  return isinstance(found, dict) and set(found) == keys


class Reader:
  """What self-edits mean; see `contexts.Reader`."""

  def __init__(self, cfg: ArcConfig, tokenizer: tokenizers.Tokenizer):
    self.cfg, self._tok = cfg, tokenizer
    self.max_dream, self.max_answer = cfg.max_dream, 1
    self.stop = tokenizer.separator
    self._request = tokenizer.encode(
      synthetic.REQUEST if cfg.source == 'twin' else _REQUEST
    )

  def context(self, puzzle: grids.Puzzle) -> contexts.Context:
    """A puzzle as a context.

    Raises:
      ConfigError: if a leave-one-out pseudo-task of it fits no row.
    """
    bos = self._tok.bos
    told = [i for pair in puzzle.train_pairs for i in self._tokens(pair)]
    needed = 1 + len(told)
    if needed > self.cfg.length:
      raise config.ConfigError(
        f'puzzle {puzzle.name}: its pairs are a row of {needed} tokens, but '
        f'task.length={self.cfg.length}; raise task.length.'
      )
    asked = [self._halves(pair) for pair in puzzle.asked]
    self.max_answer = max(self.max_answer, *(len(a) for _, a in asked))
    return contexts.Context(
      puzzle.name,
      prompt=[bos, *told, *self._request],
      questions=[[bos, *told, *question] for question, _ in asked],
      answers=[answer for _, answer in asked],
      source=puzzle,
    )

  def edit(
    self, context: contexts.Context, dream: contexts.TokenIds
  ) -> contexts.TrainingRows | contexts.Rejected:
    words = self._tok.decode(dream)
    if not words.strip():
      return contexts.Rejected('empty')
    asked_for = parse(words)
    if asked_for is None:
      return contexts.Rejected('unreadable')
    # Before any row is made: a number of many digits is quickly dreamt.
    if asked_for.epochs > self.cfg.max_row_passes:
      return contexts.Rejected('too long')
    edit = self._edit(context, asked_for)
    if len(edit.tokens) * edit.epochs > self.cfg.max_row_passes:
      return contexts.Rejected('too long')
    return edit

  def from_context(self, context: contexts.Context) -> contexts.TrainingRows:
    """Leave-one-out and no augmentation; output tokens are the targets."""
    return self._edit(context, SelfEdit())

  def open_book(
    self, context: contexts.Context, question: contexts.TokenIds
  ) -> contexts.TokenIds:
    """The question: the shown pairs stand in it as it is."""
    del context
    return question

  def grade(
    self, context: contexts.Context, said: list[contexts.TokenIds]
  ) -> np.ndarray:
    """1 for the very grid, else 0; `[questions]`."""
    pairs = zip(context.source.asked, said, strict=True)
    return np.array([self._is(pair.output, ids) for pair, ids in pairs], float)

  def _is(self, grid: np.ndarray, ids: contexts.TokenIds) -> bool:
    found = grids.parse(self._tok.decode(ids))
    return found is not None and np.array_equal(found, grid)

  def _halves(
    self, pair: grids.Pair
  ) -> tuple[contexts.TokenIds, contexts.TokenIds]:
    before = self._tok.encode(f'{grids.text(pair.input)} {synthetic.ARROW}')
    return before, [*self._tok.encode(grids.text(pair.output)), self.stop]

  def _tokens(self, pair: grids.Pair) -> contexts.TokenIds:
    before, after = self._halves(pair)
    return before + after

  def _edit(
    self, context: contexts.Context, asked_for: SelfEdit
  ) -> contexts.TrainingRows:
    cfg = self.cfg
    rng = np.random.default_rng([zlib.crc32(context.name.encode()), 5])
    chosen = []
    for left in cfg.leave_out:
      for pairs in grids.leave_out(context.source.train_pairs, left):
        for more in grids.augmented(pairs, asked_for.families):
          chosen.append(more)
          chosen += [grids.permuted(more, rng) for _ in range(cfg.permutations)]
    if len(chosen) > cfg.max_rows:
      picked = rng.permutation(len(chosen))[: cfg.max_rows]
      chosen = [chosen[i] for i in sorted(picked)]
    rows = [self._row(pairs, asked_for.all_tokens) for pairs in chosen]
    tokens, weight = zip(*(row for row in rows if row is not None))
    return contexts.TrainingRows(
      np.stack(tokens),
      np.stack(weight),
      asked_for.epochs,
      asked_for.learning_rate,
    )

  def _row(
    self, pairs: tuple[grids.Pair, ...], all_tokens: bool
  ) -> tuple[np.ndarray, np.ndarray] | None:
    """A pseudo-task, without its first pairs if it is too long for a row.

    None if not even its last pair fits.
    """
    cfg = self.cfg
    halves = [self._halves(pair) for pair in pairs]
    sizes = np.cumsum([len(a) + len(b) for a, b in reversed(halves)])
    fitting = int((sizes < cfg.length).sum())
    if not fitting:
      return None
    tokens = np.full(cfg.length, self._tok.pad, np.int32)
    weight = np.zeros(cfg.length, np.float32)
    tokens[0], at = self._tok.bos, 1
    for before, after in halves[-fitting:]:
      end = at + len(before) + len(after)
      tokens[at:end] = before + after
      weight[at if all_tokens else at + len(before) : end] = 1.0
      at = end
    return tokens, weight


class Arc:
  """The task; see the module's docstring."""

  def __init__(self, cfg: ArcConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    make = self._generated if cfg.source == 'twin' else self._real
    days, test, known = make()
    self._days = [tuple(map(self.format.context, day)) for day in days]
    self._test = [self.format.context(puzzle) for puzzle in test]
    self._known = [self.format.context(puzzle) for puzzle in known]

  def _generated(self):
    cfg = self.cfg
    self.tokenizer = synthetic.build_tokenizer()
    self.format = Reader(cfg, self.tokenizer)
    rng = np.random.default_rng([self._seed, 1])
    rules = synthetic.new_rules(rng, cfg.episodes * cfg.train + cfg.test)
    made = [
      synthetic.puzzle(f'twin {self._seed}.{i}', rule, rng, cfg.asked)
      for i, rule in enumerate(rules)
    ]
    known = [
      synthetic.puzzle(
        f'known {i}', synthetic.pretraining_rule(rng), rng, asked=1
      )
      for i in range(cfg.probes)
    ]
    days = [
      made[e * cfg.train : (e + 1) * cfg.train] for e in range(cfg.episodes)
    ]
    return days, made[cfg.episodes * cfg.train :], known

  def _real(self):
    cfg = self.cfg
    self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
    self.format = Reader(cfg, self.tokenizer)
    train = _chosen('train', cfg.train, cfg.train_ids, cfg.data_dir)
    test = _chosen('test', cfg.test, cfg.test_ids, cfg.data_dir)
    return [train] * cfg.episodes, test, []

  def experience(self, episode: int) -> experience_lib.Experience:
    rng = np.random.default_rng([self._seed, 2, episode])
    day = self._days[episode]
    plain = contexts.concat([self.format.from_context(c) for c in day])
    n = len(plain.tokens)
    # Whole permutations one after the other: every row comes equally often.
    order = [rng.permutation(n) for _ in range(-(-self.cfg.rows // n))]
    order = np.concatenate(order)[: self.cfg.rows]
    return experience_lib.Experience(
      plain.tokens[order], plain.weight[order], day
    )

  def study_exam(
    self, respond: task_lib.Respond, learn: task_lib.Study, episode: int
  ) -> experience_lib.EvalResult:
    """Marks; `success` is SEAL's measure.

    success: share of right answers over attempts and questions.
    solved: share of test puzzles that some attempt answers in full.
    icl: share of right answers by the life as it is, without study.
    base: the same on the base's own rules (twin only).
    """
    groups = [list(day) for day in self._days[: episode + 1]]
    last = episode == self.episodes - 1
    groups += [self._known, self._test if last else []]
    asked = [(q, a) for g in groups for c in g for q, a in _pairs(c)]
    got = respond(*map(list, zip(*asked)))
    sizes = [sum(len(c.questions) for c in group) for group in groups]
    parts = np.split(got.exact, np.cumsum(sizes)[:-1])
    *days, known, test = ([*part] for part in parts)
    by_episode = [float(np.mean(day)) for day in days]
    metrics = {'trained': float(np.mean(by_episode))}
    if known:
      metrics['base'] = float(np.mean(known))
    if last:
      metrics |= {'icl': float(np.mean(test)), **self._study(learn)}
    return experience_lib.EvalResult(by_episode, metrics)

  def _study(self, learn: task_lib.Study) -> dict[str, float]:
    studies = [
      contexts.StudyRequest((c,), self.cfg.attempts) for c in self._test
    ]
    marks = [
      np.stack([self.format.grade(c, said) for said in attempts])
      for c, attempts in zip(self._test, learn(studies), strict=True)
    ]
    return {
      'success': float(np.concatenate([m.ravel() for m in marks]).mean()),
      'solved': float(np.mean([(m == 1).all(1).any() for m in marks])),
    }


def _pairs(context: contexts.Context):
  return zip(context.questions, context.answers, strict=True)


def _chosen(
  split: str, first: int, ids: tuple[str, ...], folder: str
) -> list[grids.Puzzle]:
  """Puzzles by id, or the first ones."""
  found = {puzzle.name: puzzle for puzzle in arc_dataset.puzzles(split, folder)}
  if ids:
    where = f'task.{split}_ids'
    return [config.lookup(name, found, where) for name in ids]
  if not 0 < first <= len(found):
    raise config.ConfigError(
      f'task.{split}={first}, but there are {len(found)} such puzzles.'
    )
  return list(found.values())[:first]
