"""A token's price after 1, 8 and 64 windows: states against a growing cache.

The hybrid has read its windows, slept on each, and generates from its states
and the keys of the window at hand. The other side is a model of the same width
and depth with attention throughout, whose cache holds all that was read. What
such a cache holds does not change its price, so its columns are zeros.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from sleep_jax import config
from sleep_jax.inference import decoding
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import passes as passes_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer

_VOCAB = 512


def _init(plan: timing.Plan, mixers: tuple[str, ...]) -> model_lib.Model:
  dim = plan.choose(128, 16)
  cfg = config.ModelConfig(
    vocab=_VOCAB,
    dim=dim,
    layers=4,
    heads=4,
    levels=(config.LevelConfig(hidden=2 * dim),),
    mixers=mixers,
    recurrent=config.RecurrentConfig(key=dim // 4, value=dim // 2),
    max_len=8192,
  )
  return model_lib.Model(cfg, transformer.init(cfg, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=3)
def _generate(model, cache, token, new):
  """`new` greedy tokens after what `cache` holds, `[B, new]`."""
  unstacked = decoding.unstack_layers(model.cfg, model.params, None)

  def step(carry, _):
    cache, token = carry
    positions = jnp.broadcast_to(cache.end_index, token.shape)
    logits, cache = decoding.decode(
      model.cfg, unstacked, token, positions, cache
    )
    token = logits.argmax(-1)[:, None]
    return (cache, token), token

  _, tokens = jax.lax.scan(step, (cache, token), length=new)
  return tokens[..., 0].T


def run(plan: timing.Plan) -> list[dict[str, Any]]:
  """Eight rows, windows of 64 tokens, and 64 new tokens."""
  rows, length = plan.choose((8, 64), (2, 4))
  new = length
  hybrid, full = _init(plan, ('attention', 'gdn')), _init(plan, ())
  cfg = recurrence_config.RecurrenceConfig(passes=2)
  read = jax.jit(passes_lib.read, static_argnums=0)
  entries, token = [], jnp.ones((rows, 1), jnp.int32)
  for windows in plan.choose((1, 8, 64), (1, 3)):
    context = np.random.default_rng(0).integers(
      0, _VOCAB, (rows, windows, length)
    )
    state, _ = read(
      cfg,
      hybrid,
      passes_lib.init_window_state(cfg, hybrid, rows, length),
      context,
      np.ones(context.shape, bool),
    )
    memory = memory_lib.of_states(hybrid.cfg, state.states)
    cache = decoding.init_decode_cache(hybrid.cfg, rows, new, memory)
    grown = decoding.init_decode_cache(full.cfg, rows, windows * length + new)
    columns = np.arange(windows * length + new)
    grown = grown.replace(
      end_index=jnp.array(windows * length),
      positions=jnp.broadcast_to(
        np.where(columns < windows * length, columns, -1), grown.positions.shape
      ),
    )
    _check(hybrid, state, cache, token)
    sides = {
      'sleep_jax': lambda cache=cache: np.asarray(
        _generate(hybrid, cache, token, new)
      ),
      'attention throughout': lambda grown=grown: np.asarray(
        _generate(full, grown, token, new)
      ),
    }
    for side in sides.values():
      side()
    seconds = timing.interleave(sides, plan)
    entries.append(
      {
        'bench': 'eviction',
        'windows': windows,
        'rows': rows,
        'length': length,
        'new': new,
        'parity': 'first logits equal a forward pass from the states, to 1e-4',
        'seconds': seconds,
        'ms_per_token': {
          name: 1e3 * s['median'] / new for name, s in seconds.items()
        },
        'cache_bytes_per_row': {
          'sleep_jax': _bytes(cache) // rows,
          'attention throughout': _bytes(grown) // rows,
        },
        'speedup': timing.speedup(seconds),
      }
    )
  return entries


def _bytes(cache: cache_lib.Cache) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(cache.layers))


def _check(model, state, cache, token) -> None:
  """The cached step's logits are those of a forward pass from the states."""
  unstacked = decoding.unstack_layers(model.cfg, model.params, None)
  positions = jnp.zeros(token.shape, jnp.int32)
  got, _ = decoding.decode(model.cfg, unstacked, token, positions, cache)
  want = transformer.forward(
    model.cfg,
    model.params,
    token,
    memory_lib.of_states(model.cfg, state.states),
  )
  np.testing.assert_allclose(got, want.logits[:, -1], atol=1e-4)
