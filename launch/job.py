"""A job, and the steps that a platform renders it to.

Platforms only render; nothing here runs a command. A plan is a list of steps
and is executed as one bash script, which `--dry-run` prints.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import re
import shlex
from typing import Any, Self

import yaml

from launch import flags
from launch import hardware
from launch import mesh
from sleep_jax import config

VERBS = ('create', 'run', 'logs', 'resume', 'delete')
# Exit codes of a run that is worth starting again: another process was lost,
# SIGKILL, SIGTERM. Any other error would come again (docs/checkpointing.md).
RESTARTED = (134, 137, 143)
_PATTERNS = {
  'name': (
    r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?',
    '1 to 40 of a-z, 0-9 and -, begin with a letter and not end with -',
  ),
  'bucket': (
    r'gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]',
    'gs:// and a name of 3 to 63 of a-z, 0-9, ., _ and -, such as '
    'gs://my-bucket',
  ),
  'project': (
    r'([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]',
    'the id of a project, 6 to 30 of a-z, 0-9 and -',
  ),
  'zone': (r'[a-z]+-[a-z]+[0-9]+-[a-z]', 'a zone such as us-west4-a'),
  'cluster': (r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?', 'the name of a cluster'),
  'queue': (r'[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?', 'the name of a queue'),
  'image': (r'[a-z0-9][\w./:@-]*', 'an image such as HOST/PATH/NAME:TAG'),
  'gpu_type': (r'[A-Za-z0-9][\w.-]*', 'a type of GPU such as H100'),
  'partition': (r'[\w.-]+(,[\w.-]+)*', 'partitions, separated by commas'),
  'account': (r'[\w.@-]+', 'an account of Slurm'),
}
_LEAST = {
  'nodes': 1,
  'hours': 1,
  'grace': 10,
  'restarts': 0,
  'bucket_gb': 1,
  'jobs': 1,
  'share': 0,
}
_MOST = 65535  # Slurm's limit of seconds before the end; enough for the others.


@dataclasses.dataclass(frozen=True)
class Job:
  """One experiment on one platform.

  A run is identified by its work directory: the same job again resumes it. The
  directory is a plain path; on platforms without a shared disk, `bucket` is
  mounted at /bucket.
  """

  name: str  # Of the job, its machines and its files.
  config: str  # NAME[:VARIANT] of a shipped one, or FILE.py[:VARIANT].
  overrides: tuple[str, ...] = ()  # --config.section.name=value.
  grid: tuple[str, ...] = ()  # SECTION.NAME=VALUE,VALUE; see experiments.sweep.
  arms: str = ''  # Of the config, with commas; default all.
  seeds: str = ''  # With commas; default the config's.
  jobs: int = 1  # That share the lives.
  share: int = 0  # Which of the jobs this is; 0 stands for all of them.
  workdir: str = ''  # Default: runs/NAME, in the bucket if there is one.
  data_dir: str = ''  # Becomes $SLEEP_JAX_DATA.
  accelerator: str = 'cpu'
  gpu_type: str = ''  # Such as H100.
  nodes: int = 1  # Machines; TPU: slices.
  mesh: str = ''  # Devices by axis, such as fsdp=2,tensor=8.
  spot: bool = False
  restarts: int = 10  # At most, by the platform.
  image: str = ''  # Built from launch/Dockerfile, in a registry.
  bucket: str = ''  # gs://NAME.
  bucket_gb: int = 100  # Size of its volume.
  project: str = ''
  zone: str = ''
  cluster: str = ''  # GKE.
  queue: str = 'sleep-jax'  # Kueue: LocalQueue.
  partition: str = ''  # Slurm.
  account: str = ''  # Slurm.
  sbatch: tuple[str, ...] = ()  # Slurm: more options, KEY=VAL or KEY.
  hours: int = 24  # Slurm: time limit, after which the job is requeued.
  grace: int = 120  # Seconds between SIGTERM and SIGKILL.

  def __post_init__(self):
    for field in dataclasses.fields(self):
      self._check_field(field.name, getattr(self, field.name))
    for override in self.overrides:
      if not re.match(r'--config\.[\w.\[\]]+=', override):
        raise config.ConfigError(
          f'{override!r} is not a flag of the launcher; overrides have the '
          'form --config.section.name=value.'
        )
      if override.startswith('--config.mesh'):
        raise config.ConfigError(
          f'{override!r}: the launcher sets the mesh; give '
          '--mesh=fsdp=2,tensor=8, or leave it out.'
        )
    if '://' in self.workdir:
      raise config.ConfigError(
        f'--workdir={self.workdir!r} must be a path; a bucket is mounted by '
        '--bucket=gs://NAME, and its paths then begin with /bucket/.'
      )
    if self.share > self.jobs:
      raise config.ConfigError(
        f'--share={self.share} must be one of the jobs, of which there are '
        f'--jobs={self.jobs}.'
      )
    kind = self.machine.kind
    if self.gpu_type and kind != 'gpu':
      raise config.ConfigError(
        f'--gpu-type={self.gpu_type} goes with --accelerator=gpu:N, not with '
        f'{self.accelerator}.'
      )
    if self.mesh:
      mesh.check_size(mesh.parse(self.mesh), self.devices, self.where)

  def _check_field(self, name: str, value: Any) -> None:
    flag = f'--{name.replace("_", "-")}'
    values: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    for text in values:
      # A newline would end a line of a script, whatever quotes are around it.
      if isinstance(text, str) and not text.isprintable():
        raise config.ConfigError(
          f'{flag}={text!r} has a control character; leave it out.'
        )
    if name in _LEAST and not _LEAST[name] <= values[0] <= _MOST:
      raise config.ConfigError(
        f'{flag}={value} must be at least {_LEAST[name]}, and at most {_MOST}.'
      )
    if name in _PATTERNS and (value or name == 'name'):
      pattern, words = _PATTERNS[name]
      if not re.fullmatch(pattern, values[0], re.ASCII):
        raise config.ConfigError(f'{flag}={value!r} must be {words}.')

  @property
  def devices(self) -> int:
    """JAX devices of all machines; of a CPU one each."""
    return self.machine.count * self.nodes

  @property
  def where(self) -> str:
    """The devices, in words."""
    return f'{self.nodes} x {self.accelerator}'

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
  def log(self) -> str:
    """The file of its output, on platforms with a shared disk."""
    return f'{self.folder}/log' + (f'-{self.share}' if self.share else '')

  @property
  def files(self) -> str:
    """The folder of rendered files, on the launching machine."""
    return f'runs/launch/{self.name}'

  @property
  def environment(self) -> dict[str, str]:
    """Environment variables of the run."""
    out = flags.environment(self.machine.kind, self.machine.generation)
    if self.machine.kind == 'gpu' and self.processes > 1:
      # JAX gives a process of several on Slurm or Open MPI a single GPU.
      ids = map(str, range(self.machine.count))
      out['JAX_LOCAL_DEVICE_IDS'] = ','.join(ids)
    return out | ({'SLEEP_JAX_DATA': self.data_dir} if self.data_dir else {})

  @property
  def processes(self) -> int:
    """Number of processes: one per machine."""
    return self.nodes * self.machine.hosts

  @property
  def settings(self) -> tuple[str, ...]:
    """Overrides of how lives are run: one at a time on all accelerators."""
    if self.machine.kind == 'cpu' and self.processes == 1:
      return ()
    sizes = mesh.parse(self.mesh)
    return (
      '--config.workers=1',
      *(f'--config.mesh.{axis}={size}' for axis, size in sizes.items()),
    )

  @property
  def sweep(self) -> tuple[str, ...]:
    """Flags of `experiments.sweep`; none if the config is run as it is."""
    flag_values = {'arms': self.arms, 'seeds': self.seeds}
    if self.share:
      flag_values['share'] = f'{self.share}/{self.jobs}'
    elif self.jobs > 1:  # Of a single machine: lives at a time.
      flag_values['jobs'] = f'{self.jobs}'
    return (
      *(f'--grid={axis}' for axis in self.grid),
      *(f'--{name}={value}' for name, value in flag_values.items() if value),
    )

  def shares(self) -> list[Self]:
    """The jobs to submit: each has a share of the lives, and a name."""
    if self.jobs == 1:
      return [self]
    return [
      dataclasses.replace(
        self, name=f'{self.name}-{i}', share=i, workdir=self.folder
      )
      for i in ([self.share] if self.share else range(1, self.jobs + 1))
    ]

  def argv(self, python: str = 'python') -> tuple[str, ...]:
    """The command line of the experiment, the same for all processes.

    Raises:
      ConfigError: if there are several devices and no mesh of them.
    """
    if self.devices > 1:
      mesh.check_size(mesh.parse(self.mesh), self.devices, self.where)
    return (
      python,
      '-m',
      'experiments.sweep' if self.sweep else 'experiments.run',
      f'--config={self.config}',
      f'--workdir={self.folder}',
      *(('--coordinator=auto',) if self.processes > 1 else ()),
      *self.sweep,
      *self.settings,
      *self.overrides,
    )

  def require(self, *names: str) -> None:
    """Checks that these fields are set.

    Raises:
      ConfigError: naming the first field that is empty.
    """
    for name in names:
      if not getattr(self, name):
        flag = name.replace('_', '-')
        raise config.ConfigError(f'this platform needs --{flag}=...')

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
class Probe:
  """A command that changes nothing, and fails where the job would.

  Attributes:
    argv: the program and its arguments.
    advice: what to do if it fails.
    text: its standard input.
  """

  argv: tuple[str, ...]
  advice: str
  text: str = ''


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
    text = self.text.strip()
    delimiter, lines = 'END_OF_FILE', text.split('\n')
    while delimiter in lines:
      delimiter += '_'
    return (
      f'mkdir -p {folder}\n'
      f"cat >{shlex.quote(self.path)} <<'{delimiter}'\n"
      f'{text}\n{delimiter}'
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
