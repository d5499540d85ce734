"""Titans' neural memory (`titans`, arXiv 2501.00663): an MLP as state.

Each head's memory M is an MLP whose weights are what the layer carries. A
token's surprise, the gradient of how wrong M is about its value, moves M by
gradient descent with momentum S and forgetting (Titans section 3.1):

  S_t = eta_t S_{t-1} - theta_t grad |M_c(k_t) - v_t|^2
  M_t = (1 - alpha_t) M_{t-1} + S_t
  o_t = M_t(q_t)

Gradients are taken at M_c, the weights with which the token's chunk began
(Titans section 3.2), so each matrix gets one of rank one, a_t d_t^T, and no
M_t of a chunk need be formed:

  x M_t = beta_t x M_0 + gamma_t x S_0 - sum_{i <= t} W_ti (x . a_i) d_i

beta are the products of 1 - alpha. With A_tj and E_ji the products of 1 - alpha
and of eta between two tokens, W = A E diag(theta), and gamma_t = sum_j A_tj
E_j0. That is attention within the chunk, layer by layer of the MLP.

M has no residual connection, and its last matrix begins at zero, so that what
it says is what was written and not its own noise (docs/architecture.md).

A stream gives the same in whatever pieces it comes (`slots`). Letters beside
those of `sleep_jax.array_typing`: K is the width of keys and values, C tokens
of a chunk, N and M the sides of a matrix of the memory.
"""

import dataclasses
import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import lora
from sleep_jax.models.mixers import base
from sleep_jax.models.mixers import deltanet
from sleep_jax.models.mixers import slots as slots_lib

_LOG_ZERO = -1e3  # exp of it is 0, and its sums are exact.

Matrices = tuple[jax.Array, ...]  # Of the memory's layers, [B, H, N, M] each.


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """Settings of a neural memory."""

  heads: config.Count = 4
  width: config.Count = 32  # Of a head's keys and values.
  depth: config.Count = 2  # Layers of the memory; 1 = a matrix.
  expansion: config.Count = 2  # Of its hidden layers, against `width`.
  chunk: config.Count = 16  # Tokens whose gradients are of the same weights.
  max_rate: config.Positive = 0.5  # Largest theta.
  momentum: bool = True  # False: S_t is the token's surprise alone.
  # Largest norm of a token's gradient of a matrix: a deep memory may diverge.
  clip: config.Positive = 1.0

  def matrices(self) -> list[tuple[int, int]]:
    """The shapes `[N, M]` of a memory's layers."""
    k, hidden = self.width, self.expansion * self.width
    if self.depth == 1:
      return [(k, k)]
    return [(k, hidden), *[(hidden, hidden)] * (self.depth - 2), (hidden, k)]

  @property
  def columns(self) -> int:
    """Y: all numbers of a memory, in rows of `width`."""
    return sum(n * m for n, m in self.matrices()) // self.width

  def flops(self) -> float:
    """Of a token: forward, backward, two reads, and what it adds to both sums.

    With the products within a chunk, which the recurrence has not.
    """
    matrices = sum(n * m for n, m in self.matrices())
    sides = sum(n + m for n, m in self.matrices())
    return 2.0 * self.heads * (6 * matrices + self.chunk * sides)


@dataclasses.dataclass(frozen=True)
class TitansConfig(MemoryConfig):
  """Settings of `titans`."""

  conv: config.Count = 4  # Tokens that the short convolution sees.


class State(at.Pytree):
  """What a layer carries from token to token; `s` outlives the window.

  s: float32, what has been added to the initial weights, and the momentum.
  since: of these weights, what has been added since the chunk began.
  count: tokens of the window so far.
  """

  s: at.Float[jax.Array, 'B H K X']
  since: at.Float[jax.Array, 'B H K Y']
  count: at.Int[jax.Array, 'B']
  conv_state: at.Float[jax.Array, 'B W Z']


class Tokens(NamedTuple):
  """What the memory reads of T tokens, float32.

  `real` is 0 for padding, which changes nothing.
  """

  q: at.Float[jax.Array, 'B H T K']
  k: at.Float[jax.Array, 'B H T K']
  v: at.Float[jax.Array, 'B H T K']
  theta: at.Float[jax.Array, 'B H T']
  log_eta: at.Float[jax.Array, 'B H T']
  log_keep: at.Float[jax.Array, 'B H T']  # Of 1 - alpha.
  real: at.Float[jax.Array, 'B H T']


