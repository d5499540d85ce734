"""A model that slept, as a folder that other software loads.

Two forms. `custom` computes exactly what the model computes, by code of its own
in transformers. `merged` is a plain checkpoint of the base's family, which any
server takes: exact as long as no expert is in use, else an approximation whose
cost is measured.
"""

import pathlib

from sleep_jax import array_typing as at
from sleep_jax.models import model as model_lib
from sleep_jax.weights import expert_bank
from sleep_jax.weights.export import custom_form
from sleep_jax.weights.export import merged_form

MergeConfig = merged_form.MergeConfig
MergeReport = merged_form.MergeReport


def why_not_plain(model: model_lib.Model) -> str | None:
  """Why no plain checkpoint computes the same; None if `merged` is exact."""
  model = model.merged()
  return expert_bank.why_not_plain(model.cfg, model.params, model.memory)


def custom(
  model: model_lib.Model, out: pathlib.Path, source: pathlib.Path | None
) -> str:
  """Writes a Hugging Face folder with the code that runs it.

  Args:
    model: with its memory; an adapter is merged.
    out: the folder to write.
    source: a folder with the base's tokenizer, licence and configs, which are
      copied; None if there is none, of which the result then warns.

  Returns:
    What was written, in words.

  Raises:
    ConfigError: if `out` exists or cannot be written, or the model has no
      counterpart in transformers; nothing is left then.
  """
  return custom_form.write(model, out, source)


def merged(
  model: model_lib.Model,
  out: pathlib.Path,
  source: pathlib.Path | None,
  *,
  dreams: at.Array | None = None,
  lengths: at.Array | None = None,
  cfg: MergeConfig | None = None,
) -> MergeReport:
  """Writes a plain checkpoint, and measures what that costs.

  Args:
    model: with its memory; an adapter is merged.
    out: the folder to write.
    source: see `custom`.
    dreams: `[N, T]`, tokens that the model has sampled; needed where
      `why_not_plain` gives a reason. Every fourth row is held out.
    lengths: `[N]`, how many tokens of a row are real; default, all.
    cfg: of the approximation.

  Returns:
    The report; `str` of it says what was written.

  Raises:
    ConfigError: as in `custom`, or if dreams are needed and absent.
  """
  cfg = cfg or MergeConfig()
  return merged_form.write(model, out, source, (dreams, lengths), cfg)
