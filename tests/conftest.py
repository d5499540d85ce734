"""Small models and memories that tests share."""

import ctypes
import gc
import os
import sys

# Compilation takes most of the time, and each worker has one core. What is
# given from outside comes last, so that it counts.
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8'
  ' --xla_cpu_parallel_codegen_split_count=1'
  ' --xla_backend_optimization_level=0 '
) + os.environ.get('XLA_FLAGS', '')
# Compiled once, for both workers and for the next run.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  os.path.expanduser('~/.cache/sleep_jax/xla_tests'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')

import dataclasses  # noqa: E402  (XLA_FLAGS come before jax)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from sleep_jax import config  # noqa: E402
from sleep_jax.models import memory as memory_lib  # noqa: E402
from sleep_jax.models import memory_init  # noqa: E402
from sleep_jax.models import model as model_lib  # noqa: E402
from sleep_jax.models import transformer  # noqa: E402

# What `-m quick` runs of each file; '' is all of it.
QUICK = {
  'bounds_test': '',
  'model_test': 'test_fresh_memory_gives_the_base_logits_bit_for_bit',
  'objectives_test': '',
  'seeding_test': 'test_seeding_touches_the_new_slot_alone',
  'tokenizers_test': '',
  'wake_test': 'test_reading_a_repeated_row_lowers_its_loss',
}


def pytest_collection_modifyitems(items):
  for item in items:
    name = QUICK.get(item.path.stem)
    if name is None or item.get_closest_marker('slow'):
      continue
    if item.name.startswith(name):
      item.add_marker(pytest.mark.quick)


def tiny(**changes) -> config.ModelConfig:
  """Two layers, three levels with clocks 4 -> 8 -> frozen, two banks."""
  settings = dict(
    vocab=32,
    dim=16,
    layers=2,
    heads=4,
    kv_heads=2,
    levels=(
      config.LevelConfig(
        16, chunk=4, sleep_every=2, optimizer='sgd', learning_rate=0.5
      ),
      config.LevelConfig(16, chunk=8, sleep_every=4, slots=3, rank=4, top_k=2),
      config.LevelConfig(16, slots=3, rank=4, top_k=2),
    ),
  )
  return config.ModelConfig(**(settings | changes))


@pytest.fixture(name='cfg')
def _cfg() -> config.ModelConfig:
  return tiny()


def weights(cfg: config.ModelConfig):
  """Initial weights with a large embedding, so that logits differ clearly."""
  params = transformer.init(cfg, jax.random.key(0))
  return params | {'embed': jax.tree.map(lambda x: 25 * x, params['embed'])}


@pytest.fixture(name='params')
def _params(cfg):
  return weights(cfg)


@pytest.fixture(name='tokens')
def _tokens():
  return jax.random.randint(jax.random.key(1), (4, 16), 0, 32)


def build_model(
  cfg: config.ModelConfig, memory: memory_lib.Memory | None = None
) -> model_lib.Model:
  """A model with the weights of `weights`, and the given memory."""
  return model_lib.Model(cfg, weights(cfg), memory)


def random_memory(cfg: config.ModelConfig, seed: int = 5) -> memory_lib.Memory:
  """A memory in which everything that can be non-zero is."""
  memory = memory_init.init_memory(cfg)
  keys = iter(jax.random.split(jax.random.key(seed), 100))

  def noise(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return 0.3 * jax.random.normal(next(keys), x.shape)

  memory = jax.tree.map(noise, memory)
  for i, level in enumerate(memory.levels):
    if level.bank:
      num_active = level.bank.status.shape[0] - 1
      status = [memory_lib.ACTIVE] * num_active + [memory_lib.LOCKED]
      bank = level.bank.replace(
        status=jnp.array(status),
        created_night=jnp.array([*range(num_active), -1]),
      )
      memory = memory.with_level(i, bank=bank)
  return memory


def replace(cfg: config.ModelConfig, **changes) -> config.ModelConfig:
  return dataclasses.replace(cfg, **changes)


@pytest.fixture(autouse=True, scope='module')
def _clear_compiled_programs():
  """Frees what a module has compiled, once its tests have run.

  Every program maps memory of its own, and a process may have only so many
  maps (Linux: 65,530); a worker that keeps all of them is killed. The compiler
  leaves gigabytes free but mapped, which glibc returns when told to.
  """
  yield
  jax.clear_caches()
  gc.collect()
  if sys.platform == 'linux':
    getattr(ctypes.CDLL(None), 'malloc_trim', lambda _: None)(0)
