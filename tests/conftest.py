"""Small models and lives that tests share."""

import dataclasses  # noqa: E402  (XLA_FLAGS come before jax)
import os

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from sleep_jax import config
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer

os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
# Compiled once, for both workers and for the next run.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  os.path.expanduser('~/.cache/sleep_jax/xla_tests'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')


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
  """Fresh weights whose embedding is large enough to say something with."""
  params = transformer.init(cfg, jax.random.key(0))
  return params | {'embed': jax.tree.map(lambda x: 25 * x, params['embed'])}


@pytest.fixture(name='params')
def _params(cfg):
  return weights(cfg)


@pytest.fixture(name='tokens')
def _tokens():
  return jax.random.randint(jax.random.key(1), (4, 16), 0, 32)


def lived(cfg: config.ModelConfig, seed: int = 5) -> memory_lib.Memory:
  """A memory in which everything that can be non-zero is."""
  memory = memory_lib.init_memory(cfg)
  keys = iter(jax.random.split(jax.random.key(seed), 100))

  def noise(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return 0.3 * jax.random.normal(next(keys), x.shape)

  memory = jax.tree.map(noise, memory)
  for i, level in enumerate(memory.levels):
    if level.bank:
      used = level.bank.status.shape[0] - 1
      status = jnp.array([memory_lib.ACTIVE] * used + [memory_lib.LOCKED])
      birth = jnp.array([*range(used), -1])
      bank = level.bank.replace(status=status, created_night=birth)
      memory = memory.with_level(i, bank=bank)
  return memory


def replace(cfg: config.ModelConfig, **changes) -> config.ModelConfig:
  return dataclasses.replace(cfg, **changes)


@pytest.fixture(autouse=True, scope='module')
def _forget_programs():
  """Frees what a module has compiled, once it is done.

  Every program maps memory of its own, and a process may have only so many
  maps (Linux: 65,530); a worker that keeps all of them is killed in the end.
  """
  yield
  jax.clear_caches()
