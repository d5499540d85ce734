"""A pretrained model by its name: weights, tokenizer, memory."""

import dataclasses
import hashlib
import pathlib

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.models import memory as memory_lib
from sleep_jax.weights import folder as folder_lib


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """Stand-in: the content of one of our folders."""

  cfg: config.ModelConfig
  params: at.Params
  memory: memory_lib.Memory | None
  folder: pathlib.Path
  digest: str

  def tokenizer(self) -> tokenizers.Tokenizer:
    return tokenizers.load(self.folder / 'source')


def locate(name: str | pathlib.Path) -> pathlib.Path:
  """The folder of a model."""
  path = pathlib.Path(name)
  if not (path / 'config.json').is_file():
    raise config.ConfigError(
      f'model {str(name)!r} is not known, and there is no such folder.'
    )
  return path


def load(name: str | pathlib.Path) -> Pretrained:
  """Reads a model."""
  path = locate(name)
  saved = folder_lib.load(path)
  digest = hashlib.sha256((path / 'config.json').read_bytes()).hexdigest()
  return Pretrained(saved.cfg, saved.params, saved.memory, path, digest)
