"""klda: a classifier beside the model, which never changes.

Kernel linear discriminant analysis over a frozen encoder, after the KLDA of
Momeni et al. (github.com/SalehMomeni/KLDA): random Fourier features of the
text's embedding, a mean for each class and one covariance for all, summed up as
examples are read, so that no example is kept. Several
draws of the features vote by their probabilities. It answers a question with a
class, which is all that it can say: the reference for class-incremental tasks.
"""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.inference import encoder
from sleep_jax.learners import base
from sleep_jax.lifecycle import life as life_lib

_UNKNOWN = 1e-9  # Probability of an answer that was never read.
_RIDGE = 1e-4  # Added to the covariance, against its trace's mean.


@dataclasses.dataclass(frozen=True)
class KldaConfig:
  """The features."""

  features: config.Count = 1000  # Of each draw; the reference has 5,000.
  gamma: config.Positive = 0.3  # Of the kernel exp(-gamma |x - y|^2).
  draws: config.Count = 3  # The reference has 5.


class Klda(base.Learner):
  """Classes by their means; see the module's docstring.

  `learner_state`: 'classes' `[C, A]`, the tokens of the answers, -1 after their
  end; 'count' `[C]`; 'sum' `[E, C, F]` and 'outer' `[E, F, F]`, sums of the
  features and of their products, E draws; 'before' and 'between', the tokens
  of an example before its text, and between that and the answer.
  """

  name: ClassVar[str] = 'klda'
  Config: ClassVar[type] = KldaConfig

  @property
  def trains_backbone(self) -> bool:
    return False

  def check(self) -> None:
    super().check()
    encoder.load()

  def init(self, rng: at.Key) -> life_lib.Life:
    c = self.cfg
    state = {
      'classes': np.zeros((0, 0), np.int32),
      'count': np.zeros((0,), np.float32),
      'sum': np.zeros((c.draws, 0, c.features), np.float32),
      'outer': np.zeros((c.draws, c.features, c.features), np.float32),
      'before': np.zeros((0,), np.int32),
      'between': np.zeros((0,), np.int32),
    }
    return life_lib.init_life(self.setup.model, rng, learner_state=state)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    experience = experience_lib.in_memory(experience, self.name)
    if len(experience.frames) != 1 or len(experience.frames[0]) != 2:
      raise config.ConfigError(
        'learner klda reads examples of one frame, a text and its class; take '
        'it for task class_incremental.'
      )
    before, between = map(list, experience.frames[0])
    texts, classes = [], []
    for tokens, weight in zip(
      experience.tokens, experience.weight, strict=True
    ):
      row = tokens[: np.flatnonzero(weight)[-1] + 1].tolist()
      cut = _last(row, between)
      texts.append(self._text(row[:cut], before))
      classes.append(tuple(row[cut + len(between) :]))
    state = jax.tree.map(np.asarray, life.learner_state)
    state = self._with(state, texts, classes)
    state['before'] = np.array(before, np.int32)
    state['between'] = np.array(between, np.int32)
    clock = life.clock.replace(
      tokens=life.clock.tokens + experience.tokens.size
    )
    return life.replace(learner_state=state, clock=clock), {}

  def _text(self, tokens: list[int], before: list[int]) -> str:
    """What stands after a frame's first part."""
    if tokens[: len(before)] == before:
      tokens = tokens[len(before) :]
    return self.setup.tokenizer.decode(tokens)

  def _with(
    self,
    state: dict[str, np.ndarray],
    texts: list[str],
    classes: list[tuple[int, ...]],
  ) -> dict[str, np.ndarray]:
    """The sums with these examples."""
    known = list(dict.fromkeys(_classes(state) + classes))
    number = {answer: i for i, answer in enumerate(known)}
    one_hot = np.eye(len(known), dtype=np.float32)[[number[c] for c in classes]]
    longest, new = max(map(len, known)), len(known) - len(state['count'])
    tokens = np.full((len(known), longest), -1, np.int32)
    for row, answer in zip(tokens, known, strict=True):
      row[: len(answer)] = answer
    x = self._features(texts)
    return {
      'classes': tokens,
      'count': np.pad(state['count'], (0, new)) + one_hot.sum(0),
      'sum': np.pad(state['sum'], ((0, 0), (0, new), (0, 0)))
      + np.einsum('nc,enf->ecf', one_hot, x),
      'outer': state['outer'] + np.einsum('enf,eng->efg', x, x, optimize=True),
    }

  def _features(self, texts: list[str]) -> at.Float[np.ndarray, 'E N F']:
    """Random Fourier features: of all lives the same."""
    c, x = self.cfg, encoder.load()(texts)
    rng = np.random.default_rng(5)
    shape = c.draws, x.shape[1], c.features
    w = rng.normal(0.0, np.sqrt(2.0 * c.gamma), shape)
    phase = rng.uniform(0.0, 2.0 * np.pi, (c.draws, 1, c.features))
    out = np.cos(np.einsum('nd,edf->enf', x, w) + phase)
    return (np.sqrt(2.0 / c.features) * out).astype(np.float32)

  def respond(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    answers: list[list[int]],
  ) -> experience_lib.Response:
    """The likeliest class of each prompt, as if it had been written."""
    state = jax.tree.map(np.asarray, life.learner_state)
    classes = _classes(state)
    if not classes:
      nothing = np.zeros(len(prompts))
      return experience_lib.Response(
        nothing > 0, nothing + np.log(_UNKNOWN), nothing
      )
    probs = self._probabilities(state, prompts)
    number = {answer: i for i, answer in enumerate(classes)}
    gold = np.array([number.get(tuple(a), -1) for a in answers])
    of_gold = probs[np.arange(len(gold)), gold]
    exact = probs.argmax(1) == gold
    return experience_lib.Response(
      exact,
      np.log(np.where(gold < 0, _UNKNOWN, np.maximum(of_gold, _UNKNOWN))),
      exact.astype(np.float64),
    )

  def complete(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    max_new: int,
    seed: int | None = None,
  ) -> list[list[int]]:
    """The likeliest class of each prompt, cut to `max_new` tokens."""
    del seed  # Nothing is drawn.
    state = jax.tree.map(np.asarray, life.learner_state)
    if not (classes := _classes(state)):
      return [[] for _ in prompts]
    best = self._probabilities(state, prompts).argmax(1)
    return [list(classes[i][:max_new]) for i in best]

  def _probabilities(
    self, state: dict[str, np.ndarray], prompts: list[list[int]]
  ) -> at.Float[np.ndarray, 'N C']:
    """Of each class, the mean over draws; classes have equal priors."""
    before, between = (state[k].tolist() for k in ('before', 'between'))
    texts = [self._text(p[: _last(p, between)], before) for p in prompts]
    out = 0.0
    for x, sums, outer in zip(
      self._features(texts), state['sum'], state['outer'], strict=True
    ):
      means = sums / state['count'][:, None]
      within = outer - (sums.T * (1.0 / state['count'])) @ sums
      covariance = within / state['count'].sum()
      ridge = _RIDGE * np.trace(covariance) / len(covariance)
      covariance += max(ridge, 1e-12) * np.eye(len(covariance))
      weights = np.linalg.solve(covariance, means.T)  # [F, C]
      logits = x @ weights - 0.5 * (means.T * weights).sum(0)
      logits -= logits.max(1, keepdims=True)
      probs = np.exp(logits)
      out = out + probs / probs.sum(1, keepdims=True)
    return np.asarray(out) / self.cfg.draws


def _classes(state: dict[str, np.ndarray]) -> list[tuple[int, ...]]:
  return [tuple(row[row >= 0].tolist()) for row in state['classes']]


def _last(tokens: list[int], part: list[int]) -> int:
  """Where `part` last stands in `tokens`; their end if nowhere."""
  for i in range(len(tokens) - len(part), -1, -1):
    if tokens[i : i + len(part)] == part:
      return i
  return len(tokens)
