"""The passages of SEAL's SQuAD 1.1 experiment, with their questions."""

import dataclasses
import json
import random

from sleep_jax.data.datasets import catalog

_VALIDATION = 'seal_squad/squad_val.json'
ROUNDS = (
  'seal_squad/synthetic__train__iter0_train.json',
  'seal_squad/synthetic__train__iter1_train.json',
)
PER_ROUND = 50  # Passages; iter0 has 100, the first of which were rewarded.
_SHUFFLE = 42
NUM_TEST = 200


@dataclasses.dataclass(frozen=True)
class SquadPassage:
  """A paragraph, its article's title, and (question, gold answer) pairs."""

  title: str
  text: str
  questions: tuple[tuple[str, str], ...]


def _load(name: str, folder: str) -> list[SquadPassage]:
  return [
    SquadPassage(
      p['title'],
      p['context'],
      tuple((q['question'], q['answer']) for q in p['questions']),
    )
    for p in json.loads(catalog.read(name, folder))
  ]


def test_passages(folder: str = '') -> list[SquadPassage]:
  """SEAL's 200 of the validation set, in SEAL's order."""
  passages = _load(_VALIDATION, folder)
  random.Random(_SHUFFLE).shuffle(passages)
  return passages[:NUM_TEST]


def train_passages(episode: int, folder: str = '') -> list[SquadPassage]:
  """The 50 of one of SEAL's two rounds, 0 or 1."""
  return _load(ROUNDS[episode], folder)[:PER_ROUND]
