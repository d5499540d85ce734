"""What dreaming costs: nats that documents of the model before it lose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding
from sleep_jax.training import loss as loss_lib


@jax.jit
def _nll(
  model: model_lib.Model, tokens: jax.Array, weight: jax.Array
) -> jax.Array:
  batch = sharding.shard_batch((tokens, weight), 'batch')
  return loss_lib.next_token_loss(model, *batch)


def sample_documents(
  dreamer: dreamer_lib.Dreamer, model: model_lib.Model, rows: int, rng: at.Key
) -> generation.Documents:
  """`rows` of `retention_length` tokens, as the model generates them."""
  replay_cfg = dataclasses.replace(
    dreamer.replay, dream_length=dreamer.cfg.retention_length
  )
  return generation.sample_as_it_is(
    replay_cfg, model, dreamer.tokenizer, rows, rng
  )


def retention_loss(
  dreamer: dreamer_lib.Dreamer,
  before: model_lib.Model,
  after: model_lib.Model,
  rng: at.Key,
) -> float:
  """Nats per token that `after` loses against `before` on its own documents."""
  before, after = before.merged(), after.merged()
  with dreamer.costs.phase('eval') as cost:
    tokens, lengths, *_ = sample_documents(
      dreamer, before, dreamer.cfg.retention_rows, rng
    )
    weight = np.arange(tokens.shape[1]) < lengths[:, None]
    weight = jnp.asarray(weight, jnp.float32)
    old, new = (float(_nll(x, tokens, weight)) for x in (before, after))
    cost.add_forward(tokens.size, times=3)
  return new - old
