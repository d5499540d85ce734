"""Public backbones with the paper's sleep settings, for whoever has them.

Variants: `:llama3_2_1b` (default), `:llama3_2_3b`, `:llama3_8b`, `:qwen2_5_7b`,
`:qwen3_1_7b`, `:qwen3_8b`; their published dimensions. Convert the checkpoint
first; `base` is where that puts it:

  python -m sleep_jax.weights.convert Llama-3.2-1B bases/llama3_2_1b

The task is SEAL's knowledge incorporation, one night of it. The run needs the
converted checkpoint, SQuAD, and an accelerator that holds the model; without
them it ends in one line that names what is missing. Every variant is checked by
shape alone (tests).

The layers are split over three levels (the reading `partition`) with Sleep
Figure 7's clocks of about 1k, 5k and 10k tokens. Each receiver has 5 experts of
width 64 (Sleep appendix B). Where the levels' borders lie, and how often each
one sleeps, is ours: the paper does not tell.
"""

import ml_collections

from experiments.configs import common
from sleep_jax import config
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.models import lora
from sleep_jax.tasks import squad

_CLOCK = 1024  # Tokens between two updates of the fastest level.
_EXPERTS = dict(slots=5, rank=64, top_k=5)
_LLAMA_3 = dict(vocab=128_256, rope_theta=500_000.0, norm_eps=1e-5)
_LLAMA_3_2 = _LLAMA_3 | dict(
  tie_embeddings=True,
  max_len=131_072,
  rope_scaling=dict(
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_len=8192,
  ),
)
_QWEN3 = dict(
  vocab=151_936,
  head_dim=128,
  qk_norm=True,
  max_len=40_960,
  rope_theta=1e6,
  norm_eps=1e-6,
)
# Dimensions, the MLP's hidden width, and how the layers are split.
_VARIANTS = {
  'llama3_2_1b': (
    _LLAMA_3_2 | dict(dim=2048, layers=16, heads=32, kv_heads=8, head_dim=64),
    8192,
    (4, 4, 8),
  ),
  'llama3_2_3b': (
    _LLAMA_3_2 | dict(dim=3072, layers=28, heads=24, kv_heads=8, head_dim=128),
    8192,
    (7, 7, 14),
  ),
  'llama3_8b': (
    _LLAMA_3
    | dict(
      dim=4096,
      layers=32,
      heads=32,
      kv_heads=8,
      max_len=8192,
      tie_embeddings=False,
    ),
    14_336,
    (8, 8, 16),
  ),
  'qwen2_5_7b': (
    dict(
      vocab=152_064,
      dim=3584,
      layers=28,
      heads=28,
      kv_heads=4,
      qkv_bias=True,
      max_len=131_072,
      rope_theta=1e6,
      norm_eps=1e-6,
      tie_embeddings=False,
    ),
    18_944,
    (7, 7, 14),
  ),
  'qwen3_1_7b': (
    _QWEN3
    | dict(dim=2048, layers=28, heads=16, kv_heads=8, tie_embeddings=True),
    6144,
    (7, 7, 14),
  ),
  'qwen3_8b': (
    _QWEN3
    | dict(dim=4096, layers=36, heads=32, kv_heads=8, tie_embeddings=False),
    12_288,
    (9, 9, 18),
  ),
}


def model(variant: str) -> common.Config:
  """A backbone with clocks and banks."""
  dimensions, hidden, split = config.lookup(variant, _VARIANTS, 'backbone')
  levels = (
    dict(chunk=_CLOCK, sleep_every=5),
    dict(chunk=5 * _CLOCK, sleep_every=2, **_EXPERTS),
    dict(chunk=10 * _CLOCK, **_EXPERTS),
  )
  return ml_collections.ConfigDict(
    dimensions
    | dict(
      levels=tuple(
        common.settings(config.LevelConfig, hidden=hidden, **level)
        for level in levels
      ),
      partition=split,
      dtype='bfloat16',
      remat=True,
    )
  )


def get_config(variant: str = 'llama3_2_1b') -> common.Config:
  """Settings; `variant` names the backbone."""
  c = common.experiment(variant)
  c.seeds = (1,)
  c.workers = 1
  c.reference = 'sleep'
  c.arms = {'frozen': {}, 'sleep': {}}
  c.base = f'bases/{variant}'
  c.task = common.settings(squad.SquadConfig, episodes=1, tokenizer=c.base)
  c.task.name = 'knowledge_incorporation'
  c.model = model(variant)
  c.wake = common.settings(wake_lib.WakeConfig, batch=1)
  # 100 steps and an effective batch of 32 (Sleep section 7).
  c.sleep = common.settings(
    consolidation_config.SeedingConfig,
    steps=100,
    batch=32,
    dream_length=1024,
    teacher_top_k=128,
  )
  # Of the paper's runs that adapt the backbone itself.
  c.lora = common.settings(lora.LoraConfig, rank=64, alpha=128.0)
  c.trial = common.settings(dreaming_config.TrialConfig, max_parallel=1)
  c.dreaming = common.settings(
    dreaming_config.DreamingConfig, learning_rate=5e-6
  )
  return c
