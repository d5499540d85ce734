"""Seconds and bytes of saving one life: SmolLM2-135M with a level that moves.

Its numbers are random, since zeros would be compressed to nothing. Side by
side: with the base named by digest, as for a learner that leaves it alone, and
with all weights in the checkpoint.
"""

import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from experiments.configs import backbones
from sleep_jax import config
from sleep_jax.harness import build
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import checkpoint


def run(plan: timing.Plan) -> list[dict[str, Any]]:
  """One entry."""
  life = _life(_model_config(plan))
  digest = checkpoint.weights_digest(life.model.params)
  written = {}

  with tempfile.TemporaryDirectory() as folder:

    def save(name: str, base: str) -> None:
      target = pathlib.Path(tempfile.mkdtemp(dir=folder))
      checkpoint.save_life(target, life, base)
      files = [p for p in target.rglob('*') if p.is_file()]
      written[name] = sum(p.stat().st_size for p in files)
      for file in files:
        file.unlink()

    seconds = timing.interleave(
      {
        'sleep_jax': lambda: save('sleep_jax', digest),
        'with the base': lambda: save('with the base', ''),
      },
      plan,
    )
  return [
    {
      'bench': 'saves',
      'model': f'dim {life.model.cfg.dim}, layers {life.model.cfg.layers}',
      'bytes': {
        'sleep_jax': checkpoint.saved_bytes(life, digest),
        'with the base': checkpoint.saved_bytes(life),
      },
      'bytes_on_disk': written,
      'seconds': seconds,
      'speedup': timing.speedup(seconds),
    }
  ]


def _model_config(plan: timing.Plan) -> config.ModelConfig:
  """SmolLM2 with the levels of its lives, or a tiny model with such."""
  tiny = dict(vocab=64, dim=8, layers=2, heads=2)
  levels = (config.LevelConfig(16, chunk=4), config.LevelConfig(16))
  return plan.choose(
    lambda: build.model_config(
      json.loads(backbones.get_config('clinc-smollm2').to_json()), absent=True
    ),
    lambda: config.ModelConfig(**tiny, levels=levels),
  )()


def _life(cfg: config.ModelConfig) -> life_lib.Life:
  """A new life with random numbers in place of all zeros."""
  key = jax.random.PRNGKey(0)
  life = life_lib.init_life(model_lib.init(cfg, key), key)
  leaves, structure = jax.tree.flatten(life)
  filled = [
    jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating)
    else x
    for i, x in enumerate(leaves)
  ]
  return jax.tree.unflatten(structure, filled)
