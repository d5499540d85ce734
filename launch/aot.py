"""Does it fit? Compiles a full-size config for a TPU that is not there.

  python -m launch.aot --config=experiments/configs/backbones.py:llama3_2_1b \\
      --topology=v5e:4x4

Needs `pip install -e '.[tpu]'`, and no TPU. For each of a life's steps it tells
what one device holds, which collectives there are, the analytic FLOPs, and the
time below which no such TPU can do it. Exits with 1 if a step does not fit.
"""

import collections
from collections.abc import Callable
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags

from launch import hardware
from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.inference import sampling
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import imitation
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.models import flops
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.runtime import sharding

_KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
_TRIAL = dict(rows=8, steps=10)  # Of one instance's fine-tuning.


@dataclasses.dataclass(frozen=True)
class Step:
  """A program of a life.

  lower: makes its HLO.
  mesh: for which.
  flops: of one call, on all devices together.
  passes: how often it must read the model, one time after another.
  """

  lower: functools.partial[jax.stages.Lowered]
  mesh: jax.sharding.Mesh
  flops: float
  passes: int

  def lowered(self) -> jax.stages.Lowered:
    """With the mesh in force, as in a life: steps place their data by it."""
    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
      return self.lower()

  def arguments(self) -> list[jax.ShapeDtypeStruct]:
    """The arrays that it is given."""
    leaves = jax.tree.leaves((self.lower.args, self.lower.keywords))
    return [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]


@dataclasses.dataclass(frozen=True)
class Found:
  """What is known of a step; bytes are of one device, None if not compiled."""

  outputs: int | None
  temporary: int | None
  collectives: str
  seconds: float  # Of lowering and compilation.


def absent(topology: str) -> list[jax.Device]:
  """The devices of a slice that is described, and not there.

  Raises:
    ConfigError: if the topology is unknown, or libtpu is not installed.
  """
  if hardware.parse(topology).kind != 'tpu':
    raise config.ConfigError(f'--topology={topology!r} must be of a TPU.')
  # Nobody is to be asked where this TPU stands, and none is to be locked.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  from jax.experimental import topologies  # Loads no TPU if it is not used.

  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=topology)
  except Exception as e:  # libtpu raises what it likes.
    raise config.ConfigError(
      f'--topology={topology!r} cannot be described: {e}. '
      "libtpu comes with pip install -e '.[tpu]'."
    ) from e
  return list(found.devices)


