"""A life on a mesh equals the life of one device, and is sharded over all."""

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.harness import workers
from sleep_jax.inference import sampling
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import seeding
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import compilation
from sleep_jax.runtime import sharding
from sleep_jax.runtime import tree_paths
from tests import distributed_test
from tests import dreaming_test
from tests import killing
from tests import run_test

MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}
_STEPS = {
  'wake': (wake, 'read_day'),
  'seeding': (seeding, 'seed_steps'),
  'rollout': (sampling, 'generate'),
}


class Record(NamedTuple):
  """The last state of a life, and what its steps were given."""

  life: dict[str, np.ndarray]  # Leaves by name, at the last save.
  shardings: dict[str, Any]  # Of each leaf.
  scalars: list[dict[str, float]]  # By night.
  data: dict[str, list[np.ndarray]]  # Integer arguments of each step.
  flops: dict[str, float]  # Of one device, at the first call of each step.


def settings(**mesh: int) -> build_lib.Settings:
  """A small life with small updates.

  Adam's first update has the same size for a gradient of rounding errors as for
  any other, and one device and eight differ by rounding: with large updates the
  comparison would be of rounding errors.
  """
  c = run_test.small_config()
  c['model']['levels'][0] |= {'optimizer': 'sgd', 'learning_rate': 0.1}
  c['sleep']['learning_rate'] = 1e-4
  c['mesh'] |= mesh
  return c


def run_life(folder: pathlib.Path, **mesh: int) -> Record:
  snapshots, data, flops = [], {}, {}

  def recorded(name, step):
    def call(*args, **kwargs):
      data.setdefault(name, []).extend(
        np.array(x)
        for x in jax.tree.leaves(args)
        if isinstance(x, jax.Array | np.ndarray)
        and jnp.issubdtype(x.dtype, jnp.integer)
      )
      if name not in flops:
        program = step.lower(*args, **kwargs).compile()
        flops[name] = program.cost_analysis()['flops']
      return step(*args, **kwargs)

    return call

  save = checkpoint.Checkpoints.save
  with pytest.MonkeyPatch.context() as patch:
    for name, (module, function) in _STEPS.items():
      step = getattr(module, function)
      patch.setattr(module, function, recorded(name, step))
    patch.setattr(
      checkpoint.Checkpoints,
      'save',
      lambda self, snapshot: snapshots.append(snapshot) or save(self, snapshot),
    )
    live_lib.live(settings(**mesh), 'sleep', 1, folder, 0)
  last = tree_paths.leaf_paths(snapshots[-1].life)
  records = (folder / 'metrics.jsonl').read_text().splitlines()
  return Record(
    {k: np.array(x) for k, x in last.items()},
    {k: x.sharding for k, x in last.items() if isinstance(x, jax.Array)},
    [json.loads(line)['scalars'] for line in records],
    data,
    flops,
  )


@pytest.fixture(name='one', scope='module')
def _one(tmp_path_factory):
  return run_life(tmp_path_factory.mktemp('one'))


@pytest.fixture(name='folder', scope='module')
def _folder(tmp_path_factory):
  return tmp_path_factory.mktemp('eight')


@pytest.fixture(name='eight', scope='module')
def _eight(folder):
  return run_life(folder, **MESH)


def assert_close(got, want):
  assert got.keys() == want.keys() and want
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, rtol=1e-5, atol=1e-5, err_msg=name)


def assert_same_life(got: Record, want: Record):
  assert_close(got.life, want.life)
  assert len(got.scalars) == len(want.scalars) == 2
  for a, b in zip(got.scalars, want.scalars):
    assert_close(a, b)


@pytest.mark.slow
def test_a_life_on_eight_devices_equals_that_of_one(one, eight):
  assert_same_life(eight, one)
  # Days and nights change the life by far more than the tolerance.
  for name in ('fast_at_wake.0.0.down', 'model.memory.levels.1.bank.experts.b'):
    assert np.abs(one.life[name]).max() > 3e-4


@pytest.mark.slow
def test_steps_on_a_mesh_get_the_same_data_in_the_same_order(one, eight):
  assert one.data.keys() == eight.data.keys() == _STEPS.keys()
  for name, arrays in one.data.items():
    jax.tree.map(np.testing.assert_array_equal, eight.data[name], arrays)


@pytest.mark.slow
def test_every_step_is_divided_among_the_devices(one, eight):
  for name in _STEPS:
    assert eight.flops[name] < 0.2 * one.flops[name], name


def test_weights_are_sharded_by_the_table(eight):
  shardings, want = eight.shardings, jax.P(None, 'tensor', 'fsdp')
  assert shardings['model.params.blocks.level_1.down'].spec == want
  assert shardings['fast_at_wake.0.0.down'].spec == want
  for name, part in shardings.items():
    assert len(part.device_set) == 8, name
    size = eight.life[name].size
    assert part.is_fully_replicated == (size < 200), name


@pytest.mark.slow
def test_a_life_of_eight_devices_resumes_on_one(one, eight, folder):
  steps = sorted(int(x.name) for x in (folder / 'checkpoints').glob('[0-9]*'))
  shutil.rmtree(folder / 'checkpoints' / str(steps[-1]))
  (folder / 'summary.json').unlink()
  got = run_life(folder)
  assert_same_life(got, one)
  assert 'wake' not in got.data  # The last day is in the checkpoint.
  assert all(len(part.device_set) == 1 for part in got.shardings.values())


