"""Learners of tasks with a reader: they study before they are asked.

`study` takes copies of a life through contexts and asks what they know then,
closed book: n = 1 is a study of one context, n = 50 of fifty together.
"""

import dataclasses

import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.inference import scoring
from sleep_jax.learners import base as learner_lib
from sleep_jax.learners import sleep as sleep_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.lifecycle.dreaming import night as dreaming_night
from sleep_jax.lifecycle.dreaming import propose as propose_lib
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.models import lora

Answers = list[list[list[contexts.TokenIds]]]  # [study][attempt][question].


class Untuned(sleep_lib.Frozen):
  """frozen: studies nothing, and answers from what it knows."""

  def __init__(self, setup: learner_lib.Setup):
    super().__init__(setup)
    if setup.format is None:
      raise config.ConfigError(
        f'learner {type(self).__name__} needs a task with contexts to dream '
        'about, such as bulletins or arc_few_shot.'
      )
    self.dreamer = dreamer_lib.Dreamer(
      setup.model,
      setup.dreaming,
      setup.lora,
      setup.trial,
      setup.sleep,
      setup.format,
      setup.tokenizer,
      setup.costs,
    )

  def respond(self, life, prompts, answers) -> experience_lib.Response:
    return scoring.score(
      self.setup, life.merged_params(), life.memory, prompts, answers
    )

  def asked(self, life: life_lib.Life, study: contexts.StudyRequest):
    """The prompts that stand for a study's questions."""
    return study.questions

  def study(
    self, life: life_lib.Life, studies: list[contexts.StudyRequest]
  ) -> Answers:
    flat = [self.asked(life, s) for s in studies]
    said, _ = trials.run(
      self.dreamer.lab(life), [None] * len(flat), flat, life.rng
    )
    return [[own] * s.attempts for own, s in zip(said, studies, strict=True)]


class OpenBook(Untuned):
  """icl: the context stands before the question, and nothing is learnt."""

  def asked(self, life, study):
    return [
      self.setup.format.open_book(context, question)
      for context in study.contexts
      for question in context.questions
    ]


class LoraFinetune(Untuned):
  """finetune_passage: an instance is trained on the context as it is."""

  def edits(
    self, life: life_lib.Life, study: contexts.StudyRequest, rng: at.Key
  ) -> list[contexts.TrainingRows]:
    """What each attempt trains on."""
    plain = contexts.concat(
      [self.setup.format.from_context(c) for c in study.contexts]
    )
    return [plain] * study.attempts

  def study(
    self, life: life_lib.Life, studies: list[contexts.StudyRequest]
  ) -> Answers:
    rng = jax.random.fold_in(life.rng, life.clock.nights)
    keys = [jax.random.fold_in(rng, i) for i in range(len(studies))]
    edits = [self.edits(life, s, k) for s, k in zip(studies, keys, strict=True)]
    return self._tried(life, studies, edits, rng)

  def _tried(self, life, studies, edits, rng) -> Answers:
    """Answers of one isolated instance per study and attempt.

    Studies of one size share a program: padding a few rows to the number of
    many would cost more than it saves.
    """
    flat = [(i, edit) for i, own in enumerate(edits) for edit in own]
    sizes = [len(studies[i].contexts) for i, _ in flat]
    said = [[] for _ in studies]
    for size in sorted(set(sizes)):
      group = [pair for pair, s in zip(flat, sizes) if s == size]
      lab = self.dreamer.lab(life)
      if size > 1:
        lab = dataclasses.replace(lab, how=lab.how.joint())
      answers, _ = trials.run(
        lab,
        [edit for _, edit in group],
        [studies[i].questions for i, _ in group],
        jax.random.fold_in(rng, size),
      )
      for (i, _), own in zip(group, answers, strict=True):
        said[i].append(own)
    return said


class TestTimeTraining(LoraFinetune):
  """ttt: an instance is trained on the dreams of a self that never dreamt."""

  def edits(self, life, study, rng):
    """Dreams about every context, joined; without one, the plain context."""
    s, each = self.setup, self.setup.dreaming.study_dreams
    dreamt = propose_lib.propose(
      self.dreamer, life, study.contexts, each * study.attempts, rng
    )

    def of_attempt(i: int) -> contexts.TrainingRows:
      found = []
      for context, of_one in zip(study.contexts, dreamt, strict=True):
        own = of_one[i * each : (i + 1) * each]
        usable = [d.edit for d in own if d.usable]
        found += usable or [s.format.from_context(context)]
      return contexts.concat(found)

    return [of_attempt(i) for i in range(study.attempts)]


