"""Per-token divergences F(teacher || student) of GKD, summed over V, in nats.

The endpoints of the generalised JSD vanish (D_beta -> 0 as beta -> 0 or 1), so
forward and reverse KL are separate functions and not limits of it.

With a vocabulary of 150k the logits of a batch are the largest arrays of a
step. `chunked` and `from_hidden` hold the logits of a few tokens at a time;
`TopK` holds k + 1 numbers per token of a teacher's distribution.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import mesh_axes
from sleep_jax.models import token_logits

Divergence = Callable[[at.Array, at.Array], jax.Array]


def _forward_terms(teacher: at.Array, student: at.Array) -> jax.Array:
  """What each token of the vocabulary adds to `forward_kl`."""
  log_t = jax.nn.log_softmax(teacher, axis=-1)
  log_s = jax.nn.log_softmax(student, axis=-1)
  return jnp.exp(log_t) * (log_t - log_s)


def forward_kl(teacher: at.Array, student: at.Array) -> jax.Array:
  """KL(teacher || student) of logits `[..., V]` -> `[...]`; mass-covering."""
  return jnp.sum(_forward_terms(teacher, student), axis=-1)


def reverse_kl(teacher: at.Array, student: at.Array) -> jax.Array:
  """KL(student || teacher) of logits `[..., V]` -> `[...]`; mode-seeking."""
  return forward_kl(student, teacher)


def _jsd_terms(teacher: at.Array, student: at.Array, beta: float) -> jax.Array:
  """What each token of the vocabulary adds to `jsd`."""
  log_t = jax.nn.log_softmax(teacher, axis=-1)
  log_s = jax.nn.log_softmax(student, axis=-1)
  log_m = jnp.logaddexp(log_t + jnp.log(beta), log_s + jnp.log1p(-beta))
  of_teacher = jnp.exp(log_t) * (log_t - log_m)
  of_student = jnp.exp(log_s) * (log_s - log_m)
  return beta * of_teacher + (1.0 - beta) * of_student


def jsd(teacher: at.Array, student: at.Array, beta: float) -> jax.Array:
  """beta KL(T || M) + (1-beta) KL(S || M) with M = beta T + (1-beta) S."""
  return jnp.sum(_jsd_terms(teacher, student, beta), axis=-1)


def divergence(
  name: str,
  beta: float,
  clip: float | None = None,
  where: str = 'sleep.divergence',
) -> Divergence:
  """The divergence of this name.

  Args:
    name: of it.
    beta: that of `jsd`.
    clip: most that one token of the vocabulary may add (OPSD), so that the sum
      may be negative; None: as much as it does.
    where: the setting that gave the name, for the message.
  """
  terms = config.lookup(
    name,
    {
      'forward_kl': _forward_terms,
      'reverse_kl': lambda t, s: _forward_terms(s, t),
      'jsd': lambda t, s: _jsd_terms(t, s, beta),
    },
    where,
  )

  def measure(teacher: at.Array, student: at.Array) -> jax.Array:
    of_tokens = terms(teacher, student)
    if clip is not None:
      of_tokens = jnp.minimum(of_tokens, clip)
    return jnp.sum(of_tokens, axis=-1)

  return measure


def check_beta(name: str, beta: float, section: str) -> None:
  """Refuses a `beta` of `jsd` at which it vanishes.

  Raises:
    ConfigError: naming it.
  """
  if name == 'jsd' and not 0.01 <= beta <= 0.99:
    raise config.ConfigError(
      f'{section}.beta={beta}: the generalised JSD vanishes near 0 and 1; use '
      'divergence=forward_kl or reverse_kl there.'
    )


def chunked(
  per_token: Callable[[at.Tree], at.Tree], rows: at.Tree, chunk: int
) -> at.Tree:
  """`per_token(rows)`, computed `chunk` tokens at a time.

  Some columns of all rows are computed at a time, so that on a mesh every row
  stays on its device; `chunk` tokens are then those of one device. Intermediate
  values of `per_token` are not stored; the backward pass computes them again.
  Gradients flow to `rows` and to what `per_token` closes over, such as the
  unembedding matrix.

  Args:
    per_token: from leaves `[B, C, ...]` to leaves `[B, C, ...]`, token by
      token; must be finite, with a finite gradient, where all inputs are zero.
    rows: leaves `[B, T, ...]`, all with the same B and T.
    chunk: B C, tokens computed at a time; one column is the least.

  Returns:
    The results of `per_token`, leaves `[B, T, ...]`.
  """
  batch, length = jax.tree.leaves(rows)[0].shape[:2]
  parts = mesh_axes.shards(batch, mesh_axes.ROWS)
  columns = min(length, max(1, chunk * parts // batch))
  return token_logits.map_columns(per_token, rows, columns)


# From hidden states `[B, C, D]`, the unembedding `[V, D]` and leaves
# `[B, C, ...]` to one number a token, `[B, C]`, and to what else is measured.
HiddenFn = Callable[[jax.Array, jax.Array, at.Tree], tuple[jax.Array, at.Tree]]


def of_hidden(
  fn: HiddenFn,
  chunk: int,
  hidden: at.Float[at.Array, 'B T D'],
  unembedding: at.Float[at.Array, 'V D'],
  rows: at.Tree,
) -> tuple[at.Float[jax.Array, 'B T'], Any]:
  """`fn(hidden, unembedding, rows)`, computed `chunk` tokens at a time.

  While the logits of a chunk are there, so is what the backward pass needs of
  them: the gradient of every token's number with respect to its hidden state.
  It is computed at once, and no logits are computed again. What flows to the
  unembedding, if it trains, is computed from new logits; nothing flows to
  `rows`, and nothing from what else is measured.
  """
  out: Any = _of_hidden(fn, chunk, hidden, unembedding, rows)
  return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_hidden(fn, chunk, hidden, unembedding, rows):
  return chunked(lambda x: fn(x[0], unembedding, x[1]), (hidden, rows), chunk)


def _of_hidden_fwd(fn, chunk, hidden, unembedding, rows):
  def with_slope(x: tuple[jax.Array, at.Tree]) -> tuple[at.Tree, jax.Array]:
    value, vjp, aux = jax.vjp(
      lambda h: fn(h, unembedding, x[1]), x[0], has_aux=True
    )
    return (value, aux), vjp(jnp.ones_like(value))[0]

  out, slope = chunked(with_slope, (hidden, rows), chunk)
  return out, (slope, hidden, unembedding, rows)


def _of_hidden_bwd(fn, chunk, residuals, cotangents):
  slope, hidden, unembedding, rows = residuals
  cotangent, _ = cotangents
  to_hidden = (cotangent[..., None] * slope).astype(hidden.dtype)
  # Where the unembedding is frozen nobody reads this, and it never runs.
  _, vjp = jax.vjp(
    lambda w: chunked(lambda x: fn(x[0], w, x[1])[0], (hidden, rows), chunk),
    unembedding,
  )
  return to_hidden, vjp(cotangent)[0], None


_of_hidden.defvjp(_of_hidden_fwd, _of_hidden_bwd)


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
  """Logits `[..., V]` as those of `tokens` `[..., K]` and of all others.

  The result is float32.
  """
  selected = jnp.take_along_axis(logits, tokens, axis=-1)
  others = jnp.put_along_axis(logits, tokens, -jnp.inf, axis=-1, inplace=False)
  # Sums of half precision lose the tail; and a TPU reduces float32 faster.
  others = others.astype(jnp.float32)
  rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
  return jnp.concatenate([selected.astype(jnp.float32), rest], axis=-1)


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

    def lumped(hidden, matrix, top):
      logits = hidden @ matrix.T.astype(hidden.dtype) / temperature
      return measure(top.logprobs, lump(logits, top.tokens)), ()

    return of_hidden(lumped, chunk, hidden, unembedding, teacher)[0]

  teacher_hidden, teacher_unembedding = teacher

  def per_token(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
    teacher_hidden, hidden = rows
    logits = hidden @ unembedding.T / temperature
    return measure(teacher_hidden @ teacher_unembedding.T / temperature, logits)

  return chunked(per_token, (teacher_hidden, hidden), chunk)
