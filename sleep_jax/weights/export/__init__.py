"""Stand-in: a model that slept, as a folder that other software loads."""

import dataclasses
import pathlib

from sleep_jax import array_typing as at
from sleep_jax.models import model as model_lib
from sleep_jax.weights import convert


@dataclasses.dataclass(frozen=True)
class MergeReport:
  """What a merged export is."""

  text: str

  def __str__(self) -> str:
    return self.text


def custom(
  model: model_lib.Model, out: pathlib.Path, source: pathlib.Path | None
) -> str:
  """Writes a Hugging Face folder."""
  return convert._export(out, model.cfg, model.params, model.memory, source)


def merged(
  model: model_lib.Model,
  out: pathlib.Path,
  source: pathlib.Path | None,
  *,
  dreams: at.Array | None = None,
  lengths: at.Array | None = None,
) -> MergeReport:
  """Writes a plain checkpoint."""
  del dreams, lengths
  return MergeReport(custom(model, out, source))
