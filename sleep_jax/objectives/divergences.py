"""Per-token divergences F(teacher || student) of GKD, summed over V, in nats.

The endpoints of the generalised JSD vanish (D_beta -> 0 as beta -> 0 or 1), so
forward and reverse KL are functions of their own and never limits of it.

With a vocabulary of 150k the logits of a batch are the largest arrays there
are. `chunked` and `from_hidden` keep those of a few tokens at a time; `TopK`
keeps a teacher's verdict in k numbers per token.
"""

from collections.abc import Callable

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def forward_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """KL(teacher || student) of logits `[..., V]` -> `[...]`; covers mass."""
  t = jax.nn.log_softmax(teacher, axis=-1)
  s = jax.nn.log_softmax(student, axis=-1)
  return jnp.sum(jnp.exp(t) * (t - s), axis=-1)


def reverse_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """KL(student || teacher); seeks modes."""
  return forward_kl(student, teacher)


def jsd(teacher: jax.Array, student: jax.Array, beta: float) -> jax.Array:
  """beta KL(T || M) + (1-beta) KL(S || M) with M = beta T + (1-beta) S."""
  t = jax.nn.log_softmax(teacher, axis=-1)
  s = jax.nn.log_softmax(student, axis=-1)
  m = jnp.logaddexp(t + jnp.log(beta), s + jnp.log1p(-beta))
  to_t = jnp.sum(jnp.exp(t) * (t - m), axis=-1)
  to_s = jnp.sum(jnp.exp(s) * (s - m), axis=-1)
  return beta * to_t + (1.0 - beta) * to_s


def divergence(name: str, beta: float) -> Divergence:
  """The divergence that a config names."""
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

  Nothing that `per_token` computes outlives its chunk: the backward pass
  computes it again. Gradients flow to `rows` and to what `per_token` closes
  over, such as the matrix that turns hidden states into logits.

  Args:
    per_token: from leaves `[C, ...]` to leaves `[C, ...]`, token by token; must
      be finite, with a finite gradient, where all inputs are zero.
    rows: leaves `[B, T, ...]`, all with the same B and T.
    chunk: C, tokens in flight.

  Returns:
    What `per_token` gives, leaves `[B, T, ...]`.
  """
  lead = jax.tree.leaves(rows)[0].shape[:2]
  size = lead[0] * lead[1]
  chunk = min(chunk, size)
  many = -(-size // chunk)

  def split(x: jax.Array) -> jax.Array:
    flat = x.reshape(size, *x.shape[2:])
    rest = [(0, many * chunk - size)] + [(0, 0)] * (flat.ndim - 1)
    return jnp.pad(flat, rest).reshape(many, chunk, *flat.shape[1:])

  def join(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])[:size].reshape(*lead, *x.shape[2:])

  step = jax.checkpoint(per_token, prevent_cse=False)
  return jax.tree.map(join, jax.lax.map(step, jax.tree.map(split, rows)))


@struct.dataclass
class TopK:
  """A teacher's k likeliest tokens, and all others as one more outcome.

  Not renormalised: the remaining mass keeps its place, so that the student is
  told how much to put elsewhere, though not where. A divergence of the lumped
  outcomes is never above that of all tokens (data processing inequality), and
  equals it for k = V - 1.
  """

  tokens: at.Int[jax.Array, '*B K']
  logprobs: at.Float[jax.Array, '*B K+1']  # The last is that of all others.


def top_k(logits: jax.Array, k: int) -> TopK:
  """Lumps a teacher's logits `[..., V]`.

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


def lump(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Logits `[..., V]` as those of `tokens` `[..., K]` and of all others."""
  kept = jnp.take_along_axis(logits, tokens, axis=-1)
  others = jnp.put_along_axis(logits, tokens, -jnp.inf, axis=-1, inplace=False)
  rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
  return jnp.concatenate([kept, rest], axis=-1)


def from_hidden(
  measure: Divergence,
  teacher: tuple[jax.Array, jax.Array] | TopK,
  student: tuple[jax.Array, jax.Array],
  *,
  temperature: float = 1.0,
  chunk: int = 128,
) -> jax.Array:
  """A divergence whose logits never all exist at once.

  Args:
    measure: `forward_kl` or another.
    teacher: hidden states `[B, T, D']` and the matrix `[V, D']` that makes
      logits of them; or `TopK` with leaves `[B, T, ...]`, taken at the same
      temperature. No gradient flows to it.
    student: hidden states `[B, T, D]` and matrix `[V, D]`.
    temperature: divides the logits of both.
    chunk: tokens in flight, see `chunked`.

  Returns:
    Nats per token, `[B, T]`.
  """
  hidden, matrix = student
  teacher = jax.lax.stop_gradient(teacher)
  lumped = isinstance(teacher, TopK)

  def per_token(rows):
    verdict, hidden = rows
    logits = hidden @ matrix.T / temperature
    if lumped:
      return measure(verdict.logprobs, lump(logits, verdict.tokens))
    return measure(verdict @ teacher[1].T / temperature, logits)

  rows = (teacher if lumped else teacher[0], hidden)
  return chunked(per_token, rows, chunk)
