"""`class_incremental` on real text, all learners, by data set.

Variants: `:clinc` (default; 10 x 15 classes), `:banking` (7 x 11), `:dbpedia`
(7 x 10). A 0.4M-parameter base pretrained on old novels (`base_text.py`).

  python -m experiments.run --config=experiments/configs/class_incremental.py \
      --workdir=runs/clinc
"""

import ml_collections

from experiments.configs import base_text

LANES = 8
# Tokens of a row, seeds, and tokens per lane between two sleeps: a little less
# than an episode has.
_VARIANTS = {
  'clinc': dict(length=32, seeds=(1, 2, 3, 4, 5), passes=4, period=500),
  'banking': dict(length=32, seeds=(1, 2, 3), passes=4, period=500),
  'dbpedia': dict(length=48, seeds=(1, 2, 3), passes=2, period=200),
}


def get_config(variant: str = 'clinc') -> ml_collections.ConfigDict:
  """Settings; `variant` names the data set."""
  v = _VARIANTS[variant]
  c = ml_collections.ConfigDict()
  c.name = f'class_incremental_{variant}'
  c.seeds = v['seeds']
  c.workers = 2
  c.reference = 'sleep'
  c.base = 'sleep_jax/assets/base_text.npz'
  c.model = base_text.model()
  fast, slow = (dict(level) for level in c.model.levels)
  fast.update(
    chunk=v['length'],
    sleep_every=v['period'],
    optimizer='adam',
    learning_rate=3e-3,
  )
  slow.update(slots=10, rank=32, top_k=10)
  c.model.levels = (fast, slow)
  c.model.max_len = 256
  c.task = dict(
    name='class_incremental',
    dataset=variant,
    length=v['length'],
    passes=v['passes'],
  )
  c.wake = dict(lanes=LANES)
  c.sleep = dict(
    dreams=2048,
    dream_length=v['length'],
    steps=400,
    batch=32,
    learning_rate=0.01,
    continuation=12,
    splice=False,
  )
  c.finetune = dict(batch=LANES, learning_rate=2e-3)
  c.arms = {
    name: {} for name in ('icl', 'sft', 'ewc', 'wake_only', 'sleep', 'joint')
  }
  return c
