"""Generated puzzles with a closed vocabulary, for small models.

A puzzle's rule maps colours to colours. The base model is trained on rules that
change one colour at most, and infers those from the pairs in its context; the
puzzles of a life change each colour, by a permutation, which the base cannot
infer in context. Some 40 optimizer steps on the training pairs teach it, given
a suitable self-edit: rotated and mirrored grids (`basic`) prevent overfitting.
The base also learns to write self-edits, with values drawn at random.
"""

import itertools

import numpy as np

from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.tasks.arc import grids

ARROW, END, REQUEST = '->', '.', 'edit'
SIDE, COLOURS, TRAIN_PAIRS = 3, 6, 3
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
  """The closed vocabulary: colours, punctuation, words of a self-edit."""
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
  """A rule of pretraining: one colour becomes another, or none does."""
  colour = np.arange(COLOURS)
  if rng.random() < 0.75:
    old, new = rng.choice(COLOURS, 2, replace=False)
    colour[old] = new
  return tuple(colour.tolist())


def new_rules(rng: np.random.Generator, n: int) -> list[Rule]:
  """`n` distinct rules under which each colour becomes another one.

  Raises:
    ConfigError: if there are fewer.
  """
  rules = [
    rule
    for rule in itertools.permutations(range(COLOURS))
    if all(new != old for old, new in enumerate(rule))
  ]
  if n > len(rules):
    raise config.ConfigError(
      f'task: {n} puzzles are wanted, but there are {len(rules)} rules; lower '
      'task.episodes, task.train or task.test.'
    )
  return [rules[i] for i in rng.permutation(len(rules))[:n]]


def puzzle(
  name: str, rule: Rule, rng: np.random.Generator, test_pairs: int
) -> grids.Puzzle:
  """Distinct random grids; each colour occurs 3 times in training inputs."""
  while True:
    n = TRAIN_PAIRS + test_pairs
    inputs = rng.integers(0, COLOURS, (n, SIDE, SIDE))
    counts = np.bincount(inputs[:TRAIN_PAIRS].ravel(), minlength=COLOURS)
    distinct = len(np.unique(inputs.reshape(n, -1), axis=0)) == n
    if counts.min() >= 3 and distinct:
      break
  pairs = tuple(grids.Pair(x, np.array(rule)[x]) for x in inputs)
  return grids.Puzzle(name, pairs[:TRAIN_PAIRS], pairs[TRAIN_PAIRS:])


def words(pairs: tuple[grids.Pair, ...]) -> str:
  """Pairs as text: `input -> output .` for each."""
  return ' '.join(
    f'{grids.text(p.input)} {ARROW} {grids.text(p.output)} {END}' for p in pairs
  )


def pretraining_rows(
  rng: np.random.Generator, rows: int, length: int
) -> np.ndarray:
  """Documents for the base, `[rows, length]`: puzzles and random self-edits."""
  tok = build_tokenizer()
  out = np.full((rows, length), tok.pad, np.int32)
  for i, row in enumerate(out):
    drawn = puzzle('', pretraining_rule(rng), rng, test_pairs=1)
    document = words(drawn.train_pairs + drawn.test_pairs)
    if i % 4 == 0:
      pairs = words(drawn.train_pairs[: rng.integers(1, TRAIN_PAIRS + 1)])
      document = ' '.join([pairs, REQUEST, *self_edit(rng), END])
    ids = [tok.bos, *tok.encode(document)][:length]
    row[: len(ids)] = ids
  return out
