"""Public backbones on the paper's tasks, for whoever has the weights.

Variants: `:TASK-MODEL`, either of which may be left out. TASK is `clinc`,
`banking` (class-incremental), `squad` (knowledge incorporation; the default) or
`arc` (few shot); alone it has the model that the paper has it with. MODEL is
`llama3_2_1b`, `llama3_2_3b`, `llama3_8b`, `qwen2_5_7b`, `qwen3_1_7b`,
`qwen3_8b`, each also as `MODEL_instruct`, whose tasks are asked by its chat
template, or `smollm2`, which is one. Convert the checkpoint first; `base` is
where that puts it:

  python -m sleep_jax.weights.convert Llama-3.2-3B bases/llama3_2_3b
  python -m experiments.run \
      --config=experiments/configs/backbones.py:clinc-llama3_2_3b

Dimensions come from the checkpoint, so `--config.base` may be any Llama or
Qwen. The published ones stand here for `launch.aot` and the tests, which
compile a variant without its weights (section `base_model`). Hardware, memory
and minutes of a night: `docs/backbones.md`.

The layers are split over three levels (the reading `partition`) with Sleep
Figure 7's clocks of about 1k, 5k and 10k tokens; short documents are packed
into rows of 1,024 (`wake.window`). Each receiver has 5 experts of width 64
(Sleep appendix B). Where the levels' borders lie, how often each one sleeps,
and the levels' learning rates are ours: the paper does not tell.
"""

from collections.abc import Callable

import ml_collections

from experiments.configs import common
from sleep_jax import config
from sleep_jax.learners import finetune
from sleep_jax.learners import in_context
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.models import lora
from sleep_jax.tasks import class_incremental
from sleep_jax.tasks import squad
from sleep_jax.tasks.arc import task as arc

_CLOCK = 1024  # Tokens between two updates of the fastest level.
_EXPERTS = dict(slots=5, rank=64, top_k=5)
_SPLIT = (0.25, 0.25, 0.5)  # Of the layers, from the embedding on.
# Adam's rate for the fastest level, whose MLPs are pretrained: that of Llama
# 2's supervised fine-tuning of all weights (arXiv 2307.09288, section 3.1).
# Each slower level has half of the one before: ours.
_RATE = 2e-5
# SmolLM2's fewer weights need more: ours.
_SMALL_RATE = 1e-4
_CONTEXT = 4096  # Tokens that icl keeps.

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
# Dimensions as published, and the MLP's hidden width.
_MODELS = {
  'llama3_2_1b': (
    _LLAMA_3_2 | dict(dim=2048, layers=16, heads=32, kv_heads=8, head_dim=64),
    8192,
  ),
  'llama3_2_3b': (
    _LLAMA_3_2 | dict(dim=3072, layers=28, heads=24, kv_heads=8, head_dim=128),
    8192,
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
  ),
  'qwen3_1_7b': (
    _QWEN3
    | dict(dim=2048, layers=28, heads=16, kv_heads=8, tie_embeddings=True),
    6144,
  ),
  'qwen3_8b': (
    _QWEN3
    | dict(dim=4096, layers=36, heads=32, kv_heads=8, tie_embeddings=False),
    12_288,
  ),
  'smollm2': (
    dict(
      vocab=49_152,
      dim=576,
      layers=30,
      heads=9,
      kv_heads=3,
      max_len=8192,
      rope_theta=1e5,
      norm_eps=1e-5,
      tie_embeddings=True,
    ),
    1536,
  ),
}
_INSTRUCT = '_instruct'
# The model that the paper has a task with.
_DEFAULT = {
  'clinc': 'llama3_2_3b',
  'banking': 'llama3_8b',
  'squad': 'qwen2_5_7b',
  'arc': 'llama3_2_1b',
}


def base_model(model: str) -> common.Config:
  """A backbone as published: one level, and nothing that learns."""
  dimensions, hidden = config.lookup(
    model.removesuffix(_INSTRUCT), _MODELS, 'backbone'
  )
  levels = (common.settings(config.LevelConfig, hidden=hidden),)
  return ml_collections.ConfigDict(
    dimensions | dict(levels=levels, dtype='bfloat16')
  )


def _levels(rate: float) -> common.Config:
  """Levels with clocks and banks, on any base."""
  levels = (
    dict(chunk=_CLOCK, sleep_every=5, learning_rate=rate),
    dict(chunk=5 * _CLOCK, sleep_every=2, learning_rate=rate / 2, **_EXPERTS),
    dict(chunk=10 * _CLOCK, learning_rate=rate / 4, **_EXPERTS),
  )
  return ml_collections.ConfigDict(
    dict(
      levels=tuple(
        common.settings(config.LevelConfig, hidden=0, **level)
        for level in levels
      ),
      partition=_SPLIT,
      partition_from='input',  # From the output a backward pass is shorter.
      dtype='bfloat16',
      remat=True,
      remat_saves='nothing',
    )
  )


