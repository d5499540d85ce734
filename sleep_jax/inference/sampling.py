"""Rollouts: prefill and cached decode in one compiled loop."""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import padding
from sleep_jax.inference import budget
from sleep_jax.inference import decoding
from sleep_jax.inference import prefix as prefix_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import cms
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.runtime import sharding

_BLOCK = 128  # Tokens; near the square root of usual vocabularies.
# Sizes to which a batch is cut as its rows end: each is compiled, and below 32
# rows a step hardly gets cheaper.
_SIZES, _FEWEST_ROWS = 4, 32


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


class Completions(at.Pytree):
  """Sampled tokens, their log-probabilities, and how many count per row."""

  tokens: at.Int[jax.Array, 'B M']
  logprobs: at.Float[jax.Array, 'B M']
  lengths: at.Int[jax.Array, 'B']


def filter_logits(logits_BxV: jax.Array, sampler: SamplerConfig) -> jax.Array:
  """Logits after temperature, min-p, top-k and top-p; the dropped are -inf."""
  logits = logits_BxV / sampler.temperature
  if sampler.min_p:
    threshold = jnp.max(logits, axis=-1, keepdims=True) + math.log(
      sampler.min_p
    )
    logits = jnp.where(logits >= threshold, logits, -jnp.inf)
  if sampler.top_k:
    threshold = jax.lax.top_k(logits, sampler.top_k)[0][:, -1:]
    logits = jnp.where(logits >= threshold, logits, -jnp.inf)
  if sampler.top_p < 1.0:
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    p = jax.nn.softmax(ordered, axis=-1)
    # Keep the smallest set whose mass reaches top_p, the top token always.
    keep = jnp.cumsum(p, axis=-1) - p < sampler.top_p
    threshold = jnp.min(
      jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True
    )
    logits = jnp.where(logits >= threshold, logits, -jnp.inf)
  return logits


def _argmax(x_BxV: jax.Array) -> jax.Array:
  """First index of the largest entry; on CPU ten times as fast as `argmax`."""
  size = x_BxV.shape[-1]
  is_top = x_BxV == x_BxV.max(axis=-1, keepdims=True)
  first = jnp.where(is_top, jnp.arange(size), size).min(axis=-1)
  return jnp.minimum(first, size - 1)  # Should there be no largest, but NaN.


