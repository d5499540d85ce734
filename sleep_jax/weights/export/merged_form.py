"""The form `merged`: a plain checkpoint, and what it costs.

Where no expert is in use, and no block has a second MLP that counts, the fast
change is added to the weights and nothing is lost. Otherwise experts and faster
levels become columns of the MLPs (`fold`), which are then distilled (`refine`).
"""

import dataclasses
import pathlib
import time

import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import model as model_lib
from sleep_jax.weights import expert_bank
from sleep_jax.weights.export import fold
from sleep_jax.weights.export import plain_form
from sleep_jax.weights.export import refine

_HELD_OUT = 4  # Every fourth row.


@dataclasses.dataclass(frozen=True)
class MergeConfig:
  """How what a plain block lacks is approximated by columns of its MLP."""

  steps: int = 200  # Of distillation into the added columns; 0 = none.
  # Nats a token: columns by least squares that lose no more are kept as they
  # are. The others are distilled, and kept as they were if that is no better.
  enough: float = 0.01
  batch: int = 8  # Rows of a step.
  # Of a step, as a share of the root mean square of a matrix.
  learning_rate: float = 0.02
  ridge: float = 1e-4  # Of the least squares that the columns begin with.
  # The MLPs' width becomes a multiple of it: formats group 32 weights, some
  # 128 (GPTQ, AWQ) or 256 (llama.cpp's K types).
  multiple: int = 32

  def __post_init__(self):
    if min(self.steps, self.ridge) < 0 or min(self.batch, self.multiple) < 1:
      raise config.ConfigError(
        f'{self}: steps and ridge must be at least 0, batch and multiple at '
        'least 1.'
      )


@dataclasses.dataclass(frozen=True)
class MergeReport:
  """A merged checkpoint, and what it loses on held-out dreams of the model.

  out: its folder.
  why: what a plain checkpoint cannot compute; '' if nothing, and then it
    computes the same, and there is nothing to measure.
  hidden: width of its MLPs, and of the model's own.
  base: loss of the backbone without the memory.
  fitted: loss of the columns by least squares alone.
  final: loss of what was written: of the fitted, or of the distilled columns.
  tokens: how many these are measured on.
  seconds: of fitting, distillation and measuring.
  warning: '' unless there is no tokenizer.
  """

  out: pathlib.Path
  why: str = ''
  hidden: tuple[int, int] = (0, 0)
  base: refine.Loss | None = None
  fitted: refine.Loss | None = None
  final: refine.Loss | None = None
  tokens: int = 0
  seconds: float = 0.0
  warning: str = ''

  def __str__(self) -> str:
    lines = [f'{self.out}: {self.cost()}']
    if self.base and self.fitted and self.final:
      lines += [
        f'  {name:<26} KL {loss.kl:.4f} nats a token, same first choice '
        f'{loss.agreement:.1%}'
        for name, loss in (
          ('base without the memory', self.base),
          ('fitted by least squares', self.fitted),
          ('written', self.final),
        )
      ]
    return '\n'.join([*lines, *filter(None, [self.warning])])

  def cost(self) -> str:
    """One sentence: what the checkpoint is, and what it loses."""
    if self.final is None:
      return (
        'merged into a plain checkpoint, which computes the same logits; '
        'clocks and pending updates are not included.'
      )
    wide, narrow = self.hidden
    return (
      f'merged into a plain checkpoint with MLPs of width {wide} in place '
      f'of {narrow}, because {self.why}. It loses {self.final.kl:.4f} nats a '
      f'token on {self.tokens} held-out tokens of its dreams '
      f'({self.seconds:.0f} s).'
    )


def write(
  model: model_lib.Model,
  out: pathlib.Path,
  source: pathlib.Path | None,
  dreams: tuple[at.Array | None, at.Array | None],
  cfg: MergeConfig,
) -> MergeReport:
  """Writes the folder `out`; see `export.merged`."""
  model = model.merged()
  plain_form.check(model.cfg, out)
  why = expert_bank.why_not_plain(model.cfg, model.params, model.memory)
  if why is None:
    params = expert_bank.with_fast_change(model.cfg, model.params, model.memory)
    report, plain = MergeReport(out), model.replace(params=params)
  else:
    rows = _checked(model.cfg, why, *dreams)
    report, plain = _approximate(model, rows, cfg)
    report = dataclasses.replace(report, out=out, why=why)
  warning = plain_form.write(
    plain.cfg, plain.params, out, source, [_sentence(report.cost())]
  )
  return dataclasses.replace(report, warning=warning)


def _sentence(text: str) -> str:
  return text[0].upper() + text[1:]


def _approximate(
  model: model_lib.Model, dreams: refine.Dreams, cfg: MergeConfig
) -> tuple[MergeReport, model_lib.Model]:
  """The plain model that is nearest, and the report of it."""
  start = time.monotonic()
  model = model.replace(params=jax.tree.map(jax.numpy.asarray, model.params))
  held_out = np.arange(len(dreams.tokens)) % _HELD_OUT == _HELD_OUT - 1
  held, rest = dreams.rows(held_out), dreams.rows(~held_out)
  params = expert_bank.with_fast_change(model.cfg, model.params, model.memory)
  plain = fold.plain_model(model.cfg, params)
  columns = fold.fit(model, params, (rest.tokens, rest.real), cfg)
  fitted = refine.measure(model, fold.with_columns(plain, columns), held)
  final = fitted
  if fitted.kl > cfg.enough:
    distilled = refine.distil(model, plain, columns, rest, cfg)
    loss = refine.measure(model, fold.with_columns(plain, distilled), held)
    if loss.kl < fitted.kl:
      columns, final = distilled, loss
  merged = fold.with_columns(plain, columns)
  report = MergeReport(
    pathlib.Path(),
    hidden=(merged.cfg.levels[0].hidden, model.cfg.levels[-1].hidden),
    base=refine.measure(model, model.with_memory(None), held),
    fitted=fitted,
    final=final,
    tokens=int(held.real.sum()),
    seconds=time.monotonic() - start,
  )
  return report, merged


def _checked(
  cfg: config.ModelConfig,
  why: str,
  tokens: at.Array | None,
  lengths: at.Array | None,
) -> refine.Dreams:
  """The dreams, if they will do."""
  if tokens is None:
    raise config.ConfigError(
      f'form merged is an approximation here, because {why}; it needs dreams '
      'of the model to fit and measure it (export.merged(dreams=...), or '
      '--dreams=FILE.npy). Form custom needs none.'
    )
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or len(tokens) < _HELD_OUT or tokens.shape[1] < 2:
    raise config.ConfigError(
      f'dreams are {list(tokens.shape)}; give tokens [N, T] of at least '
      f'{_HELD_OUT} rows, since every fourth is held out, and 2 columns.'
    )
  if tokens.shape[1] > cfg.max_len:
    raise config.ConfigError(
      f'dreams have {tokens.shape[1]} columns, but the model takes '
      f'{cfg.max_len} tokens; shorten them.'
    )
  if lengths is None:
    lengths = np.full(len(tokens), tokens.shape[1])
  real = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None] - 1
  if not real[_HELD_OUT - 1 :: _HELD_OUT].any() or not real.any():
    raise config.ConfigError(
      'dreams have no row of 2 tokens or more among those held out; sample '
      'longer ones.'
    )
  return refine.Dreams(tokens, real)
