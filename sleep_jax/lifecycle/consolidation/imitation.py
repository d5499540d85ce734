"""Learning to Imitate: the student continues replayed rows and is rewarded.

A row of D is cut at a random place; the student, on policy, continues it, and
earns Eq. 3's reward for agreeing with what the row continues with.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import tokenizers
from sleep_jax.inference import encoder
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.models import model as model_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.objectives import policy_gradient
from sleep_jax.objectives import rewards
from sleep_jax.runtime import sharding
from sleep_jax.training import loss as loss_lib


class Continuations(NamedTuple):
  """Prefixes of rows of D, and how student and row continue them."""

  prefixes: at.Int[jax.Array, 'B P']  # Right-aligned.
  lengths: at.Int[jax.Array, 'B']
  completions: sampling.Completions  # The student's.
  references: at.Int[jax.Array, 'B M']  # The row's.
  reference_lengths: at.Int[jax.Array, 'B']


class Rollouts(at.Pytree):
  """The student's own continuations, labelled and rewarded."""

  labels: teacher_labels.LabeledBatch
  old_logp: at.Float[jax.Array, 'B T']  # When they were sampled.
  advantage: at.Float[jax.Array, 'B']

  def rows(self, index: jax.Array) -> 'Rollouts':
    """The rows at `index`; the labels' `vocabulary` belongs to none of them."""
    return Rollouts(
      self.labels.rows(index), self.old_logp[index], self.advantage[index]
    )


