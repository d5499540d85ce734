"""sleep_jax.learners.in_context."""

import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.inference import scoring
from sleep_jax.learners import sleep as sleep_lib
from sleep_jax.lifecycle import life as life_lib


class InContext(sleep_lib.WakeOnly):
  """icl: nothing learns; the end of the stream stands before every question."""

  def init(self, rng: at.Key) -> life_lib.Life:
    notes = {'context': jnp.zeros((0,), jnp.int32)}
    return life_lib.init_life(
      self.setup.model, self.setup.params, rng, notes=notes
    )

  def wake(
    self, life: life_lib.Life, experience: experience_lib.Experience
  ) -> tuple[life_lib.Life, at.Metrics]:
    # The latest tokens that still leave half the window for the question.
    room = self.setup.model.max_len // 2
    read = experience.tokens[experience.weight > 0]
    read = read[read != self.setup.tokenizer.bos]
    kept = jnp.concatenate([life.notes['context'], jnp.asarray(read)])[-room:]
    clock = life.clock.replace(
      tokens=life.clock.tokens + experience.tokens.size
    )
    return life.replace(notes={'context': kept}, clock=clock), {}

  def respond(self, life, prompts, answers) -> experience_lib.Response:
    context = life.notes['context'].tolist()
    return scoring.score(
      self.setup,
      life.params,
      life.memory,
      [[p[0], *context, *p[1:]] for p in prompts],
      answers,
    )
