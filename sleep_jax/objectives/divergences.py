"""Per-token divergences F(teacher || student) of GKD, summed over V, in nats.

The endpoints of the generalised JSD vanish (D_beta -> 0 as beta -> 0 or 1), so
forward and reverse KL are separate functions and not limits of it.

With a vocabulary of 150k the logits of a batch are the largest arrays of a
step. `chunked` and `from_hidden` hold the logits of a few tokens at a time;
`TopK` holds k + 1 numbers per token of a teacher's distribution.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import mesh_axes
from sleep_jax.models import token_logits

Divergence = Callable[[at.Array, at.Array], jax.Array]


def forward_kl(teacher: at.Array, student: at.Array) -> jax.Array:
  """KL(teacher || student) of logits `[..., V]` -> `[...]`; mass-covering."""
  log_t = jax.nn.log_softmax(teacher, axis=-1)
  log_s = jax.nn.log_softmax(student, axis=-1)
  return jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)


def reverse_kl(teacher: at.Array, student: at.Array) -> jax.Array:
  """KL(student || teacher) of logits `[..., V]` -> `[...]`; mode-seeking."""
  return forward_kl(student, teacher)


def jsd(teacher: at.Array, student: at.Array, beta: float) -> jax.Array:
  """beta KL(T || M) + (1-beta) KL(S || M) with M = beta T + (1-beta) S."""
  log_t = jax.nn.log_softmax(teacher, axis=-1)
  log_s = jax.nn.log_softmax(student, axis=-1)
  log_m = jnp.logaddexp(log_t + jnp.log(beta), log_s + jnp.log1p(-beta))
  kl_t = jnp.sum(jnp.exp(log_t) * (log_t - log_m), axis=-1)
  kl_s = jnp.sum(jnp.exp(log_s) * (log_s - log_m), axis=-1)
  return beta * kl_t + (1.0 - beta) * kl_s


def divergence(name: str, beta: float) -> Divergence:
  """The divergence of this name; `beta` is that of `jsd`."""
  return config.lookup(
    name,
    {
      'forward_kl': forward_kl,
      'reverse_kl': reverse_kl,
      'jsd': lambda t, s: jsd(t, s, beta),
    },
    'sleep.divergence',
  )


def chunked(
  per_token: Callable[[at.Tree], at.Tree], rows: at.Tree, chunk: int
) -> at.Tree:
  """`per_token(rows)`, computed `chunk` tokens at a time.

  On a mesh that splits the rows it is `chunk` tokens of every device, and each
  computes those of its own rows: a chunk is then of columns.

  Intermediate values of `per_token` are not stored; the backward pass computes
  them again. Gradients flow to `rows` and to what `per_token` closes over, such
  as the unembedding matrix.

  Args:
    per_token: from leaves `[C, ...]`, or `[B, C, ...]`, to such leaves, token
      by token; must be finite, with a finite gradient, where all inputs are
      zero.
    rows: leaves `[B, T, ...]`, all with the same B and T.
    chunk: C, tokens computed at a time; on a mesh one of every row at least.

  Returns:
    The results of `per_token`, leaves `[B, T, ...]`.
  """
  lead = jax.tree.leaves(rows)[0].shape[:2]
  parts = mesh_axes.shards(lead[0], mesh_axes.ROWS)
  if parts > 1:
    columns = min(max(1, chunk * parts // lead[0]), lead[1])
    return token_logits.map_columns(per_token, rows, columns)
  size = lead[0] * lead[1]
  chunk = min(chunk, size)
  num_chunks = -(-size // chunk)

  def split(x: at.Array) -> jax.Array:
    flat = x.reshape(size, *x.shape[2:])
    padding = [(0, num_chunks * chunk - size)] + [(0, 0)] * (flat.ndim - 1)
    return jnp.pad(flat, padding).reshape(num_chunks, chunk, *flat.shape[1:])

  def join(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])[:size].reshape(*lead, *x.shape[2:])

  step = jax.checkpoint(per_token, prevent_cse=False)
  return jax.tree.map(join, jax.lax.map(step, jax.tree.map(split, rows)))


class TopK(at.Pytree):
  """A teacher's k likeliest tokens, and all others as one more outcome.

  The probabilities are not renormalised: the mass of all other tokens is kept
  as one outcome. A divergence of the lumped outcomes is at most that of all
  tokens (data processing inequality), and equals it for k = V - 1.
  """

  tokens: jax.Array  # Int `[..., K]`.
  logprobs: jax.Array  # Float `[..., K+1]`; the last is of all others.


def top_k(logits: at.Array, k: int) -> TopK:
  """The top k tokens of a teacher's logits `[..., V]`.

  Raises:
    config.ConfigError: k is not in 1..V-1.
  """
  if not 0 < k < logits.shape[-1]:
    raise config.ConfigError(
      f'top_k={k} of a teacher must be in 1..{logits.shape[-1] - 1}; for all '
      f'{logits.shape[-1]} tokens use its logits.'
    )
  _, tokens = jax.lax.top_k(logits, k)
  return TopK(tokens, jax.nn.log_softmax(lump(logits, tokens), axis=-1))


def lump(logits: at.Array, tokens: at.Array) -> jax.Array:
  """Logits `[..., V]` as those of `tokens` `[..., K]` and of all others."""
  selected = jnp.take_along_axis(logits, tokens, axis=-1)
  others = jnp.put_along_axis(logits, tokens, -jnp.inf, axis=-1, inplace=False)
  rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
  return jnp.concatenate([selected, rest], axis=-1)


def from_hidden(
  measure: Divergence,
  teacher: tuple[at.Array, at.Array] | TopK,
  student: tuple[at.Array, at.Array],
  *,
  temperature: float = 1.0,
  chunk: int = 128,
) -> jax.Array:
  """A divergence computed from hidden states, `chunk` tokens at a time.

  Args:
    measure: `forward_kl` or another divergence of logits.
    teacher: hidden states `[B, T, D']` and the unembedding matrix `[V, D']`; or
      `TopK` with leaves `[B, T, ...]`, taken at the same temperature. No
      gradient flows to it.
    student: hidden states `[B, T, D]` and unembedding matrix `[V, D]`.
    temperature: divides the logits of both.
    chunk: tokens computed at a time, see `chunked`.

  Returns:
    Nats per token, `[B, T]`.
  """
  hidden, unembedding = student
  teacher = jax.lax.stop_gradient(teacher)

  if isinstance(teacher, TopK):

    def lumped(rows: tuple[TopK, jax.Array]) -> jax.Array:
      top, hidden = rows
      logits = hidden @ unembedding.T / temperature
      return measure(top.logprobs, lump(logits, top.tokens))

    return chunked(lumped, (teacher, hidden), chunk)

  teacher_hidden, teacher_unembedding = teacher

  def per_token(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
    teacher_hidden, hidden = rows
    logits = hidden @ unembedding.T / temperature
    return measure(teacher_hidden @ teacher_unembedding.T / temperature, logits)

  return chunked(per_token, (teacher_hidden, hidden), chunk)