def split_prefix(
  tokens_BxT: jax.Array, lengths_B: jax.Array, keep: int, rng: at.Key
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Cuts each row at a random place.

  Returns:
    Prefixes `[B, T - keep]` right-aligned, their lengths, what followed in the
    row `[B, keep]`, and how many tokens of that are real.
  """
  rows, length = tokens_BxT.shape
  width = length - keep
  last = jnp.clip(lengths_B - 1, 1, width)
  at_B = jnp.floor(jax.random.uniform(rng, (rows,)) * last).astype(jnp.int32)
  at_B = 1 + at_B
  columns = at_B[:, None] - width + jnp.arange(length)
  window = jnp.take_along_axis(tokens_BxT, jnp.clip(columns, 0), axis=1)
  window = jnp.where((columns >= 0) & (columns < length), window, 0)
  remaining = jnp.clip(lengths_B - at_B, 0, keep)
  return window[:, :width], at_B, window[:, width:], remaining


def sample_continuations(
  cfg: consolidation_config.SeedingConfig,
  tokenizer: tokenizers.Tokenizer,
  student: model_lib.Model,
  tokens: at.Int[jax.Array, 'P T'],
  lengths: at.Int[jax.Array, 'P'],
  rng: at.Key,
) -> Continuations:
  """`cfg.group` on-policy continuations of each row, cut at random."""
  cut_key, roll_key = jax.random.split(rng)
  pieces = split_prefix(tokens, lengths, cfg.continuation, cut_key)
  prefixes, prefix_lengths, references, remaining = sharding.shard_batch(
    tuple(jnp.repeat(x, cfg.group, axis=0) for x in pieces), 'batch'
  )
  sampler = sampling.SamplerConfig(
    max_new=cfg.continuation,
    temperature=cfg.temperature,
    stop=tokenizer.stop,
    pad=tokenizer.pad,
  )
  completions = sampling.generate(
    student, prefixes, prefix_lengths, roll_key, sampler
  )
  return Continuations(
    prefixes, prefix_lengths, completions, references, remaining
  )


def assign_teacher(
  teachers: replay_lib.Teachers,
  tokens_BxT: jax.Array,
  positions_BxT: jax.Array,
  separator: int,
) -> jax.Array:
  """Which teacher labels the student's tokens: per segment, the likelier one.

  Returns:
    `[B, T]`, 1 for the current model.
  """
  if teachers.previous is None:
    return jnp.ones(tokens_BxT.shape)

  def logp(model: model_lib.Model) -> jax.Array:
    return loss_lib.token_logprobs(model, tokens_BxT, positions_BxT)

  lead = logp(teachers.current) - logp(teachers.previous)
  lead = jnp.pad(lead, ((0, 0), (1, 0)))
  lead = jnp.where(positions_BxT > 0, lead, 0.0)
  num_ended = jnp.cumsum(tokens_BxT == separator, axis=1)
  segment = jnp.pad(num_ended[:, :-1], ((0, 0), (1, 0)))
  same = segment[:, :, None] == segment[:, None, :]
  return ((same * lead[:, None, :]).sum(-1) > 0).astype(jnp.float32)


def judged_similarity(
  cfg: consolidation_config.SeedingConfig,
  tokenizer: tokenizers.Tokenizer,
  rollouts: Continuations,
) -> np.ndarray | None:
  """Similarity of completions and references by the frozen encoder, `[B]`.

  None with another `cfg.semantic`: then it is computed with the rewards.
  """
  if cfg.semantic != 'encoder':
    return None

  def texts(tokens: jax.Array, lengths: jax.Array) -> list[str]:
    tokens, lengths = sharding.fetch((tokens, lengths))
    return [
      tokenizer.decode(row[:length].tolist())
      for row, length in zip(tokens, lengths, strict=True)
    ]

  _, _, completions, references, reference_lengths = rollouts
  return encoder.load().similarity(
    texts(completions.tokens, completions.lengths),
    texts(references, reference_lengths),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_rollouts(
  cfg: consolidation_config.SeedingConfig,
  separator: int,
  teachers: replay_lib.Teachers,
  rollouts: Continuations,
  similarity: at.Float[at.Array, 'B'] | None = None,
) -> tuple[Rollouts, at.Float[jax.Array, 'B']]:
  """Labels and rewards the continuations (Eq. 3 and 4).

  Rows come in groups of `cfg.group` continuations of one prefix; the mean of
  the group is the baseline. `similarity` is a judge's, see `judged_similarity`.

  Returns:
    The rollouts, and the reward of every row.
  """
  prefixes, lengths, completions, *_ = rollouts
  tokens = jnp.concatenate([prefixes, completions.tokens], axis=1)
  width = prefixes.shape[1]
  number = jnp.arange(tokens.shape[1]) - width
  positions = number + lengths[:, None]
  positions = jnp.where(positions < 0, positions_lib.PAD_POSITION, positions)
  is_new = (number >= 0) & (number < completions.lengths[:, None])
  source = assign_teacher(teachers, tokens, positions, separator)
  labels, hidden = teacher_labels.label(
    cfg, teachers, tokens, positions, is_new.astype(jnp.float32), source
  )
  hidden = hidden[:, width:]
  reward = _reward(cfg, teachers, rollouts, (positions, hidden, similarity))
  advantage = policy_gradient.group_advantages(reward.reshape(-1, cfg.group))
  old_logp = jnp.concatenate(
    [jnp.zeros_like(prefixes, jnp.float32), completions.logprobs], axis=1
  )
  return Rollouts(labels, old_logp, advantage.reshape(-1)), reward


def _reward(
  cfg: consolidation_config.SeedingConfig,
  teachers: replay_lib.Teachers,
  rollouts: Continuations,
  known: tuple[jax.Array, jax.Array, at.Array | None],
) -> jax.Array:
  """Eq. 3.

  `known`: positions, the current model's states of the completions, and the
  similarity by a judge, if there is one.
  """
  positions, hidden, similarity = known
  prefixes, _, completions, references, reference_lengths = rollouts
  size = jnp.minimum(completions.lengths, cfg.continuation)
  absolute = rewards.absolute(
    completions.tokens, size, references, reference_lengths, cfg.z0
  )
  if cfg.semantic == 'exact':
    semantic = rewards.exact(
      completions.tokens, size, references, reference_lengths
    )
  else:
    if similarity is None:
      rows = jnp.concatenate([prefixes, references], axis=1)
      out = teachers.current.forward(rows, positions=positions)
      similarity = rewards.pooled_similarity(
        hidden, size, out.hidden[:, prefixes.shape[1] :], reference_lengths
      )
    same = jnp.asarray(similarity) >= cfg.semantic_threshold
    semantic = same.astype(jnp.float32)
  return rewards.imitation(semantic, absolute, cfg.gamma)
