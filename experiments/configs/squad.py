"""`squad`: SEAL's knowledge incorporation on SQuAD, two rounds.

Variants: `:small` (default), a handful of passages and the base of
`base_text.py`, to see it run end to end (a model of this size knows and learns
next to nothing of them); `:paper`, Qwen2.5-7B with SEAL's settings, which is
`squad-qwen2_5_7b` of `backbones.py`.

  python -m experiments.run --config=experiments/configs/squad.py \
      --workdir=runs/squad
"""

from experiments.configs import backbones
from experiments.configs import base_text
from experiments.configs import common
from sleep_jax import config
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.models import lora
from sleep_jax.tasks import squad


def get_config(variant: str = 'small') -> common.Config:
  """Settings; `variant` is small or paper."""
  return config.lookup(variant, {'small': _small, 'paper': _paper}, 'variant')()


def _paper() -> common.Config:
  return backbones.get_config('squad-qwen2_5_7b')


def _small() -> common.Config:
  c = common.experiment('squad_small')
  c.seeds = (1,)
  c.workers = 1
  c.reference = 'sleep'
  c.arms = common.KNOWLEDGE_ARMS
  length, batch = 192, 8
  c.base = 'sleep_jax/assets/base_text.npz'
  c.model = base_text.model()
  c.model.max_len = 1024
  fast, slow = c.model.levels
  fast.update(chunk=length, sleep_every=2, optimizer='adam', learning_rate=1e-3)
  slow.update(slots=3, rank=32, top_k=3)  # Two nights, and a study's.
  c.task = common.settings(
    squad.SquadConfig,
    tokenizer='sleep_jax/assets/text.model',
    train=2,
    reads=8,
    test=2,
    joint=3,
    length=length,
    max_dream=64,
    max_answer=16,
  )
  c.task.name = 'knowledge_incorporation'
  c.wake = common.settings(wake_lib.WakeConfig, batch=batch)
  c.sleep = common.settings(
    consolidation_config.SeedingConfig,
    dreams=32,
    dream_length=64,
    splice=False,
    steps=10,
    batch=4,
    alpha=1.0,
    lam=0.0,
  )
  c.finetune = common.settings(finetune.FinetuneConfig, batch=batch)
  c.lora = common.settings(lora.LoraConfig)
  c.trial = common.settings(
    dreaming_config.TrialConfig, epochs=2, max_parallel=8
  )
  c.dreaming = common.settings(
    dreaming_config.DreamingConfig,
    dreams=4,
    keep=2,
    keep_random=1,
    retention_rows=8,
    study_rows=2 * batch,
  )
  return c
