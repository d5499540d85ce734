"""The programs of a life's steps, as shapes, compiled for absent devices.

Nothing is allocated: weights, memory and data are `jax.ShapeDtypeStruct`s with
the shardings that a life on the same mesh gives them.
"""

import collections
import dataclasses
import functools
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from launch import hardware
from launch import mesh as mesh_lib
from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.harness import build
from sleep_jax.inference import sampling
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import imitation
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.models import flops
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
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
class CompileResult:
  """What is known of a step; bytes are of one device, None if not compiled."""

  outputs: int | None
  temporary: int | None
  collectives: str
  seconds: float  # Of lowering and compilation.


def absent_devices(topology: str) -> list[at.Device]:
  """The devices of a slice that is described, and not there.

  Raises:
    ConfigError: if the topology is unknown, or libtpu is not installed.
  """
  if hardware.parse(topology).kind != 'tpu':
    raise config.ConfigError(f'--topology={topology!r} must be of a TPU.')
  # libtpu neither queries a metadata server for this TPU nor locks a real one.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  from jax.experimental import topologies  # Loads no TPU if it is not used.

  try:
    description = topologies.get_topology_desc(
      platform='tpu', topology_name=topology
    )
  except Exception as e:  # libtpu has no common base class of its errors.
    raise config.ConfigError(
      f'--topology={topology!r} cannot be described: {e}. '
      "libtpu comes with pip install -e '.[tpu]'."
    ) from e
  return list(description.devices)


