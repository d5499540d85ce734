"""A small world of generated puzzles, with a closed vocabulary.

A puzzle's rule gives colours new colours. The base model is trained on rules
that change one colour at most, and reads those off the pairs it is shown; the
puzzles of a life change every colour, by a permutation, which the base cannot
read off. Some forty steps on the shown pairs teach it, if the self-edit asks
for sensible ones: turned and mirrored grids (`basic`) keep it from learning the
shown grids by heart. The base also learns to write self-edits, but picks their
values blindly.
"""

import itertools

import numpy as np

from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.tasks.arc import grids

ARROW, END, REQUEST = '->', '.', 'edit'
SIDE, COLOURS, SHOWN = 3, 6, 3
_FLAGS = [f'"use_{family}_augmentations"' for family in grids.AUGMENTATIONS]
_STRATEGIES = ('"train_using_all_tokens"', '"train_using_output_tokens"')
LEARNING_RATES = ('0.0001', '0.003', '0.005', '0.01', '0.02', '0.1')
EPOCHS = ('2', '4', '6', '8')
_MALFORMED = 0.1  # Share of the base's self-edits that lack a word.
_WORDS = [
  *(END, '/', ARROW, REQUEST, *'{}:,', 'true', 'false', *_FLAGS),
  *('"data_generation"', '"training"', '"strategy"', *_STRATEGIES),
  *('"learning_rate"', '"num_train_epochs"', *LEARNING_RATES),
  *dict.fromkeys([*map(str, range(grids.COLOURS)), *EPOCHS]),
]


def build_tokenizer() -> tokenizers.WordTokenizer:
  """The closed vocabulary: colours, marks, and the words of a self-edit."""
  return tokenizers.WordTokenizer(_WORDS, separator=END)


def self_edit(rng: np.random.Generator) -> list[str]:
  """The words of a self-edit, every value drawn at random."""
  flags = [
    word
    for flag in _FLAGS
    for word in (',', flag, ':', str(rng.choice(['true', 'false'])))
  ][1:]
  words = ['{', '"data_generation"', ':', '{', *flags, '}', ',']
  words += ['"training"', ':', '{']
  words += ['"strategy"', ':', str(rng.choice(_STRATEGIES)), ',']
  words += ['"learning_rate"', ':', str(rng.choice(LEARNING_RATES)), ',']
  words += ['"num_train_epochs"', ':', str(rng.choice(EPOCHS)), '}', '}']
  if rng.random() < _MALFORMED:
    del words[rng.integers(len(words))]
  return words


MAX_EDIT = len(self_edit(np.random.default_rng(0))) + 3  # Words, and its end.

Rule = tuple[int, ...]  # The new colour of each.


def pretraining_rule(rng: np.random.Generator) -> Rule:
  """A rule of the base's own: one colour becomes another, or none does."""
  colour = np.arange(COLOURS)
  if rng.random() < 0.75:
    old, new = rng.choice(COLOURS, 2, replace=False)
    colour[old] = new
  return tuple(colour.tolist())


def new_rules(rng: np.random.Generator, n: int) -> list[Rule]:
  """`n` distinct rules under which every colour becomes another one.

  Raises:
    ConfigError: if there are not so many.
  """
  every = [
    rule
    for rule in itertools.permutations(range(COLOURS))
    if all(new != old for old, new in enumerate(rule))
  ]
  if n > len(every):
    raise config.ConfigError(
      f'task: {n} puzzles are wanted, but there are {len(every)} rules; lower '
      'task.episodes, task.train or task.test.'
    )
  return [every[i] for i in rng.permutation(len(every))[:n]]


def puzzle(
  name: str, rule: Rule, rng: np.random.Generator, asked: int
) -> grids.Puzzle:
  """Distinct random grids under a rule; every colour is shown three times."""
  while True:
    n = SHOWN + asked
    inputs = rng.integers(0, COLOURS, (n, SIDE, SIDE))
    counts = np.bincount(inputs[:SHOWN].ravel(), minlength=COLOURS)
    distinct = len(np.unique(inputs.reshape(n, -1), axis=0)) == n
    if counts.min() >= 3 and distinct:
      break
  pairs = tuple(grids.Pair(x, np.array(rule)[x]) for x in inputs)
  return grids.Puzzle(name, pairs[:SHOWN], pairs[SHOWN:])


def words(pairs: tuple[grids.Pair, ...]) -> str:
  """Pairs as a document tells them."""
  told = (
    f'{grids.text(p.input)} {ARROW} {grids.text(p.output)} {END}' for p in pairs
  )
  return ' '.join(told)


def pretraining_rows(
  rng: np.random.Generator, rows: int, length: int
) -> np.ndarray:
  """Documents for the base, `[rows, length]`: puzzles and blind self-edits."""
  tok = build_tokenizer()
  out = np.full((rows, length), tok.pad, np.int32)
  for i, row in enumerate(out):
    puzzled = puzzle('', pretraining_rule(rng), rng, asked=1)
    document = words(puzzled.train_pairs + puzzled.asked)
    if i % 4 == 0:
      told = words(puzzled.train_pairs[: rng.integers(1, SHOWN + 1)])
      document = ' '.join([told, REQUEST, *self_edit(rng), END])
    ids = [tok.bos, *tok.encode(document)][:length]
    row[: len(ids)] = ids
  return out
