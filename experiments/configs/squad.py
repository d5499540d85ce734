"""`squad`: SEAL's knowledge incorporation on SQuAD, two rounds.

Variants: `:small` (default), a handful of passages and the base of
`base_text.py`, to see it run end to end (a model of this size knows and learns
next to nothing of them); `:paper`, Qwen2.5-7B with SEAL's settings (v1): LoRA
of rank 32 and alpha 64 on q and v, 10 epochs of single rows at 1e-3, five
dreams of a passage, the best of them learnt for two epochs at 3e-4 by a
separate LoRA, 200 test passages with 974 questions. For that, convert the
checkpoint first (see `backbones.py`), and bring an accelerator that holds it.

SEAL learns its dreams by LoRA 64/128 on all linear layers, 10 rows a step, and
its 200 passages together by five dreams each in 3 epochs of 8 rows, each dream
in one piece; what `:paper` does not set apart from the above is ours.

  python -m experiments.run --config=experiments/configs/squad.py \
      --workdir=runs/squad
"""

from typing import Any

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


def _arms() -> dict[str, dict[str, Any]]:
  """Table 3 of the Sleep paper, but for four levels."""
  return {
    'frozen': {},
    'icl': {},
    'finetune_passage': {},
    'ttt': {},
    'seal': {},
    'sleep': {},
    'no_selection': dict(learner='sleep', dreaming=dict(importance='random')),
    'no_random_expert': dict(learner='sleep', dreaming=dict(random_expert=0.0)),
    'no_dreaming': dict(
      learner='sleep', dreaming=dict(enabled=False, study_night=True)
    ),
  }


def get_config(variant: str = 'small') -> common.Config:
  """Settings; `variant` is small or paper."""
  c = common.experiment(f'squad_{variant}')
  c.seeds = (1,)
  c.workers = 1
  c.reference = 'sleep'
  config.lookup(variant, {'small': _small, 'paper': _paper}, 'variant')(c)
  c.task.name = 'knowledge_incorporation'
  c.arms = _arms()
  return c


def _small(c: common.Config) -> None:
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


def _paper(c: common.Config) -> None:
  c.base = 'bases/qwen2_5_7b'
  c.model = backbones.model('qwen2_5_7b')
  c.task = common.settings(squad.SquadConfig)
  c.wake = common.settings(wake_lib.WakeConfig, batch=1)
  # 100 steps and an effective batch of 32 (Sleep section 7).
  c.sleep = common.settings(
    consolidation_config.SeedingConfig,
    steps=100,
    batch=32,
    dream_length=1024,
    teacher_top_k=128,
  )
  c.finetune = common.settings(finetune.FinetuneConfig, batch=1)
  c.lora = common.settings(lora.LoraConfig)  # The defaults are SEAL's.
  c.trial = common.settings(
    dreaming_config.TrialConfig, repeats=3, max_parallel=1, joint_epochs=3
  )
  c.dreaming = common.settings(
    dreaming_config.DreamingConfig,
    dreams=5,
    top_p=0.95,
    epochs=2,
    batch=10,
    learning_rate=3e-4,
  )
