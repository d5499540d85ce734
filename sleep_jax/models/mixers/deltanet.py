"""Gated DeltaNet (`gdn`) and Jet (`jet`): linear recurrences, fast weights.

Each head keeps a matrix S `[K, V]` that every token first decays and then
corrects towards its value (arXiv 2412.06464; written here as S transposed):

  S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
  o_t = S_t^T q_t

`scan_tokens` is that recurrence. `scan_chunks` is the same sum, a chunk at a
time: within a chunk it solves one triangular system per head, between chunks
it carries S. Both start from any S, and both compute in float32.

Letters beside those of `sleep_jax.array_typing`: K and V are here the widths of
a head's key and value.
"""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import lora
from sleep_jax.models.mixers import base

_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK, _DOUBLINGS = 8, 2  # Tokens of a block; 2 ** (2 + 1) = 8.


_Tokens = tuple[jax.Array, ...]  # q, k, v, log alpha and beta of a step.


class State(at.Pytree):
  """What a layer carries from token to token.

  Sleep keeps `s` alone: `conv_state` ends with the window
  (offline_recurrence 8).
  """

  s: at.Float[jax.Array, 'B H K V']  # Always float32.
  # The last W inputs of the convolution, which it reads again.
  conv_state: at.Float[jax.Array, 'B W X']


def scan_tokens(
  q: at.Float[jax.Array, 'B T H K'],
  k: at.Float[jax.Array, 'B T H K'],
  v: at.Float[jax.Array, 'B T H V'],
  log_alpha: at.Float[jax.Array, 'B T H'],
  beta: at.Float[jax.Array, 'B T H'],
  s: at.Float[jax.Array, 'B H K V'],
) -> tuple[jax.Array, jax.Array]:
  """The recurrence, token by token: outputs `[B, T, H, V]`, and the last S."""
  dot = functools.partial(jnp.einsum, precision=_HIGHEST)

  def step(s: jax.Array, token: _Tokens) -> tuple[jax.Array, jax.Array]:
    q, k, v, log_alpha, beta = token
    s = s * jnp.exp(log_alpha)[..., None, None]
    error = v - dot('bhkv,bhk->bhv', s, k)
    s = s + dot('bhk,bhv->bhkv', k * beta[..., None], error)
    return s, dot('bhkv,bhk->bhv', s, q)

  xs = (q, k, v, log_alpha, beta)
  xs = tuple(x.astype(jnp.float32).swapaxes(0, 1) for x in xs)
  s, out = jax.lax.scan(step, s.astype(jnp.float32), xs)
  return out.swapaxes(0, 1), s


def _inverse(a: jax.Array) -> jax.Array:
  """(I + A)^-1 for A strictly lower triangular, `[..., C, C]`.

  By blocks: a block's own inverse is the product (I - A)(I + A^2)(I + A^4),
  exact because A^8 = 0, and short enough that its terms stay small. Ten times
  as fast on a CPU as `jax.scipy.linalg.solve_triangular`, which calls LAPACK
  for every head of every row.
  """
  size, out = a.shape[-1], []
  for i in range(0, size, _BLOCK):
    rows = slice(i, i + _BLOCK)
    left = jnp.broadcast_to(jnp.eye(size)[rows], a[..., rows, :].shape)
    for j, block in zip(range(0, i, _BLOCK), out, strict=True):
      left = left - a[..., rows, j : j + _BLOCK] @ block
    power = -a[..., rows, rows]
    inverse = jnp.eye(power.shape[-1]) + power
    for _ in range(_DOUBLINGS):
      power = power @ power
      inverse = inverse + inverse @ power
    out.append(inverse @ left)
  return jnp.concatenate(out, axis=-2)


@jax.custom_vjp
def _solve(a: jax.Array, rhs: jax.Array) -> jax.Array:
  """U of (I + A) U = rhs, A strictly lower triangular."""
  return _inverse(a) @ rhs


_Residuals = tuple[jax.Array, jax.Array]


def _solve_forward(
  a: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, _Residuals]:
  inverse = _inverse(a)
  u = inverse @ rhs
  return u, (inverse, u)


def _solve_backward(
  residuals: _Residuals, du: jax.Array
) -> tuple[jax.Array, jax.Array]:
  inverse, u = residuals
  d_rhs = inverse.swapaxes(-1, -2) @ du
  return -d_rhs @ u.swapaxes(-1, -2), d_rhs


_solve.defvjp(_solve_forward, _solve_backward)


