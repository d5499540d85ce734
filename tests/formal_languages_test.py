"""Words and classes of every language, by a recogniser written otherwise."""

import functools
import itertools
import re

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.tasks.algorithmic import formal_languages

LENGTH = 12


def balanced(word):
  return all(
    word.count(opening) == word.count(closing)
    and all(
      word[:i].count(opening) >= word[:i].count(closing)
      for i in range(len(word) + 1)
    )
    for opening, closing in ('ab', 'cd')
  )


# The letters of a language, and whether a word is of it.
RECOGNISERS = {
  'aa_star': ('a', lambda word: re.fullmatch('(aa)*', word)),
  'abab_star': ('ab', lambda word: re.fullmatch('(abab)*', word)),
  'a_n_b_n': (
    'ab',
    lambda word: word and word == 'a' * (n := len(word) // 2) + 'b' * n,
  ),
  'a_n_b_n_c_n': (
    'abc',
    lambda word: (
      word and word == 'a' * (n := len(word) // 3) + 'b' * n + 'c' * n
    ),
  ),
  'shuffle_2': ('abcd', balanced),
}


def made(language, rows=64, seed=0, for_eval=False):
  task = tasks.build(
    'formal_languages',
    dict(language=language, length=LENGTH, long_length=2 * LENGTH),
    0,
  )
  rng = np.random.default_rng(seed)
  return task, task.batch(rng, rows, for_eval=for_eval)


def read(batch):
  """The words of a batch, and the classes after each of their symbols."""
  for row, there in enumerate(batch.input_mask):
    symbols = batch.inputs[row][there]
    yield (
      ''.join('abcd'[symbol - 2] for symbol in symbols),
      batch.targets[row][there].tolist(),
    )


@functools.cache
def may_follow(language, prefix, longest):
  """Symbols with which `prefix` begins some word, and whether it is one."""
  letters, is_word = RECOGNISERS[language]
  if language == 'shuffle_2':  # All that is open can be closed later.
    allowed = {
      letter
      for letter in letters
      if letter in 'ac'
      or prefix.count('ac'['bd'.index(letter)]) > prefix.count(letter)
    }
  else:
    allowed = {
      letter
      for letter in letters
      for n in range(longest)
      for word in (
        prefix + letter + ''.join(rest) for rest in _endings(letters, n)
      )
      if is_word(word)
    }
  return frozenset(allowed | ({'end'} if is_word(prefix) else set()))


def _endings(letters, n):
  """Sorted words of n letters: all that these languages need, or `abab`."""
  yield from itertools.combinations_with_replacement(letters, n)
  yield ('ab' * n)[:n]
  yield ('ba' * n)[:n]


@pytest.mark.parametrize('language', RECOGNISERS)
def test_a_class_is_what_may_follow(language):
  _, batch = made(language)
  sets, classes = {}, {}
  for word, after in read(batch):
    for i, found in enumerate(after):
      allowed = may_follow(language, word[: i + 1], LENGTH + 1)
      assert allowed, word[: i + 1]  # Every prefix is one of a word.
      if language == 'shuffle_2':
        allowed = allowed - {'end'}  # The depth alone decides it.
      # One class for one set, and the other way round.
      assert sets.setdefault(found, allowed) == allowed, (word, i)
      assert classes.setdefault(allowed, found) == found, (word, i)
  number = dict(aa_star=2, abab_star=3, a_n_b_n=3, a_n_b_n_c_n=4, shuffle_2=4)
  assert len(classes) == number[language]


def test_parity_counts_ones():
  _, batch = made('parity')
  for word, after in read(batch):
    assert len(word) == LENGTH
    for i, found in enumerate(after):
      assert found - 6 == word[: i + 1].count('b') % 2


@pytest.mark.parametrize('language', formal_languages.LANGUAGES)
def test_half_of_an_evaluation_is_longer_than_what_was_read(language):
  _, batch = made(language)
  assert batch.inputs.shape == (64, LENGTH) and batch.depth.max() == 1
  task, batch = made(language, for_eval=True)
  assert batch.inputs.shape == (64, 2 * LENGTH)
  lengths = batch.input_mask.sum(1)
  assert lengths[:32].max() <= LENGTH < lengths[32:].min()
  assert (np.diff(batch.input_mask.astype(int)) <= 0).all()
  assert not batch.token_mask.any()
  assert batch.targets.max() < task.tokenizer.vocab
  right = task.metrics(batch, batch.targets, batch.weight)
  assert set(right) == set(task.headline) == set(task.chance_level())
  assert set(right.values()) == {1.0}
  # One wrong class, in a long word, is one word of 32.
  wrong = batch.targets.copy()
  wrong[40, 3] += 1
  metrics = task.metrics(batch, wrong, batch.weight)
  assert metrics['exact'] == 1 and metrics['exact_long'] == 31 / 32


def test_chance_is_of_the_commonest_class():
  chance = made('parity')[0].chance_level()
  assert chance['accuracy'] == pytest.approx(0.5, abs=0.01)
  assert chance['loss'] == pytest.approx(np.log(2), abs=1e-3)
  assert chance['exact'] < 0.01 and chance['exact_long'] == 0


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(language='dyck'), 'task.language'),
    (dict(length=5), 'task.length=5'),
    (dict(length=20, long_length=25), 'task.long_length=25'),
  ],
)
def test_what_cannot_be_is_refused(changes, words):
  with pytest.raises(config.ConfigError, match=words):
    tasks.build('formal_languages', changes, 0)
