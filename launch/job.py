"""A job, and the steps that a platform renders it to.

Platforms only render; nothing here runs a command. A plan is a list of steps
and is executed as one bash script, which `--dry-run` prints.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import re
import shlex
from typing import Any

import yaml

from launch import flags
from launch import hardware
from sleep_jax import config

VERBS = ('create', 'run', 'logs', 'resume', 'delete')
_NAME = re.compile(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?')


@dataclasses.dataclass(frozen=True)
class Job:
  """One experiment on one platform.

  A run is identified by its work directory: the same job again resumes it. The
  directory is a plain path; on platforms without a shared disk, `bucket` is
  mounted at /bucket.
  """

  name: str  # Of the job, its machines and its files.
  config: str  # experiments/configs/FILE.py[:VARIANT].
  overrides: tuple[str, ...] = ()  # --config.section.name=value.
  workdir: str = ''  # Default: runs/NAME, in the bucket if there is one.
  data_dir: str = ''  # Becomes $SLEEP_JAX_DATA.
  accelerator: str = 'cpu'
  nodes: int = 1  # Machines; TPU: slices.
  spot: bool = False
  image: str = ''  # Built from launch/Dockerfile, in a registry.
  bucket: str = ''  # gs://NAME.
  project: str = ''
  zone: str = ''
  cluster: str = ''  # GKE.
  queue: str = 'sleep-jax'  # Kueue: LocalQueue.
  partition: str = ''  # Slurm.
  account: str = ''  # Slurm.
  hours: int = 24  # Slurm: time limit, after which the job is requeued.
  grace: int = 120  # Seconds between SIGTERM and SIGKILL.

  def __post_init__(self):
    if not _NAME.fullmatch(self.name):
      raise config.ConfigError(
        f'--name={self.name!r} must be 1 to 40 of a-z, 0-9 and -, begin with '
        'a letter and not end with -.'
      )
    if self.nodes < 1:
      raise config.ConfigError(f'--nodes={self.nodes} must be at least 1.')
    for override in self.overrides:
      if not override.startswith('--config.'):
        raise config.ConfigError(
          f'{override!r} is not a flag of the launcher; overrides have the '
          'form --config.section.name=value.'
        )
    if self.bucket and not re.fullmatch(r'gs://[a-z0-9._-]+', self.bucket):
      raise config.ConfigError(f'--bucket={self.bucket!r} must be gs://NAME.')
    if '://' in self.workdir:
      raise config.ConfigError(
        f'--workdir={self.workdir!r} must be a path; a bucket is mounted by '
        '--bucket=gs://NAME, and its paths then begin with /bucket/.'
      )
    hardware.parse(self.accelerator)

  @property
  def machine(self) -> hardware.Accelerator:
    """The accelerator it runs on."""
    return hardware.parse(self.accelerator)

  @property
  def folder(self) -> str:
    """The work directory, as a path on the machines of the job."""
    root = '/bucket/' if self.bucket else ''
    return self.workdir or f'{root}runs/{self.name}'

  @property
  def files(self) -> str:
    """The folder of rendered files, on the launching machine."""
    return f'runs/launch/{self.name}'

  @property
  def environment(self) -> dict[str, str]:
    """Environment variables of the run."""
    out = flags.environment(self.machine.kind, self.machine.generation)
    return out | ({'SLEEP_JAX_DATA': self.data_dir} if self.data_dir else {})

  @property
  def processes(self) -> int:
    """Number of processes: one per machine."""
    return self.nodes * self.machine.hosts

  def argv(self, python: str = 'python') -> tuple[str, ...]:
    """The command line of the experiment, the same for all processes."""
    return (
      python,
      '-m',
      'experiments.run',
      f'--config={self.config}',
      f'--workdir={self.folder}',
      *(('--coordinator=auto',) if self.processes > 1 else ()),
      *self.overrides,
    )

  def require(self, *names: str) -> None:
    """Checks that these fields are set.

    Raises:
      ConfigError: naming the first field that is empty.
    """
    for name in names:
      if not getattr(self, name):
        raise config.ConfigError(f'this platform needs --{name}=...')

  def require_kind(self, *kinds: str) -> None:
    """Checks the kind of accelerator.

    Raises:
      ConfigError: if the platform does not have this kind.
    """
    if self.machine.kind not in kinds:
      raise config.ConfigError(
        f'--accelerator={self.accelerator} is of kind {self.machine.kind}, but '
        f'this platform has {" or ".join(kinds)}.'
      )

  def refuse_bucket(self) -> None:
    """Checks that no bucket is set, on platforms with a shared disk.

    Raises:
      ConfigError: if a bucket is set.
    """
    if self.bucket:
      raise config.ConfigError(
        f'--bucket={self.bucket}: this platform mounts no bucket; give '
        '--workdir=PATH on its own disk.'
      )


@dataclasses.dataclass(frozen=True)
class Command:
  """A program and its arguments, run on the launching machine."""

  argv: tuple[str, ...]

  def script(self) -> str:
    """Shell code: one line, or one line per option."""
    words = [shlex.quote(word) for word in self.argv]
    if len(line := ' '.join(words)) <= 80:
      return line
    options = [i for i, word in enumerate(self.argv) if word.startswith('--')]
    first = min(options, default=len(words))
    return ' \\\n  '.join([' '.join(words[:first]), *words[first:]])


@dataclasses.dataclass(frozen=True)
class Shell:
  """Lines of bash, where one command is not enough."""

  text: str

  def script(self) -> str:
    """The text, without surrounding blank lines."""
    return self.text.strip()


@dataclasses.dataclass(frozen=True)
class File:
  """A file that is written before the next step runs."""

  path: str
  text: str

  def script(self) -> str:
    """A quoted here-document, in which nothing is expanded."""
    folder = shlex.quote(str(pathlib.PurePosixPath(self.path).parent))
    return (
      f'mkdir -p {folder}\n'
      f"cat >{shlex.quote(self.path)} <<'END_OF_FILE'\n"
      f'{self.text.strip()}\nEND_OF_FILE'
    )


Step = Command | Shell | File


def command(*argv: str | None) -> Command:
  """A command; arguments that are None are omitted."""
  return Command(tuple(word for word in argv if word is not None))


def script(steps: Sequence[Step]) -> str:
  """A plan as one bash script that stops at the first failure."""
  parts = ['#!/usr/bin/env bash\nset -euo pipefail']
  return '\n\n'.join(parts + [step.script() for step in steps]) + '\n'


class _Dumper(yaml.SafeDumper):
  """Writes text of several lines as a block."""


_Dumper.add_representer(
  str,
  lambda dumper, text: dumper.represent_scalar(
    'tag:yaml.org,2002:str', text, style='|' if '\n' in text else None
  ),
)


def as_yaml(*documents: dict[str, Any]) -> str:
  """A YAML file of several documents; the order of keys is kept."""
  return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000)


def exports(environment: dict[str, str]) -> str:
  """Shell lines that export the variables."""
  return '\n'.join(
    f'export {name}={shlex.quote(value)}' for name, value in environment.items()
  )
