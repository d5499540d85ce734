"""Learning to Imitate: the student continues a dream and is marked on it.

Knowing is not using. A dream is cut at a random place; the student, on policy,
continues it, and earns Eq. 3's reward for saying what the dream said.
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import losses
from sleep_jax.objectives import policy_gradient
from sleep_jax.objectives import rewards
from sleep_jax.runtime import sharding


@struct.dataclass
class Rollouts:
  """The student's own continuations, judged and marked."""

  judged: teacher_labels.LabeledBatch
  old_logp: at.Float[jax.Array, 'B T']  # When they were sampled.
  advantage: at.Float[jax.Array, 'B']

  def rows(self, index: jax.Array) -> 'Rollouts':
    """The rows at `index`."""
    return jax.tree.map(lambda x: x[index], self)


def split_prefix(
  tokens_BxT: jax.Array, lengths_B: jax.Array, keep: int, rng: at.Key
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Cuts each dream at a random place.

  Returns:
    Prefixes `[B, T - keep]` right-aligned, their lengths, what followed in the
    dream `[B, keep]`, and how many tokens of that are real.
  """
  rows, length = tokens_BxT.shape
  width = length - keep
  last = jnp.clip(lengths_B - 1, 1, width)
  at = 1 + jnp.floor(jax.random.uniform(rng, (rows,)) * last).astype(jnp.int32)
  columns = at[:, None] - width + jnp.arange(length)
  window = jnp.take_along_axis(tokens_BxT, jnp.clip(columns, 0), axis=1)
  window = jnp.where((columns >= 0) & (columns < length), window, 0)
  left = jnp.clip(lengths_B - at, 0, keep)
  return window[:, :width], at, window[:, width:], left


def assign_teacher(
  cfg: config.ModelConfig,
  params: at.Params,
  selves: replay_lib.Teachers,
  tokens_BxT: jax.Array,
  positions_BxT: jax.Array,
  separator: int,
) -> jax.Array:
  """Who judges the student's own words: per segment, the self to whom they are
  likelier; `[B, T]`, 1 for the awake self."""
  if selves.old is None:
    return jnp.ones(tokens_BxT.shape)

  def logp(memory: memory_lib.Memory) -> jax.Array:
    out = transformer.forward(
      cfg, params, tokens_BxT, memory, positions=positions_BxT
    )
    return losses.token_logprobs(out.logits, tokens_BxT)

  lead = jnp.pad(logp(selves.awake) - logp(selves.old), ((0, 0), (1, 0)))
  lead = jnp.where(positions_BxT > 0, lead, 0.0)
  ended = jnp.cumsum(tokens_BxT == separator, axis=1)
  segment = jnp.pad(ended[:, :-1], ((0, 0), (1, 0)))
  same = segment[:, :, None] == segment[:, None, :]
  return ((same * lead[:, None, :]).sum(-1) > 0).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def score_rollouts(
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  separator: int,
  params: at.Params,
  selves: replay_lib.Teachers,
  prefixes: at.Int[jax.Array, 'B P'],
  lengths: at.Int[jax.Array, 'B'],
  said: sampling.Completions,
  meant: at.Int[jax.Array, 'B M'],
  meant_lengths: at.Int[jax.Array, 'B'],
) -> tuple[Rollouts, jax.Array]:
  """Judges and marks the continuations (Eq. 3 and 4).

  Rows come in groups of `how.group` continuations of one prefix; the mean of
  the group is the baseline.

  Returns:
    The rollouts, and the reward of every row `[B]`.
  """
  width = prefixes.shape[1]
  tokens = jnp.concatenate([prefixes, said.tokens], axis=1)
  positions = jnp.arange(tokens.shape[1]) - (width - lengths[:, None])
  positions = jnp.where(positions < 0, positions_lib.PAD_POSITION, positions)
  new = jnp.arange(tokens.shape[1]) - width
  mine = (new >= 0) & (new < said.lengths[:, None])
  owner = assign_teacher(cfg, params, selves, tokens, positions, separator)
  judged, hidden = teacher_labels.label(
    cfg,
    how,
    params,
    selves,
    tokens,
    positions,
    mine.astype(jnp.float32),
    owner,
  )
  size = jnp.minimum(said.lengths, how.continuation)
  absolute = rewards.absolute(said.tokens, size, meant, meant_lengths, how.z0)
  if how.semantic == 'exact':
    semantic = rewards.exact(said.tokens, size, meant, meant_lengths)
  else:
    dreamt = transformer.forward(
      cfg,
      params,
      jnp.concatenate([prefixes, meant], axis=1),
      selves.awake,
      positions=positions,
    ).hidden
    alike = rewards.pooled_similarity(
      hidden[:, width:], size, dreamt[:, width:], meant_lengths
    )
    semantic = (alike >= how.semantic_threshold).astype(jnp.float32)
  reward = rewards.imitation(semantic, absolute, how.gamma)
  advantage = policy_gradient.group_advantages(reward.reshape(-1, how.group))
  old_logp = jnp.concatenate(
    [jnp.zeros_like(prefixes, jnp.float32), said.logprobs], axis=1
  )
  return Rollouts(judged, old_logp, advantage.reshape(-1)), reward


def roll_out(
  cfg: config.ModelConfig,
  how: consolidation_config.SeedingConfig,
  tokenizer: tokenizers.Tokenizer,
  params: at.Params,
  student: memory_lib.Memory,
  tokens: at.Int[jax.Array, 'P T'],
  lengths: at.Int[jax.Array, 'P'],
  rng: at.Key,
) -> tuple[jax.Array, jax.Array, sampling.Completions, jax.Array, jax.Array]:
  """`how.group` on-policy continuations of each dream, cut at random.

  Returns:
    Prefixes and their lengths, what the student said, and what the dream said
    with its lengths: the arguments of `mark`.
  """
  cut_key, roll_key = jax.random.split(rng)
  pieces = split_prefix(tokens, lengths, how.continuation, cut_key)
  prefixes, at, meant, left = sharding.shard_batch(
    tuple(jnp.repeat(x, how.group, axis=0) for x in pieces), 'batch'
  )
  sampler = sampling.SamplerConfig(
    max_new=how.continuation,
    temperature=how.temperature,
    stop=tokenizer.stop,
    pad=tokenizer.pad,
  )
  said = sampling.generate(
    cfg, params, student, prefixes, at, roll_key, sampler
  )
  return prefixes, at, said, meant, left
