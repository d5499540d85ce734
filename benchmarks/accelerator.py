"""A 1B Llama in bfloat16 on an accelerator: train MFU, decode bandwidth share.

Formulas, per token, with c the mean number of keys that a query sees:

  train FLOPs  = 6 * (weights that multiply + 2 * layers * heads * head_dim * c)
                 (`flops.train_flops`; causal, so c = T / 2; what remat computes
                 again is not counted)
  decode bytes = 2 * (weights that multiply
                      + 2 * layers * kv_heads * head_dim * c * rows), per step

and the shares are those of the vendor's dense bfloat16 peak and bandwidth.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import llama
from benchmarks import timing
from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.inference import sampling
from sleep_jax.models import flops
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.training import fit
from sleep_jax.training import optimizers

# FLOP/s in bfloat16 without sparsity and bytes/s of memory, by the vendors'
# data sheets; the first key that `device_kind` contains counts.
PEAKS = {
  'H200': (989e12, 4.8e12),
  'H100': (989e12, 3.35e12),
  'A100': (312e12, 2.04e12),
  'L4': (121e12, 0.3e12),
  'TPU v6': (918e12, 1.64e12),
  'TPU v5p': (459e12, 2.77e12),
  'TPU v5': (197e12, 0.82e12),  # Whose `device_kind` is "TPU v5 lite".
  'TPU v4': (275e12, 1.23e12),
}


def model_config(plan: timing.Plan) -> config.ModelConfig:
  """The shape of Llama 3.2 1B."""
  shape = plan.choose((2048, 16, 32, 8, 8192, 128_256), (16, 2, 4, 2, 24, 64))
  return llama.ours(*shape, unroll=1, remat=True, dtype='bfloat16')


def multiplying(cfg: config.ModelConfig) -> float:
  """Weights that take part in a product, the tied head among them."""
  return flops.forward_flops(cfg, context=0) / 2


def _init(cfg: config.ModelConfig) -> model_lib.Model:
  """Fresh weights without a memory."""
  return model_lib.Model(cfg, transformer.init(cfg, jax.random.key(0)))


def train_step(
  cfg: config.ModelConfig, rows: int, length: int
) -> tuple[jax.stages.Lowered, at.Tree]:
  """The lowered step, and the shapes of its weights and optimizer state."""
  optimizer = optimizers.adamw(1e-4)
  model = jax.eval_shape(lambda: _init(cfg))
  opt_state = jax.eval_shape(optimizer.init, model.params)
  tokens = jax.ShapeDtypeStruct((1, rows, length), jnp.int32)
  weight = jax.ShapeDtypeStruct((1, rows, length), jnp.float32)
  step = fit.train_steps.lower(optimizer, model, opt_state, tokens, weight)
  return step, (model.params, opt_state)


def rollout(
  cfg: config.ModelConfig,
  rows: int,
  width: int,
  sampler: sampling.SamplerConfig,
) -> jax.stages.Lowered:
  """The lowered rollout of bfloat16 weights."""
  model = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, cfg.dtype),
    jax.eval_shape(lambda: _init(cfg)),
  )
  return sampling.generate.lower(
    model,
    jax.ShapeDtypeStruct((rows, width), jnp.int32),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
    jax.eval_shape(lambda: jax.random.key(0)),
    sampler,
  )


def run(plan: timing.Plan) -> list[dict[str, Any]]:
  """Both measurements; without an accelerator one entry that says so."""
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return [
      {
        'bench': 'accelerator',
        'skipped': f'no accelerator: JAX found {device.device_kind}',
      }
    ]
  peaks = next((v for k, v in PEAKS.items() if k in device.device_kind), None)
  same = {'bench': 'accelerator', 'device': device.device_kind, 'peaks': peaks}
  cfg = model_config(plan)
  entries = [same | _train(plan, cfg, peaks)]
  for rows in plan.choose((1, 8, 32), (2,)):
    entries.append(same | _decode(plan, cfg, peaks, rows))
  return entries


def _train(plan, cfg, peaks) -> dict[str, Any]:
  rows, length = plan.choose((8, 2048), (2, 8))
  lowered, _ = train_step(cfg, rows, length)
  step = lowered.compile()
  model = jax.jit(lambda: _init(cfg))()
  state = [model, jax.jit(optimizers.adamw(1e-4).init)(model.params)]
  tokens = jnp.ones((1, rows, length), jnp.int32)
  weight = jnp.ones((1, rows, length))

  def side():
    *state[:], loss = step(*state, tokens, weight)
    jax.block_until_ready(loss)

  seconds = timing.interleave({'sleep_jax': side}, plan)['sleep_jax']
  rate = rows * length * flops.train_flops(cfg, length / 2) / seconds['median']
  return {
    'what': 'train',
    'rows': rows,
    'length': length,
    'seconds': seconds,
    'tokens_per_second': rows * length / seconds['median'],
    'flops_per_second': rate,
    'mfu': peaks and rate / peaks[0],
  }


def _decode(plan, cfg, peaks, rows) -> dict[str, Any]:
  width, new = plan.choose((128, 256), (5, 4))
  init = jax.jit(lambda: _init(cfg))
  model = jax.tree.map(lambda x: x.astype(cfg.dtype), init())
  prompts = jnp.ones((rows, width), jnp.int32)
  lengths = jnp.full((rows,), width)

  def side(new):
    sampler = sampling.SamplerConfig(max_new=new, temperature=0.0)
    key = jax.random.key(0)
    out = sampling.generate(model, prompts, lengths, key, sampler)
    return np.asarray(out.tokens)

  sides = {'all': lambda: side(new), 'prefill': lambda: side(1)}
  seconds = timing.interleave(sides, plan)
  step = (seconds['all']['median'] - seconds['prefill']['median']) / (new - 1)
  per_token = 2 * cfg.layers * cfg.num_kv_heads * cfg.resolved_head_dim
  cached = rows * per_token * (width + new / 2)
  rate = 2 * (multiplying(cfg) + cached) / step
  return {
    'what': 'decode',
    'rows': rows,
    'prompt': width,
    'new': new,
    'seconds': seconds,
    'tokens_per_second': rows / step,
    'bytes_per_second': rate,
    'bandwidth_share': peaks and rate / peaks[1],
  }