class Weights(NamedTuple):
  """A memory within a chunk: as it is, its momentum, and as the chunk began."""

  now: Matrices
  momentum: Matrices
  began: Matrices


def surprise(
  memory: Matrices, k: jax.Array, v: jax.Array, clip: float
) -> list[tuple[jax.Array, jax.Array]]:
  """The gradients of `|M(k) - v|^2`, of each matrix as a_t and d_t.

  Args:
    memory: the weights.
    k: keys `[B, H, C, K]`.
    v: values `[B, H, C, K]`.
    clip: largest norm of the gradient of a token and a matrix.

  Returns:
    For each matrix `[B, H, C, N]` and `[B, H, C, M]`; the gradient of a token
    is their outer product.
  """
  read, hidden = [k], []
  for matrix in memory[:-1]:
    hidden.append(read[-1] @ matrix)
    read.append(jax.nn.silu(hidden[-1]))
  out = read[-1] @ memory[-1]
  error = 2.0 * (out - v)
  errors = [error]
  for matrix, h in zip(memory[:0:-1], hidden[::-1], strict=True):
    gate = jax.nn.sigmoid(h)
    slope = gate * (1.0 + h * (1.0 - gate))
    errors.append((errors[-1] @ matrix.swapaxes(-1, -2)) * slope)

  def clipped(a: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    squares = (a * a).sum(-1, keepdims=True) * (d * d).sum(-1, keepdims=True)
    return a, d * jnp.minimum(1.0, clip * jax.lax.rsqrt(squares + 1e-12))

  return [clipped(*pair) for pair in zip(read, errors[::-1], strict=True)]


def read_chunk(
  r: MemoryConfig, weights: Weights, tokens: Tokens
) -> tuple[Weights, jax.Array]:
  """Reads tokens of one chunk, and answers each: `[B, H, C, K]`.

  `weights.began` stays, since the chunk may go on.
  """
  size = tokens.q.shape[2]
  lower = jnp.tril(jnp.ones((size, size), bool))

  def products(log_x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Those from the first token to each, and those between two tokens."""
    total = jnp.cumsum(log_x, axis=-1)
    between = total[..., :, None] - total[..., None, :]
    # Above the diagonal the exponent is positive, and could overflow.
    return jnp.exp(total), jnp.exp(jnp.where(lower, between, -jnp.inf))

  beta, keep = products(tokens.log_keep)
  log_eta = tokens.log_eta if r.momentum else _LOG_ZERO * tokens.real
  from_start, carried = products(log_eta)
  keep = keep * tokens.real[..., None, :]
  gamma = (keep @ from_start[..., None])[..., 0]
  carried = carried * tokens.theta[..., None, :]
  written = keep @ carried
  pairs = surprise(weights.began, tokens.k, tokens.v, r.clip)

  x = tokens.q
  for i, (a, d) in enumerate(pairs):
    of_chunk = (written * (x @ a.swapaxes(-1, -2))) @ d
    x = (
      beta[..., None] * (x @ weights.now[i])
      + gamma[..., None] * (x @ weights.momentum[i])
      - of_chunk
    )
    x = jax.nn.silu(x) if i + 1 < len(pairs) else x

  def end(of_now: jax.Array, of_momentum: jax.Array, by: jax.Array) -> Matrices:
    """What the last token leaves: a sum of both, and the chunk's gradients."""
    return tuple(
      of_now[..., -1, None, None] * now
      + of_momentum[..., -1, None, None] * momentum
      - (a * by[..., -1, :, None]).swapaxes(-1, -2) @ d
      for (a, d), now, momentum in zip(
        pairs, weights.now, weights.momentum, strict=True
      )
    )

  now = end(beta, gamma, written)
  momentum = end(jnp.zeros_like(beta), from_start, carried)
  return Weights(now, momentum, weights.began), x


def read(
  r: TitansConfig, weights: Weights, count: jax.Array, tokens: Tokens
) -> tuple[Weights, jax.Array]:
  """Reads tokens that follow `count` others of the window.

  Args:
    r: the settings.
    weights: as the tokens before left them.
    count: `[B]`, how many these were.
    tokens: the new ones; those that are padding may stand anywhere.

  Returns:
    The weights after them, and the answers `[B, H, T, K]`; those of padding
    have no meaning.
  """
  slots = slots_lib.of_stream(count, tokens.real[:, 0], r.chunk)
  if tokens.q.shape[2] == 1:
    weights, out = read_chunk(r, weights, tokens)
    return with_began(weights, slots.ends(0)), out

  def step(
    weights: Weights, xs: tuple[jax.Array, Tokens]
  ) -> tuple[Weights, jax.Array]:
    number, tokens = xs
    weights, out = read_chunk(r, weights, tokens)
    return with_began(weights, slots.ends(number)), out

  xs = jnp.arange(slots.chunks), Tokens(*map(slots.split, tokens))
  weights, out = jax.lax.scan(step, weights, xs)
  return weights, slots.join(out)


def answer(memory: Matrices, q: jax.Array) -> jax.Array:
  """M(q) of queries `[B, H, C, K]`."""
  x = q
  for matrix in memory[:-1]:
    x = jax.nn.silu(x @ matrix)
  return x @ memory[-1]


def with_began(weights: Weights, ends: jax.Array) -> Weights:
  """The weights, where in rows whose chunk has ended a new one begins."""
  where = functools.partial(jnp.where, ends[:, None, None, None])
  return weights._replace(began=tuple(map(where, weights.now, weights.began)))


def initial_memory(layer: nn.Module, r: MemoryConfig) -> Matrices:
  """The weights that a memory begins with, parameters of `layer`.

  The last matrix is zero: what a memory says is then what was written, and not
  the noise of its first weights.
  """
  inits = [_init_matrix] * (r.depth - 1) + [nn.initializers.zeros_init()]
  return tuple(
    layer.param(f'memory_{i}', init, (r.heads, *shape))
    for i, (init, shape) in enumerate(zip(inits, r.matrices(), strict=True), 1)
  )


def unpack(
  r: MemoryConfig,
  initial: Matrices,
  s: at.Float[jax.Array, 'B H K X'],
  since: at.Float[jax.Array, 'B H K Y'],
) -> Weights:
  """The memory that `State.s` and `State.since` say."""
  added, momentum = jnp.split(s, 2, axis=-1)
  return Weights(
    now=tuple(map(jnp.add, initial, _matrices(r, added))),
    momentum=_matrices(r, momentum),
    began=tuple(map(jnp.add, initial, _matrices(r, added - since))),
  )


def pack(
  r: MemoryConfig, initial: Matrices, weights: Weights
) -> tuple[jax.Array, jax.Array]:
  """The inverse of `unpack`: `State.s` and `State.since`."""
  added, began = (
    _in_one(tuple(map(jnp.subtract, x, initial)), r.width)
    for x in (weights.now, weights.began)
  )
  s = jnp.concatenate([added, _in_one(weights.momentum, r.width)], axis=-1)
  return s, added - began


def _in_one(matrices: Matrices, width: int) -> at.Float[jax.Array, 'B H K Y']:
  """The matrices of a memory in one array."""
  parts = [m.reshape(*m.shape[:2], width, -1) for m in matrices]
  return jnp.concatenate(parts, axis=-1)


def _matrices(
  r: MemoryConfig, packed: at.Float[jax.Array, 'B H K Y']
) -> Matrices:
  cuts, parts = 0, []
  for n, m in r.matrices():
    columns = n * m // r.width
    part = packed[..., cuts : cuts + columns]
    parts.append(part.reshape(*packed.shape[:2], n, m))
    cuts += columns
  return tuple(parts)


def init_gates(r: MemoryConfig) -> jax.Array:
  """Biases of what `tokens` reads: slow to write and to forget at first."""
  return jnp.repeat(jnp.array([-2.0, 2.0, 4.0]), r.heads)


def tokens(
  r: MemoryConfig,
  qkv_BxHxTx3K: jax.Array,
  gates_BxHxTx3: jax.Array,
  real_BxT: jax.Array,
) -> Tokens:
  """What a memory reads of projections, before any non-linearity.

  Args:
    r: the settings.
    qkv_BxHxTx3K: query, key and value of each head.
    gates_BxHxTx3: of theta, of eta and of 1 - alpha.
    real_BxT: 0 where a token is padding.
  """
  q, k, v = jnp.split(nn.silu(qkv_BxHxTx3K), 3, axis=-1)
  theta, eta, keep = jnp.moveaxis(gates_BxHxTx3.astype(jnp.float32), -1, 0)
  real = jnp.broadcast_to(real_BxT[:, None], theta.shape).astype(jnp.float32)
  return Tokens(
    q=deltanet.l2_normalize(q),
    k=deltanet.l2_normalize(k),
    v=v.astype(jnp.float32),
    theta=real * r.max_rate * nn.sigmoid(theta),
    log_eta=real * nn.log_sigmoid(eta),
    log_keep=real * nn.log_sigmoid(keep),
    real=real,
  )


class TitansLayer(nn.Module):
  """The layer of `titans`: the neural memory alone (Titans' LMM)."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    inputs: base.MixerInputs,
    state: State | None,
    adapter: lora.Adapter | None = None,
  ) -> tuple[jax.Array, State]:
    """Mixes, from `state` on; tokens that are padding change nothing."""
    del adapter  # `LayerStack` refuses it.
    r, rows = self.cfg.recurrent, len(x_BxTxD)
    if state is None:
      state = Titans.init_state(self.cfg, rows, 0)
    read_of, conv_state = self._tokens(x_BxTxD, inputs.token_mask, state)
    initial = initial_memory(self, r)
    weights = unpack(r, initial, state.s, state.since)
    with jax.default_matmul_precision('highest'):
      weights, out = read(r, weights, state.count, read_of)
    s, since = pack(r, initial, weights)
    count = state.count + inputs.token_mask.sum(1).astype(jnp.int32)
    out = deltanet.gated_output(self, self.cfg, x_BxTxD, out.swapaxes(1, 2))
    return out, State(s, since, count, conv_state)

  def _tokens(
    self, x_BxTxD: jax.Array, token_mask: jax.Array, state: State
  ) -> tuple[Tokens, jax.Array]:
    """What the memory reads, and the convolution's new state."""
    r, dtype = self.cfg.recurrent, x_BxTxD.dtype
    dense = functools.partial(nn.Dense, use_bias=False, dtype=dtype)
    qkv = dense(3 * r.heads * r.width, name='qkv')(x_BxTxD)
    qkv = jnp.where(token_mask[..., None], qkv, 0)
    init = nn.initializers.normal(r.conv**-0.5)
    kernel = self.param('conv', init, (r.conv, qkv.shape[-1]))
    qkv, conv_state = deltanet.convolve(qkv, state.conv_state, kernel)
    gates = nn.Dense(
      3 * r.heads,
      bias_init=lambda *_: init_gates(r),
      dtype=jnp.float32,
      name='gates',
    )(x_BxTxD)
    qkv, gates = heads_of(qkv, r.heads), heads_of(gates, r.heads)
    return tokens(r, qkv, gates, token_mask), conv_state


def heads_of(x_BxTx3X: jax.Array, heads: int) -> jax.Array:
  """`[B, T, 3 H X]`, by the third and then by head, as `[B, H, T, 3 X]`."""
  x = x_BxTx3X.reshape(*x_BxTx3X.shape[:2], 3, heads, -1)
  x = x.transpose(0, 3, 1, 2, 4)
  return x.reshape(*x.shape[:3], -1)


def _init_matrix(key: at.Key, shape: tuple[int, ...]) -> jax.Array:
  """Of `[H, N, M]`, so that the answer to a key of length 1 is small."""
  return jax.random.normal(key, shape) * shape[1] ** -0.5


class Titans(base.Mixer):
  """Titans' neural memory (arXiv 2501.00663)."""

  name = 'titans'
  Config = TitansConfig
  recurrent = True

  @classmethod
  def module(cls, cfg: config.ModelConfig, name: str | None) -> nn.Module:
    return TitansLayer(cfg, name=name)

  @classmethod
  def init_state(
    cls, cfg: config.ModelConfig, rows: int, capacity: int
  ) -> State:
    del capacity  # The state does not grow with what was read.
    r = cfg.recurrent
    return State(
      s=jnp.zeros((rows, r.heads, r.width, 2 * r.columns)),
      since=jnp.zeros((rows, r.heads, r.width, r.columns)),
      count=jnp.zeros((rows,), jnp.int32),
      conv_state=jnp.zeros(
        (rows, r.conv - 1, 3 * r.heads * r.width), cfg.dtype
      ),
    )

  @classmethod
  def flops(cls, cfg: config.ModelConfig, context: float) -> float:
    del context
    r = cfg.recurrent
    projections = cfg.dim * (5 * r.heads * r.width + 3 * r.heads)
    convolution = r.conv * 3 * r.heads * r.width
    return 2.0 * (projections + convolution) + r.flops()
