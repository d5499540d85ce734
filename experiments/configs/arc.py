"""`arc_few_shot`: learning to write the self-edit that solves a puzzle.

Variants: none, generated puzzles and a small base (`base_arc.py`), 3 nights, 5
seeds; `:real`, the whole path on three small ARC puzzles with the base of
`base_text.py`, which solves none and writes no JSON; `:paper`, the paper's
setting on Llama-3.2-1B, which is `arc-llama3_2_1b` of `backbones.py`.

`success` is the share of right answers after self-edits of 5 dreams, applied
one by one. The paper's: icl 0, ttt 10, seal 72.5, sleep 80 %. Expect few of the
base's dreams, whose values are random, to succeed (`ttt`), and `seal` and
`sleep` to learn to write the few settings that do, and to keep what the base
knew: `sleep.previous_fraction` and `dreaming.rehearsed` (of both) were chosen
on seed 100, in four lives of three nights, three of them without dreaming, and
parts of two.

  python -m experiments.run --config=experiments/configs/arc.py \
      --workdir=runs/arc
"""

import dataclasses
from typing import Any

import ml_collections

from experiments.configs import backbones
from experiments.configs import base_arc
from experiments.configs import base_text
from experiments.configs import common
from sleep_jax import config
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.models import lora
from sleep_jax.tasks.arc import task as arc

BATCH = 8
# Fine-tuning of one instance, as SEAL does it.
_TARGETS = ('q', 'v', 'gate', 'up', 'down')
_ARMS: dict[str, dict[str, Any]] = {
  'icl': {},
  'ttt': {},
  'seal': {},
  # At a rate that was not chosen: none was tried.
  'seal_reads_day': common.seal_reads_day(1e-3),
  'sleep': {},
}


def _clocked(model: common.Config, task: arc.ArcConfig) -> common.Config:
  """A base whose level 1 is fast, and whose level 2 grows an expert a night."""
  fast, slow = model.levels
  fast.update(
    chunk=task.length,
    sleep_every=task.rows // BATCH,
    optimizer='adam',
    learning_rate=1e-3,
  )
  slow.update(slots=task.episodes, rank=32, top_k=task.episodes)
  return model


def _generated() -> common.Config:
  c = common.experiment('arc')
  c.seeds = (1, 2, 3, 4, 5)
  c.base = 'sleep_jax/assets/base_arc.npz'
  # At most 63 steps a trial: 6 epochs of leave-one-out and its turns.
  task = arc.ArcConfig(episodes=3, train=8, test_pairs=2, max_row_passes=126)
  c.model = _clocked(base_arc.model(), task)
  c.model.max_len = 256
  c.task = ml_collections.ConfigDict(dataclasses.asdict(task))
  c.lora = common.settings(
    lora.LoraConfig, rank=16, alpha=16.0, targets=_TARGETS
  )
  c.trial = common.settings(
    dreaming_config.TrialConfig,
    epochs=4,
    batch=2,
    learning_rate=1e-3,
    max_steps=375,
  )
  c.dreaming = common.settings(
    dreaming_config.DreamingConfig,
    **common.ARC_DREAMING,
    learning_rate=4e-3,
    rehearsed=8,
    # A document is a puzzle; a shorter row would not see that it was lost.
    retention_length=task.length,
  )
  return c


def _real(c: common.Config) -> None:
  """Real puzzles that fit a small model, and no hope to solve them."""
  small: dict[str, Any] = dict(episodes=2, length=256, rows=16)
  c.base = 'sleep_jax/assets/base_text.npz'
  c.task = common.settings(
    arc.ArcConfig,
    source='real',
    tokenizer='sleep_jax/assets/text.model',
    train_ids=('44f52bb0', '6150a2bd'),
    test_ids=('66e6c45b',),
    attempts=2,
    leave_out=(1, 2),
    permutations=1,
    max_dream=128,
    **small,
  )
  c.model = _clocked(base_text.model(), arc.ArcConfig(**small))
  c.model.max_len = 1024
  c.seeds = (1,)
  c.dreaming.update(dreams=8, keep=3, keep_random=1)
  c.arms = {name: _ARMS[name] for name in ('icl', 'ttt', 'seal', 'sleep')}


def get_config(variant: str = '') -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  if variant == 'paper':
    return backbones.get_config('arc-llama3_2_1b')
  c = _generated()
  c.reference = 'sleep'
  c.wake = common.settings(wake_lib.WakeConfig, batch=BATCH)
  c.sleep = common.settings(
    consolidation_config.SeedingConfig,
    dreams=512,
    dream_length=c.task.length,
    # Puzzles that a model dreams after the day obey no rule; the base's do.
    previous_fraction=(0.8, 1.0),
    splice=False,  # A document is one puzzle.
    steps=200,
    batch=16,
    learning_rate=0.01,
    alpha=1.0,
    lam=0.0,
  )
  c.finetune = common.settings(finetune.FinetuneConfig, batch=BATCH)
  c.arms = _ARMS
  if variant:
    c.name = f'arc_{variant}'
    config.lookup(variant, {'real': _real}, 'variant')(c)
  c.task.name = 'arc_few_shot'
  return c
