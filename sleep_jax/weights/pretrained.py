"""Pretrained models by name: weights, tokenizer and chat template.

A name is one of `fetch.KNOWN`, a folder in our format, a Hugging Face folder, a
GGUF file, or `org/name` on the Hugging Face hub. What is not in our format is
converted once, into the cache.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from typing import Any

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.data import untrusted
from sleep_jax.models import memory as memory_lib
from sleep_jax.weights import convert
from sleep_jax.weights import fetch
from sleep_jax.weights import folder as folder_lib

_HUB_NAME = re.compile(r'[\w.-]+/[\w.-]+')
_HUB_FILES = (
  '*.safetensors', '*.json', '*.jinja', 'tokenizer.model', 'merges.txt',
  'LICENSE*',
)  # fmt: skip
# The same weights again, in another format.
_NOT_HUB_FILES = ('consolidated*', '*/*')


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model on disk.

  Attributes:
    cfg: as its file says: one level, unless it has slept.
    params: mapped into memory, in their own type, read-only.
    memory: of a model that has slept.
    folder: in our format; `source/` has tokenizer and chat template.
    digest: SHA-256 of names, types, shapes and content of all tensors.
  """

  cfg: config.ModelConfig
  params: at.Params
  memory: memory_lib.Memory | None
  folder: pathlib.Path
  digest: str

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer of the model's origin.

    Raises:
      ConfigError: if the model came without one.
    """
    return tokenizers.load(self.folder)


def load(name: str) -> Pretrained:
  """Opens a model; no tensor is read, except for the first time, to hash it.

  Raises:
    ConfigError: see `locate`; or naming the tensor that is damaged.
  """
  folder = locate(name)
  saved = folder_lib.load(folder)
  return Pretrained(
    saved.cfg, saved.params, saved.memory, folder, folder_lib.digest(folder)
  )


def locate(name: str) -> pathlib.Path:
  """The model's folder in our format, made if necessary.

  Args:
    name: see the module; a local path has precedence over the hub, and a known
      name over a local path (`./smollm2` is the path).

  Raises:
    ConfigError: if there is no such model, it cannot be fetched, or it is of a
      kind that cannot be read.
  """
  if name in fetch.KNOWN:
    return fetch.fetch(name)
  path = pathlib.Path(name).expanduser()
  if path.is_file() and path.suffix == '.gguf':
    return _converted(path, [path])
  if path.is_dir():
    file = path / 'config.json'
    if not file.is_file():
      raise config.ConfigError(
        f'{path} holds no config.json; it is the folder of no model.'
      )
    if untrusted.read_json(file).get('format') == folder_lib.FORMAT:
      return path
    return _converted(path, [p for p in path.iterdir() if p.is_file()])
  if _HUB_NAME.fullmatch(name) and not path.suffix == '.gguf':
    return _from_hub(name)
  raise config.ConfigError(
    f'model {name!r} does not exist; it may be {", ".join(fetch.KNOWN)}, a '
    "folder of sleep_jax or of Hugging Face, a .gguf file, or 'org/name' on "
    'the Hugging Face hub.'
  )


def _converted(path: pathlib.Path, files: list[pathlib.Path]) -> pathlib.Path:
  """The conversion of a local model, of this state of its files."""
  path = path.resolve()
  state: list[Any] = [str(path)]
  for file in sorted(files):
    stat = file.stat()
    state.append([file.name, stat.st_size, stat.st_mtime_ns])
  key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
  return fetch.cached(
    f'{path.name.removesuffix(".gguf")}-{key}',
    lambda out: convert.convert(path, out),
  )


def _from_hub(name: str) -> pathlib.Path:
  try:
    import huggingface_hub
  except ImportError:
    raise config.ConfigError(
      f'model {name!r} is no local path, and the Hugging Face hub needs the '
      "library 'huggingface_hub': pip install 'sleep_jax[hf]'."
    ) from None
  try:
    snapshot = huggingface_hub.snapshot_download(
      name,
      allow_patterns=list(_HUB_FILES),
      ignore_patterns=list(_NOT_HUB_FILES),
    )
  except Exception as e:  # Of the hub, of HTTP or of the system: many types.
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise config.ConfigError(
      f'model {name!r} is no local path, and cannot be downloaded from the '
      f'Hugging Face hub ({reason}).'
    ) from None
  source = pathlib.Path(snapshot)  # Its name is the commit.
  return fetch.cached(
    f'{name.replace("/", "--")}-{source.name[:16]}',
    lambda out: convert.convert(source, out),
  )
