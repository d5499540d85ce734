"""The passages of SEAL's SQuAD 1.1 experiment, with their questions."""

import dataclasses
import random

from sleep_jax.data import datasets

ROUNDS = ('round0', 'round1')
PER_ROUND = 50  # Passages; round 0 has 100, the first of which were rewarded.
_SHUFFLE = 42
NUM_TEST = 200


@dataclasses.dataclass(frozen=True)
class SquadPassage:
  """A paragraph, its article's title, and (question, gold answer) pairs."""

  title: str
  text: str
  questions: tuple[tuple[str, str], ...]


def _load(split: str, folder: str) -> list[SquadPassage]:
  return [
    SquadPassage(
      record['title'],
      record['context'],
      tuple(
        zip(record['questions']['question'], record['questions']['answer'])
      ),
    )
    for record in datasets.load('seal_squad', split, folder)
  ]


def test_passages(folder: str = '') -> list[SquadPassage]:
  """SEAL's 200 of the validation set, in SEAL's order."""
  passages = _load('validation', folder)
  random.Random(_SHUFFLE).shuffle(passages)
  return passages[:NUM_TEST]


def train_passages(episode: int, folder: str = '') -> list[SquadPassage]:
  """The 50 of one of SEAL's two rounds, 0 or 1."""
  return _load(ROUNDS[episode], folder)[:PER_ROUND]