def _categorical(u_2xB: jax.Array, logits_BxV: jax.Array) -> jax.Array:
  """Draws by the softmax: a block of the vocabulary, then a token in it.

  Two random numbers a row. The usual way, noise on every logit, takes V of them
  and costs a small model more than its forward pass. Both picks invert a sum of
  few terms, so that rare tokens are not lost to rounding.
  """
  rows, size = logits_BxV.shape
  p = jnp.exp(logits_BxV - logits_BxV.max(axis=-1, keepdims=True))
  p = jnp.pad(p, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
  u = u_2xB[..., None]

  def pick(weights: jax.Array, u: jax.Array) -> jax.Array:
    below = jnp.cumsum(weights, axis=-1)
    return (below <= u * below[:, -1:]).sum(axis=-1)

  block = pick(p.sum(axis=-1), u[0])
  inside = jnp.take_along_axis(p, block[:, None, None], axis=1)[:, 0]
  return block * _BLOCK + pick(inside, u[1])


def _sample(
  logits: jax.Array, u_2xB: jax.Array, sampler: SamplerConfig
) -> tuple[jax.Array, jax.Array]:
  """One token per row, and its log-probability under the sampler.

  `u_2xB` are two random numbers of each row, uniform in [0, 1).
  """
  if sampler.temperature == 0.0:
    token = _argmax(logits)
  else:
    logits = filter_logits(logits, sampler)
    token = _categorical(u_2xB, logits)
  chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
  return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def _check_fit(
  cfg: config.ModelConfig, longest: int, sampler: SamplerConfig
) -> None:
  if longest + sampler.max_new > cfg.max_len:
    raise config.ConfigError(
      f'A prompt of {longest} tokens and max_new={sampler.max_new} need a '
      f'cache of {longest + sampler.max_new}, but model.max_len={cfg.max_len}; '
      'shorten the prompt, lower max_new or raise model.max_len.'
    )


def check_ids(cfg: config.ModelConfig, rows: list[list[int]]) -> None:
  """Refuses token ids that the model does not have, and would read as NaN.

  Raises:
    config.ConfigError: naming the first one.
  """
  for row in rows:
    if row and not 0 <= min(row) <= max(row) < cfg.vocab:
      wrong = next(i for i in row if not 0 <= i < cfg.vocab)
      raise config.ConfigError(
        f'a prompt has token {wrong}, but model.vocab={cfg.vocab}; encode it '
        "with the model's own tokenizer."
      )


def complete(
  model: model_lib.Model,
  prompts: list[list[int]],
  rng: at.Key,
  sampler: SamplerConfig,
  prefix: prefix_lib.Prefix | None = None,
) -> list[list[int]]:
  """What follows each prompt, the stop token included.

  Rows are padded to a power of two and prompts to a multiple of 8, so that few
  shapes are ever compiled. What does not fit a device at once is sampled part
  by part (`budget.rows_per_rollout`).

  Args:
    model: who is asked.
    prompts: token ids.
    rng: random key.
    sampler: how tokens are drawn, and how many.
    prefix: what stands before every prompt, see `prefix.prefill`.

  Raises:
    config.ConfigError: a prompt is empty, too long for `cfg.max_len`, or has an
      id beyond `cfg.vocab`.
  """
  if not prompts or not all(prompts):
    raise config.ConfigError('A prompt is empty; give at least the BOS token.')
  check_ids(model.cfg, prompts)
  before = 0 if prefix is None else int(prefix.length)
  longest = before + max(map(len, prompts))
  _check_fit(model.cfg, longest, sampler)
  rows = 1 << (len(prompts) - 1).bit_length()
  size = budget.rows_per_rollout(
    model.cfg, prompt=longest, new=sampler.max_new, most=rows
  )
  if size < len(prompts):
    completions = []
    for i in range(0, len(prompts), size):
      key = jax.random.fold_in(rng, i)
      part = prompts[i : i + size]
      completions += complete(model, part, key, sampler, prefix)
    return completions
  filled = [*prompts, *[[]] * (rows - len(prompts))]
  tokens, lengths = padding.left_pad(filled, sampler.pad)
  max_prompt_len = model.cfg.max_len - sampler.max_new - before
  batch = sharding.shard_batch((tokens[:, -max_prompt_len:], lengths), 'batch')
  out = sharding.fetch(generate(model, *batch, rng, sampler, prefix))
  pairs = list(zip(out.tokens, out.lengths))[: len(prompts)]
  return [row[:length].tolist() for row, length in pairs]


@functools.partial(jax.jit, static_argnums=4)
def generate(
  model: model_lib.Model,
  prompts: at.Int[jax.Array, 'B P'],
  lengths: at.Int[jax.Array, 'B'],
  rng: at.Key,
  sampler: SamplerConfig,
  prefix: prefix_lib.Prefix | None = None,
) -> Completions:
  """Continues every prompt; leaves the loop once all rows have ended.

  Whenever half of the rows have ended the others go on alone, so that a step
  costs what is left. A row's random numbers do not depend on that. On a mesh
  all rows stay where they are.

  Args:
    model: its memory is shared by the rows; see `generate_per_row`.
    prompts: right-aligned prompts, see `left_pad`.
    lengths: how many tokens of each row are real; a row of 0 yields nothing.
    rng: random key.
    sampler: static.
    prefix: what stands before every prompt.

  Raises:
    config.ConfigError: prompt and continuation exceed `cfg.max_len`, or the
      model has an adapter, which must be merged first.
  """
  _check_merged(model)
  cfg, per_layer_memory = model.cfg, None
  if model.memory is not None:
    per_layer_memory = _per_layer_memory(
      model.memory, prompts.shape[0], rng, sampler
    )
  unstacked = decoding.unstack_layers(cfg, model.weights(), per_layer_memory)

  def decode_fn(ids, *args):
    return decoding.decode(cfg, unstacked.select_rows(ids), *args)

  def sample_fn(logits, step, ids):
    u = jax.random.uniform(jax.random.fold_in(rng, step), (2, len(prompts)))
    return _sample(logits, u[:, ids], sampler)

  size, first = _cache_size(cfg, prompts, sampler), 0
  if prefix is None:
    cache = decoding.init_decode_cache(cfg, len(prompts), size, model.memory)
  else:
    cache, first = prefix.broadcast(len(prompts), size), prefix.length
  return _decode_loop(
    decode_fn, sample_fn, cache, (prompts, lengths), sampler, first
  )


@functools.partial(jax.jit, static_argnums=4)
def generate_per_row(
  model: model_lib.Model,
  prompts: at.Int[jax.Array, 'B P'],
  lengths: at.Int[jax.Array, 'B'],
  rngs: at.Key,
  sampler: SamplerConfig,
) -> Completions:
  """`generate` with a memory and a random key per row.

  Each row is what `generate` makes of it alone. Weights that memory does not
  change are shared by the rows.

  Args:
    model: leaves of its memory are `[B, ...]`; its weights are shared.
    prompts: see `generate`.
    lengths: see `generate`.
    rngs: `[B]`.
    sampler: see `generate`.

  Raises:
    config.ConfigError: the model is a hybrid, see `generate`.
  """
  _check_merged(model)
  cfg = model.cfg
  if cfg.mixers:
    raise config.ConfigError(
      f'model.mixers={cfg.mixers}: generate_per_row is for models of attention '
      'alone; `generate` takes states of each row in memory.states.'
    )
  per_layer_memory = jax.vmap(
    lambda m, key: _per_layer_memory(m, 1, key, sampler)
  )(model.memory, rngs)
  unstacked, axes = decoding.unstack_per_row(
    cfg, model.params, per_layer_memory, model.required_memory()
  )

  def decode_fn(ids, *args):
    del ids  # All: what is cut would be a copy of the rows' own weights.
    return decoding.decode_per_row(cfg, unstacked, axes, *args)

  def sample_fn(logits, step, ids):
    del ids

    def sample_row(logits, rng):
      u = jax.random.uniform(jax.random.fold_in(rng, step), (2, 1))
      return jax.tree.map(lambda x: x[0], _sample(logits[None], u, sampler))

    return jax.vmap(sample_row)(logits, rngs)

  cache = decoding.init_decode_cache(
    cfg, len(prompts), _cache_size(cfg, prompts, sampler)
  )
  return _decode_loop(
    decode_fn, sample_fn, cache, (prompts, lengths), sampler, cut=False
  )


def _check_merged(model: model_lib.Model) -> None:
  if model.adapter is not None:
    raise config.ConfigError(
      'The model has an adapter beside its weights; sample from model.merged().'
    )


def _cache_size(
  cfg: config.ModelConfig, prompts: jax.Array, sampler: SamplerConfig
) -> int:
  """Columns of the cache: the prompts, and what follows them."""
  _check_fit(cfg, prompts.shape[1], sampler)
  return prompts.shape[1] + sampler.max_new


def _per_layer_memory(
  memory: memory_lib.Memory, rows: int, rng: at.Key, sampler: SamplerConfig
) -> cms.PerLayerMemory:
  """Each layer's part of the memory, with random experts if asked for."""
  per_layer_memory = cms.per_layer_memory(memory)
  if not sampler.random_expert:
    return per_layer_memory
  key = jax.random.fold_in(rng, sampler.max_new)  # Steps use those below.
  return cms.with_random_experts(
    per_layer_memory, rows, sampler.random_expert, key
  )


def _decode_loop(
  decode_fn: Callable[..., tuple[jax.Array, cache_lib.Cache]],
  sample_fn: Callable[..., tuple[jax.Array, jax.Array]],
  cache: cache_lib.Cache,
  batch: tuple[jax.Array, jax.Array],
  sampler: SamplerConfig,
  first: jax.Array | int = 0,
  *,
  cut: bool = True,
) -> Completions:
  """Prefill and decode.

  Args:
    decode_fn: advances the model by columns of the rows with these ids, and
      yields the last column's logits.
    sample_fn: draws a token of each row, and its log-probability.
    cache: empty, or a prefix.
    batch: prompts and their lengths.
    sampler: how tokens are drawn.
    first: the position of every prompt's first token.
    cut: whether rows that have ended are left out.
  """
  prompts, lengths = batch
  rows, width = prompts.shape
  ids = jnp.arange(rows)
  positions = positions_lib.left_padded_positions(lengths, width, first)
  logits, cache = decode_fn(ids, prompts, positions, cache)

  def emit(step, logits, ids, done, out):
    token, logp = sample_fn(logits, step, ids)
    out = Completions(
      out.tokens.at[ids, step].set(jnp.where(done, sampler.pad, token)),
      out.logprobs.at[ids, step].set(jnp.where(done, 0.0, logp)),
      out.lengths.at[ids].add(~done),
    )
    return ids, token, done | (token == sampler.stop), out

  def unfinished(fewest, state):
    step, _, _, _, done, _ = state
    return (step < sampler.max_new) & ((~done).sum() > fewest)

  def decode(state):
    step, cache, ids, token, done, out = state
    positions = (first + lengths[ids] + step - 1)[:, None]
    logits, cache = decode_fn(ids, token[:, None], positions, cache)
    return step + 1, cache, *emit(step, logits, ids, done, out)

  shape = (rows, sampler.max_new)
  empty = Completions(
    jnp.full(shape, sampler.pad, jnp.int32),
    jnp.zeros(shape),
    jnp.zeros((rows,), jnp.int32),
  )
  state = (
    jnp.ones((), jnp.int32),
    cache,
    *emit(0, logits, ids, lengths == 0, empty),
  )
  sizes = _sizes(rows) if cut and sharding.current() is None else [rows]
  for size, fewest in zip(sizes, [*sizes[1:], 0], strict=True):
    state = jax.lax.while_loop(
      functools.partial(unfinished, fewest),
      decode,
      _unfinished_rows(state, size),
    )
  return state[-1]


def _sizes(rows: int) -> list[int]:
  """`rows`, and its halves as long as they are worth a program."""
  sizes = [rows]
  while len(sizes) < _SIZES and sizes[-1] // 2 >= _FEWEST_ROWS:
    sizes.append(sizes[-1] // 2)
  return sizes


def _unfinished_rows(state: tuple, size: int) -> tuple:
  """The state of a decode loop with `size` of its rows, ended ones last."""
  step, cache, ids, token, done, out = state
  if size == len(ids):
    return state
  chosen = jnp.argsort(done, stable=True)[:size]
  cache = jax.tree.map(lambda x: x[chosen] if x.ndim else x, cache)
  return step, cache, ids[chosen], token[chosen], done[chosen], out
