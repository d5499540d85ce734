"""The programs of a life's steps, as shapes, compiled for absent devices.

Settings, model and batches are those of the learner that `harness.build` makes
for the runner, and the mesh is one that the runner accepts. Nothing is
allocated: weights, memory and data are `jax.ShapeDtypeStruct`s with the
shardings that a life on the same mesh gives them.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from launch import hardware
from launch import mesh as mesh_lib
from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax import learners
from sleep_jax.data import padding
from sleep_jax.data import tokenizers
from sleep_jax.harness import build
from sleep_jax.inference import budget
from sleep_jax.inference import sampling
from sleep_jax.inference import scoring
from sleep_jax.learners import base as learner_base
from sleep_jax.learners import sleep as sleep_learner
from sleep_jax.lifecycle import schedule
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import imitation
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.lifecycle.dreaming import importance
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import flops
from sleep_jax.models import lora
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.runtime import sharding

# What a life takes from its data, and no config tells.
DAY_BATCHES = 2  # Of a day; each is read like the others.
_TRIAL_ROWS = 8  # Of one instance's fine-tuning.
_ANSWER = 16  # Tokens of the longest answer of an evaluation.


@dataclasses.dataclass(frozen=True)
class Step:
  """A program of a life.

  lower: makes its HLO.
  mesh: for which.
  flops: of one call, on all devices together.
  passes: how often it must read the model, one time after another.
  tokens: that one call takes or makes.
  cache_bytes: of keys and values that one call must read, on one device.
  shares: see `schedule_cost.estimate`.
  """

  lower: functools.partial[jax.stages.Lowered]
  mesh: jax.sharding.Mesh
  flops: float
  passes: int
  tokens: int
  cache_bytes: float = 0.0
  shares: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def lowered(self) -> jax.stages.Lowered:
    """With the mesh in force, as in a life: steps place their data by it."""
    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
      return self.lower()

  def arguments(self) -> list[jax.ShapeDtypeStruct]:
    """The arrays that it is given."""
    leaves = jax.tree.leaves((self.lower.args, self.lower.keywords))
    return [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]


def absent_devices(topology: str) -> list[at.Device]:
  """The devices of a slice that is described, and not there.

  Raises:
    ConfigError: if the topology is unknown, or libtpu is not installed.
  """
  accelerator = hardware.parse(topology)
  if accelerator.kind != 'tpu':
    raise config.ConfigError(f'--topology={topology!r} must be of a TPU.')
  # libtpu neither queries a metadata server for this TPU nor locks a real one.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  from jax.experimental import topologies  # Loads no TPU if it is not used.

  try:
    description = topologies.get_topology_desc(
      platform='tpu',
      topology_name=topology,
      chips_per_host_bounds=_host_bounds(accelerator),
    )
  except Exception as e:  # libtpu has no common base class of its errors.
    raise config.ConfigError(
      f'--topology={topology!r} cannot be described: {e}. '
      "libtpu comes with pip install -e '.[tpu]'."
    ) from e
  return list(description.devices)


def _host_bounds(accelerator: hardware.Accelerator) -> tuple[int, ...]:
  """Chips of one host along each axis: 2 x 2, or one for a single chip."""
  side = 1 if accelerator.count == 1 else 2
  return (side, side, 1)


@dataclasses.dataclass(frozen=True)
class Run:
  """What the runner builds for one arm, made of shapes.

  learner: with its settings, its model and the rows of its batches.
  row_length: tokens of a row of the task.
  converted: whether there is a base, whose numbers keep their type.
  """

  learner: sleep_learner.Sleep
  row_length: int
  converted: bool

  @property
  def demand(self) -> mesh_lib.Demand:
    """What a mesh must divide, by the runner's own checks."""
    model = self.learner.setup.model
    rows = self.learner.batch_rows()
    return mesh_lib.Demand(rows, [model], model.cfg.num_kv_heads)

  def mesh(self, text: str, devices: list[at.Device]) -> jax.sharding.Mesh:
    """The mesh that a flag describes; by default the launcher's choice.

    Raises:
      ConfigError: if the runner refuses it, or it has another size.
    """
    sizes = mesh_lib.parse(text)
    if not sizes:
      sizes = mesh_lib.choose(self.demand, 1, len(devices))
    mesh = sharding.mesh(sizes, devices)
    self.demand.check(sizes)
    return mesh


