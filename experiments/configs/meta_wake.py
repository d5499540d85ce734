"""Pretraining for reading: the weights from which updates predict best.

A small model of old novels, of which the upper layer's MLP is updated by plain
gradient descent every 32 tokens of a row (TTT-E2E, arXiv 2512.23675: clip 1,
rate 1). Arms: `sft` predicts without updates; `first_order` and `second_order`
train and are evaluated with them. Equal tokens, not equal FLOPs.
`held_out_loss` is that of a book that none has read, in nats per token.

  python -m experiments.run --config=experiments/configs/meta_wake.py \
      --workdir=runs/meta_wake
"""

from experiments.configs import base_text
from experiments.configs import common
from sleep_jax import config

STEPS, LENGTH = 1000, 256


def get_config() -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  c = common.corpus(
    'meta_wake',
    base_text.model(),
    corpus='text',
    length=LENGTH,
    steps=STEPS,
    batch=16,
    learning_rate=3e-3,
    eval_rows=256,
  )
  del c.learner
  c.export, c.seeds = '', (1, 2, 3)
  fast = common.settings(
    config.LevelConfig,
    hidden=192,
    chunk=32,
    optimizer='sgd',
    learning_rate=1.0,
  )
  c.model.update(
    max_len=LENGTH,
    layers=4,
    levels=(fast, common.settings(config.LevelConfig, hidden=192)),
    partition=(1, 3),
    partition_from='output',
  )
  c.reference = 'second_order'
  c.arms = {
    'sft': {},
    'first_order': dict(
      learner='meta_wake', learner_config=dict(second_order=False)
    ),
    'second_order': dict(learner='meta_wake'),
  }
  return c
