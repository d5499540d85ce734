"""How a life comes to lie on a mesh: no device holds more than its part."""

import functools

import jax
from jax import core
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.harness import build as build_lib
from sleep_jax.models import memory_init
from sleep_jax.models import transformer
from sleep_jax.runtime import sharding
from sleep_jax.runtime import tree_paths
from tests import conftest
from tests import sharded_lives_test

_MESH = {'fsdp': 4, 'tensor': 2}


def memory_of_programs(monkeypatch) -> list[tuple[int, int]]:
  """Bytes of a device, of each program: what it puts out, and besides."""
  found, jit = [], jax.jit

  def recorded(function, **options):
    def call(*args):
      compiled = jit(function, **options).lower(*args).compile()
      sizes = compiled.memory_analysis()
      found.append((sizes.output_size_in_bytes, sizes.temp_size_in_bytes))
      return compiled(*args)

    return call

  monkeypatch.setattr(sharding.jax, 'jit', recorded)
  return found


@pytest.mark.parametrize(
  'make',
  [
    lambda cfg: transformer.init(cfg, jax.random.key(0)),
    memory_init.init_memory,
  ],
  ids=['weights', 'memory'],
)
def test_no_device_holds_more_than_its_part_of_a_new_life(make, monkeypatch):
  cfg = conftest.tiny(vocab=4096, dim=64)
  make = functools.partial(make, cfg)
  whole = sum(4 * x.size for x in jax.tree.leaves(jax.eval_shape(make)))
  found = memory_of_programs(monkeypatch)
  with sharding.use_mesh(_MESH):
    got = sharding.init(make)
  ((output, temporary),) = found
  assert output < 1.4 * whole / 8 and temporary < 0.5 * whole
  monkeypatch.undo()
  want = jax.jit(make)()
  for name, leaf in tree_paths.leaf_paths(got).items():
    np.testing.assert_allclose(
      leaf, tree_paths.leaf_paths(want)[name], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize('learner', ['sleep', 'sft'])
def test_all_that_is_made_for_a_life_lies_on_the_whole_mesh(
  learner, monkeypatch
):
  """Of the runner's own build, with a base from a file."""
  init_memory, in_programs = memory_init.init_memory, []

  def recorded(cfg, **options):
    in_programs.append(isinstance(jnp.zeros(()), core.Tracer))
    return init_memory(cfg, **options)

  monkeypatch.setattr(memory_init, 'init_memory', recorded)
  c = sharded_lives_test.settings(**_MESH)
  c['arms'] = {learner: {}}
  with sharding.use_mesh(c['mesh']):
    before = {id(x) for x in jax.live_arrays()}
    _, built, _ = build_lib.build(build_lib.arm_config(c, learner), seed=1)
    life = built.init(jax.random.PRNGKey(0))
    made = [x for x in jax.live_arrays() if id(x) not in before]
  assert in_programs and all(in_programs)
  assert any(x.size > 500 for x in jax.tree.leaves(life))
  for x in made:
    on_all = len(x.sharding.device_set) == 8 and not x.is_fully_replicated
    assert on_all or x.size < 500, (x.shape, x.sharding)


def test_of_weights_on_the_host_each_device_reads_its_own_part():
  read = []

  class Mapped(np.ndarray):
    """An array that tells which parts of it are read."""

    def __getitem__(self, index):
      part = super().__getitem__(index)
      read.append(np.size(part))
      return part

  gate = np.arange(2 * 8 * 16, dtype=np.float32).reshape(2, 8, 16)
  with sharding.use_mesh(_MESH):
    placed = sharding.shard_params({'level_1': {'gate': gate.view(Mapped)}})
  placed = placed['level_1']['gate']
  assert set(read) == {gate.size // 8}
  np.testing.assert_array_equal(placed, gate)
  assert placed.sharding.spec == jax.P(None, 'fsdp', 'tensor')