class Seal(TestTimeTraining):
  """seal: self-edits of a dreamer that ReST^EM has trained (SEAL)."""

  def __init__(self, setup: learner_lib.Setup):
    super().__init__(setup)
    # No selection and no random expert: as many are tried, drawn evenly.
    how = setup.dreaming
    self.dreamer = dataclasses.replace(
      self.dreamer,
      how=dataclasses.replace(
        how,
        dreams=how.keep + how.keep_random,
        importance='random',
        random_expert=0.0,
      ),
    )

  def init(self, rng: at.Key) -> life_lib.Life:
    return _with_dreamer(self.dreamer, super().init(rng))

  def wake(self, life, experience):
    return life.replace(contexts=experience.contexts), {}

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, at.Metrics]:
    life, metrics = _dream(self.dreamer, life)
    return life_lib.end_night(life), metrics


class Sleep(TestTimeTraining):
  """sleep: wake, consolidate, then dream.

  A study is a day and a night of a copy of the life: it reads the contexts,
  consolidates them if they are due, and trains on its dreams about them.
  """

  def __init__(self, setup: learner_lib.Setup):
    super().__init__(setup)
    self.nights = sleep_lib.Sleep(setup)

  def init(self, rng: at.Key) -> life_lib.Life:
    return _with_dreamer(self.dreamer, self.nights.init(rng))

  def _online(self, verb, life, *args):
    """A verb of `online.Sleep`, with a LoRA of the life's own in force."""
    params = life.params
    life, metrics = verb(life.replace(params=life.merged_params()), *args)
    return life.replace(params=params), metrics

  def wake(self, life, experience):
    life, metrics = self._online(self.nights.wake, life, experience)
    return life.replace(contexts=experience.contexts), metrics

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, at.Metrics]:
    about, nights = life.contexts, life.clock.nights
    life, metrics = self._online(self.nights.sleep, life)
    life, dreamt = _dream(
      self.dreamer,
      life.replace(contexts=about, clock=life.clock.replace(nights=nights)),
    )
    return life_lib.end_night(life), metrics | dreamt

  def study(
    self, life: life_lib.Life, studies: list[contexts.StudyRequest]
  ) -> Answers:
    how = self.setup.dreaming
    if not how.study_night:
      if not how.enabled:  # Who never dreams has nothing of its own to study.
        return Untuned.study(self, life, studies)
      return super().study(life, studies)
    return [self._after_a_night(life, s, i) for i, s in enumerate(studies)]

  def _after_a_night(
    self, life, study, number
  ) -> list[list[contexts.TokenIds]]:
    s = self.setup
    plain = contexts.concat([s.format.from_context(c) for c in study.contexts])
    rows = np.resize(np.arange(len(plain.tokens)), s.dreaming.study_rows)
    copy = life.replace(rng=jax.random.fold_in(life.rng, 1 + number))
    copy, _ = self._online(
      self.nights.wake,
      copy,
      experience_lib.Experience(plain.tokens[rows], plain.weight[rows]),
    )
    copy, _ = self._online(self.nights.sleep, copy)
    if not s.dreaming.enabled:
      return self._tried(copy, [study], [[None] * study.attempts], copy.rng)[0]
    edits = self.edits(copy, study, copy.rng)
    return self._tried(copy, [study], [edits], copy.rng)[0]


def _with_dreamer(
  dreamer: dreamer_lib.Dreamer, life: life_lib.Life
) -> life_lib.Life:
  """The life with a LoRA for its dreamer, where dreaming goes into one."""
  if not dreamer.how.enabled or dreamer.how.target != 'lora':
    return life
  key = jax.random.fold_in(life.rng, 0)
  return life.replace(
    adapter=lora.init_adapter(dreamer.cfg, dreamer.lora, life.params, key)
  )


def _dream(
  dreamer: dreamer_lib.Dreamer, life: life_lib.Life
) -> tuple[life_lib.Life, at.Metrics]:
  key = jax.random.fold_in(life.rng, life.clock.nights)
  life, report, _ = dreaming_night.night(
    dreamer, life, jax.random.fold_in(key, 7)
  )
  return life, {f'dreaming/{k}': v for k, v in report.metrics().items()}
