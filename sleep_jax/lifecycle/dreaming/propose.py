"""sleep_jax.lifecycle.dreaming.propose."""

import dataclasses

from sleep_jax import array_typing as at
from sleep_jax.data import contexts
from sleep_jax.inference import sampling
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.lifecycle.dreaming import trials


@dataclasses.dataclass(frozen=True)
class Dream:
  """One dream about one context.

  tokens: as it was sampled, without a stop token.
  edit: what it asks for, or why it was rejected.
  """

  context: contexts.Context
  tokens: contexts.TokenIds
  edit: contexts.TrainingRows | contexts.Rejected

  @property
  def usable(self) -> bool:
    return isinstance(self.edit, contexts.TrainingRows)


def propose(
  dreamer: dreamer_lib.Dreamer,
  life: life_lib.Life,
  about: tuple[contexts.Context, ...],
  each: int,
  rng: at.Key,
) -> list[list[Dream]]:
  """Step 1: `each` dreams about every context, in one batched rollout."""
  how, reader = dreamer.how, dreamer.format
  prompts = [c.prompt for c in about for _ in range(each)]
  with dreamer.costs.phase('rollout') as account:
    said = sampling.complete(
      dreamer.cfg,
      life.merged_params(),
      life.memory,
      prompts,
      rng,
      sampling.SamplerConfig(
        max_new=reader.max_dream,
        temperature=how.temperature,
        top_p=how.top_p,
        stop=reader.stop,
        pad=dreamer.tokenizer.pad,
        random_expert=how.random_expert,
      ),
    )
    account.add_forward(sum(map(len, prompts)) + len(said) * reader.max_dream)

  def read(context: contexts.Context, tokens: contexts.TokenIds) -> Dream:
    if tokens and tokens[-1] == reader.stop:
      tokens = tokens[:-1]
    edit = contexts.Rejected('empty')
    if tokens:
      edit = reader.parse(context, tokens)
    if isinstance(edit, contexts.TrainingRows) and (
      trials.num_steps(dreamer.trial, edit) > dreamer.trial.max_steps
    ):
      edit = contexts.Rejected('too long')
    return Dream(context, tokens, edit)

  return [
    [read(c, tokens) for tokens in said[i * each : (i + 1) * each]]
    for i, c in enumerate(about)
  ]
