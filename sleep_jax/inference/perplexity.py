"""How well a model predicts rows, with logits for few tokens at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from sleep_jax.objectives import divergences
from sleep_jax.objectives import losses
from sleep_jax.runtime import sharding

_EVAL_BATCH = 8  # Rows per pass, at most.
_TOKENS_IN_FLIGHT = 512  # Whose logits exist at the same time.


@functools.partial(jax.jit, static_argnames=('chunk',))
def _nll(
  model: model_lib.Model,
  tokens_BxT: at.Int[jax.Array, 'B T'],
  weight_BxT: at.Float[jax.Array, 'B T'],
  *,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """Nats of all targets, weighted, and the sum of the weights."""
  hidden = model.forward(tokens_BxT).hidden[:, :-1]
  matrix = model.unembedding()
  logp = divergences.chunked(
    lambda x: losses.logprobs(
      (x[0] @ matrix.T.astype(x[0].dtype)).astype(jnp.float32), x[1]
    ),
    (hidden, tokens_BxT[:, 1:]),
    chunk,
  )
  weight = weight_BxT[:, 1:]
  return -(logp * weight).sum(), weight.sum()


def perplexity(
  model: model_lib.Model,
  tokens: np.ndarray,
  weight: np.ndarray,
  *,
  costs: costs_lib.CostTracker,
) -> float:
  """exp of the mean nats per target; every row is its own context.

  Args:
    model: who predicts; an adapter must be merged.
    tokens: `[N, T]` rows; the first column is no target.
    weight: `[N, T]` of each token as a target.
    costs: where the passes are written down, in phase `eval`.

  Returns:
    The perplexity, at least 1; nan if no token is a target.
  """
  batch = min(_EVAL_BATCH, 1 << (len(tokens) - 1).bit_length())
  nats, total = 0.0, 0.0
  with costs.phase('eval') as cost:
    for start in range(0, len(tokens), batch):
      rows = slice(start, start + batch)
      fill = ((0, batch - len(tokens[rows])), (0, 0))
      args = np.pad(tokens[rows], fill), np.pad(weight[rows], fill)
      out = sharding.fetch(
        _nll(
          model, *sharding.shard_batch(args, 'batch'), chunk=_TOKENS_IN_FLIGHT
        )
      )
      nats, total = nats + float(out[0]), total + float(out[1])
      cost.add_forward(batch * tokens.shape[1])
  return float(np.exp(nats / total)) if total else float('nan')
