"""The form `plain`: an ordinary checkpoint of the family."""

import pathlib

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.weights import architectures
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import huggingface
from sleep_jax.weights.export import companions
from sleep_jax.weights.export import readme


def check(cfg: config.ModelConfig, out: pathlib.Path) -> None:
  """Finds before long work what would stop it at its end.

  Raises:
    ConfigError: if `out` exists, or no supported family computes the same.
  """
  architectures.to_hf_config(cfg, cfg.dtype)
  folder_lib.check_absent(out)


def write(
  cfg: config.ModelConfig,
  params: at.Params,
  out: pathlib.Path,
  source: pathlib.Path | None,
  notes: list[str],
) -> str:
  """Writes a plain checkpoint of blocks with one MLP, the slowest level.

  Args:
    cfg: the model.
    params: its weights; leaves may be `expert_bank.LazySum`s.
    out: the folder to write.
    source: a folder with the base's companions, or None.
    notes: paragraphs of its README.

  Returns:
    A warning, '' unless there is no tokenizer.
  """
  tensors = huggingface.lazy_tensors(params, huggingface.tensor_slots(cfg))
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
  dtype = str(jnp.result_type(*dtypes))
  with folder_lib.atomic_dir(out) as part:
    values, warning = companions.add(part, cfg, source, dtype)
    companions.write_config(part, values)
    notes = [*notes, warning] if warning else notes
    readme.write(part, out.name, values, notes)
    huggingface.save(part, tensors)
  return warning