def scan_chunks(
  q: at.Float[jax.Array, 'B T H K'],
  k: at.Float[jax.Array, 'B T H K'],
  v: at.Float[jax.Array, 'B T H V'],
  log_alpha: at.Float[jax.Array, 'B T H'],
  beta: at.Float[jax.Array, 'B T H'],
  s: at.Float[jax.Array, 'B H K V'],
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """`scan_tokens` in chunks; T need not be a multiple of `chunk`.

  With g_t the product of the alphas up to t and R_ti = g_t / g_i, what each
  token writes is U = (I + A)^-1 diag(beta) (V - diag(g) K S_0), where A is the
  strict lower triangle of beta_t R_ti (k_t . k_i).
  """
  length, size = q.shape[1], min(chunk, q.shape[1])
  fill = -length % size

  def split(x: jax.Array) -> jax.Array:
    """`[B, T, H, ...]` to `[chunks, B, H, C, ...]`."""
    x = jnp.pad(
      x.astype(jnp.float32), [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)
    )
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))

  lower = jnp.tril(jnp.ones((size, size), bool))
  strict = jnp.tril(lower, -1)

  def step(s: jax.Array, tokens: _Tokens) -> tuple[jax.Array, jax.Array]:
    q, k, v, log_alpha, beta = tokens
    log_g = jnp.cumsum(log_alpha, axis=-1)
    # Above the diagonal the exponent is positive, and could overflow.
    log_decay = log_g[..., :, None] - log_g[..., None, :]
    ratio = jnp.exp(jnp.where(lower, log_decay, -jnp.inf))
    g = jnp.exp(log_g)[..., None]
    a = beta[..., None] * ratio * (k @ k.swapaxes(-1, -2))
    rhs = beta[..., None] * (v - g * (k @ s))
    u = _solve(jnp.where(strict, a, 0.0), rhs)
    out = g * (q @ s) + (ratio * (q @ k.swapaxes(-1, -2))) @ u
    decay_to_end = ratio[..., -1, :, None]
    return g[..., -1:, :] * s + (k * decay_to_end).swapaxes(-1, -2) @ u, out

  # A chunk's padding neither decays nor writes: log alpha and beta are 0.
  xs = tuple(map(split, (q, k, v, log_alpha, beta)))
  with jax.default_matmul_precision('highest'):
    s, out = jax.lax.scan(step, s.astype(jnp.float32), xs)
  out = jnp.moveaxis(out, (0, 2), (1, 3))
  return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length], s


