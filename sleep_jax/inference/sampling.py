"""Rollouts: prefill and cached decode in one compiled loop."""

import dataclasses
import functools
import math

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import padding
from sleep_jax.inference import decoding
from sleep_jax.models import cms
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.runtime import sharding

_BLOCK = 128  # Tokens; near the square root of usual vocabularies.


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How the next token is drawn."""

  max_new: int
  temperature: float = 1.0  # 0 = greedy.
  top_k: int = 0  # 0 = all.
  top_p: float = 1.0
  min_p: float = 0.0  # Least share of the top token's probability; 0 = all.
  stop: int = -1  # The row ends with this token; -1 = never.
  pad: int = 0  # Fills a row after its end.
  # Least gate of one random active expert per router and row, in addition to
  # those the router picks (`cms.with_random_experts`); 0 = none.
  random_expert: float = 0.0

  def __post_init__(self):
    if self.max_new < 1 or self.temperature < 0 or self.top_k < 0:
      raise config.ConfigError(
        f'{self}: max_new must be at least 1; temperature and top_k at least 0 '
        '(temperature 0 is greedy, top_k 0 keeps all).'
      )
    if not (0 < self.top_p <= 1 and 0 <= self.random_expert <= 1):
      raise config.ConfigError(
        f'{self}: top_p must be in (0, 1] and random_expert in [0, 1].'
      )


@struct.dataclass
class Completions:
  """Sampled tokens, their log-probabilities, and how many count per row."""

  tokens: at.Int[jax.Array, 'B M']
  logprobs: at.Float[jax.Array, 'B M']
  lengths: at.Int[jax.Array, 'B']


def filter_logits(logits_BxV: jax.Array, how: SamplerConfig) -> jax.Array:
  """Logits after temperature, min-p, top-k and top-p; the dropped are -inf."""
  logits = logits_BxV / how.temperature
  if how.min_p:
    bar = jnp.max(logits, axis=-1, keepdims=True) + math.log(how.min_p)
    logits = jnp.where(logits >= bar, logits, -jnp.inf)
  if how.top_k:
    bar = jax.lax.top_k(logits, how.top_k)[0][:, -1:]
    logits = jnp.where(logits >= bar, logits, -jnp.inf)
  if how.top_p < 1.0:
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    p = jax.nn.softmax(ordered, axis=-1)
    # Keep the smallest set whose mass reaches top_p, the top token always.
    keep = jnp.cumsum(p, axis=-1) - p < how.top_p
    bar = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits >= bar, logits, -jnp.inf)
  return logits


def _argmax(x_BxV: jax.Array) -> jax.Array:
  """First index of the largest entry; on CPU ten times as fast as `argmax`."""
  size = x_BxV.shape[-1]
  is_top = x_BxV == x_BxV.max(axis=-1, keepdims=True)
  first = jnp.where(is_top, jnp.arange(size), size).min(axis=-1)
  return jnp.minimum(first, size - 1)  # Should there be no largest, but NaN.


def _categorical(rng: at.Key, logits_BxV: jax.Array) -> jax.Array:
  """Draws by the softmax: a block of the vocabulary, then a token in it.

  Two random numbers a row. The usual way, noise on every logit, takes V of them
  and costs a small model more than its forward pass. Both picks invert a sum of
  few terms, so that rare tokens are not lost to rounding.
  """
  rows, size = logits_BxV.shape
  p = jnp.exp(logits_BxV - logits_BxV.max(axis=-1, keepdims=True))
  p = jnp.pad(p, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
  u = jax.random.uniform(rng, (2, rows, 1))

  def pick(weights: jax.Array, u: jax.Array) -> jax.Array:
    below = jnp.cumsum(weights, axis=-1)
    return (below <= u * below[:, -1:]).sum(axis=-1)

  block = pick(p.sum(axis=-1), u[0])
  inside = jnp.take_along_axis(p, block[:, None, None], axis=1)[:, 0]
  return block * _BLOCK + pick(inside, u[1])


def _sample(
  logits: jax.Array, rng: at.Key, how: SamplerConfig
) -> tuple[jax.Array, jax.Array]:
  """One token per row, and its log-probability under the sampler."""
  if how.temperature == 0.0:
    token = _argmax(logits)
  else:
    logits = filter_logits(logits, how)
    token = _categorical(rng, logits)
  chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
  return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def _check_fit(
  cfg: config.ModelConfig, longest: int, how: SamplerConfig
) -> None:
  if longest + how.max_new > cfg.max_len:
    raise config.ConfigError(
      f'A prompt of {longest} tokens and max_new={how.max_new} need a cache of '
      f'{longest + how.max_new}, but model.max_len={cfg.max_len}; shorten the '
      'prompt, lower max_new or raise model.max_len.'
    )


def complete(
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory | None,
  prompts: list[list[int]],
  rng: at.Key,
  how: SamplerConfig,
) -> list[list[int]]:
  """What follows each prompt, the stop token included.

  Rows are padded to a power of two and prompts to a multiple of 8, so that few
  shapes are ever compiled.

  Raises:
    config.ConfigError: a prompt is empty, or too long for `cfg.max_len`.
  """
  if not prompts or not all(prompts):
    raise config.ConfigError('A prompt is empty; give at least the BOS token.')
  longest = max(map(len, prompts))
  _check_fit(cfg, longest, how)
  rows = 1 << (len(prompts) - 1).bit_length()
  tokens, lengths = padding.left_pad(
    [*prompts, *[[]] * (rows - len(prompts))], how.pad
  )
  room = cfg.max_len - how.max_new
  asked = sharding.shard_batch((tokens[:, -room:], lengths), 'batch')
  out = sharding.fetch(generate(cfg, params, memory, *asked, rng, how))
  pairs = zip(out.tokens, out.lengths)
  return [row[:n].tolist() for row, n in list(pairs)[: len(prompts)]]


@functools.partial(jax.jit, static_argnums=(0, 6))
def generate(
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory | None,
  prompts: at.Int[jax.Array, 'B P'],
  lengths: at.Int[jax.Array, 'B'],
  rng: at.Key,
  how: SamplerConfig,
) -> Completions:
  """Continues every prompt; leaves the loop once all rows have ended.

  Args:
    cfg: the model (static).
    params: backbone weights.
    memory: fast weights and experts, shared by the rows; see `generate_each`.
    prompts: right-aligned prompts, see `left_pad`.
    lengths: how many tokens of each row are real; a row of 0 yields nothing.
    rng: random key.
    how: the sampler (static).

  Raises:
    config.ConfigError: prompt and continuation exceed `cfg.max_len`.
  """
  views = None
  if memory is not None:
    views = _layer_memories(cfg, memory, prompts.shape[0], rng, how)
  model = decoding.unstack_layers(cfg, params, views)
  read = functools.partial(decoding.decode, cfg, model)

  def draw(logits, step):
    return _sample(logits, jax.random.fold_in(rng, step), how)

  return _decode_loop(cfg, read, draw, prompts, lengths, how, memory)


@functools.partial(jax.jit, static_argnums=(0, 6))
def generate_per_row(
  cfg: config.ModelConfig,
  params: at.Params,
  memories: memory_lib.Memory,
  prompts: at.Int[jax.Array, 'B P'],
  lengths: at.Int[jax.Array, 'B'],
  rngs: at.Key,
  how: SamplerConfig,
) -> Completions:
  """`generate` with a memory and a random key per row: leaves `[B, ...]`.

  Each row is what `generate` makes of it alone. Weights that memory does not
  change are shared by the rows.

  Raises:
    config.ConfigError: the model is a hybrid, see `generate`.
  """
  if cfg.mixers:
    raise config.ConfigError(
      f'model.mixers={cfg.mixers}: generate_each is for models of attention '
      'alone; `generate` takes states of each row in memory.states.'
    )
  views = jax.vmap(lambda m, key: _layer_memories(cfg, m, 1, key, how))(
    memories, rngs
  )
  model, axes = decoding.unstack_per_row(cfg, params, views)
  read = functools.partial(decoding.decode_per_row, cfg, model, axes)

  def draw(logits, step):
    def one(logits, rng):
      key = jax.random.fold_in(rng, step)
      return jax.tree.map(lambda x: x[0], _sample(logits[None], key, how))

    return jax.vmap(one)(logits, rngs)

  return _decode_loop(cfg, read, draw, prompts, lengths, how)


def _layer_memories(cfg, memory, rows, rng, how) -> decoding.LayerMemories:
  """What the layers see of the memory while sampling."""
  views = cms.per_layer_memory(memory)
  if not how.random_expert:
    return views
  key = jax.random.fold_in(rng, how.max_new)  # Steps use those below.
  return cms.with_random_experts(views, rows, how.random_expert, key)


def _decode_loop(
  cfg, read, draw, prompts, lengths, how, memory=None
) -> Completions:
  """Prefill and decode; `read` advances the model, `draw` picks the tokens."""
  rows, width = prompts.shape
  _check_fit(cfg, width, how)
  cache = decoding.init_decode_cache(cfg, rows, width + how.max_new, memory)
  positions = jnp.arange(width) - (width - lengths[:, None])
  positions = jnp.where(positions < 0, positions_lib.PAD_POSITION, positions)
  logits, cache = read(prompts, positions, cache)

  def say(step, logits, done, tokens, logprobs, taken):
    token, logp = draw(logits, step)
    tokens = tokens.at[:, step].set(jnp.where(done, how.pad, token))
    logprobs = logprobs.at[:, step].set(jnp.where(done, 0.0, logp))
    taken = taken + ~done
    return token, done | (token == how.stop), tokens, logprobs, taken

  def proceed(state):
    step, _, _, done, *_ = state
    return (step < how.max_new) & ~done.all()

  def decode(state):
    step, cache, token, *said = state
    at = (lengths + step - 1)[:, None]
    logits, cache = read(token[:, None], at, cache)
    return step + 1, cache, *say(step, logits, *said)

  shape = (rows, how.max_new)
  nothing = (
    lengths == 0,
    jnp.full(shape, how.pad, jnp.int32),
    jnp.zeros(shape),
    jnp.zeros((rows,), jnp.int32),
  )
  state = (jnp.ones((), jnp.int32), cache, *say(0, logits, *nothing))
  *_, tokens, logprobs, taken = jax.lax.while_loop(proceed, decode, state)
  return Completions(tokens, logprobs, taken)
