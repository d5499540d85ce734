"""What long rows need besides a program's arguments, by the compiler's account.

The loss of one row of Llama 3.2 1B in float32, and its gradient by all weights,
are compiled and not run.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import accelerator
from benchmarks import timing
from sleep_jax import config
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.training import loss as loss_lib


def run(plan: timing.Plan) -> Iterator[dict[str, Any]]:
  """Bytes, length by length."""
  # XLA's CPU compiler keeps a float32 copy of what is bfloat16.
  cfg = dataclasses.replace(accelerator.model_config(plan), dtype='float32')
  for gradient in (False, True):
    for length in plan.choose((2048, 8192, 32_768, 131_072), (32,)):
      yield memory(cfg, length, gradient)


def memory(
  cfg: config.ModelConfig, length: int, gradient: bool
) -> dict[str, Any]:
  """Temporary bytes of the loss of one row, or of its gradient."""

  def init() -> model_lib.Model:
    return model_lib.Model(cfg, transformer.init(cfg, jax.random.key(0)))

  def loss(params, tokens):
    model = model_lib.Model(cfg, params)
    return loss_lib.next_token_loss(model, tokens, jnp.ones(tokens.shape))

  params = jax.eval_shape(init).params
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  step = jax.jit(jax.grad(loss) if gradient else loss)
  stats = step.lower(params, tokens).compile().memory_analysis()
  assert stats is not None  # XLA's own compilers all give them.
  return {
    'bench': 'long_rows',
    'model': f'dim {cfg.dim}, layers {cfg.layers}, {cfg.dtype}',
    'rows': 1,
    'length': length,
    'pass': 'gradient' if gradient else 'forward',
    'temporary_bytes': stats.temp_size_in_bytes,
  }