@pytest.mark.slow
def test_trials_on_a_mesh_give_the_same_answers(monkeypatch):
  """Five instances: they are padded to eight."""
  shardings, train_instances = [], trials.train_instances

  def recorded(model, *instances):
    shardings.extend(x.sharding for x in jax.tree.leaves(instances))
    return train_instances(model, *instances)

  def run_trials():
    life = dreaming_test.life_of(dreaming_test.init_model(), 5)
    life = sharding.shard_params(life)
    updates = [dreaming_test.Bandit().from_context(c) for c in life.contexts]
    questions = [c.questions for c in life.contexts]
    dreamer = dreaming_test.dreamer_of()
    return trials.run(
      dreamer, life.model, updates, questions, jax.random.key(0)
    )

  want, _ = run_trials()
  monkeypatch.setattr(trials, 'train_instances', recorded)
  with sharding.use_mesh({'data': 4, 'fsdp': 2}):
    got, finite = run_trials()
  assert got == want and finite.shape == (5,) and finite.all()
  assert {len(x.device_set) for x in shardings} == {8}
  assert not any(x.is_fully_replicated for x in shardings)


@pytest.mark.slow
def test_two_processes_resume_a_life_of_one(tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')  # A device each.
  small_updates = (
    '--config.model.levels[0].optimizer=sgd',
    '--config.model.levels[0].learning_rate=0.1',
  )
  flags_of_all = (distributed_test.SHORT, *small_updates)
  killing.live(tmp_path / 'alone', None, *flags_of_all)
  moment = killing.Moment('', 'sleep_jax.learners.sleep:Sleep.sleep', 2)
  killing.live(tmp_path / 'both', moment, *flags_of_all)
  port = distributed_test.free_port()
  both = [
    distributed_test.start(
      tmp_path / 'both', port, i, more=(*small_updates, '--config.mesh.fsdp=2')
    )
    for i in range(2)
  ]
  for process in both:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
  (alone, _), (got, not_addressable) = map(
    _saved, (tmp_path / x for x in ('alone', 'both'))
  )
  assert_close(got, alone)
  # Leaves that are sharded over both processes.
  assert any('fast' in name for name in not_addressable)


def _saved(workdir: pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
  """The leaves of a life's last save, and those sharded over processes."""
  folder = next((workdir / 'lives').iterdir()) / 'checkpoints'
  with ocp.CheckpointManager(
    folder,
    item_handlers={
      'life': ocp.StandardCheckpointHandler(),
      'meta': ocp.JsonCheckpointHandler(),
    },
  ) as manager:
    last = manager.latest_step()
    like = {
      k: np.empty(x.shape, x.dtype)
      for k, x in manager.item_metadata(last)['life'].items()
    }
    saved = manager.restore(
      last,
      args=ocp.args.Composite(
        life=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore()
      ),
    )
  leaves = checkpoint.unpack(saved.life, saved.meta['packed'])
  return leaves, saved.meta['not_addressable']


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'workers': 2}, 'workers=2: on a mesh one life is lived after the other'),
    ({'mesh': {'data': 3}}, 'mesh of data=3 needs 3 devices, but there are 8'),
    ({'mesh': {'data': 0}}, 'mesh.data=0 must be at least 1'),
    (
      {'wake': {'batch': 12}},
      "wake.batch: 'batch' has size 12, which 8 devices",
    ),
    (
      {'mesh': {'data': 1, 'tensor': 8}},
      r'which 8 devices \(tensor\) do not divide',
    ),
  ],
)
def test_bad_settings_are_refused_before_any_life(changes, words):
  c = settings(data=8)
  c['sleep']['batch'] = 8
  for name, value in changes.items():
    c[name] = c.get(name, {}) | value if isinstance(value, dict) else value
  with pytest.raises(config.ConfigError, match=words):
    workers.check(c)


def test_a_mesh_does_not_change_the_identity_of_a_config():
  assert build_lib.config_identity(
    settings(data=8)
  ) == build_lib.config_identity(settings())
  assert sharding.num_shards('batch') == 1  # No mesh is left in force.


def test_compilation_cache_is_at_the_environments_path(monkeypatch):
  name = 'JAX_COMPILATION_CACHE_DIR'
  monkeypatch.setenv(name, '/elsewhere')
  assert compilation.folder() == pathlib.Path('/elsewhere')
  monkeypatch.delenv(name)
  home = pathlib.Path('~/.cache/sleep_jax/xla').expanduser()
  assert compilation.folder() == home


def test_who_has_no_home_has_no_cache_of_programs():
  """Nothing that is imported, and no flag, needs one."""
  code = (
    'import os, pwd\n'
    "os.environ.pop('HOME', None)\n"
    "os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)\n"
    'def gone(uid):\n'
    '  raise KeyError(uid)\n'
    'pwd.getpwuid = gone\n'
    'import sleep_jax, sleep_jax.cli, experiments.run\n'
    'from sleep_jax.data.datasets import prepared\n'
    'from sleep_jax.runtime import compilation\n'
    'compilation.enable_cache()\n'
    'assert compilation.folder() is None\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=run_test.ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert not done.returncode, done.stderr


@pytest.mark.parametrize('value', ['wandb', "('wandb',)"])
def test_writers_flag_accepts_a_name_or_a_tuple(value, monkeypatch):
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file('config', flag_values=values)
  path = run_test.ROOT / 'experiments/configs/quickstart.py'
  argv = ['run', f'--config={path}', f'--config.writers={value}']
  monkeypatch.setattr(
    sys, 'argv', argv
  )  # ml_collections reads overrides there.
  values(argv)
  assert holder.value.writers == ('wandb',)
