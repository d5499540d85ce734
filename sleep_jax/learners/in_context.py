"""icl: nothing learns; what was read stands before every question.

Of a stream, that is its end. Where a task has contexts, a study puts each
question's own context before it (open book).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import packing
from sleep_jax.learners import base
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.dreaming import study as study_lib


@dataclasses.dataclass(frozen=True)
class InContextConfig:
  """How much is kept."""

  # Tokens of the stream's end before a question; 0 = half of model.max_len,
  # which is 65,536 for a Llama 3.2: more than most devices compute at once.
  max_context: int = 0


class InContext(base.Learner):
  """In-context learning; `learner_state['context']` is what was read."""

  name: ClassVar[str] = 'icl'
  Config: ClassVar[type] = InContextConfig

  @property
  def trains_backbone(self) -> bool:
    return False

  def init(self, rng: at.Key) -> life_lib.Life:
    state = {'context': jnp.zeros((0,), jnp.int32)}
    return life_lib.init_life(self.setup.model, rng, learner_state=state)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    if experience.contexts:
      return life, {}
    experience = experience_lib.in_memory(experience, self.name)
    # The latest tokens that still leave half the window for the question.
    half = self.setup.model.cfg.max_len // 2
    capacity = min(self.cfg.max_context or half, half)
    tokens = jnp.asarray(self._documents(experience))
    context = jnp.concatenate([life.learner_state['context'], tokens])
    clock = life.clock.replace(
      tokens=life.clock.tokens + experience.tokens.size
    )
    state = {'context': context[-capacity:]}
    return life.replace(learner_state=state, clock=clock), {}

  def respond(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    answers: list[list[int]],
  ) -> experience_lib.Response:
    context = life.learner_state['context'].tolist()
    if self.setup.tokenizer.bos in context:  # It marks turns too, and is kept.
      prompts = [[*context, *p] for p in prompts]
    else:
      prompts = [[p[0], *context, *p[1:]] for p in prompts]
    return super().respond(life, prompts, answers)

  def _documents(self, experience: experience_lib.Experience) -> np.ndarray:
    """The rows one after another, without padding.

    The BOS of each is left out, but where it begins turns of a conversation
    too, as in SmolLM2's chats: without it they could not be read.
    """
    tokens = np.asarray(experience.tokens)
    sizes = packing.lengths(experience.weight)
    inside = np.arange(tokens.shape[1]) < sizes[:, None]
    is_bos = tokens == self.setup.tokenizer.bos
    if not (is_bos & inside)[:, 1:].any():
      inside &= ~is_bos
    return tokens[inside]

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
