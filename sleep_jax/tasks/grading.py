"""Grades of free answers, by SQuAD's rules (Rajpurkar et al. 2016)."""

import collections
from collections.abc import Callable
import re
import string

# (question, gold, answer) -> whether `answer` is right.
Grader = Callable[[str, str, str], bool]
_ARTICLES = re.compile(r'\b(a|an|the)\b')
_PUNCTUATION = str.maketrans('', '', string.punctuation)
_MIN_F1 = 0.5


def normalize(text: str) -> str:
  """Lower case, without punctuation and articles, single spaces."""
  text = text.lower().translate(_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', text).split())


def exact_match(answer: str, golds: list[str]) -> float:
  """1 if `answer` is one of `golds` after normalisation, else 0."""
  return float(any(normalize(answer) == normalize(gold) for gold in golds))


def f1(answer: str, golds: list[str]) -> float:
  """Harmonic mean of word precision and recall; the best over `golds`."""
  return max(
    _f1(normalize(answer).split(), normalize(gold).split()) for gold in golds
  )


def _f1(answer: list[str], gold: list[str]) -> float:
  if not answer or not gold:  # 1 if both are empty.
    return float(answer == gold)
  common = (collections.Counter(answer) & collections.Counter(gold)).total()
  return 2 * common / (len(answer) + len(gold))


def _exact(question: str, gold: str, answer: str) -> bool:
  del question
  return bool(exact_match(answer, [gold]))


def _contains(question: str, gold: str, answer: str) -> bool:
  """Whether `answer` contains the words of `gold`, adjacent and in order."""
  del question
  return f' {normalize(gold)} ' in f' {normalize(answer)} '


def _f1_at_least_half(question: str, gold: str, answer: str) -> bool:
  del question
  return f1(answer, [gold]) >= _MIN_F1


# Another one (a language model that answers yes or no, say) is added by
# `grading.GRADERS['name'] = grader` before the task is built.
GRADERS: dict[str, Grader] = {
  'exact': _exact,
  'contains': _contains,
  'f1': _f1_at_least_half,
}
