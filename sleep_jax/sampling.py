"""Rollouts: prefill and cached decode in one compiled loop."""

import dataclasses
import functools
import math

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import config
from sleep_jax import typing as t
from sleep_jax.models import cms
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn."""

  max_new: int
  temperature: float = 1.0  # 0 = greedy.
  top_k: int = 0  # 0 = all.
  top_p: float = 1.0
  min_p: float = 0.0  # Least share of the top token's probability; 0 = all.
  stop: int = -1  # The row ends with this token; -1 = never.
  pad: int = 0  # Fills a row after its end.


@struct.dataclass
class Completions:
  """Sampled tokens, their log-probabilities, and how many count per row."""

  tokens: t.Int[jax.Array, 'B M']
  logprobs: t.Float[jax.Array, 'B M']
  lengths: t.Int[jax.Array, 'B']


def left_pad(
  prompts: list[list[int]], pad: int, multiple: int = 8
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts of unequal length as `[B, P]`, right-aligned, and lengths `[B]`.

  P is rounded up to a `multiple`, so that few shapes are ever compiled.
  """
  lengths = np.array([len(p) for p in prompts], np.int32)
  width = -(-int(lengths.max()) // multiple) * multiple
  out = np.full((len(prompts), width), pad, np.int32)
  for row, prompt in zip(out, prompts, strict=True):
    row[width - len(prompt) :] = prompt
  return out, lengths


def filtered(logits_BxV: jax.Array, how: Sampling) -> jax.Array:
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


def _draw(
  logits: jax.Array, rng: t.Key, how: Sampling
) -> tuple[jax.Array, jax.Array]:
  """One token per row, and its log-probability under the sampler."""
  if how.temperature == 0.0:
    token = jnp.argmax(logits, axis=-1)
  else:
    logits = filtered(logits, how)
    token = jax.random.categorical(rng, logits)
  chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
  return token, chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 6))
def generate(
  cfg: config.ModelConfig,
  params: t.Params,
  memory: memory_lib.Memory | None,
  prompts: t.Int[jax.Array, 'B P'],
  lengths: t.Int[jax.Array, 'B'],
  rng: t.Key,
  how: Sampling,
) -> Completions:
  """Continues every prompt; leaves the loop once all rows have ended.

  Args:
    cfg: the model (static).
    params: backbone weights.
    memory: fast weights and experts, shared by the rows; for a memory per row,
      `jax.vmap` this function over (memory, prompts, lengths, rng).
    prompts: right-aligned prompts, see `left_pad`.
    lengths: how many tokens of each row are real; at least 1.
    rng: random key.
    how: the sampler (static).
  """
  rows, width = prompts.shape
  views = None if memory is None else cms.views(memory, cfg.layers)
  model = transformer.unroll(cfg, params, views)
  cache = transformer.unrolled_cache(cfg, rows, width + how.max_new)
  positions = jnp.arange(width) - (width - lengths[:, None])
  positions = jnp.where(positions < 0, transformer.PAD_POSITION, positions)
  out = transformer.decode(cfg, model, prompts, positions, cache)

  def proceed(state):
    step, _, _, done, *_ = state
    return (step < how.max_new) & ~done.all()

  def decode(state):
    step, cache, logits, done, tokens, logprobs, taken = state
    token, logp = _draw(logits, jax.random.fold_in(rng, step), how)
    tokens = tokens.at[:, step].set(jnp.where(done, how.pad, token))
    logprobs = logprobs.at[:, step].set(jnp.where(done, 0.0, logp))
    taken = taken + ~done
    done = done | (token == how.stop)
    positions = (lengths + step)[:, None]
    out = transformer.decode(cfg, model, token[:, None], positions, cache)
    return step + 1, out.cache, out.logits[:, 0], done, tokens, logprobs, taken

  shape = (rows, how.max_new)
  state = (
    jnp.zeros((), jnp.int32),
    out.cache,
    out.logits[:, 0],
    jnp.zeros((rows,), bool),
    jnp.full(shape, how.pad, jnp.int32),
    jnp.zeros(shape),
    jnp.zeros((rows,), jnp.int32),
  )
  *_, tokens, logprobs, taken = jax.lax.while_loop(proceed, decode, state)
  return Completions(tokens, logprobs, taken)
