"""sleep_jax.lifecycle.dreaming.retention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import losses


@functools.partial(jax.jit, static_argnums=0)
def _nll(cfg, params, memory, tokens, weight) -> jax.Array:
  out = transformer.forward(cfg, params, tokens, memory)
  return losses.next_token_loss(out.logits, tokens, weight)


def retention_loss(
  dreamer: dreamer_lib.Dreamer,
  before: life_lib.Life,
  after: life_lib.Life,
  rng: at.Key,
) -> float:
  """Nats per token by which documents of `before` surprise `after` more."""
  how = dreamer.how
  drawing = dataclasses.replace(
    dreamer.retention, dream_length=how.retention_length
  )
  with dreamer.costs.phase('eval') as account:
    tokens, lengths = replay_lib.sample(
      dreamer.cfg,
      drawing,
      before.merged_params(),
      before.memory,
      dreamer.tokenizer,
      how.retention_rows,
      rng,
    )
    weight = np.arange(tokens.shape[1]) < lengths[:, None]
    weight = jnp.asarray(weight, jnp.float32)
    old, new = (
      float(_nll(dreamer.cfg, x.merged_params(), x.memory, tokens, weight))
      for x in (before, after)
    )
    account.add_forward(tokens.size, times=3)
  return new - old
