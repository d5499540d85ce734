"""`arc_few_shot`: few-shot puzzles; dreams choose how to train on them.

A context is a puzzle: a few pairs of grids under one rule, which is not given.
A dream is a *self-edit* (SEAL): JSON that chooses the augmentations that make
training rows of the training pairs, the target tokens, the learning rate and
the epochs. The questions are the puzzle's test inputs, after the training
pairs; the prompt is the same with and without an update.

`source='real'`: the puzzles of SEAL's experiment, the same ones each night: of
its 12 training puzzles the first `train` by id (the paper used 11 and does not
state which), of its 10 test puzzles first the 8 of its results file.
`source='synthetic'`: generated puzzles that a small model can learn, new ones
each night (`synthetic`); all rules, of episodes and test, are distinct and
drawn by seed.
"""

import dataclasses
import json
import math
import zlib

import numpy as np

from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.data import tokenizers
from sleep_jax.tasks import base as task_lib
from sleep_jax.tasks.arc import dataset as arc_dataset
from sleep_jax.tasks.arc import grids
from sleep_jax.tasks.arc import synthetic

_FAMILIES = tuple(grids.AUGMENTATIONS)
# Of each episode, of the test, and of the base's pretraining rules.
Puzzles = tuple[
  list[list[grids.Puzzle]], list[grids.Puzzle], list[grids.Puzzle]
]
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
  """The puzzles, and the limits of a self-edit."""

  source: str = 'synthetic'  # or real.
  # Of source=real, see `tokenizers.load`; '' = the base's own.
  tokenizer: str = ''
  episodes: config.Count = 2  # Nights, and so rounds of ReST^EM.
  train: config.Count = 11  # Puzzles of an episode.
  test: config.Count = 8  # Puzzles of the last evaluation.
  # Ids of real puzzles, in place of the first `train` and `test`.
  train_ids: tuple[str, ...] = ()
  test_ids: tuple[str, ...] = ()
  # Self-edits of each test puzzle, applied independently.
  attempts: config.Count = 5
  test_pairs: config.Count = 1  # Of a generated puzzle.
  rows: config.Count = 264  # Rows of an episode's stream.
  length: config.Count = 104  # Tokens of a row.
  leave_out: tuple[int, ...] = (1,)  # Pairs that pseudo-tasks leave out.
  permutations: int = 0  # Copies of each with other colours and order.
  max_rows: config.Count = 250  # Of a self-edit; of more, a random sample.
  max_row_passes: config.Count = 750  # Rows times epochs; above, `too long`.
  max_dream: config.Count = synthetic.MAX_EDIT  # Tokens.
  probes: int = 64  # Generated puzzles of pretraining rules, in evaluations.
  data_dir: str = ''

  def __post_init__(self):
    for name in ('leave_out', 'train_ids', 'test_ids'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    config.lookup(
      self.source, dict.fromkeys(('synthetic', 'real')), 'task.source'
    )


@dataclasses.dataclass(frozen=True)
class SelfEdit:
  """A parsed dream; `families` are those of `grids.AUGMENTATIONS`."""

  families: tuple[str, ...] = ()
  all_tokens: bool = False
  epochs: int = 0
  learning_rate: float = 0.0


def parse(words: str) -> SelfEdit | None:
  """The self-edit in `words`; None unless they are JSON of its exact form."""
  try:
    edit = json.loads(words)
  except (ValueError, RecursionError):
    return None
  flags = {f'use_{family}_augmentations': family for family in _FAMILIES}
  keys = {'strategy', 'learning_rate', 'num_train_epochs'}
  if not _has_keys(edit, {'data_generation', 'training'}):
    return None
  data, training = edit['data_generation'], edit['training']
  if not _has_keys(data, set(flags)) or not _has_keys(training, keys):
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


def _has_keys(value: object, keys: set[str]) -> bool:
  return isinstance(value, dict) and set(value) == keys


class ArcFormat:
  """The self-edits of puzzles; see `contexts.SelfEditFormat`."""

  def __init__(self, cfg: ArcConfig, tokenizer: tokenizers.Tokenizer):
    self.cfg, self._tok = cfg, tokenizer
    self.max_dream, self.max_answer = cfg.max_dream, 1
    self.stop = tokenizer.separator
    self._request = tokenizer.encode(
      synthetic.REQUEST if cfg.source == 'synthetic' else _REQUEST
    )

  def context(self, puzzle: grids.Puzzle) -> contexts.Context:
    """A puzzle as a context.

    Raises:
      ConfigError: if its training pairs do not fit into a row.
    """
    bos = self._tok.bos
    pairs = [i for pair in puzzle.train_pairs for i in self._tokens(pair)]
    needed = 1 + len(pairs)
    if needed > self.cfg.length:
      raise config.ConfigError(
        f'puzzle {puzzle.name}: its pairs take a row of {needed} tokens, but '
        f'task.length={self.cfg.length}; raise task.length.'
      )
    tests = [self._halves(pair) for pair in puzzle.test_pairs]
    self.max_answer = max(self.max_answer, *(len(a) for _, a in tests))
    return contexts.Context(
      puzzle.name,
      prompt=[bos, *pairs, *self._request],
      questions=[[bos, *pairs, *question] for question, _ in tests],
      answers=[answer for _, answer in tests],
      source=puzzle,
    )

  def parse(
    self, context: contexts.Context, dream: contexts.TokenIds
  ) -> contexts.TrainingRows | contexts.Rejected:
    """The rows of pseudo-tasks that the self-edit chooses."""
    words = self._tok.decode(dream)
    if not words.strip():
      return contexts.Rejected('empty')
    edit = parse(words)
    if edit is None:
      return contexts.Rejected('unreadable')
    # Before any row is made: `epochs` can be a number of many digits.
    if edit.epochs > self.cfg.max_row_passes:
      return contexts.Rejected('too long')
    rows = self._rows(context, edit)
    if len(rows.tokens) * rows.epochs > self.cfg.max_row_passes:
      return contexts.Rejected('too long')
    return rows

  def from_context(self, context: contexts.Context) -> contexts.TrainingRows:
    """Leave-one-out and no augmentation; output tokens are the targets."""
    return self._rows(context, SelfEdit())

  def open_book(
    self, context: contexts.Context, question: contexts.TokenIds
  ) -> contexts.TokenIds:
    """The question as it is: it has the training pairs."""
    del context
    return question

  def grade(
    self, context: contexts.Context, answers: list[contexts.TokenIds]
  ) -> np.ndarray:
    """1 for the exact grid, else 0; `[questions]`."""
    pairs = zip(context.source.test_pairs, answers, strict=True)
    return np.array(
      [self._is_grid(ids, pair.output) for pair, ids in pairs], float
    )

  def _is_grid(self, ids: contexts.TokenIds, grid: np.ndarray) -> bool:
    parsed = grids.parse(self._tok.decode(ids))
    return parsed is not None and np.array_equal(parsed, grid)

  def _halves(
    self, pair: grids.Pair
  ) -> tuple[contexts.TokenIds, contexts.TokenIds]:
    """`input ->`, and `output` with the stop token."""
    before = self._tok.encode(f'{grids.text(pair.input)} {synthetic.ARROW}')
    return before, [*self._tok.encode(grids.text(pair.output)), self.stop]

  def _tokens(self, pair: grids.Pair) -> contexts.TokenIds:
    before, after = self._halves(pair)
    return before + after

  def _rows(
    self, context: contexts.Context, edit: SelfEdit
  ) -> contexts.TrainingRows:
    """The pseudo-tasks of a self-edit; a sample of them depends on the name."""
    cfg = self.cfg
    rng = np.random.default_rng([zlib.crc32(context.name.encode()), 5])
    tasks = []
    for left in cfg.leave_out:
      for pairs in grids.leave_out(context.source.train_pairs, left):
        for task in grids.augmented(pairs, edit.families):
          tasks.append(task)
          tasks += [grids.permuted(task, rng) for _ in range(cfg.permutations)]
    if len(tasks) > cfg.max_rows:
      sample = rng.permutation(len(tasks))[: cfg.max_rows]
      tasks = [tasks[i] for i in sorted(sample)]
    rows = [self._row(pairs, edit.all_tokens) for pairs in tasks]
    tokens, weight = zip(*(row for row in rows if row is not None))
    return contexts.TrainingRows(
      np.stack(tokens),
      np.stack(weight),
      edit.epochs,
      edit.learning_rate,
    )

  def _row(
    self, pairs: tuple[grids.Pair, ...], all_tokens: bool
  ) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens and weight of a pseudo-task, `[length]` each.

    Its first pairs are left out if it is too long for a row; None if its last
    pair alone is.
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


class Arc(task_lib.Task):
  """The task; see the module's docstring."""

  name = 'arc_few_shot'
  Config = ArcConfig
  columns = ('success', 'solved', 'icl', 'base_accuracy')
  headline = ('success', 'solved', 'base_accuracy')
  format: ArcFormat

  def __init__(self, cfg: ArcConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    if cfg.source == 'synthetic':
      self.tokenizer = synthetic.build_tokenizer()
      train, test, base = self._generate()
    else:
      self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
      train, test, base = self._load()
    make = self.format = ArcFormat(cfg, self.tokenizer)
    self._trained_contexts = [tuple(map(make.context, p)) for p in train]
    self._test = [make.context(puzzle) for puzzle in test]
    self._base_contexts = [make.context(puzzle) for puzzle in base]

  def _generate(self) -> Puzzles:
    cfg = self.cfg
    rng = np.random.default_rng([self._seed, 1])
    rules = synthetic.new_rules(rng, cfg.episodes * cfg.train + cfg.test)
    # Names seed the sample of a self-edit's rows: a change changes figures.
    puzzles = [
      synthetic.puzzle(f'twin {self._seed}.{i}', rule, rng, cfg.test_pairs)
      for i, rule in enumerate(rules)
    ]
    base = [
      synthetic.puzzle(
        f'known {i}', synthetic.pretraining_rule(rng), rng, test_pairs=1
      )
      for i in range(cfg.probes)
    ]
    train = [
      puzzles[e * cfg.train : (e + 1) * cfg.train] for e in range(cfg.episodes)
    ]
    return train, puzzles[cfg.episodes * cfg.train :], base

  def _load(self) -> Puzzles:
    cfg = self.cfg
    train = _select('train', cfg.train, cfg.train_ids, cfg.data_dir)
    test = _select('test', cfg.test, cfg.test_ids, cfg.data_dir)
    return [train] * cfg.episodes, test, []

  def experience(self, episode: int) -> experience_lib.Experience:
    """Rows of the episode's puzzles without augmentation, equally often."""
    rng = np.random.default_rng([self._seed, 2, episode])
    trained = self._trained_contexts[episode]
    rows = contexts.concat([self.format.from_context(c) for c in trained])
    order = order_lib.shuffled(np.arange(len(rows.tokens)), self.cfg.rows, rng)
    return experience_lib.Experience(
      rows.tokens[order], rows.weight[order], trained
    )

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """Exact grids; `by_episode` and `trained`, their mean, on trained puzzles.

    base_accuracy: on puzzles of pretraining rules (synthetic only).
    After the last episode, on the test puzzles:
    icl: share of right answers without study.
    success: share of right answers over attempts and questions (SEAL's).
    solved: share of puzzles that at least one attempt answers in full.
    """
    last = episode == self.episodes - 1
    groups = [list(group) for group in self._trained_contexts[: episode + 1]]
    groups += [self._base_contexts, self._test if last else []]
    flat = [c for group in groups for c in group]
    response = student.respond(
      [q for c in flat for q in c.questions],
      [a for c in flat for a in c.answers],
    )
    sizes = [sum(len(c.questions) for c in group) for group in groups]
    parts = np.split(response.exact, np.cumsum(sizes)[:-1])
    *trained, base, test = ([*part] for part in parts)
    by_episode = [float(np.mean(exact)) for exact in trained]
    metrics = {'trained': float(np.mean(by_episode))}
    if base:
      metrics['base_accuracy'] = float(np.mean(base))
    if last:
      metrics['icl'] = float(np.mean(test))
      metrics |= self._after_study(student)
    return experience_lib.EvalResult(by_episode, metrics)

  def _after_study(self, student: task_lib.Student) -> dict[str, float]:
    requests = [
      contexts.StudyRequest((c,), self.cfg.attempts) for c in self._test
    ]
    grades = [
      np.stack([self.format.grade(c, answers) for answers in attempts])
      for c, attempts in zip(self._test, student.study(requests), strict=True)
    ]
    return {
      'success': float(np.concatenate([g.ravel() for g in grades]).mean()),
      'solved': float(np.mean([(g == 1).all(1).any() for g in grades])),
    }


def _select(
  split: str, first: int, ids: tuple[str, ...], folder: str
) -> list[grids.Puzzle]:
  """Puzzles by id, or the first ones."""
  puzzles = arc_dataset.load(split, folder)
  by_name = {puzzle.name: puzzle for puzzle in puzzles}
  if ids:
    where = f'task.{split}_ids'
    return [config.lookup(name, by_name, where) for name in ids]
  if not 0 < first <= len(puzzles):
    raise config.ConfigError(
      f'task.{split}={first}, but there are {len(puzzles)} such puzzles.'
    )
  return puzzles[:first]
