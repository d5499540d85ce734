"""A life on a mesh is the life of one device, and lies on all of them."""

import json
import pathlib
import shutil
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
  'wake': (wake, 'wake'),
  'seeding': (seeding, 'seed_steps'),
  'rollout': (sampling, 'generate'),
}


class Lived(NamedTuple):
  """What a life became, and how."""

  life: dict[str, np.ndarray]  # Leaves by name, at the last save.
  parts: dict[str, Any]  # How each leaf lay on the devices.
  scalars: list[dict[str, float]]  # By night.
  data: dict[str, list[np.ndarray]]  # Whole numbers that each step was given.
  flops: dict[str, float]  # Of one device, at the first call of each step.


def settings(**mesh: int) -> build_lib.Settings:
  """A small life of gentle steps.

  Adam's first step is as large for a gradient that is all rounding as for any
  other, and rounding is what one device and eight differ in: large steps would
  compare little else.
  """
  c = run_test.small_config()
  c['model']['levels'][0] |= {'optimizer': 'sgd', 'learning_rate': 0.1}
  c['sleep']['learning_rate'] = 1e-4
  c['mesh'] |= mesh
  return c


def lived(folder: pathlib.Path, **mesh: int) -> Lived:
  moments, data, flops = [], {}, {}

  def watched(name, step):
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
      patch.setattr(module, function, watched(name, step))
    patch.setattr(
      checkpoint.Checkpoints,
      'save',
      lambda self, moment: moments.append(moment) or save(self, moment),
    )
    live_lib.live(settings(**mesh), 'sleep', 1, folder, 0)
  last = tree_paths.leaf_paths(moments[-1].life)
  records = (folder / 'metrics.jsonl').read_text().splitlines()
  return Lived(
    {k: np.array(x) for k, x in last.items()},
    {k: x.sharding for k, x in last.items() if isinstance(x, jax.Array)},
    [json.loads(line)['scalars'] for line in records],
    data,
    flops,
  )


@pytest.fixture(name='one', scope='module')
def _one(tmp_path_factory):
  return lived(tmp_path_factory.mktemp('one'))


@pytest.fixture(name='folder', scope='module')
def _folder(tmp_path_factory):
  return tmp_path_factory.mktemp('eight')


@pytest.fixture(name='eight', scope='module')
def _eight(folder):
  return lived(folder, **MESH)


def assert_close(got, want):
  assert got.keys() == want.keys() and want
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, rtol=1e-5, atol=1e-5, err_msg=name)


def assert_same_life(got: Lived, want: Lived):
  assert_close(got.life, want.life)
  assert len(got.scalars) == len(want.scalars) == 2
  for a, b in zip(got.scalars, want.scalars):
    assert_close(a, b)


def test_a_life_on_eight_devices_is_that_of_one(one, eight):
  assert_same_life(eight, one)
  # Days and nights that teach something, by far more than what is forgiven.
  for name in ('rested.0.0.down', 'memory.levels.1.bank.experts.b'):
    assert np.abs(one.life[name]).max() > 3e-4


def test_every_step_of_it_is_given_the_same_data_in_the_same_order(one, eight):
  assert one.data.keys() == eight.data.keys() == _STEPS.keys()
  for name, given in one.data.items():
    jax.tree.map(np.testing.assert_array_equal, eight.data[name], given)


def test_every_step_of_it_is_shared_by_the_devices(one, eight):
  for name in _STEPS:
    assert eight.flops[name] < 0.2 * one.flops[name], name


def test_its_weights_are_split_by_the_table(eight):
  parts, want = eight.parts, jax.P(None, 'tensor', 'fsdp')
  assert parts['params.blocks.level_1.down'].spec == want
  assert parts['rested.0.0.down'].spec == want
  for name, part in parts.items():
    assert len(part.device_set) == 8, name
    size = eight.life[name].size
    assert part.is_fully_replicated == (size < 500), name


def test_it_goes_on_on_one_device(one, eight, folder):
  steps = sorted(int(x.name) for x in (folder / 'checkpoints').glob('[0-9]*'))
  shutil.rmtree(folder / 'checkpoints' / str(steps[-1]))
  (folder / 'summary.json').unlink()
  got = lived(folder)
  assert_same_life(got, one)
  assert 'wake' not in got.data  # That was before.
  assert all(len(part.device_set) == 1 for part in got.parts.values())


