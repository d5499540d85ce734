"""sleep_jax.lifecycle.consolidation.teacher_labels."""

import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import divergences
from sleep_jax.runtime import sharding

_MAX_TEACHER_KL = 4.0  # Nats; a single token must not carry a batch.
_LABEL_BATCH = 64  # Rows judged at a time; bounds the memory of a pass.


@struct.dataclass
class LabeledBatch:
  """Token rows with their teacher's verdicts.

  Column t holds what concerns the prediction of token t+1.
  """

  tokens: at.Int[jax.Array, 'N T']
  positions: at.Int[jax.Array, 'N T']
  weight: at.Float[jax.Array, 'N T']  # Weight of the prediction; 0 = padding.
  # Logits of the owner `[N, T, V]`, or the likeliest of them.
  teacher: jax.Array | divergences.TopK
  gate: at.Float[jax.Array, 'N T']  # Where the new expert belongs: 1 or 0,
  gate_weight: at.Float[jax.Array, 'N T']  # and how much that is known.

  def rows(self, index: jax.Array) -> 'LabeledBatch':
    """The rows at `index`."""
    return jax.tree.map(lambda x: x[index], self)


def mixture(share: jax.Array, awake: jax.Array, old: jax.Array) -> jax.Array:
  """Log of share * softmax(awake) + (1 - share) * softmax(old)."""
  return jnp.logaddexp(
    jax.nn.log_softmax(awake) + jnp.log(share),
    jax.nn.log_softmax(old) + jnp.log1p(-share),
  )


def _teacher_logits(
  how: consolidation_config.SeedingConfig,
  share: jax.Array,
  awake: jax.Array,
  old: jax.Array | None = None,
) -> tuple[jax.Array | divergences.TopK, jax.Array]:
  """The teacher of each token, and the nats that the selves are apart.

  `share` is how much of the next token the awake self owns.
  """
  # What is copied every night flattens: a sharper teacher counters it.
  teacher, apart = awake / how.teacher_temperature, jnp.zeros(share.shape)
  if old is not None:
    apart = divergences.forward_kl(awake, old)
    teacher = mixture(share[..., None], teacher, old / how.teacher_temperature)
  if how.teacher_top_k:
    teacher = divergences.top_k(teacher, how.teacher_top_k)
  return teacher, apart


@functools.partial(jax.jit, static_argnums=(0, 1))
def label(
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  params: at.Params,
  selves: replay_lib.Teachers,
  tokens: at.Int[jax.Array, 'B T'],
  positions: at.Int[jax.Array, 'B T'],
  weight: at.Float[jax.Array, 'B T'],
  owner: at.Float[jax.Array, 'B T'],
) -> tuple[LabeledBatch, jax.Array]:
  """Teacher logits of every token, by the self that owns it.

  The new expert belongs where the awake self owns the target and the two
  selves disagree by more than `how.router_margin` nats; it must keep off where
  the old self owns; elsewhere nothing is known.

  Returns:
    The verdicts, and the awake self's hidden states `[B, T, D]`.
  """

  def think(memory: memory_lib.Memory) -> transformer.Output:
    return transformer.forward(cfg, params, tokens, memory, positions=positions)

  out = think(selves.awake)
  old = None if selves.old is None else think(selves.old)
  ahead = jnp.pad(owner[:, 1:], ((0, 0), (0, 1)))
  rule = functools.partial(_teacher_logits, how)
  if how.teacher_top_k:
    matrix = transformer.unembedding(cfg, params)

    def per_token(rows):
      hidden, share = rows
      return rule(share, *(h @ matrix.T.astype(h.dtype) for h in hidden))

    hidden = [x.hidden for x in (out, old) if x is not None]
    teacher, apart = divergences.chunked(
      per_token, (hidden, ahead), how.tokens_in_flight
    )
  else:
    teacher, apart = rule(
      ahead, *(x.logits for x in (out, old) if x is not None)
    )
  gate, known = jnp.ones(tokens.shape), owner
  ahead_weight = jnp.pad(weight[:, 1:], ((0, 0), (0, 1)))
  if old is not None:
    gate = ahead
    known = jnp.where(ahead > 0, apart > how.router_margin, 1.0)
    # Where the selves disagree lies what must be moved, or must be kept.
    owned = jnp.where(ahead > 0.5, how.disagreement_weight[0], how.disagreement_weight[1])
    ahead_weight *= 1.0 + owned * jnp.minimum(apart, _MAX_TEACHER_KL)
  return (
    LabeledBatch(
      tokens, positions, ahead_weight, teacher, gate, known * ahead_weight
    ),
    out.hidden,
  )


def label_all(
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  params: at.Params,
  selves: replay_lib.Teachers,
  dreamt: replay_lib.Replay,
) -> LabeledBatch:
  """`judge` over all dreams, a batch at a time."""
  tokens, lengths, owner, _ = dreamt
  columns = np.arange(tokens.shape[1])
  inside = (columns < lengths[:, None]).astype(np.float32)
  positions = np.broadcast_to(columns, tokens.shape)
  rows = tokens, positions, inside, owner
  batches = []
  for i in range(0, len(tokens), _LABEL_BATCH):
    some = tuple(x[i : i + _LABEL_BATCH] for x in rows)
    judged, _ = label(
      cfg, how, params, selves, *sharding.shard_batch(some, 'batch')
    )
    batches.append(judged)
  return jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