def build_run(c: build.Settings, arm: str = 'sleep') -> Run:
  """What `harness.build` makes of an arm, without weights.

  Where the base is public and not here, its tokenizer is not either: the
  learner is then built from the same settings with ids alone.

  Raises:
    ConfigError: for the first setting that cannot work, or if the arm is not of
      the learner `sleep`, or does not read its day by updates.
  """
  settings = build.arm_config(c, arm)
  try:
    task, learner, _ = build.build(settings, c['seeds'][0], absent=True)
    length = task.row_length
  except config.ConfigError:
    if not c.get('base_model'):
      raise
    length = settings['task'].get('length', 0)
    learner = _without_data(settings, length)
  if not isinstance(learner, sleep_learner.Sleep):
    raise config.ConfigError(
      f'--arm={arm} is of the learner {learner.name}; steps of sleep alone are '
      'compiled here.'
    )
  if learner.reads_windows:
    raise config.ConfigError(
      f'--arm={arm} has wake.reads=windows; wake.reads=updates alone is '
      'compiled here.'
    )
  window = learner.cfg.wake.window or learner.cfg.sleep.dream_length
  return Run(learner, length or window, bool(settings['base']))


class _Ids(tokenizers.IntegerTokenizer):
  """In place of a tokenizer that is not here; documents end, as with one."""

  separator = stop = 2


def _without_data(
  settings: build.Settings, length: int
) -> learner_base.Learner:
  cfg = build.model_config(settings, absent=True)
  setup = learner_base.Setup(
    model=model_lib.Model(
      cfg,
      jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0))),
      jax.eval_shape(lambda: memory_init.init_memory(cfg)),
    ),
    tokenizer=_Ids(cfg.vocab, bos=1),
    costs=costs_lib.CostTracker(cfg, max(length, 1)),
    episodes=settings['task'].get('episodes', 1),
  )
  return learners.build(settings['learner'], settings, setup)