def test_trials_on_a_mesh_say_the_same(monkeypatch):
  """Five instances: they are filled up to eight."""
  lies, train = [], trials.train_instances

  def watched(*args):
    lies.extend(x.sharding for x in jax.tree.leaves(args[3:]))
    return train(*args)

  def tried():
    born = dreaming_test.params.__wrapped__()
    life = sharding.shard_params(dreaming_test.life_of(born, 5))
    edits = [dreaming_test.Bandit().from_context(c) for c in life.contexts]
    questions = [c.questions for c in life.contexts]
    lab = dreaming_test.dreamer_of().lab(life)
    return trials.run(lab, edits, questions, jax.random.key(0))

  want, _ = tried()
  monkeypatch.setattr(trials, 'train', watched)
  with sharding.use_mesh({'data': 4, 'fsdp': 2}):
    got, finite = tried()
  assert got == want and finite.shape == (5,) and finite.all()
  assert {len(x.device_set) for x in lies} == {8}
  assert not any(x.is_fully_replicated for x in lies)


def test_two_processes_share_a_life_that_one_began(tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')  # A device each.
  gentle = (
    '--config.model.levels[0].optimizer=sgd',
    '--config.model.levels[0].learning_rate=0.1',
  )
  flags_of_all = (distributed_test.SHORT, *gentle)
  killing.live(tmp_path / 'alone', None, *flags_of_all)
  deadly = killing.Moment('', 'sleep_jax.learners.online:WakeOnly.sleep', 2)
  killing.live(tmp_path / 'both', deadly, *flags_of_all)
  port = distributed_test.free_port()
  both = [
    distributed_test.start(
      tmp_path / 'both', port, i, more=(*gentle, '--config.mesh.fsdp=2')
    )
    for i in range(2)
  ]
  for process in both:
    told, _ = process.communicate(timeout=500)
    assert process.returncode == 0, told
  (alone, _), (got, unseen) = map(
    _saved, (tmp_path / x for x in ('alone', 'both'))
  )
  assert_close(got, alone)
  # Neither process had all of these.
  assert any('fast' in name for name in unseen)


def _saved(workdir: pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
  """The leaves of a life's last save, and which no process saw whole."""
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
    found = manager.restore(
      last,
      args=ocp.args.Composite(
        life=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore()
      ),
    )
  leaves = checkpoint.unpack(found.life, found.meta['packed'])
  return leaves, found.meta['unseen']


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'puzzle': {}}, 'mesh: a puzzle is learnt on one device'),
    ({'workers': 2}, 'workers=2: on a mesh one life is lived after the other'),
    ({'mesh': {'data': 3}}, 'mesh of data=3 needs 3 devices, but there are 8'),
    ({'mesh': {'data': 0}}, 'mesh.data=0 must be at least 1'),
    (
      {'wake': {'lanes': 12}},
      "wake.lanes: 'batch' has size 12, which 8 devices",
    ),
    (
      {'mesh': {'data': 1, 'tensor': 8}},
      r'which 8 devices \(tensor\) do not divide',
    ),
  ],
)
def test_what_cannot_be_is_refused_before_any_life(changes, words):
  c = settings(data=8)
  c['sleep']['batch'] = 8
  for name, value in changes.items():
    c[name] = c.get(name, {}) | value if isinstance(value, dict) else value
  with pytest.raises(config.ConfigError, match=words):
    workers.check(c)


def test_a_mesh_is_no_part_of_what_a_life_is():
  assert build_lib.config_identity(
    settings(data=8)
  ) == build_lib.config_identity(settings())
  assert sharding.num_shards('batch') == 1  # And nothing is left of one.


def test_programs_are_kept_where_the_environment_says(monkeypatch):
  name = 'JAX_COMPILATION_CACHE_DIR'
  monkeypatch.setenv(name, '/elsewhere')
  assert compilation.folder() == pathlib.Path('/elsewhere')
  monkeypatch.delenv(name)
  home = pathlib.Path('~/.cache/sleep_jax/xla').expanduser()
  assert compilation.folder() == home


@pytest.mark.parametrize('given', ['wandb', "('wandb',)"])
def test_writers_are_named_on_the_command_line(given, monkeypatch):
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file('config', flag_values=values)
  path = run_test.ROOT / 'experiments/configs/quickstart.py'
  argv = ['run', f'--config={path}', f'--config.writers={given}']
  monkeypatch.setattr(sys, 'argv', argv)  # There overrides are looked for.
  values(argv)
  assert holder.value.writers == ('wandb',)
