"""Greedy decoding against `transformers.generate`, token by token equal."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import llama
from benchmarks import timing
from sleep_jax.inference import sampling
from sleep_jax.models import model as model_lib

# dim, layers, heads, kv heads, hidden, vocab; new tokens.
_MODELS = {
  'D128 L4': ((128, 4, 4, 2, 352, 8192), 128),
  'D512 L8': ((512, 8, 8, 4, 1376, 8192), 64),
}
_TINY = {'D16 L2': ((16, 2, 4, 2, 24, 64), 4)}


def run(plan: timing.Plan) -> list[dict[str, Any]]:
  """Both models at 1, 8 and 32 rows of 64 prompt tokens."""
  entries = []
  for name, (shape, new) in plan.choose(_MODELS, _TINY).items():
    cfg = llama.ours(*shape)
    opponent = llama.theirs(cfg)
    params = jax.device_put(llama.params(cfg, opponent))
    model = model_lib.Model(cfg, params)
    for rows in plan.choose((1, 8, 32), (2,)):
      entry = _compare(plan, model, opponent, rows, new)
      entries.append({'bench': 'decode', 'model': name, 'rows': rows} | entry)
  return entries


def _compare(plan, model, opponent, rows, new) -> dict[str, Any]:
  import torch

  width = plan.choose(64, 5)
  rng = np.random.default_rng(0)
  prompts = rng.integers(1, model.cfg.vocab, (rows, width))
  ids = torch.tensor(prompts)
  tokens, lengths = jnp.array(prompts, jnp.int32), jnp.full((rows,), width)
  sampler = sampling.SamplerConfig(max_new=new, temperature=0.0)
  key = jax.random.key(0)

  def ours():
    out = sampling.generate(model, tokens, lengths, key, sampler)
    return np.asarray(out.tokens)

  def theirs(cache):
    with torch.inference_mode():
      out = opponent.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        cache_implementation=cache,
      )
    return out[:, width:].numpy()

  sides = {
    'sleep_jax': ours,
    'transformers, dynamic cache': lambda: theirs(None),
    'transformers, static cache': lambda: theirs('static'),
  }
  outputs = {name: side() for name, side in sides.items()}
  for name, output in outputs.items():
    if not np.array_equal(outputs['sleep_jax'], output):
      raise AssertionError(f'decode: greedy tokens differ from {name}.')
  seconds = timing.interleave(sides, plan)
  return {
    'prompt': width,
    'new': new,
    'parity': 'all greedy tokens equal',
    'seconds': seconds,
    'tokens_per_second': {
      k: rows * new / s['median'] for k, s in seconds.items()
    },
    'speedup': timing.speedup(seconds),
  }
