"""The form `merged`: a plain checkpoint, and what it costs."""

import dataclasses
import pathlib

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import model as model_lib
from sleep_jax.weights import expert_bank
from sleep_jax.weights.export import plain_form


@dataclasses.dataclass(frozen=True)
class MergeConfig:
  """How experts are approximated."""


@dataclasses.dataclass(frozen=True)
class MergeReport:
  """What was written."""

  out: pathlib.Path
  had_memory: bool
  warning: str = ''

  def __str__(self) -> str:
    return f'{self.out}: merged'


def write(
  model: model_lib.Model,
  out: pathlib.Path,
  source: pathlib.Path | None,
  dreams: at.Array | None,
  lengths: at.Array | None,
  cfg: MergeConfig,
) -> MergeReport:
  """Writes the folder `out`; see `export.merged`."""
  model = model.merged()
  why = expert_bank.why_not_plain(model.cfg, model.params, model.memory)
  params = expert_bank.with_fast_change(model.cfg, model.params, model.memory)
  if why is None:
    warning = plain_form.write(model.cfg, params, out, source, [])
    return MergeReport(out, model.memory is not None, warning)
  raise config.ConfigError(why)