def convolve(
  x_BxTxX: jax.Array, conv_state_BxWxX: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Causal depthwise convolution, and the state for the next call.

  Args:
    x_BxTxX: the new inputs; 0 where a token is padding.
    conv_state_BxWxX: the W inputs before them.
    kernel: `[W + 1, X]`, or one per token, `[B, T, W + 1, X]`.
  """
  width, length = kernel.shape[-2], x_BxTxX.shape[1]
  conv_state = conv_state_BxWxX.astype(x_BxTxX.dtype)
  whole = jnp.concatenate([conv_state, x_BxTxX], axis=1)
  y = sum(
    whole[:, i : i + length] * kernel[..., i, :].astype(x_BxTxX.dtype)
    for i in range(width)
  )
  return jnp.asarray(y), whole[:, length:]


def l2_normalize(x: jax.Array) -> jax.Array:
  """Vectors of length 1, in float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def _init_log_a(key: at.Key, shape: tuple[int, ...]) -> jax.Array:
  """log A with A uniform in (0, 16)."""
  return jnp.log(jax.random.uniform(key, shape, minval=1e-3, maxval=16.0))


def _init_dt_bias(key: at.Key, shape: tuple[int, ...]) -> jax.Array:
  """The inverse softplus of a dt that is log-uniform in [1e-3, 0.1]."""
  low, high = math.log(1e-3), math.log(0.1)
  dt = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
  return dt + jnp.log(-jnp.expm1(-dt))


def gated_output(
  layer: nn.Module,
  cfg: config.ModelConfig,
  x_BxTxD: jax.Array,
  out_BxTxHxV: jax.Array,
) -> at.Float[jax.Array, 'B T D']:
  """The heads' outputs, normalized, gated by the tokens and projected.

  Its parameters are those of `layer`: `norm`, `g` and `o`.
  """
  dtype, (*_, heads, width) = x_BxTxD.dtype, out_BxTxHxV.shape
  scale = layer.param('norm', nn.initializers.ones_init(), (width,))
  square = (out_BxTxHxV**2).mean(-1, keepdims=True)
  out = out_BxTxHxV * jax.lax.rsqrt(square + cfg.norm_eps)
  out = (out * scale).astype(dtype).reshape(*x_BxTxD.shape[:2], -1)
  dense = functools.partial(nn.Dense, use_bias=False, dtype=dtype)
  out = out * nn.silu(dense(heads * width, name='g')(x_BxTxD))
  return dense(cfg.dim, name='o')(out)


class GatedDeltaLayer(nn.Module):
  """The layer of `gdn`, and with `dynamic_conv` of `jet` (arXiv 2508.15884).

  gdn: q, k and v pass a short convolution. jet: v alone does, by kernels that
  each token makes for itself. The kernels' last matrix begins at zero, so that
  training starts from a static convolution; its first is drawn, because two
  matrices of zeros would never get a gradient.
  """

  cfg: config.ModelConfig
  dynamic_conv: bool

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
    c, r, dtype = self.cfg, self.cfg.recurrent, x_BxTxD.dtype
    b, length, _ = x_BxTxD.shape
    if state is None:
      state = _init_state(c, self.dynamic_conv, b)
    token_mask = inputs.token_mask[..., None]

    def project(size: int, name: str) -> jax.Array:
      return nn.DenseGeneral((size,), use_bias=False, dtype=dtype, name=name)(
        x_BxTxD
      )

    q = project(r.heads * r.key, 'q')
    k = project(r.heads * r.key, 'k')
    v = project(r.heads * r.value, 'v')
    conv_in = v if self.dynamic_conv else jnp.concatenate([q, k, v], axis=-1)
    conv_in = jnp.where(token_mask, conv_in, 0)
    kernel = self._kernel(x_BxTxD, conv_in.shape[-1])
    conv_out, conv_state = convolve(conv_in, state.conv_state, kernel)
    conv_out = nn.silu(conv_out)
    if self.dynamic_conv:
      q, k, v = nn.silu(q), nn.silu(k), conv_out
    else:
      cuts = (r.heads * r.key, 2 * r.heads * r.key)
      q, k, v = jnp.split(conv_out, cuts, axis=-1)
    q, k, v = (x.reshape(b, length, r.heads, -1) for x in (q, k, v))

    beta = nn.sigmoid(project(r.heads, 'beta').astype(jnp.float32))
    rate = self.param('log_rate', _init_log_a, (r.heads,))
    dt = project(r.heads, 'dt').astype(jnp.float32)
    dt = nn.softplus(dt + self.param('dt_bias', _init_dt_bias, (r.heads,)))
    log_alpha = jnp.where(token_mask, -jnp.exp(rate) * dt, 0.0)
    beta = jnp.where(token_mask, beta, 0.0)

    q, k = l2_normalize(q) * r.key**-0.5, l2_normalize(k)
    if length == 1:  # A solve of one unknown is a detour.
      out, s = scan_tokens(q, k, v, log_alpha, beta, state.s)
    else:
      out, s = scan_chunks(q, k, v, log_alpha, beta, state.s, r.chunk)
    return gated_output(self, c, x_BxTxD, out), State(s, conv_state)

  def _kernel(self, x_BxTxD: jax.Array, width: int) -> jax.Array:
    """The convolution's kernel: one for all tokens, or one for each."""
    taps = self.cfg.recurrent.conv
    init = nn.initializers.normal(taps**-0.5)
    kernel = self.param('conv', init, (taps, width))
    if not self.dynamic_conv:
      return kernel
    dense = functools.partial(nn.Dense, use_bias=False, dtype=x_BxTxD.dtype)
    hidden = nn.silu(dense(max(1, width // 8), name='kernel_in')(x_BxTxD))
    zero = nn.initializers.zeros_init()
    change = dense(taps * width, kernel_init=zero, name='kernel_out')(hidden)
    return kernel + change.reshape(*change.shape[:-1], taps, width)


def _conv_width(cfg: config.ModelConfig, dynamic_conv: bool) -> int:
  """How many channels a layer's convolution reads."""
  r = cfg.recurrent
  keys = 0 if dynamic_conv else 2 * r.heads * r.key
  return keys + r.heads * r.value


def _init_state(
  cfg: config.ModelConfig, dynamic_conv: bool, rows: int
) -> State:
  r = cfg.recurrent
  width = _conv_width(cfg, dynamic_conv)
  return State(
    s=jnp.zeros((rows, r.heads, r.key, r.value)),
    conv_state=jnp.zeros((rows, r.conv - 1, width), cfg.dtype),
  )


class GatedDeltaNet(base.Mixer):
  """Gated DeltaNet (arXiv 2412.06464)."""

  name = 'gdn'
  Config = config.RecurrentConfig
  recurrent = True
  dynamic_conv = False

  @classmethod
  def module(cls, cfg: config.ModelConfig, name: str | None) -> nn.Module:
    return GatedDeltaLayer(cfg, cls.dynamic_conv, name=name)

  @classmethod
  def init_state(
    cls, cfg: config.ModelConfig, rows: int, capacity: int
  ) -> State:
    del capacity  # The state does not grow with what was read.
    return _init_state(cfg, cls.dynamic_conv, rows)

  @classmethod
  def flops(cls, cfg: config.ModelConfig, context: float) -> float:
    """As the recurrence needs them.

    The chunked form computes more, within a chunk, as attention would.
    """
    del context
    r = cfg.recurrent
    keys, values = r.heads * r.key, r.heads * r.value
    kernels = 0
    if cls.dynamic_conv:  # Two layers that make every token's kernel.
      kernels = max(1, values // 8) * (cfg.dim + r.conv * values)
    projections = cfg.dim * (2 * keys + 3 * values + 2 * r.heads)
    convolution = r.conv * _conv_width(cfg, cls.dynamic_conv)
    return 2.0 * (projections + convolution + kernels + 3 * keys * r.value)


class Jet(GatedDeltaNet):
  """Jet (arXiv 2508.15884): `gdn` with a convolution that tokens choose."""

  name = 'jet'
  dynamic_conv = True
