"""The mesh of an accelerator's devices that a config is run on.

Nothing is allocated and no weights are read: what a mesh must divide is known
by shapes, so the machine that launches a job needs no accelerator.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import math
import pathlib

from absl import flags
import jax
from ml_collections import config_flags

from experiments import command_line
from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data.datasets import download
from sleep_jax.harness import build as build_lib
from sleep_jax.models import transformer
from sleep_jax.runtime import sharding

Sizes = dict[str, int]  # Devices by mesh axis; {} is no mesh.


def load_config(file: str, overrides: Sequence[str]) -> build_lib.Settings:
  """The settings that `experiments.run` would read from these flags.

  Args:
    file: of `--config`, or the name of a shipped one, with its variant.
    overrides: flags `--config.section.name=value`.

  Raises:
    ConfigError: if the file cannot be read, or has no such setting.
  """
  argv = ['launch', f'--config={command_line.find(file)}', *overrides]
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file(
    'config', flag_values=values, sys_argv=argv
  )
  try:
    values(argv)
    return json.loads(holder.value.to_json())
  except Exception as e:  # A config file is code, and may raise anything.
    lines = str(e).strip().splitlines() or [type(e).__name__]
    raise config.ConfigError(f'--config={file}: {lines[-1].strip()}') from e


@dataclasses.dataclass(frozen=True)
class Demand:
  """What a mesh must divide.

  Attributes:
    rows: sizes of batches, by setting.
    models: weights and memory of every arm, as shapes.
    key_heads: of the model; a `tensor` axis cannot be larger.
    unknown: what is not here, so that rows are not known; '' if they are.
  """

  rows: Mapping[str, int]
  models: Sequence[at.Tree]
  key_heads: int
  unknown: str = ''

  def check(self, sizes: Sizes) -> None:
    """Refuses a mesh that does not divide everything.

    Raises:
      ConfigError: naming the setting or the leaf, and the devices.
    """
    with sharding.use_absent_mesh(sizes):
      sharding.check_rows(self.rows)
      for model in self.models:
        sharding.check_leaves(model)


def demand(c: build_lib.Settings) -> Demand:
  """What a mesh must divide to run this config.

  Without the data, or a public base, rows of batches are unknown here; the
  machines of the job check them before the first life.

  Raises:
    ConfigError: for the first setting that cannot work.
  """
  build_lib.check_sections(c)
  if c.get('base_model') and not pathlib.Path(c['base']).exists():
    return _without_rows(c, f'base {c["base"]!r} is not')
  rows, models, heads = {}, [], 1
  try:
    for arm in c['arms']:
      settings = build_lib.arm_config(c, arm)
      _, learner, _ = build_lib.build(settings, c['seeds'][0], absent=True)
      rows |= learner.batch_rows()
      models.append(learner.setup.model)
      heads = learner.setup.model.cfg.num_kv_heads
  except download.DataError as e:
    return _without_rows(c, f'the data is not ({e})')
  return Demand(rows, models, heads)


def _without_rows(c: build_lib.Settings, unknown: str) -> Demand:
  """What is known by the model's dimensions alone."""
  cfg = build_lib.model_config(c, absent=True)
  params = jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
  return Demand({}, [params], cfg.num_kv_heads, unknown)


def _candidates(nodes: int, devices: int, heads: int) -> Iterator[Sizes]:
  """Meshes of all devices, the preferred one first.

  The network between machines carries least where `data` is split over them.
  Within one, layers are split as far as key heads go, as `launch.aot` does, and
  weights over the rest.
  """
  tensor = math.gcd(heads, devices // nodes)
  divisors = [n for n in range(1, devices + 1) if devices % n == 0]
  shapes = [
    (d, t) for d in divisors for t in divisors if devices % (d * t) == 0
  ]

  def distance(shape: tuple[int, int]) -> tuple[float, float]:
    return (
      abs(math.log(shape[0] / nodes)),
      abs(math.log(shape[1] / tensor)),
    )

  for d, t in sorted(shapes, key=distance):
    sizes = {'data': d, 'fsdp': devices // (d * t), 'tensor': t}
    yield {axis: size for axis, size in sizes.items() if size > 1}


def choose(needed: Demand, nodes: int, devices: int) -> Sizes:
  """A mesh of all devices that divides what is needed.

  Args:
    needed: see `demand`.
    nodes: machines with GPUs, or slices of TPUs.
    devices: of all of them.

  Raises:
    ConfigError: if there is none, with the reason that the preferred one fails.
  """
  first = None
  for sizes in _candidates(nodes, devices, needed.key_heads):
    try:
      needed.check(sizes)
      return sizes
    except config.ConfigError as e:
      first = first or e
  raise config.ConfigError(
    f'no mesh of {devices} devices fits this config ({first}); take fewer '
    'devices by --accelerator or --nodes, or change the setting.'
  )


def parse(text: str) -> Sizes:
  """The sizes that a flag such as `fsdp=2,tensor=8` names.

  Raises:
    ConfigError: if it has another form.
  """
  sizes = {}
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    if axis not in sharding.MESH_AXES or not size.isdecimal() or int(size) < 1:
      raise config.ConfigError(
        f'--mesh={text!r}: write axis=size, such as fsdp=2,tensor=8; axes are '
        f'{", ".join(sharding.MESH_AXES)}.'
      )
    sizes[axis] = int(size)
  return sizes


def text_of(sizes: Sizes) -> str:
  """What `parse` reads."""
  return ','.join(f'{axis}={size}' for axis, size in sizes.items())


def check_size(sizes: Sizes, devices: int, where: str) -> None:
  """Refuses a mesh that does not use all devices.

  Raises:
    ConfigError: with both numbers.
  """
  if (size := math.prod(sizes.values())) != devices:
    raise config.ConfigError(
      f'--mesh={text_of(sizes) or "1"} has {size} devices, but {where} has '
      f'{devices}; the product of its sizes must be that.'
    )
