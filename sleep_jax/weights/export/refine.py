"""Distillation into the added columns, and what is lost in the end.

Everything is measured and trained on tokens that the model has sampled.
"""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sleep_jax import array_typing as at
from sleep_jax.models import block as block_lib
from sleep_jax.models import layer_stack
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import model as model_lib
from sleep_jax.objectives import divergences
from sleep_jax.weights.export import fold
from sleep_jax.weights.export import trace

_ROWS = 8  # Run at a time.
_TOKENS = 256  # Whose logits are held at a time.


class Loss(NamedTuple):
  """What a model loses against the full one, per token.

  kl: KL(full || model) in nats.
  agreement: share of tokens whose likeliest successor is the same.
  """

  kl: float
  agreement: float


@dataclasses.dataclass(frozen=True)
class Dreams:
  """Sampled rows.

  tokens: `[N, T]`.
  real: `[N, T]`, whether a token is real and has a successor in its row.
  """

  tokens: np.ndarray
  real: np.ndarray

  def rows(self, index: Any) -> 'Dreams':
    """Some of the rows."""
    return Dreams(self.tokens[index], self.real[index])

  def batches(self) -> list['Dreams']:
    """All rows, a few at a time."""
    firsts = range(0, len(self.tokens), _ROWS)
    return [self.rows(slice(i, i + _ROWS)) for i in firsts]


def measure(
  full: model_lib.Model, other: model_lib.Model, dreams: Dreams
) -> Loss:
  """What `other` loses against `full`."""
  sums = [
    np.asarray(_measure(full, other, batch.tokens, batch.real), np.float64)
    for batch in dreams.batches()
  ]
  kl, same, tokens = np.sum(sums, axis=0)
  return Loss(float(kl / tokens), float(same / tokens))


@jax.jit
def _measure(
  full: model_lib.Model,
  other: model_lib.Model,
  tokens: at.Array,
  real: at.Array,
) -> jax.Array:
  """Sums over real tokens of KL, of agreement, and of one."""
  kl, same = _compare(
    (full.forward(tokens).hidden, full.unembedding()),
    (other.forward(tokens).hidden, other.unembedding()),
  )
  return jnp.stack([(kl * real).sum(), (same * real).sum(), real.sum()])


def _compare(
  full: tuple[at.Array, at.Array], other: tuple[at.Array, at.Array]
) -> tuple[jax.Array, jax.Array]:
  """KL and agreement, `[B, T]`, from hidden states and unembeddings."""
  heads = full[1], other[1]

  def per_token(hidden: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
    ours, theirs = (
      (x @ head.T.astype(x.dtype)).astype(jnp.float32)
      for x, head in zip(hidden, heads, strict=True)
    )
    same = ours.argmax(-1) == theirs.argmax(-1)
    return divergences.forward_kl(ours, theirs), same.astype(jnp.float32)

  return divergences.chunked(per_token, (full[0], other[0]), _TOKENS)


class _Lesson(NamedTuple):
  """Rows to learn from.

  tokens, real: see `Dreams`.
  stream: `[B, T, D]`, what the first trained block reads.
  hidden: `[B, T, D]`, what the teacher ends with.
  """

  tokens: np.ndarray
  real: np.ndarray
  stream: np.ndarray
  hidden: np.ndarray


def distil(
  full: model_lib.Model,
  plain: model_lib.Model,
  added: fold.Columns,
  dreams: Dreams,
  cfg: Any,
) -> fold.Columns:
  """The added columns after a short distillation; all else is frozen.

  Layers before the first that has any compute the same in both models, so they
  are run once, and no gradient passes through them.

  Args:
    full: the teacher.
    plain: the student, without the added columns.
    added: `[L, ...]`.
    dreams: rows to train on.
    cfg: a `MergeConfig`.
  """
  used = np.asarray(added.down).any(axis=(1, 2))
  if not cfg.steps or not used.any():
    return added
  first = int(np.flatnonzero(used)[0])
  lessons = _lessons(full, dreams, first)
  student = _from_layer(plain, first)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b2=0.98),
    optax.scale_by_param_block_rms(),
    optax.scale_by_learning_rate(
      optax.cosine_decay_schedule(cfg.learning_rate, cfg.steps)
    ),
  )
  step = _step_fn(optimizer)
  columns = jax.tree.map(lambda w: jnp.asarray(w[first:]), added)
  opt_state = optimizer.init(columns)
  for rows in _schedule(len(dreams.tokens), cfg.steps, cfg.batch):
    lesson = _Lesson(*(x[rows] for x in lessons))
    columns, opt_state = step(columns, opt_state, student, lesson)
  return jax.tree.map(
    lambda w, new: np.concatenate([w[:first], new]), added, columns
  )


def _schedule(num: int, steps: int, batch: int) -> list[np.ndarray]:
  """The rows of every step: each row once before any comes again."""
  rng, batch = np.random.default_rng(0), min(batch, num)
  epochs = -(-steps * batch // num)
  order = np.concatenate([rng.permutation(num) for _ in range(epochs)])
  return [order[i * batch : (i + 1) * batch] for i in range(steps)]


def _lessons(full: model_lib.Model, dreams: Dreams, first: int) -> _Lesson:
  """What the teacher makes of all rows, in host memory."""
  streams, hiddens = [], []
  for batch in dreams.batches():
    blocks = trace.blocks(full, batch.tokens)
    streams += [np.asarray(next(itertools.islice(blocks, first, None)).before)]
    hiddens += [np.asarray(_hidden(full, batch.tokens))]
  return _Lesson(
    dreams.tokens,
    dreams.real,
    np.concatenate(streams),
    np.concatenate(hiddens),
  )


@jax.jit
def _hidden(model: model_lib.Model, tokens: at.Array) -> jax.Array:
  return model.forward(tokens).hidden


def _from_layer(plain: model_lib.Model, first: int) -> model_lib.Model:
  """The layers of a plain model from `first`."""
  blocks = jax.tree.map(lambda w: w[first:], plain.params['blocks'])
  cfg = dataclasses.replace(plain.cfg, layers=plain.cfg.layers - first)
  return model_lib.Model(cfg, plain.params | {'blocks': blocks})


def _step_fn(
  optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[fold.Columns, Any]]:
  """One step of the optimizer on the loss, compiled."""

  @jax.jit
  def step(
    columns: fold.Columns,
    opt_state: Any,
    student: model_lib.Model,
    lesson: _Lesson,
  ) -> tuple[fold.Columns, Any]:
    grads = jax.grad(_loss)(columns, student, lesson)
    updates, opt_state = optimizer.update(grads, opt_state, columns)
    return cast(fold.Columns, optax.apply_updates(columns, updates)), opt_state

  return step


def _loss(
  columns: fold.Columns, student: model_lib.Model, lesson: _Lesson
) -> jax.Array:
  """Mean KL(teacher || student) of the real tokens."""
  model = fold.with_columns(student, columns)
  x, _, _ = layers_lib.apply(
    layer_stack.LayerStack(model.cfg),
    model.params['blocks'],
    lesson.stream,
    block_lib.LayerInputs(None, None, None),
    trace.mixer_inputs(model.cfg, lesson.tokens),
  )
  norm = layers_lib.RMSNorm(model.cfg.norm_eps)
  hidden = layers_lib.apply(norm, model.params['norm'], x)
  head = model.unembedding()
  kl, _ = _compare((lesson.hidden, head), (hidden, head))
  return (kl * lesson.real).sum() / jnp.maximum(lesson.real.sum(), 1)
