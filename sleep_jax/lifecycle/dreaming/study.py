"""Studies: copies of a life learn contexts, and are then asked, closed book.

n = 1 is a study of one context, n = 50 of fifty together. What a copy trains on
are rows made from the contexts, or the model's own dreams about them.
"""

import dataclasses

import jax

from sleep_jax import array_typing as at
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.lifecycle.dreaming import propose as propose_lib
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib


def context_rows(
  form: contexts.SelfEditFormat, request: contexts.StudyRequest
) -> contexts.TrainingRows:
  """Rows of the contexts as they are, without any dream."""
  return contexts.concat([form.from_context(c) for c in request.contexts])


def dreamed_rows(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  request: contexts.StudyRequest,
  rng: at.Key,
) -> list[contexts.TrainingRows]:
  """Rows of each attempt: the model's dreams about every context, joined.

  A context without a usable dream contributes its own rows.
  """
  per_attempt = dreamer.cfg.study_dreams
  dreams = propose_lib.propose(
    dreamer, model, request.contexts, per_attempt * request.attempts, rng
  )

  def of_attempt(i: int) -> contexts.TrainingRows:
    rows = []
    for context, dreams_of_context in zip(
      request.contexts, dreams, strict=True
    ):
      part = dreams_of_context[i * per_attempt : (i + 1) * per_attempt]
      updates = [d.update for d in part]
      usable = [u for u in updates if isinstance(u, contexts.TrainingRows)]
      rows += usable or [dreamer.format.from_context(context)]
    return contexts.concat(rows)

  return [of_attempt(i) for i in range(request.attempts)]


def train_and_answer(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  requests: list[contexts.StudyRequest],
  rows: list[list[contexts.TrainingRows]],
  rng: at.Key,
) -> experience_lib.Answers:
  """Answers of one isolated instance per request and attempt.

  Requests of one size share a program: padding a few rows to the number of
  many would cost more than it saves.

  Args:
    dreamer: settings of instances and of their training.
    model: what every instance begins as.
    requests: what is studied, and asked.
    rows: of each request, the rows of each attempt.
    rng: random key.
  """
  flat = [(i, part) for i, parts in enumerate(rows) for part in parts]
  sizes = [len(requests[i].contexts) for i, _ in flat]
  answers = [[] for _ in requests]
  for size in sorted(set(sizes)):
    group = [pair for pair, s in zip(flat, sizes) if s == size]
    group_dreamer = dreamer
    if size > 1:
      group_dreamer = dataclasses.replace(dreamer, trial=dreamer.trial.joint())
    completions, _ = trials.run(
      group_dreamer,
      model,
      [part for _, part in group],
      [requests[i].questions for i, _ in group],
      jax.random.fold_in(rng, size),
    )
    for (i, _), answers_of_instance in zip(group, completions, strict=True):
      answers[i].append(answers_of_instance)
  return answers


def answer(
  model: model_lib.Model,
  form: contexts.SelfEditFormat,
  prompts: list[contexts.TokenIds],
  *,
  pad: int,
  costs: costs_lib.CostTracker,
) -> list[contexts.TokenIds]:
  """Greedy answers without stop tokens."""
  with costs.phase('eval') as cost:
    completions = sampling.complete(
      model.merged(),
      prompts,
      jax.random.key(0),  # Greedy: nothing is drawn.
      sampling.SamplerConfig(
        max_new=form.max_answer, temperature=0.0, stop=form.stop, pad=pad
      ),
    )
    cost.add_forward(sum(map(len, prompts)) + len(prompts) * form.max_answer)
  return [[t for t in tokens if t != form.stop] for tokens in completions]