def mesh_of(
  cfg: config.ModelConfig, text: str, devices: list[jax.Device]
) -> jax.sharding.Mesh:
  """The mesh that a flag tells.

  The default splits layers as far as key heads go, and weights over the rest.
  """
  sizes = {}
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    if not size.isdigit():
      raise config.ConfigError(
        f'--mesh={text!r}: write axis=size, such as fsdp=2,tensor=8.'
      )
    sizes[axis] = int(size)
  if not sizes:
    tensor = math.gcd(cfg.num_kv_heads, len(devices))
    sizes = {'fsdp': len(devices) // tensor, 'tensor': tensor}
  return sharding.mesh(sizes, devices)


class Program:
  """The steps of one config on one mesh, as shapes; nothing is allocated."""

  def __init__(self, c: dict[str, Any], mesh: jax.sharding.Mesh):
    self.cfg = config.ModelConfig.from_mapping(c['model'])
    self.wake = config.from_mapping(wake.WakeConfig, c['wake'], 'wake')
    self.sleep = config.from_mapping(
      consolidation_config.SeedingConfig, c['sleep'], 'sleep'
    )
    known = {f.name for f in dataclasses.fields(lora.LoraConfig)}
    self.lora = config.from_mapping(
      lora.LoraConfig,
      {k: v for k, v in c.get('lora', {}).items() if k in known},
      'lora',
    )
    self.mesh = mesh
    self.batch = mesh.shape['data'] * mesh.shape['fsdp']
    params = jax.eval_shape(
      lambda: transformer.init(self.cfg, jax.random.key(0))
    )
    # Converted checkpoints keep their type.
    self.params = self._lies(
      jax.tree.map(lambda x: x.update(dtype=self.cfg.dtype), params)
    )
    self.memory = self._lies(
      jax.eval_shape(lambda: memory_lib.init_memory(self.cfg))
    )

  def _on(self, tree: at.Tree, parts: at.Tree) -> at.Tree:
    return jax.tree.map(lambda x, s: x.update(sharding=s), tree, parts)

  def _lies(self, tree: at.Tree) -> at.Tree:
    """Weights, by the table."""
    return self._on(tree, sharding.shardings(self.mesh, tree))

  def _split(self, shape, dtype=jnp.int32, axes=('batch',)) -> at.Tree:
    """Data with these logical axes; () lies whole on every device."""
    part = sharding.sharding(self.mesh, axes, shape, str(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=part)

  def _whole(self, tree: at.Tree) -> at.Tree:
    part = jax.sharding.NamedSharding(self.mesh, jax.P())
    return jax.tree.map(lambda x: x.update(sharding=part), tree)

  def _up(self, rows: int) -> int:
    """The next number of rows that the mesh can split."""
    return -(-rows // self.batch) * self.batch

  def local(self, tree: at.Tree) -> int:
    """Bytes that one device holds of a tree."""
    return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
    )

  def thinks(self) -> int:
    """Bytes that a forward pass reads, of one device."""
    banks = [l.bank for l in self.memory.levels]
    return self.local((self.params, self.memory.deltas(), banks))

  def rested(self) -> int:
    """Bytes of the old self, which a life keeps beside every step."""
    return self.local(self.memory.deltas())

  def step(self, name: str) -> Step:
    """A step by its name."""
    steps = {
      'wake': self.waking,
      'seeding': self.seeding,
      'rollout': self.rollout,
      'trials': self.trials,
    }
    return config.lookup(name, steps, '--steps')()

  def waking(self) -> Step:
    """Two chunks of the fastest level, of every lane."""
    lanes = self._up(self.wake.batch)
    chunk = schedule.base_chunk(self.cfg, self.sleep.dream_length)
    shape = (lanes, 2 * chunk)
    how = dataclasses.replace(self.wake, batch=lanes)
    lower = functools.partial(
      wake.wake.lower,
      self.cfg,
      how,
      self.params,
      self.memory,
      self._split((), axes=()),
      self._split(shape),
      self._split(shape, jnp.float32),
      defer_due_update=True,
    )
    each = flops.wake_flops(self.cfg, chunk)
    return Step(lower, self.mesh, each * math.prod(shape), 2)

  def _judged(self, rows: int) -> teacher_labels.LabeledBatch:
    """Rows with their teacher's verdict, by what judging them gives."""
    shape = (rows, self.sleep.dream_length)
    ints = jax.ShapeDtypeStruct(shape, jnp.int32)
    reals = jax.ShapeDtypeStruct(shape, jnp.float32)
    selves = replay_lib.Teachers(awake=self.memory, old=self.memory)
    judged, _ = jax.eval_shape(
      functools.partial(teacher_labels.label, self.cfg, self.sleep),
      self.params,
      selves,
      ints,
      ints,
      reals,
      reals,
    )
    return self._whole(judged)

  def seeding(self) -> Step:
    """One step of a night, with the student's own rollouts in the batch."""
    how = self.sleep
    batch = self._up(how.batch)
    own = self._up(how.rollout_groups * how.group)
    level = next(i for i, l in enumerate(self.cfg.levels) if l.slots)
    expert = jax.eval_shape(
      lambda m: m.levels[level].bank.expert(0), self.memory
    )
    state = jax.eval_shape(seeding.optimizer(how).init, expert)
    mine = self._judged(how.prefixes * how.group)
    rows, length = mine.tokens.shape
    real = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    rolled = imitation.Rollouts(
      judged=mine,
      old_logp=self._whole(real((rows, length))),
      advantage=self._whole(real((rows,))),
    )
    lower = functools.partial(
      seeding.seed_steps.lower,
      self.cfg,
      how,
      level,
      self._lies(expert),
      self._lies(state),
      self.params,
      self.memory,
      self._split((), axes=()),
      self._judged(how.dreams),
      rolled,
      # Every device has all dreams, and takes its own rows of a batch.
      self._split((1, batch), axes=(None, 'batch')),
      self._split((1, own), axes=(None, 'batch')),
    )
    each = flops.partial_train_flops(self.cfg, length / 2)
    return Step(lower, self.mesh, each * (batch + own) * length, 1)

  def rollout(self) -> Step:
    """One round of dreams, from BOS to their full length."""
    rows = self._up(self.sleep.prefixes * self.sleep.group)
    how = sampling.SamplerConfig(
      max_new=self.sleep.dream_length - 1, min_p=self.sleep.min_p
    )
    lower = functools.partial(
      sampling.generate.lower,
      self.cfg,
      self.params,
      self.memory,
      self._split((rows, 1)),
      self._split((rows,)),
      self._whole(jax.eval_shape(lambda: jax.random.key(0))),
      how,
    )
    each = flops.forward_flops(self.cfg, self.sleep.dream_length / 2)
    return Step(
      lower, self.mesh, each * rows * self.sleep.dream_length, how.max_new
    )

  def trials(self) -> Step:
    """Eight instances or more, each fine-tuned on rows of its own."""
    instances = self._up(8)
    rows, steps = _TRIAL['rows'], _TRIAL['steps']
    length = self.sleep.dream_length
    fresh = jax.eval_shape(
      jax.vmap(
        lambda key: lora.init_adapter(self.cfg, self.lora, self.params, key)
      ),
      jax.eval_shape(lambda: jax.random.split(jax.random.key(0), instances)),
    )
    split = functools.partial(self._split, axes=('instances',))
    lower = functools.partial(
      trials.train_instances.lower,
      self.cfg,
      self.params,
      self.memory,
      self._on(fresh, sharding.rows(self.mesh, fresh, 'instances')),
      split((instances, rows, length)),
      split((instances, rows, length), jnp.float32),
      split((instances, steps, 1)),
      split((instances, steps), jnp.float32),
    )
    each = flops.partial_train_flops(self.cfg, length / 2)
    return Step(lower, self.mesh, each * instances * steps * length, steps)


def lowered(step: Step) -> Found:
  """What is known without compiling: the arguments, and that it lowers."""
  start = time.perf_counter()
  step.lowered()
  seconds = time.perf_counter() - start
  return Found(None, None, 'not compiled', seconds)


def compiled(step: Step) -> Found | str:
  """What the compiler says; a text if it found no room."""
  start = time.perf_counter()
  unplaced = step.lowered()
  try:
    program = unplaced.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    told = re.search(r'Used [^.]*\.\w+ of [^.]*\.\w+ hbm', str(e))
    return told[0] if told else str(e).splitlines()[0]
  stats = program.memory_analysis()
  kinds = re.findall(rf' ({"|".join(_KINDS)})(?:-start)?\(', program.as_text())
  return Found(
    # What is donated is an argument and an output, but there once.
    outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    temporary=stats.temp_size_in_bytes,
    collectives=', '.join(
      f'{n} {kind}' for kind, n in sorted(collections.Counter(kinds).items())
    ),
    seconds=time.perf_counter() - start,
  )


def bound(step: Step, thinks: int, chip: hardware.Chip, devices: int) -> str:
  """The roofline: no such TPU is faster, whatever the program."""
  chips = devices / chip.devices
  computing = step.flops / (chips * chip.flops)
  reading = step.passes * thinks * chip.devices / chip.bandwidth
  what = 'compute' if computing > reading else 'memory'
  return f'{max(computing, reading):.3g} s, {what}'


def table(
  program: Program,
  topology: str,
  names: list[str],
  say: Callable[[str], None],
  look: Callable[[Step], Found | str] = compiled,
) -> bool:
  """Says the table line by line, as it comes; returns whether all fit."""
  machine = hardware.parse(topology)
  devices = program.mesh.size
  chip = machine.chip
  hbm = chip.hbm / chip.devices
  sizes = ', '.join(f'{k}={v}' for k, v in program.mesh.shape.items() if v > 1)
  gib = lambda x: '?' if x is None else f'{x / 2**30:.2f}'
  say(
    f'{topology}: {devices} devices ({sizes}), {gib(hbm)} GiB each, '
    f'{chip.flops / 1e12:.0f} TFLOP/s and {chip.bandwidth / 1e9:.0f} GB/s a '
    f'chip ({chip.source}); the old self takes {gib(program.rested())} GiB of '
    'a device beside every step.\n'
  )
  heads = (
    'step',
    'arguments',
    'outputs',
    'temporary',
    'with old self',
    'of HBM',
    'collectives',
    'TFLOP',
    'at least',
    'took',
  )
  say(f'| {" | ".join(heads)} |')
  say('|' + '---|' * len(heads))
  fits = True
  for name in names:
    step = program.step(name)
    found = look(step)
    if isinstance(found, str):
      say(f'| {name} | does not fit: {found} |' + ' |' * (len(heads) - 2))
      fits = False
      continue
    # A life holds all of its memory, also what this step does not read.
    given = program.local(step.arguments())
    used = given + (found.outputs or 0) + (found.temporary or 0)
    used += program.rested()
    fits &= used <= hbm
    cells = (
      name,
      *map(gib, (given, found.outputs, found.temporary, used)),
      f'{used / hbm:.0%}' + ('' if used <= hbm else ', does not fit'),
      found.collectives,
      f'{step.flops / 1e12:.4g}',
      bound(step, program.thinks(), chip, devices),
      f'{found.seconds:.0f} s',
    )
    say(f'| {" | ".join(cells)} |')
  return fits


def define_flags() -> None:
  """Of the command line alone: other commands have flags of these names."""
  config_flags.DEFINE_config_file('config')
  flags.DEFINE_string(
    'topology', 'v5e:4x4', 'Generation and topology of one slice.'
  )
  flags.DEFINE_string(
    'mesh', '', 'Such as fsdp=2,tensor=8; default: tensor over the key heads.'
  )
  flags.DEFINE_list(
    'steps', ['wake', 'seeding', 'rollout', 'trials'], 'Which steps.'
  )
  flags.DEFINE_bool(
    'lower_only', False, 'Do not compile: seconds, but no temporary memory.'
  )
  flags.DEFINE_string('out', '', 'A file for the table.')


def main(_) -> None:
  given = flags.FLAGS
  jax.config.update('jax_platforms', 'cpu')
  c = json.loads(given.config.to_json())
  lines = []

  def say(line: str) -> None:
    print(line, flush=True)
    lines.append(line)

  try:
    devices = absent(given.topology)
    cfg = config.ModelConfig.from_mapping(c['model'])
    program = Program(c, mesh_of(cfg, given.mesh, devices))
    look = lowered if given.lower_only else compiled
    fits = table(program, given.topology, given.steps, say, look)
  except config.ConfigError as e:
    sys.exit(f'error: {e}')
  if given.out:
    path = pathlib.Path(given.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  if not fits:
    sys.exit(
      f'{c["name"]} does not fit on {given.topology}; take a larger slice, '
      'another --mesh, or fewer rows.'
    )


if __name__ == '__main__':
  define_flags()
  app.run(main)