def mesh_of(
  cfg: config.ModelConfig, text: str, devices: list[at.Device]
) -> jax.sharding.Mesh:
  """The mesh that a flag describes.

  The default splits layers as far as key heads go, and weights over the rest.
  """
  sizes = mesh_lib.parse(text)
  if not sizes:
    tensor = math.gcd(cfg.num_kv_heads, len(devices))
    sizes = {'fsdp': len(devices) // tensor, 'tensor': tensor}
  return sharding.mesh(sizes, devices)


class Program:
  """The steps of one config on one mesh, as shapes; nothing is allocated."""

  def __init__(self, c: dict[str, Any], mesh: jax.sharding.Mesh):
    self.cfg = build.model_config(c, absent=True)
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
    params = jax.tree.map(lambda x: x.update(dtype=self.cfg.dtype), params)
    memory = jax.eval_shape(lambda: memory_lib.init_memory(self.cfg))
    self.model = model_lib.Model(
      self.cfg, self._shard_params(params), self._shard_params(memory)
    )

  def _place(self, tree: at.Tree, parts: at.Tree) -> at.Tree:
    return jax.tree.map(lambda x, s: x.update(sharding=s), tree, parts)

  def _shard_params(self, tree: at.Tree) -> at.Tree:
    """Weights, by the table of `runtime.sharding`."""
    return self._place(tree, sharding.shardings(self.mesh, tree))

  def _split(self, shape, dtype=jnp.int32, axes=('batch',)) -> at.Tree:
    """Data with these logical axes; () is whole on every device."""
    part = sharding.sharding(self.mesh, axes, shape, str(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=part)

  def _replicate(self, tree: at.Tree) -> at.Tree:
    part = jax.sharding.NamedSharding(self.mesh, jax.P())
    return jax.tree.map(lambda x: x.update(sharding=part), tree)

  def _round_up(self, rows: int) -> int:
    """The next number of rows that the mesh can split."""
    return -(-rows // self.batch) * self.batch

  def local_bytes(self, tree: at.Tree) -> int:
    """Bytes that one device holds of a tree."""
    return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
    )

  def forward_bytes(self) -> int:
    """Bytes that a forward pass reads, of one device."""
    memory = self.model.required_memory()
    banks = [l.bank for l in memory.levels]
    return self.local_bytes((self.model.params, memory.deltas(), banks))

  def previous_memory_bytes(self) -> int:
    """Bytes of the previous model's fast weights, held beside every step."""
    return self.local_bytes(self.model.required_memory().deltas())

  def step(self, name: str) -> Step:
    """A step by its name."""
    steps = {
      'wake': self.wake_step,
      'seeding': self.seeding_step,
      'rollout': self.rollout_step,
      'trials': self.trials_step,
    }
    return config.lookup(name, steps, '--steps')()

  def wake_step(self) -> Step:
    """Two chunks of the fastest level, of every row of a batch."""
    rows, axes = self.wake.batch, ()
    if rows > 1:  # A single row is on every device.
      rows, axes = self._round_up(rows), ('batch',)
    length = self.wake.window or self.sleep.dream_length
    chunk = schedule.base_chunk(self.cfg, length)
    shape = (rows, 2 * chunk)
    lower = functools.partial(
      wake.read_day.lower,
      dataclasses.replace(self.wake, batch=rows),
      self.model,
      self._split((), axes=()),
      self._split(shape, axes=axes),
      self._split(shape, jnp.float32, axes),
      defer_due_update=True,
    )
    per_token = flops.wake_flops(self.cfg, chunk)
    return Step(lower, self.mesh, per_token * math.prod(shape), 2)

  def _labels(self, rows: int) -> teacher_labels.LabeledBatch:
    """Labelled rows, by the shapes that labelling them gives."""
    shape = (rows, self.sleep.dream_length)
    ints = jax.ShapeDtypeStruct(shape, jnp.int32)
    reals = jax.ShapeDtypeStruct(shape, jnp.float32)
    teachers = replay_lib.Teachers(
      current=self.model, previous_memory=self.model.memory
    )
    labels, _ = jax.eval_shape(
      functools.partial(teacher_labels.label, self.sleep),
      teachers,
      ints,
      ints,
      reals,
      reals,
    )
    return self._replicate(labels)

  def seeding_step(self) -> Step:
    """One step of a night, with the student's own rollouts in the batch."""
    cfg = self.sleep
    batch = self._round_up(cfg.batch)
    rollout_batch = self._round_up(cfg.rollout_groups * cfg.group)
    level = next(i for i, l in enumerate(self.cfg.levels) if l.slots)
    expert = jax.eval_shape(
      lambda m: m.levels[level].bank.expert(0), self.model.memory
    )
    opt_state = jax.eval_shape(seeding.optimizer(cfg).init, expert)
    labels = self._labels(cfg.prefixes * cfg.group)
    rows, length = labels.tokens.shape
    real = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    rollouts = imitation.Rollouts(
      labels=labels,
      old_logp=self._replicate(real((rows, length))),
      advantage=self._replicate(real((rows,))),
    )
    lower = functools.partial(
      seeding.seed_steps.lower,
      cfg,
      (self._shard_params(expert), self._shard_params(opt_state)),
      self.model,
      job_lib.SlotId(level, self._split((), axes=())),
      (self._labels(cfg.dreams), rollouts),
      # Every device has all rows of D, and takes its own rows of a batch.
      (
        self._split((1, batch), axes=(None, 'batch')),
        self._split((1, rollout_batch), axes=(None, 'batch')),
      ),
    )
    per_token = flops.partial_train_flops(self.cfg, length / 2)
    size = (batch + rollout_batch) * length
    return Step(lower, self.mesh, per_token * size, 1)

  def rollout_step(self) -> Step:
    """One round of generated rows, from BOS to their full length."""
    rows = self._round_up(self.sleep.prefixes * self.sleep.group)
    sampler = sampling.SamplerConfig(
      max_new=self.sleep.dream_length - 1, min_p=self.sleep.min_p
    )
    lower = functools.partial(
      sampling.generate.lower,
      self.model,
      self._split((rows, 1)),
      self._split((rows,)),
      self._replicate(jax.eval_shape(lambda: jax.random.key(0))),
      sampler,
    )
    per_token = flops.forward_flops(self.cfg, self.sleep.dream_length / 2)
    size = rows * self.sleep.dream_length
    return Step(lower, self.mesh, per_token * size, sampler.max_new)

  def trials_step(self) -> Step:
    """Eight instances or more, each fine-tuned on its own rows."""
    instances = self._round_up(8)
    rows, steps = _TRIAL['rows'], _TRIAL['steps']
    length = self.sleep.dream_length
    adapters = jax.eval_shape(
      jax.vmap(
        lambda key: lora.init_adapter(
          self.cfg, self.lora, self.model.params, key
        )
      ),
      jax.eval_shape(lambda: jax.random.split(jax.random.key(0), instances)),
    )
    split = functools.partial(self._split, axes=('instances',))
    lower = functools.partial(
      trials.train_instances.lower,
      self.model,
      self._place(adapters, sharding.rows(self.mesh, adapters, 'instances')),
      (
        split((instances, rows, length)),
        split((instances, rows, length), jnp.float32),
      ),
      (split((instances, steps, 1)), split((instances, steps), jnp.float32)),
    )
    per_token = flops.partial_train_flops(self.cfg, length / 2)
    size = instances * steps * length
    return Step(lower, self.mesh, per_token * size, steps)


def lowered(step: Step) -> CompileResult:
  """What is known without compiling: the arguments, and that it lowers."""
  start = time.perf_counter()
  step.lowered()
  seconds = time.perf_counter() - start
  return CompileResult(None, None, 'not compiled', seconds)


def compiled(step: Step) -> CompileResult | str:
  """The compiler's figures; its message if a device's memory is too small."""
  start = time.perf_counter()
  unplaced = step.lowered()
  try:
    program = unplaced.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    usage = re.search(r'Used [^.]*\.\w+ of [^.]*\.\w+ hbm', str(e))
    return usage[0] if usage else str(e).splitlines()[0]
  stats = program.memory_analysis()
  assert stats is not None  # XLA's own compilers all give them.
  text = program.as_text() or ''
  kinds = re.findall(rf' ({"|".join(_KINDS)})(?:-start)?\(', text)
  return CompileResult(
    # What is donated is an argument and an output, but there once.
    outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    temporary=stats.temp_size_in_bytes,
    collectives=', '.join(
      f'{n} {kind}' for kind, n in sorted(collections.Counter(kinds).items())
    ),
    seconds=time.perf_counter() - start,
  )


def bound(
  step: Step, forward_bytes: int, chip: hardware.Chip, devices: int
) -> str:
  """The roofline: no such TPU is faster, whatever the program."""
  chips = devices / chip.devices
  compute = step.flops / (chips * chip.flops)
  memory = step.passes * forward_bytes * chip.devices / chip.bandwidth
  limit = 'compute' if compute > memory else 'memory'
  return f'{max(compute, memory):.3g} s, {limit}'
