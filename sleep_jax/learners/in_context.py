"""icl: nothing learns; what was read stands before every question.

Of a stream, that is its end, document by document. Where a task has contexts, a
study puts each question's own context before it (open book). What is left once
the context is gone is the base as it is: that arm is the learner `frozen`.
"""

from collections.abc import Iterator
import dataclasses
from typing import ClassVar

import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data.tokenizers import tokenizer as tokenizer_lib
from sleep_jax.inference import prefix as prefix_lib
from sleep_jax.inference import scoring
from sleep_jax.learners import base
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.dreaming import study as study_lib


@dataclasses.dataclass(frozen=True)
class InContextConfig:
  """How much is kept of what was read."""

  # Tokens, in whole documents (of one that is longer, its end). 0 = half of
  # model.max_len to the last token: the oldest document may lack its beginning.
  context: int = 0


class InContext(base.Learner):
  """In-context learning.

  `learner_state`: 'context', the tokens of what is kept, and 'lengths', how
  many of them each document has, oldest first. Of equal documents only the
  latest is kept.
  """

  name: ClassVar[str] = 'icl'
  Config: ClassVar[type] = InContextConfig

  @property
  def trains_backbone(self) -> bool:
    return False

  def check(self) -> None:
    super().check()
    size, max_len = self.cfg.context, self.setup.model.cfg.max_len
    if not 0 <= size < max_len:
      raise config.ConfigError(
        f'learner_config.context={size} must be at least 0 and leave room for '
        f'a question in model.max_len={max_len}.'
      )

  def init(self, rng: at.Key) -> life_lib.Life:
    return life_lib.init_life(
      self.setup.model, rng, learner_state=_state_of([])
    )

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    if experience.contexts:
      return life, {}
    experience = experience_lib.in_memory(experience, self.name)
    state = jax.tree.map(np.asarray, life.learner_state)
    ends = np.cumsum(state['lengths'])[:-1]
    documents = [tuple(x.tolist()) for x in np.split(state['context'], ends)]
    documents += self._documents(experience)
    clock = life.clock.replace(
      tokens=life.clock.tokens + experience.tokens.size
    )
    return life.replace(
      learner_state=_state_of(self._kept(documents)), clock=clock
    ), {}

  def _documents(
    self, experience: experience_lib.Experience
  ) -> Iterator[tuple[int, ...]]:
    """The documents of all rows, without a BOS that was put before them.

    A row is a document, or, where a frame of the stream begins within it, more
    than one.
    """
    bos = self._bos()
    begins = [np.array(frame[0]) for frame in experience.frames]
    for tokens, weight in zip(
      experience.tokens, experience.weight, strict=True
    ):
      # A token inside may have no weight: one of a question, say.
      tokens = tokens[: np.max(np.flatnonzero(weight), initial=-1) + 1]
      for document in _split(tokens, begins):
        start = int(document[:1].tolist() == bos)
        yield tuple(document[start:].tolist())

  def _kept(self, documents: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The latest of them that fit, oldest first."""
    capacity = self.cfg.context or self.setup.model.cfg.max_len // 2
    kept: list[tuple[int, ...]] = []
    for document in dict.fromkeys(reversed(documents)):
      if len(document) > capacity and (not self.cfg.context or not kept):
        document = document[len(document) - capacity :]
      if len(document) > capacity:
        break
      if document:
        kept.append(document)
      capacity -= len(document)
    return kept[::-1]

  def respond(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    answers: list[list[int]],
  ) -> experience_lib.Response:
    """Answers with the context before every prompt, scored."""
    pairs = zip(prompts, answers, strict=True)
    prefix, prompts = self._read_context(
      life, prompts, max((len(p) + len(a) for p, a in pairs), default=0)
    )
    return scoring.score(
      life.model,
      prompts,
      answers,
      pad=self.setup.tokenizer.pad,
      costs=self.setup.costs,
      prefix=prefix,
    )

  def complete(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    max_new: int,
    seed: int | None = None,
  ) -> list[list[int]]:
    """Completions with the context before every prompt."""
    longest = max(map(len, prompts), default=0) + max_new
    prefix, prompts = self._read_context(life, prompts, longest)
    return self._complete(life.model, prompts, max_new, prefix, seed)

  def _bos(self) -> list[int]:
    """What stands once before all documents, and is no part of any."""
    tokenizer = self.setup.tokenizer
    return [tokenizer.bos] if tokenizer_lib.prepends_bos(tokenizer) else []

  def _read_context(
    self, life: life_lib.Life, prompts: list[list[int]], longest: int
  ) -> tuple[prefix_lib.Prefix | None, list[list[int]]]:
    """The context, read once, and what follows it in every row.

    The last token of the context is left to the rows, so that none is empty.

    Args:
      life: who read it.
      prompts: token ids.
      longest: tokens of the longest prompt, with its answer.

    Raises:
      ConfigError: context and question are longer than `model.max_len`.
    """
    bos, context = self._bos(), life.learner_state['context'].tolist()
    max_len = life.model.cfg.max_len
    if len(context) + longest > max_len:
      raise config.ConfigError(
        f'The context of {len(context)} tokens and a question with its answer '
        f'of {longest} exceed model.max_len={max_len}; lower '
        f'learner_config.context={self.cfg.context}.'
      )
    if not context:
      return None, prompts
    questions = [p[len(bos) :] if p[: len(bos)] == bos else p for p in prompts]
    text = [*bos, *context]
    if life.model.cfg.mixers or len(text) == 1:
      return None, [[*text, *question] for question in questions]
    with self.setup.costs.phase('eval') as cost:
      prefix = prefix_lib.prefill(
        life.model, text[:-1], self.setup.tokenizer.pad
      )
      prefix = jax.block_until_ready(prefix)
      cost.add_forward(len(text) - 1)
    return prefix, [[text[-1], *question] for question in questions]

  def study(
    self, life: life_lib.Life, requests: list[contexts.StudyRequest]
  ) -> experience_lib.Answers:
    form, setup = self.setup.required_format(self.name), self.setup
    answers = []
    for request in requests:
      prompts = [
        form.open_book(context, question)
        for context in request.contexts
        for question in context.questions
      ]
      completions = study_lib.answer(
        life.model, form, prompts, pad=setup.tokenizer.pad, costs=setup.costs
      )
      answers.append([completions] * request.attempts)
    return answers


def _split(tokens: np.ndarray, begins: list[np.ndarray]) -> list[np.ndarray]:
  """`tokens` cut before each place where one of `begins` stands."""
  places = set()
  for begin in begins:
    if 0 < len(begin) <= len(tokens):
      windows = np.lib.stride_tricks.sliding_window_view(tokens, len(begin))
      places |= set(np.flatnonzero((windows == begin).all(axis=1)).tolist())
  return np.split(tokens, sorted(places - {0}))


def _state_of(documents: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Documents as `InContext.learner_state`."""
  return {
    'context': np.array(sum(documents, ()), np.int32),
    'lengths': np.array([len(d) for d in documents], np.int32),
  }
