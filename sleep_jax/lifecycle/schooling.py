"""How a hybrid learns to sleep: back-propagation through windows and passes.

By the recipe of arXiv 2605.26099: Muon for the matrices inside the blocks,
AdamW for embeddings, head, norms, gates and convolutions; warm-up, plateau,
linear decay. At sleep itself nothing is trained.
"""

import functools
from typing import Any

import jax
import optax
import optax.contrib

from sleep_jax import config
from sleep_jax import typing as t
from sleep_jax.data import windows
from sleep_jax.lifecycle import recurrence
from sleep_jax.models import flops
from sleep_jax.models import transformer

_MATRIX = optax.contrib.MuonDimensionNumbers(0, 1)
# Of attention's kernels, which have an axis for heads.
_INTO_HEADS = optax.contrib.MuonDimensionNumbers(0, (1, 2))
_FROM_HEADS = optax.contrib.MuonDimensionNumbers((0, 1), 2)


def _rule(path: tuple[Any, ...], leaf: jax.Array) -> Any:
  """How Muon sees a leaf as a matrix; None leaves it to AdamW."""
  names = [key.key for key in path]
  if names[0] != 'blocks':
    return None
  inside = names[2].startswith('level') or names[-2] in 'qkvgo'
  if leaf.ndim < 2 or not inside:
    return None
  if leaf.ndim == 2:
    return _MATRIX
  return _FROM_HEADS if names[-2] == 'o' else _INTO_HEADS


def matrices(params: t.Params) -> t.Tree:
  """Which leaves Muon trains, and along which axes they are matrices."""
  return jax.tree_util.tree_map_with_path(_rule, params)


def schedule(how: config.TrainingConfig, peak: float) -> optax.Schedule:
  """Warm-up, plateau, and a linear decay to a thousandth."""
  warm = max(1, round(how.warmup * how.steps))
  fall = max(1, round(how.decay * how.steps))
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, peak, warm),
      optax.constant_schedule(peak),
      optax.linear_schedule(peak, peak / 1000, fall),
    ],
    [warm, how.steps - fall],
  )


def optimizer(how: config.TrainingConfig) -> optax.GradientTransformation:
  """Muon and AdamW under a global-norm clip of 1."""
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(
      schedule(how, how.muon_learning_rate),
      weight_decay=how.weight_decay,
      adam_learning_rate=schedule(how, how.adam_learning_rate),
      adam_b2=0.95,
      muon_weight_dimension_numbers=matrices,
    ),
  )


def check(cfg: config.ModelConfig, how: config.RecurrenceConfig) -> None:
  """Refuses a model that cannot sleep so.

  Raises:
    ConfigError: if it has nothing to keep a window in, or no such blocks.
  """
  if not cfg.layers_with(attention=False):
    raise config.ConfigError(
      f'model.mixers={cfg.mixers} has no recurrent layer, so nothing would '
      "stay of an evicted window; add 'gdn' or 'jet'."
    )
  how.looped(cfg.layers)


def init(
  cfg: config.ModelConfig, how: config.RecurrenceConfig, rng: t.Key
) -> t.Params:
  """Fresh weights, with a rule that stops a window if `how` has one."""
  check(cfg, how)
  params = transformer.init(cfg, rng)
  if how.halting:
    params |= {'halt': recurrence.fresh_halt(cfg)}
  return params


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def train_steps(
  cfg: config.ModelConfig,
  how: config.RecurrenceConfig,
  training: config.TrainingConfig,
  params: t.Params,
  opt_state: Any,
  batches: windows.Windows,
) -> tuple[t.Params, Any, jax.Array]:
  """One optimizer step per leading row of `batches`, in one program.

  Returns:
    Weights, optimizer state, and the loss of each step before its update.
  """

  def step(carry, batch):
    params, opt_state = carry
    loss, grads = jax.value_and_grad(
      lambda p: recurrence.judge(cfg, how, p, batch).loss
    )(params)
    update, opt_state = optimizer(training).update(grads, opt_state, params)
    return (optax.apply_updates(params, update), opt_state), loss

  (params, opt_state), loss = jax.lax.scan(step, (params, opt_state), batches)
  return params, opt_state, loss


@functools.partial(jax.jit, static_argnums=(0, 1))
def examine(
  cfg: config.ModelConfig,
  how: config.RecurrenceConfig,
  params: t.Params,
  batch: windows.Windows,
) -> recurrence.Verdict:
  """What trained weights make of a batch; a stopping rule decides."""
  if how.halting:
    params = recurrence.harden(params)
  return recurrence.judge(cfg, how, params, batch)


def forward_flops(
  cfg: config.ModelConfig,
  how: config.RecurrenceConfig,
  puzzle: windows.Puzzle,
) -> float:
  """Forward FLOPs of one sequence; a training step costs three times that."""
  looped = len(how.looped(cfg.layers)) / cfg.layers
  context = puzzle.windows * puzzle.window
  read = flops.forward_flops(cfg, puzzle.window / 2)
  read -= 2.0 * cfg.dim * cfg.vocab  # A slept window is never read out.
  read *= 1 + (how.passes - 1) * looped
  told = flops.forward_flops(cfg, puzzle.prediction / 2)
  return context * read + puzzle.prediction * told
