"""Mathematics with a pretrained model: SFT, GRPO, OPSD and SDFT on GSM8K.

`gsm8k` (default) is SmolLM2-135M-Instruct on what two cores allow: 32 problems
of GSM8K, one step of 16 solutions at a time, LoRA 64/128; it shows that the
stack runs on a real model and a real tokenizer, and no more. Weights come by
`sleep-jax fetch smollm2` (93 MB). `:short` is one step of every arm.

`:paper` has the settings of Sleep's Table 5 for Qwen3-1.7B: LoRA 64/128, rate
5e-6, batches of 32, 100 steps, and OPSD's clip (arXiv 2601.18734); avg@16 on
the 30 problems of AIME 2024. GRPO makes 800 steps of 32 completions, where the
paper made 500. Solutions have 1,024 tokens, in training as in OPSD, and in the
evaluation too, where the paper has 16,384 and more: it was not run. What to
train on (OpenThoughts' columns) and AIME are JSON lines that you bring,
`openthoughts.jsonl` and `aime2024.jsonl`. The paper prints (Table 2, avg@16 of
AIME 2024): base 49.8, SFT 47.3, GRPO 51.0, OPSD 51.6, Sleep 53.2.

  python -m experiments.run --config=experiments/configs/mathematics.py \
      --workdir=runs/mathematics
"""

from typing import Any

import ml_collections

from experiments.configs import backbones
from experiments.configs import common
from sleep_jax.learners import finetune
from sleep_jax.models import lora
from sleep_jax.tasks import mathematics

_BATCH = 16
_OPSD = dict(divergence='forward_kl', clip=0.05)


def get_config(variant: str = 'gsm8k') -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  c = common.experiment('mathematics')
  c.seeds = (1,)
  c.workers = 1
  c.reference = 'opsd'
  c.base = 'smollm2'
  c.base_model = backbones.base_model(c.base)
  c.model = ml_collections.ConfigDict(dict(max_len=1024))
  c.task = common.settings(mathematics.MathematicsConfig, episodes=1)
  c.task.update(problems=32, eval_problems=16, samples=2, length=384)
  c.task.update(max_new=192, name='mathematics')
  c.lora = common.settings(
    lora.LoraConfig,
    rank=64,
    alpha=128.0,
    targets=('q', 'k', 'v', 'o', 'gate', 'up', 'down'),
  )
  c.finetune = common.settings(
    finetune.FinetuneConfig, target='lora', batch=_BATCH, learning_rate=1e-4
  )
  c.learner_config = ml_collections.ConfigDict()
  c.arms = _arms(group=8)
  common.vary(c, '' if variant == 'gsm8k' else variant, short=_short,
              paper=_paper)  # fmt: skip
  return c


def _arms(group: int) -> dict[str, dict[str, Any]]:
  return {
    'frozen': {},
    'sft': {},
    'grpo': dict(learner_config=dict(group=group)),
    'opsd': dict(learner_config=dict(_OPSD)),
    'sdft': dict(
      learner='opsd',
      learner_config=dict(teacher='average', divergence='reverse_kl'),
    ),
  }


def _short(c: common.Config) -> None:
  """One step of every arm."""
  c.task.update(problems=2, eval_problems=2, samples=1, max_new=96)
  c.finetune.batch = 2
  c.arms = _arms(group=2)


def _paper(c: common.Config) -> None:
  """Qwen3-1.7B on AIME 2024."""
  c.base = 'bases/qwen3_1_7b'
  c.base_model = backbones.base_model('qwen3_1_7b')
  c.model.update(max_len=4096, dtype='bfloat16', remat=True)
  batch, steps = 32, 100
  c.task.update(
    train='openthoughts.jsonl',
    test='aime2024.jsonl',
    problems=batch * steps,
    eval_problems=30,
    samples=16,
    length=2048,
    max_new=1024,
  )
  c.finetune.update(batch=batch, learning_rate=5e-6)
  for arm in ('sft', 'grpo'):
    c.arms[arm]['finetune'] = dict(learning_rate=2e-5)
