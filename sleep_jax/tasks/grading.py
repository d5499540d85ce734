"""Marks of free answers, by SQuAD's rules (Rajpurkar et al. 2016)."""

import collections
from collections.abc import Callable
import re
import string

# (question, gold, said) -> whether `said` is right.
Grader = Callable[[str, str, str], bool]
_ARTICLES = re.compile(r'\b(a|an|the)\b')
_PUNCTUATION = str.maketrans('', '', string.punctuation)
_F1_IS_RIGHT = 0.5


def normalize(text: str) -> str:
  """Lower case, without punctuation and articles, single spaces."""
  text = text.lower().translate(_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', text).split())


def exact_match(said: str, golds: list[str]) -> float:
  """1 if `said` is one of `golds` after normalisation, else 0."""
  return float(any(normalize(said) == normalize(gold) for gold in golds))


def f1(said: str, golds: list[str]) -> float:
  """Harmonic mean of word precision and recall; the best over `golds`."""
  return max(
    _f1(normalize(said).split(), normalize(gold).split()) for gold in golds
  )


def _f1(said: list[str], gold: list[str]) -> float:
  if not said or not gold:  # Both empty is agreement.
    return float(said == gold)
  common = (collections.Counter(said) & collections.Counter(gold)).total()
  return 2 * common / (len(said) + len(gold))


def _exact(question: str, gold: str, said: str) -> bool:
  del question
  return bool(exact_match(said, [gold]))


def _contains(question: str, gold: str, said: str) -> bool:
  """Whether the words of `gold` stand in `said`, in one piece."""
  del question
  return f' {normalize(gold)} ' in f' {normalize(said)} '


def _f1_judge(question: str, gold: str, said: str) -> bool:
  del question
  return f1(said, [gold]) >= _F1_IS_RIGHT


# One's own (a language model that answers yes or no, say) is added by
# `grading.JUDGES['mine'] = judge` before the task is built.
GRADERS: dict[str, Grader] = {
  'exact': _exact,
  'contains': _contains,
  'f1': _f1_judge,
}
