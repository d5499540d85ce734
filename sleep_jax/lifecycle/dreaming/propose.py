"""Step 1 of dreaming: sample dreams ~ LM(. | C), one random expert mixed in."""

import dataclasses

from sleep_jax import array_typing as at
from sleep_jax.data import contexts as contexts_lib
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.models import model as model_lib


@dataclasses.dataclass(frozen=True)
class Dream:
  """One dream about one context.

  tokens: as it was sampled, without a stop token.
  update: the rows it asks to be trained on, or why it was rejected.
  """

  context: contexts_lib.Context
  tokens: contexts_lib.TokenIds
  update: contexts_lib.TrainingRows | contexts_lib.Rejected

  @property
  def usable(self) -> bool:
    return isinstance(self.update, contexts_lib.TrainingRows)

  def required_rows(self) -> contexts_lib.TrainingRows:
    """The rows of a usable dream.

    Raises:
      ValueError: if the dream was rejected.
    """
    if isinstance(self.update, contexts_lib.Rejected):
      raise ValueError(f'A dream without rows: {self.update.reason}.')
    return self.update


def propose(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  contexts: tuple[contexts_lib.Context, ...],
  num_dreams: int,
  rng: at.Key,
) -> list[list[Dream]]:
  """`num_dreams` dreams about every context, in one batched rollout."""
  cfg, form = dreamer.cfg, dreamer.format
  prompts = [c.prompt for c in contexts for _ in range(num_dreams)]
  with dreamer.costs.phase('rollout') as cost:
    completions = sampling.complete(
      model.merged(),
      prompts,
      rng,
      sampling.SamplerConfig(
        max_new=form.max_dream,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        stop=form.stop,
        pad=dreamer.tokenizer.pad,
        random_expert=cfg.random_expert,
      ),
    )
    size = sum(map(len, prompts)) + len(completions) * form.max_dream
    cost.add_forward(size)
  return [
    [
      _parse(dreamer, context, tokens)
      for tokens in completions[i * num_dreams : (i + 1) * num_dreams]
    ]
    for i, context in enumerate(contexts)
  ]


def _parse(
  dreamer: dreamer_lib.Dreamer,
  context: contexts_lib.Context,
  tokens: contexts_lib.TokenIds,
) -> Dream:
  """What a completion asks for."""
  if tokens and tokens[-1] == dreamer.format.stop:
    tokens = tokens[:-1]
  update = contexts_lib.Rejected('empty')
  if tokens:
    update = dreamer.format.parse(context, tokens)
  if isinstance(update, contexts_lib.TrainingRows):
    steps = trials.num_steps(dreamer.trial, trials.packed(dreamer, update))
    if steps > dreamer.trial.max_steps:
      update = contexts_lib.Rejected('too long')
  return Dream(context, tokens, update)
