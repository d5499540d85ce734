"""Awake: Eq. 2's online updates, prequential and chunk-parallel.

Every chunk is scored by weights that saw only earlier chunks, and its gradient
is taken at those same weights. Within a chunk nothing is sequential.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.lifecycle import schedule
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class WakeConfig:
  """How a life reads its day."""

  batch: int = 8  # Rows read side by side; one update averages over them.
  carry_memory: bool = True  # False: fast memory is per row, and ends with it.


def chunk_loss(
  cfg: config.ModelConfig,
  deltas: tuple[at.Tree | None, ...],
  params: at.Params,
  memory: memory_lib.Memory,
  cache: cache_lib.Cache,
  chunk: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, cache_lib.Cache]:
  """Mean loss of one chunk given what the cache holds of its rows.

  `chunk` is (tokens, targets, weights of the targets), each `[B, c]`; the
  target of the last column is the first token of the next chunk.
  """
  tokens, targets, weight = chunk
  out = transformer.forward(
    cfg, params, tokens, memory.with_deltas(deltas), cache=cache
  )
  logp = jax.nn.log_softmax(out.logits, axis=-1)
  logp = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
  loss = -(logp * weight).sum() / jnp.maximum(weight.sum(), 1.0)
  return loss, out.cache


def apply_update(
  level: config.LevelConfig, fast: memory_lib.Fast
) -> memory_lib.Fast:
  """Eq. 2: the accumulated error, through f(.), into the fast weights."""
  scale = 1.0 / jnp.maximum(fast.chunks, 1)
  grads = jax.tree.map(lambda g: g * scale, fast.grads)
  update, opt_state = memory_lib.level_optimizer(level).update(
    grads, fast.opt_state, fast.delta
  )
  return memory_lib.Fast(
    delta=optax.apply_updates(fast.delta, update),
    grads=jax.tree.map(jnp.zeros_like, fast.grads),
    chunks=jnp.zeros_like(fast.chunks),
    opt_state=opt_state,
  )


def update_levels(
  cfg: config.ModelConfig,
  memory: memory_lib.Memory,
  grads: tuple[at.Tree | None, ...],
  tokens: jax.Array,
  *,
  defer_due_update: bool,
) -> memory_lib.Memory:
  """Accumulates one chunk's gradient and updates the levels that are due."""
  for i, level in enumerate(cfg.levels):
    fast = memory.levels[i].fast
    if fast is None:
      continue
    fast = fast.replace(
      grads=jax.tree.map(jnp.add, fast.grads, grads[i]),
      chunks=fast.chunks + 1,
    )
    fast = jax.lax.cond(
      schedule.updates_now(level, tokens, defer_due_update=hold),
      functools.partial(apply_update, level),
      lambda f: f,
      fast,
    )
    memory = memory.with_level(i, fast=fast)
  return memory


def read_rows(
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory,
  clock: jax.Array,
  tokens_BxT: jax.Array,
  weight_BxT: jax.Array,
  *,
  defer_due_update: bool,
) -> tuple[memory_lib.Memory, jax.Array]:
  """Reads B rows side by side, chunk by chunk.

  Attention reaches back through the row; the gradient stops at the chunk.

  Returns:
    The memory after the rows, and the loss of every chunk `[T / c]`.
  """
  rows, length = tokens_BxT.shape
  c = schedule.base_chunk(cfg, length)

  def chunks(x_BxT: jax.Array) -> jax.Array:
    return x_BxT.reshape(rows, length // c, c).swapaxes(0, 1)

  def after(x_BxT: jax.Array) -> jax.Array:
    return jnp.pad(x_BxT[:, 1:], ((0, 0), (0, 1)))

  def step(carry, chunk):
    memory, cache, clock = carry
    (loss, cache), grads = jax.value_and_grad(
      chunk_loss, argnums=1, has_aux=True
    )(cfg, memory.deltas(), params, memory, cache, chunk)
    clock += c
    memory = update_levels(cfg, memory, grads, clock, defer_due_update=hold)
    return (memory, cache, clock), loss

  xs = tuple(map(chunks, (tokens_BxT, after(tokens_BxT), after(weight_BxT))))
  cache = cache_lib.init_cache(cfg, rows, length)
  (memory, _, _), loss = jax.lax.scan(step, (memory, cache, clock), xs)
  return memory, loss


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=('hold',))
def wake(
  cfg: config.ModelConfig,
  how: WakeConfig,
  params: at.Params,
  memory: memory_lib.Memory,
  clock: at.Int[jax.Array, ''],
  tokens: at.Int[jax.Array, 'N T'],
  weight: at.Float[jax.Array, 'N T'],
  *,
  defer_due_update: bool,
) -> tuple[memory_lib.Memory, jax.Array, jax.Array]:
  """Reads a day.

  Args:
    cfg: the model (static).
    how: lanes, and whether memory persists (static).
    params: backbone weights, never changed.
    memory: what the life knows when the day begins.
    clock: tokens read so far, per lane.
    tokens: the day's rows; N must be a multiple of `how.lanes`.
    weight: weight of every token as a target.
    hold: leave an update that coincides with its consolidation pending.

  Returns:
    Memory and clock after the day, and the prequential loss of every chunk in
    nats per token, `[N / lanes * T / c]`. With per-row memory (`persistent`
    false) each row starts from `memory`, learns as it is read, and takes what
    it learned with it: the memory that comes back is the one that went in.
  """
  rows, length = tokens.shape
  if rows % how.batch:
    raise config.ConfigError(
      f'wake.lanes={how.lanes} does not divide the {rows} rows of a day.'
    )
  shape = (rows // how.batch, how.batch, length)

  def carry_memory(carry, group):
    memory, clock = carry
    memory, loss = read_rows(cfg, params, memory, clock, *group, defer_due_update=hold)
    return (memory, clock + length), loss

  def per_row(carry, group):
    memory, clock = carry

    def one(tokens, weight):
      return read_rows(
        cfg, params, memory, clock, tokens[None], weight[None], defer_due_update=False
      )[1]

    return (memory, clock + length), jax.vmap(one)(*group).mean(0)

  groups = sharding.shard_batch(
    (tokens.reshape(shape), weight.reshape(shape)), None, 'batch'
  )
  (memory, clock), loss = jax.lax.scan(
    persistent if how.carry_memory else per_row, (memory, clock), groups
  )
  return sharding.shard_params(memory), clock, loss.reshape(-1)