def get_config(variant: str = 'squad-llama3_2_1b') -> common.Config:
  """Settings; `variant` names task and backbone."""
  task, _, model = variant.rpartition('-')
  if not task:
    task = variant if variant in _TASKS else 'squad'
    model = _DEFAULT[task] if variant in _TASKS else variant
  set_up = config.lookup(task, _TASKS, 'task')
  c = common.experiment(f'{task}_{model}')
  c.seeds = (1,)
  c.workers = 1
  c.reference = 'sleep'
  c.base_model = base_model(model)
  small = model == 'smollm2'
  c.base = model if small else f'bases/{model}'
  c.model = _levels(_SMALL_RATE if small else _RATE)
  c.wake = common.settings(wake_lib.WakeConfig, batch=1, window=_CLOCK)
  c.learner_config = ml_collections.ConfigDict()
  # Sleep section 7: LoRA, its rate, an effective batch of 32, 100 steps.
  c.lora = common.settings(
    lora.LoraConfig,
    rank=64,
    alpha=128.0,
    targets=('q', 'k', 'v', 'o', 'gate', 'up', 'down'),
  )
  c.finetune = common.settings(
    finetune.FinetuneConfig, target='lora', batch=32, learning_rate=5e-6
  )
  c.sleep = common.settings(
    consolidation_config.SeedingConfig,
    steps=100,
    batch=32,
    dreams=256,
    dream_length=1024,
    slot_policy='merge',  # A life may have more nights than the paper's slots.
    teacher_top_k=128,
    tokens_in_flight=2048,
  )
  c.trial = common.settings(dreaming_config.TrialConfig, max_parallel=1)
  c.dreaming = common.settings(
    dreaming_config.DreamingConfig, learning_rate=5e-6
  )
  set_up(c, task, small or model.endswith(_INSTRUCT))
  for name in c.arms:
    if c.arms[name].get('learner', name) == 'icl':
      c.arms[name].learner_config = common.settings(
        in_context.InContextConfig, context=_CONTEXT
      )
  return c


def _class_incremental(c: common.Config, task: str, chat: bool) -> None:
  """New intents every night (Sleep Figure 3)."""
  length = 128 if chat else 64
  c.task = common.settings(
    class_incremental.ClassIncrementalConfig,
    dataset=task,
    tokenizer='',
    chat=chat,
    length=length,
    passes=2,
  )
  c.task.name = 'class_incremental'
  # A document is one example.
  c.sleep.update(
    dreams=2048,
    dream_length=length,
    splice=False,
    min_p=0.1,
    day_dreams=float(chat),  # A text and a label, made up in the day's form.
  )
  c.arms = {
    'icl': {},
    'sft': {},
    'replay': {},
    'ewc': {},
    'wake_only': common.WAKE_ONLY,
    'sleep': {},
    'joint': {},
  }


def _squad(c: common.Config, task: str, chat: bool) -> None:
  """SEAL's two rounds and 200 test passages (Sleep Table 3).

  SEAL (v1): LoRA of rank 32 and alpha 64 on q and v, 10 epochs of single rows
  at 1e-3, five dreams of a passage, the best of them learnt for two epochs at
  3e-4 by a separate LoRA. It learns its dreams by LoRA 64/128 on all linear
  layers, 10 rows a step, and its 200 passages together by five dreams each in 3
  epochs of 8 rows, each dream in one piece; what is not set apart from that
  here is ours.
  """
  del task
  c.task = common.settings(squad.SquadConfig, tokenizer='', chat=chat)
  c.task.name = 'knowledge_incorporation'
  c.lora = common.settings(lora.LoraConfig)  # The defaults are SEAL's.
  c.finetune.batch = 1
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
  c.arms = common.KNOWLEDGE_ARMS


def _arc(c: common.Config, task: str, chat: bool) -> None:
  """SEAL's few-shot puzzles (Sleep Table 4); prompts are grids, chat or not.

  SEAL's and the paper's numbers; what they leave open stays ours.
  """
  del task, chat
  c.task = common.settings(
    arc.ArcConfig,
    source='real',
    rows=88,
    length=8192,
    leave_out=(1, 2),
    permutations=1,
    max_dream=128,
  )
  c.task.name = 'arc_few_shot'
  c.lora = common.settings(
    lora.LoraConfig,
    rank=128,
    alpha=16.0,
    targets=('q', 'v', 'gate', 'up', 'down'),
  )
  c.finetune.batch = 1
  c.wake.window = 8192
  c.trial = common.settings(
    dreaming_config.TrialConfig,
    epochs=2,
    batch=2,
    learning_rate=1e-4,
    max_steps=375,
    max_parallel=1,
  )
  c.dreaming = common.settings(
    dreaming_config.DreamingConfig,
    **common.ARC_DREAMING,
    learning_rate=5e-5,
    retention_length=1024,
  )
  c.arms = {'icl': {}, 'ttt': {}, 'seal': {}, 'sleep': {}}


_TASKS: dict[str, Callable[[common.Config, str, bool], None]] = {
  'clinc': _class_incremental,
  'banking': _class_incremental,
  'squad': _squad,
  'arc': _arc,
}
