"""The Learner: one way to live, behind a few verbs.

Every baseline stands behind it, so each is compared on the same stream, with
the same evaluation and the same costs. `sleep` takes no data: its type says so.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data import windows
from sleep_jax.inference import prefix as prefix_lib
from sleep_jax.inference import sampling
from sleep_jax.inference import scoring
from sleep_jax.learners import checks
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.dreaming import study as study_lib
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import training as recurrent_training
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Setup:
  """What every learner is made of, whatever its settings.

  model: the pretrained base; a life begins with it.
  tokenizer: of the task.
  costs: where tokens, FLOPs and seconds are written down.
  episodes: nights of a life.
  row_length: tokens of a row of the task; 0 where a learner's own windows are
    all that it reads.
  seed: of the life.
  format: of a task with contexts to dream about.
  base_digest: of the base, where it is known without reading its weights.
  """

  model: model_lib.Model
  tokenizer: tokenizers.Tokenizer
  costs: costs_lib.CostTracker
  episodes: int = 1
  row_length: int = 0
  seed: int = 0
  format: contexts.SelfEditFormat | None = None
  base_digest: str = ''

  def __post_init__(self):
    tokenizers.check_fits(self.tokenizer, self.model.cfg.vocab)

  def required_format(self, learner: str) -> contexts.SelfEditFormat:
    """The task's format.

    Raises:
      ConfigError: if the task has no contexts.
    """
    if self.format is None:
      raise config.ConfigError(
        f'learner {learner} needs a task with contexts to dream about, such as '
        'bulletins or arc_few_shot.'
      )
    return self.format


class Learner:
  """A way to live. Lives are values: each verb returns a new one.

  A learner is a class `L(cfg, setup)`; `registry.find` knows it by `name`. A
  field of `Config` that is a dataclass is the config section of that name,
  which learners share; all other fields are read from `learner_config`.
  """

  name: ClassVar[str]
  Config: ClassVar[type]

  def __init__(self, cfg: Any, setup: Setup):
    self.cfg, self.setup = cfg, setup

  @property
  def trains_backbone(self) -> bool:
    """Whether a life's `model.params` ever differ from the base's.

    Where it is false a life shares the base's buffers from its first day to
    its last, and its checkpoints name the base by digest in place of holding
    it.
    """
    return True

  def batch_rows(self) -> dict[str, int]:
    """Rows of the learner's batches by setting; a mesh must divide them."""
    return {}

  def check(self) -> None:
    """Refuses, before the first day, settings that cannot work together.

    Raises:
      ConfigError: naming the setting, and the way out.
    """
    checks.check_mesh(self.setup.model.cfg, self.batch_rows())

  def init(self, rng: at.Key) -> life_lib.Life:
    """A new life."""
    return life_lib.init_life(self.setup.model, rng)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    """The life after it has read one episode's stream."""
    raise NotImplementedError

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, at.Metrics]:
    """The life after a night; by default nothing happens but the night."""
    return life_lib.end_night(life), {}

  def respond(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    answers: list[list[int]],
  ) -> experience_lib.Response:
    """Closed-book answers, scored against `answers`."""
    return scoring.score(
      life.model.merged(),
      prompts,
      answers,
      pad=self.setup.tokenizer.pad,
      costs=self.setup.costs,
    )

  def complete(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    max_new: int,
    seed: int | None = None,
  ) -> list[list[int]]:
    """What follows each prompt: at most `max_new` tokens.

    A completion that ended has the tokenizer's stop token as its last. Without
    a `seed` it is greedy; else drawn at temperature 1.

    Raises:
      ConfigError: a prompt is empty, or too long for `model.max_len`.
    """
    return self._complete(life.model.merged(), prompts, max_new, seed=seed)

  def _complete(
    self,
    model: model_lib.Model,
    prompts: list[list[int]],
    max_new: int,
    prefix: prefix_lib.Prefix | None = None,
    seed: int | None = None,
  ) -> list[list[int]]:
    """`complete` of a model, which may have read a prefix."""
    tokenizer, completions = self.setup.tokenizer, []
    sampler = sampling.SamplerConfig(
      max_new=max_new,
      temperature=0.0 if seed is None else 1.0,
      stop=tokenizer.stop,
      pad=tokenizer.pad,
    )
    key = jax.random.key(seed or 0)
    rows = len(prompts)
    if prefix is not None:
      rows = prefix.batch_size(rows)
    with self.setup.costs.phase('eval') as cost:
      for start in range(0, len(prompts), max(rows, 1)):
        completions += sampling.complete(
          model,
          prompts[start : start + rows],
          jax.random.fold_in(key, start),
          sampler,
          prefix,
        )
      cost.add_forward(sum(map(len, prompts)) + sum(map(len, completions)))
    return completions

  def study(
    self, life: life_lib.Life, requests: list[contexts.StudyRequest]
  ) -> experience_lib.Answers:
    """Answers of copies of the life that wake on the contexts, and sleep.

    A copy reads the contexts' rows as a stream without contexts, so it does not
    dream about what it is going to be asked.
    """
    form, answers = self.setup.required_format(self.name), []
    for i, request in enumerate(requests):
      rows = study_lib.context_rows(form, request)
      # Training steps donate their buffers, and the life must outlive them.
      copy = self._copy(life)
      copy = copy.replace(rng=jax.random.fold_in(life.rng, 1 + i))
      copy, _ = self.wake(
        copy, experience_lib.Experience(rows.tokens, rows.weight)
      )
      copy, _ = self.sleep(copy)
      answers.append([self._answer(copy.model, request)] * request.attempts)
    return answers

  def _copy(self, life: life_lib.Life) -> life_lib.Life:
    """A life with buffers of its own, but for what no training changes."""
    params = life.model.params
    if self.trains_backbone:
      return jax.tree.map(jnp.copy, life)
    bare = life.replace(model=life.model.replace(params={}))
    copy = jax.tree.map(jnp.copy, bare)
    return copy.replace(model=copy.model.replace(params=params))

  def _answer(
    self, model: model_lib.Model, request: contexts.StudyRequest
  ) -> list[contexts.TokenIds]:
    """Greedy answers to a request's questions."""
    return study_lib.answer(
      model,
      self.setup.required_format(self.name),
      request.questions,
      pad=self.setup.tokenizer.pad,
      costs=self.setup.costs,
    )

  def predict(
    self,
    life: life_lib.Life,
    batch: windows.WindowBatch,
    passes: int | None = None,
  ) -> experience_lib.WindowPredictions:
    """Reads windows, then predicts; by one pass, if `passes` is not given."""
    recurrence = recurrence_config.RecurrenceConfig(passes=passes or 1)
    return predict_windows(recurrence, life.model, batch, self.setup.costs)


def predict_windows(
  cfg: recurrence_config.RecurrenceConfig,
  model: model_lib.Model,
  batch: windows.WindowBatch,
  costs: costs_lib.CostTracker,
) -> experience_lib.WindowPredictions:
  """What a hybrid predicts after it has read a batch's windows.

  Raises:
    ConfigError: if the model has no recurrent layer.
  """
  recurrent_training.check(model.cfg, cfg)
  with costs.phase('eval') as cost:
    placed = sharding.shard_batch(batch, 'batch')
    predictions = sharding.fetch(
      recurrent_training.evaluate_batch(cfg, model, placed)
    )
    rows = len(batch.inputs)
    flops = recurrent_training.forward_flops(model.cfg, cfg, batch)
    size = rows * (batch.context[0].size + batch.inputs.shape[1])
    cost.add(tokens=size, flops=rows * flops)
  return experience_lib.WindowPredictions(
    argmax=predictions.argmax,
    nll=predictions.nll,
    passes=predictions.passes,
    loss=float(predictions.loss),
  )
