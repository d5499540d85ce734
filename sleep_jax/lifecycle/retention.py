"""What a night costs: nats that documents of the model before it lose."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding
from sleep_jax.training import loss as loss_lib


class Documents(NamedTuple):
  """Rows that a model wrote, and 1 for each token of a document: `[N, T]`."""

  tokens: np.ndarray
  weight: np.ndarray


def sample(
  cfg: consolidation_config.SeedingConfig,
  model: model_lib.Model,
  rows: int,
  tokenizer: tokenizers.Tokenizer,
  costs: costs_lib.CostTracker,
  rng: at.Key,
  day: tuple[experience_lib.Frame, ...] = (),
) -> Documents:
  """Documents of `model`; the arguments are those of `generation.sample`."""
  with costs.phase('eval') as cost:
    tokens, lengths, *_ = generation.sample_as_it_is(
      cfg, model.merged(), tokenizer, rows, rng, day
    )
    cost.add_forward(tokens.size)
  weight = np.arange(tokens.shape[1]) < lengths[:, None]
  return Documents(tokens, weight.astype(np.float32))


def nll(
  model: model_lib.Model, documents: Documents, costs: costs_lib.CostTracker
) -> float:
  """Mean cross-entropy of the documents, in nats per token."""
  with costs.phase('eval') as cost:
    loss = float(_nll(model.merged(), *map(jnp.asarray, documents)))
    cost.add_forward(documents.tokens.size)
  return loss


@jax.jit
def _nll(
  model: model_lib.Model, tokens: jax.Array, weight: jax.Array
) -> jax.Array:
  batch = sharding.shard_batch((tokens, weight), 'batch')
  return loss_lib.next_token_loss(model, *batch)
