"""Awake: how a day is read.

`read_day` makes Eq. 2's online updates, prequential and chunk-parallel: every
chunk is scored by weights that saw only earlier chunks, and its gradient is
taken at those same weights; within a chunk nothing is sequential.
`read_windows` trains nothing: the recurrent states of a hybrid are what stays
of every window (arXiv 2605.26099).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import order as order_lib
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import passes as passes_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import token_logits
from sleep_jax.objectives import divergences
from sleep_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class WakeConfig:
  """How a life reads its day."""

  # updates: Eq. 2 changes the levels that have a clock. windows: a hybrid's
  # states are all that changes, by `recurrence.passes` over every row.
  reads: str = 'updates'
  # Rows read side by side; one update averages over them.
  batch: config.Count = 8
  carry_memory: bool = True  # False: fast memory is per row, and ends with it.
  # Archived dreams (`sleep.archive`) that every update also distils from, so
  # that what earlier nights taught is not overwritten by the day; each counts
  # as much as a row of the day.
  rehearsed: int = 0
  # Where the model, when half of the day is read, gives another token than a
  # dream more than this probability, although it was rehearsed until then, and
  # did not choose it in the morning, the day has told it otherwise, and it is
  # not rehearsed further; 1 = never.
  contradicted: config.Fraction = 1.0
  # Documents are packed into rows of so many tokens (`data.packing`), where a
  # clock is slower than they are long; 0 = rows are read as the task has them.
  window: int = 0

  def __post_init__(self):
    config.lookup(self.reads, {'updates': 0, 'windows': 0}, 'wake.reads')
    if self.rehearsed and not (self.reads == 'updates' and self.carry_memory):
      raise config.ConfigError(
        f'wake.rehearsed={self.rehearsed} is about updates that last; set '
        'wake.reads=updates and wake.carry_memory=True, or wake.rehearsed=0.'
      )


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=('defer_due_update',)
)
def read_day(
  cfg: WakeConfig,
  model: model_lib.Model,
  clock: at.Int[jax.Array, ''],
  tokens: at.Int[jax.Array, 'N T'],
  weight: at.Float[jax.Array, 'N T'],
  dreams: archive_lib.Archive | None = None,
  *,
  defer_due_update: bool,
) -> tuple[memory_lib.Memory, jax.Array, at.Float[jax.Array, 'M']]:
  """Reads a day with Eq. 2's updates.

  Args:
    cfg: rows side by side, and whether memory is carried over (static).
    model: as the day begins; its weights are never changed.
    clock: tokens read so far, per row of a batch.
    tokens: the day's rows; N must be a multiple of `cfg.batch`.
    weight: of every token as a target.
    dreams: what each chunk's update rehearses, leaves `[M, R, ...]`; see
      `draw_rehearsed`.
    defer_due_update: leave an update that coincides with its level's
      consolidation pending.

  Returns:
    Memory and clock after the day, and the prequential loss of every chunk in
    nats per token, `[M]`, M = N / batch * T / c. With memory per row
    (`carry_memory` false) each row starts from the model's memory and its
    changes end with it: the memory that comes back is the one that went in.
  """
  rows, length = tokens.shape
  if rows % cfg.batch:
    raise config.ConfigError(
      f'wake.batch={cfg.batch} does not divide the {rows} rows of a day.'
    )
  shape = (rows // cfg.batch, cfg.batch, length)
  groups = sharding.shard_batch(
    (tokens.reshape(shape), weight.reshape(shape)), None, 'batch'
  )
  if dreams is not None:
    dreams = jax.tree.map(
      lambda x: x.reshape(shape[0], -1, *x.shape[1:]), dreams
    )
  data, losses = (*groups, dreams), []
  half = shape[0] // 2 if dreams is not None and cfg.contradicted < 1.0 else 0
  carry = model.required_memory(), clock
  for part in (slice(0, half), slice(half, None)) if half else (slice(None),):
    of_part = jax.tree.map(lambda x, part=part: x[part], data)
    if part.start:
      midday = model.with_memory(carry[0])
      rehearsed = uncontradicted(cfg.contradicted, model, midday, of_part[2])
      of_part = *of_part[:2], rehearsed
    carry, loss = jax.lax.scan(
      functools.partial(_read_group, cfg, model, defer_due_update),
      carry,
      of_part,
    )
    losses.append(loss.reshape(-1))
  memory, clock = carry
  return sharding.shard_params(memory), clock, jnp.concatenate(losses)


def uncontradicted(
  threshold: float,
  morning: model_lib.Model,
  midday: model_lib.Model,
  dreams: archive_lib.Archive,
) -> archive_lib.Archive:
  """The dreams without what has been told otherwise since the morning.

  Args:
    threshold: a probability, see `archive.contradicted`.
    morning: before the day.
    midday: after some of it.
    dreams: leaves `[groups, chunks, rows, ...]`, run a chunk's rows at a time.
  """

  def weight(rows: archive_lib.Archive) -> jax.Array:
    said = morning.map_logits(_choice, morning.forward(rows.tokens))
    told = midday.map_logits(
      functools.partial(archive_lib.contradicted, threshold),
      *(midday.forward(rows.tokens), rows.likeliest(), said),
    )
    return rows.weight * (1.0 - told)

  by_group = functools.partial(jax.lax.map, weight)
  return dreams.replace(weight=jax.lax.map(by_group, dreams))


def _choice(logits: jax.Array) -> jax.Array:
  return logits.argmax(-1)


def _read_group(
  cfg: WakeConfig,
  model: model_lib.Model,
  defer_due_update: bool,
  carry: tuple[memory_lib.Memory, jax.Array],
  group: tuple[jax.Array, jax.Array, archive_lib.Archive | None],
) -> tuple[tuple[memory_lib.Memory, jax.Array], jax.Array]:
  """A step of the scan over a day: rows side by side, or each for itself."""
  (memory, clock), (tokens, weight, dreams) = carry, group
  model, after = model.with_memory(memory), clock + tokens.shape[1]
  if cfg.carry_memory:
    memory, loss = read_rows(
      model,
      clock,
      tokens,
      weight,
      dreams,
      defer_due_update=defer_due_update,
    )
    return (memory, after), loss

  def read_row(tokens, weight):
    rows = tokens[None], weight[None]
    return read_rows(model, clock, *rows, defer_due_update=False)[1]

  return (memory, after), jax.vmap(read_row)(tokens, weight).mean(0)


def draw_rehearsed(
  cfg: WakeConfig,
  archive: archive_lib.Archive | None,
  chunks: int,
  rng: at.Key,
  splice: tokenizers.Tokenizer | None = None,
) -> archive_lib.Archive | None:
  """`cfg.rehearsed` archived dreams for each chunk of a day.

  Args:
    cfg: how many.
    archive: what there is.
    chunks: of the day.
    rng: random key.
    splice: the tokenizer, by whose separator rows are made anew of the
      segments of all dreams; None leaves them as they are.

  Returns:
    Leaves `[chunks, cfg.rehearsed, ...]`; None where nothing is rehearsed, or
    nothing has been archived.
  """
  if not cfg.rehearsed or archive is None or not len(archive):
    return None
  draw, shape = order_lib.numpy_rng(rng), (chunks, cfg.rehearsed)
  if splice is None or not len(archive.segments(splice)):
    dreams = archive.rows(draw.integers(0, len(archive), shape))
  else:
    dreams = archive.spliced(chunks * cfg.rehearsed, splice, draw)
    dreams = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), dreams)
  return sharding.shard_batch(dreams, None, 'batch')


def read_rows(
  model: model_lib.Model,
  clock: jax.Array,
  tokens_BxT: jax.Array,
  weight_BxT: jax.Array,
  dreams: archive_lib.Archive | None = None,
  *,
  defer_due_update: bool,
  second_order: bool = True,
) -> tuple[memory_lib.Memory, jax.Array]:
  """Reads B rows side by side, chunk by chunk.

  Attention reaches back through the row; the gradient stops at the chunk. Each
  chunk's update also rehearses its `dreams`, see `dreams_loss`. Who
  differentiates the losses goes through the updates to the weights that they
  began with, unless `second_order` is false: then updates are constants.

  Returns:
    The memory after the rows, and the loss of every chunk `[T / c]`.
  """
  rows, length = tokens_BxT.shape
  c = schedule.base_chunk(model.cfg, length)

  def chunks(x_BxT: jax.Array) -> jax.Array:
    return x_BxT.reshape(rows, length // c, c).swapaxes(0, 1)

  def shift_left(x_BxT: jax.Array) -> jax.Array:
    return jnp.pad(x_BxT[:, 1:], ((0, 0), (0, 1)))

  def objective(deltas, model, cache, chunk, dreams):
    loss, cache = chunk_loss(deltas, model, cache, chunk)
    total = loss
    if dreams is not None:
      kl = dreams_loss(deltas, model, dreams)
      total += len(dreams) / rows * kl
    return total, (loss, cache)

  def step(carry, xs):
    memory, cache, clock = carry
    grads, (loss, cache) = jax.grad(objective, has_aux=True)(
      memory.deltas(), model.with_memory(memory), cache, *xs
    )
    if not second_order:
      grads = jax.lax.stop_gradient(grads)
    clock += c
    memory = update_levels(
      model.cfg, memory, grads, clock, defer_due_update=defer_due_update
    )
    return (memory, cache, clock), loss

  targets, target_weight = shift_left(tokens_BxT), shift_left(weight_BxT)
  xs = tuple(map(chunks, (tokens_BxT, targets, target_weight))), dreams
  cache = None
  if length > c or model.cfg.mixers:  # A row that is one chunk needs no cache.
    cache = cache_lib.init_cache(model.cfg, rows, length)
  memory = model.required_memory()
  (memory, _, _), loss = jax.lax.scan(step, (memory, cache, clock), xs)
  return memory, loss


def dreams_loss(
  deltas: tuple[at.Tree | None, ...],
  model: model_lib.Model,
  dreams: archive_lib.Archive,
) -> jax.Array:
  """`kl_of_archived`; `deltas` replace the fast changes of its memory."""
  memory = model.required_memory().with_deltas(deltas)
  return kl_of_archived(model.with_memory(memory), dreams)


def kl_of_archived(
  model: model_lib.Model, dreams: archive_lib.Archive
) -> jax.Array:
  """Mean KL(teacher || model) of archived dreams, nats per token."""
  out = model.forward(dreams.tokens)
  kl = divergences.from_hidden(
    divergences.forward_kl,
    dreams.teacher,
    (out.hidden, model.unembedding()),
    chunk=token_logits.columns_at_once(1, model.cfg.vocab),
  )
  weight = dreams.weight
  return (kl * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def chunk_loss(
  deltas: tuple[at.Tree | None, ...],
  model: model_lib.Model,
  cache: cache_lib.Cache | None,
  chunk: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, cache_lib.Cache | None]:
  """Mean loss of one chunk given what the cache holds of its rows.

  Without a cache the chunk is all of its rows.

  `chunk` is (tokens, targets, weights of the targets), each `[B, c]`; the
  target of the last column is the first token of the next chunk. `deltas`
  replace the fast changes of the model's memory.
  """
  tokens, targets, weight = chunk
  memory = model.required_memory().with_deltas(deltas)
  model = model.with_memory(memory)
  out = model.forward(tokens, cache=cache)

  def logprob(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logp = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]

  logp = model.map_logits(logprob, out, targets)
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


def update_scope(level: int) -> str:
  """What a compiled program calls the update of level number `level`."""
  return f'update_of_level_{level + 1}'


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
    due = schedule.updates_now(level, tokens, defer_due_update=defer_due_update)
    with jax.named_scope(update_scope(i)):
      fast = jax.lax.cond(
        due, functools.partial(apply_update, level), lambda f: f, fast
      )
    memory = memory.with_level(i, fast=fast)
  return memory


@functools.partial(jax.jit, static_argnums=0)
def read_windows(
  cfg: recurrence_config.RecurrenceConfig,
  model: model_lib.Model,
  tokens: at.Int[jax.Array, 'J L'],
  token_mask: at.Bool[jax.Array, 'J L'],
) -> memory_lib.Memory:
  """Passes over every window (Algorithm 1 of arXiv 2605.26099).

  Args:
    cfg: the passes, under hard eviction (static).
    model: a hybrid as the windows begin.
    tokens: windows in reading order, one life's.
    token_mask: False on padding.

  Returns:
    The memory, with the recurrent states that the last window leaves.
  """
  state = passes_lib.init_window_state(cfg, model, 1, tokens.shape[1])
  state, _ = passes_lib.read(cfg, model, state, tokens[None], token_mask[None])
  return model.required_memory().replace(
    states=tuple(s[0] for s in state.states)
  )