class Program:
  """The steps of one run on one mesh, as shapes; nothing is allocated."""

  def __init__(self, run: Run, mesh: jax.sharding.Mesh):
    self.run, self.mesh = run, mesh
    self.learner = run.learner
    model = run.learner.setup.model
    self.cfg, params = model.cfg, model.params
    if run.converted:
      params = jax.tree.map(lambda x: x.update(dtype=self.cfg.dtype), params)
    self.model = model_lib.Model(
      self.cfg, self._shard_params(params), self._shard_params(model.memory)
    )

  def _place(self, tree: at.Tree, parts: at.Tree) -> at.Tree:
    return jax.tree.map(lambda x, s: x.update(sharding=s), tree, parts)

  def _shard_params(self, tree: at.Tree) -> at.Tree:
    """Weights, by the table of `runtime.sharding`."""
    return self._place(tree, sharding.shardings(self.mesh, tree))

  def _split(self, shape, dtype=jnp.int32, axes=('batch',)) -> at.Tree:
    """Data with these logical axes; () is whole on every device.

    As `sharding.shard_batch` has it, an axis that the mesh does not divide is
    whole too.
    """
    sizes = self.mesh.shape
    axes = tuple(
      axis
      if size % math.prod(sizes[a] for a in sharding.RULES.get(axis, ())) == 0
      else None
      for axis, size in zip(axes, shape)
    )
    part = sharding.sharding(self.mesh, axes, shape, str(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=part)

  def _replicate(self, tree: at.Tree) -> at.Tree:
    part = jax.sharding.NamedSharding(self.mesh, jax.P())
    return jax.tree.map(lambda x: x.update(sharding=part), tree)

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

  def steps(self) -> dict[str, Callable[[], Step]]:
    """Makers of the steps of a life, in its order."""
    return {
      'wake': self._wake,
      'rollout': self._rollout,
      'labelling': self._labelling,
      'continuations': self._continuations,
      'scoring': self._scoring,
      'seeding': self._seeding,
      'importance': self._importance,
      'trials': self._trials,
      'evaluation': self._evaluation,
    }

  def step(self, name: str) -> Step:
    """A step by its name.

    Raises:
      ConfigError: if there is none of that name.
    """
    return config.lookup(name, self.steps(), '--steps')()

  def _partial(self, jitted: Any, *args: Any, **kwargs: Any) -> Any:
    return functools.partial(jitted.lower, *args, **kwargs)

  def _eval_shape(self, function: Callable[..., Any], *args: Any) -> Any:
    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
      return jax.eval_shape(function, *args)

  def _num_shards(self, axis: str) -> int:
    return math.prod(self.mesh.shape[a] for a in sharding.RULES[axis])

  def _wake(self) -> Step:
    """A day of a few batches."""
    cfg = self.learner.cfg
    length = cfg.wake.window or self.run.row_length
    chunk = schedule.base_chunk(self.cfg, length)
    shape = (DAY_BATCHES * cfg.wake.batch, length)
    lower = self._partial(
      wake.read_day,
      cfg.wake,
      self.model,
      self._split((), axes=()),
      self._split(shape, axes=()),
      self._split(shape, jnp.float32, ()),
      defer_due_update=cfg.sleep.consolidate,
    )
    size = math.prod(shape)
    per_token = flops.wake_flops(self.cfg, length / 2)
    passes = DAY_BATCHES * length // chunk
    shares = {
      wake.update_scope(i): chunk / level.chunk
      for i, level in enumerate(self.cfg.levels)
      if level.chunk
    }
    return Step(lower, self.mesh, per_token * size, passes, size, shares=shares)

  @property
  def _teachers(self) -> replay_lib.Teachers:
    both = self.learner.cfg.sleep.teachers == 'current+previous'
    return replay_lib.Teachers(
      current=self.model, previous_memory=self.model.memory if both else None
    )

  def _generate(
    self, prompts: tuple[int, int], sampler: sampling.SamplerConfig
  ) -> Step:
    """Rows that continue their prompts, to their full length."""
    rows, width = prompts
    args = (
      self.model,
      self._split(prompts),
      self._split((rows,)),
      self._replicate(jax.eval_shape(lambda: jax.random.key(0))),
      sampler,
    )
    length, new = width + sampler.max_new, sampler.max_new
    per_token = flops.forward_flops(self.cfg, length / 2)
    itemsize = jnp.dtype(self.cfg.dtype).itemsize
    # Keys and values are split as rows and heads are.
    parts = math.gcd(rows, self._num_shards('batch'))
    parts *= math.gcd(self.cfg.num_kv_heads, self._num_shards('heads'))
    columns = (
      self.cfg.layers * 2 * self.cfg.num_kv_heads * self.cfg.resolved_head_dim
    )
    cache = new * rows * (width + new / 2) * columns * itemsize / parts
    return Step(
      self._partial(sampling.generate, *args),
      self.mesh,
      per_token * rows * length,
      new,
      rows * new,
      cache,
    )

  def _rollout(self) -> Step:
    """The dreams of one teacher, from BOS to their full length."""
    cfg, tokenizer = self.learner.cfg.sleep, self.learner.setup.tokenizer
    rows = cfg.dreams
    if cfg.teachers == 'current+previous':
      rows //= 2
    rows *= cfg.oversample
    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
      rows = budget.rows_per_rollout(
        self.cfg, prompt=1, new=cfg.dream_length - 1, most=rows
      )
    sampler = sampling.SamplerConfig(
      max_new=cfg.dream_length - 1,
      temperature=cfg.temperature,
      min_p=cfg.min_p,
      stop=tokenizer.stop,
      pad=tokenizer.pad,
    )
    return self._generate((rows, 1), sampler)

  def _continuation_sampler(self) -> sampling.SamplerConfig:
    cfg, tokenizer = self.learner.cfg.sleep, self.learner.setup.tokenizer
    return sampling.SamplerConfig(
      max_new=cfg.continuation,
      temperature=cfg.temperature,
      stop=tokenizer.stop,
      pad=tokenizer.pad,
    )

  def _continuations(self) -> Step:
    """The student continues prefixes of dreams."""
    cfg = self.learner.cfg.sleep
    prompts = cfg.prefixes * cfg.group, cfg.dream_length - cfg.continuation
    return self._generate(prompts, self._continuation_sampler())

  def _rows_to_label(self, rows: int) -> tuple[at.Tree, ...]:
    shape = (rows, self.learner.cfg.sleep.dream_length)
    ints, reals = self._split(shape), self._split(shape, jnp.float32)
    return ints, ints, reals, reals

  def _labels(self, rows: int) -> teacher_labels.LabeledBatch:
    """Labelled rows, by the shapes that labelling them gives."""
    label = functools.partial(teacher_labels.label, self.learner.cfg.sleep)
    args = self._teachers, *self._rows_to_label(rows)
    labels, _ = self._eval_shape(label, *args)
    return self._replicate(labels)

  def _labelling(self) -> Step:
    """A batch of dreams, by the teachers."""
    cfg = self.learner.cfg.sleep
    rows = min(cfg.dreams, teacher_labels.LABEL_BATCH)
    lower = self._partial(
      teacher_labels.label, cfg, self._teachers, *self._rows_to_label(rows)
    )
    times = 1 if self._teachers.previous is None else 2
    return self._forward(lower, rows * cfg.dream_length, times)

  def _forward(self, lower: Any, tokens: int, times: int) -> Step:
    """A step of `times` forward passes over its tokens."""
    length = self.learner.cfg.sleep.dream_length
    per_token = flops.forward_flops(self.cfg, length / 2)
    return Step(lower, self.mesh, times * per_token * tokens, times, tokens)

  def _scoring(self) -> Step:
    """Labels and rewards of a round of continuations."""
    cfg = self.learner.cfg.sleep
    rows, keep = cfg.prefixes * cfg.group, cfg.continuation
    width = cfg.dream_length - keep
    completions = sampling.Completions(
      tokens=self._split((rows, keep)),
      lengths=self._split((rows,)),
      logprobs=self._split((rows, keep), jnp.float32),
    )
    continuations = imitation.Continuations(
      prefixes=self._split((rows, width)),
      lengths=self._split((rows,)),
      completions=completions,
      references=self._split((rows, keep)),
      reference_lengths=self._split((rows,)),
    )
    similarity = None
    if cfg.semantic == 'encoder':
      similarity = self._split((rows,), jnp.float32)
    lower = self._partial(
      imitation.score_rollouts,
      cfg,
      self.learner.setup.tokenizer.separator,
      self._teachers,
      continuations,
      similarity,
    )
    times = 2 if self._teachers.previous is None else 5
    return self._forward(lower, rows * cfg.dream_length, times)

  def _seeding(self) -> Step:
    """The steps between two rounds of rollouts, which are in the batch."""
    cfg = self.learner.cfg.sleep
    level = next(i for i, l in enumerate(self.cfg.levels) if l.slots)
    expert = jax.eval_shape(
      lambda m: m.levels[level].bank.expert(0), self.model.memory
    )
    opt_state = jax.eval_shape(seeding.optimizer(cfg).init, expert)
    steps = min(cfg.rollout_every, cfg.steps)
    rollout_batch, rollouts = 0, None
    if cfg.uses_rollouts:
      rollout_batch = cfg.rollout_groups * cfg.group
      labels = self._labels(cfg.prefixes * cfg.group)
      real = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
      rollouts = imitation.Rollouts(
        labels=labels,
        old_logp=self._replicate(real(labels.tokens.shape)),
        advantage=self._replicate(real(labels.tokens.shape[:1])),
      )
    rows = functools.partial(self._split, axes=(None, 'batch'))
    lower = self._partial(
      seeding.seed_steps,
      cfg,
      (self._shard_params(expert), self._shard_params(opt_state)),
      self.model,
      job_lib.SlotId(level, self._split((), axes=())),
      (self._labels(cfg.dreams), rollouts),
      # Every device has all rows of D, and takes its own rows of a batch.
      (rows((steps, cfg.batch)), rows((steps, rollout_batch))),
    )
    first = self.cfg.layers_of(level).start
    per_token = flops.partial_train_flops(self.cfg, cfg.dream_length / 2, first)
    size = steps * (cfg.batch + rollout_batch) * cfg.dream_length
    return Step(lower, self.mesh, per_token * size, 2 * steps, size)

  def _adapters(self, targets: tuple[str, ...] | None = None) -> at.Tree:
    cfg = self.learner.cfg.lora
    if targets is not None:
      cfg = dataclasses.replace(cfg, targets=targets)
    return jax.eval_shape(
      lambda key: lora.init_adapter(self.cfg, cfg, self.model.params, key),
      jax.eval_shape(lambda: jax.random.key(0)),
    )

  def _importance(self) -> Step:
    """Gradients of the dreams about one context."""
    cfg = self.learner.cfg.dreaming
    adapter = self._replicate(self._adapters(cfg.importance_targets))
    shape = (cfg.dreams, cfg.importance_rows, self.run.row_length)
    lower = self._partial(
      importance.gradients,
      self.model.replace(adapter=adapter),
      self._split(shape, axes=()),
      self._split(shape, jnp.float32, ()),
    )
    size = math.prod(shape)
    per_token = flops.partial_train_flops(self.cfg, shape[2] / 2)
    return Step(lower, self.mesh, per_token * size, 2, size)

  def _trials(self) -> Step:
    """The instances of one program, each fine-tuned on its own rows."""
    cfg, trial = self.learner.cfg.dreaming, self.learner.cfg.trial
    updates = min(trial.max_parallel, cfg.keep + cfg.keep_random)
    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
      instances = trials.num_instances(updates)
    length = trial.window or self.run.row_length
    steps = min(trial.max_steps, trial.epochs * -(-_TRIAL_ROWS // trial.batch))
    adapters = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((instances, *x.shape), x.dtype),
      self._adapters(),
    )
    split = functools.partial(self._split, axes=('instances',))
    rows = (instances, _TRIAL_ROWS, length)
    lower = self._partial(
      trials.train_instances,
      self.model,
      self._place(adapters, sharding.rows(self.mesh, adapters, 'instances')),
      (split(rows), split(rows, jnp.float32)),
      (
        split((instances, steps, trial.batch)),
        split((instances, steps), jnp.float32),
      ),
    )
    per_token = flops.partial_train_flops(self.cfg, length / 2)
    size = instances * steps * trial.batch * length
    return Step(lower, self.mesh, per_token * size, 2 * steps, size)

  def _evaluation(self) -> Step:
    """A batch of answers that are scored."""
    multiple = padding.MULTIPLE
    width = -(-self.run.row_length // multiple) * multiple
    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
      rows = budget.rows_per_pass(
        self.cfg, width=width, columns=_ANSWER, most=scoring.EVAL_BATCH
      )
    lower = self._partial(
      scoring.score_batch,
      self.model,
      self._split((rows, width)),
      self._split((rows,)),
      self._split((rows, width), jnp.bool_),
      None,
      _ANSWER,
    )
    return self._forward(lower, rows * width, 1)
