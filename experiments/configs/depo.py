"""Depo: walk k edges of a cycle, given its edges in random order.

A question may begin at any node and ask for any k, so the passes cannot prepare
a single answer: they must put the whole cycle in order. Variants: none, eight
seeds at a size for two cores; `:paper`, the sizes of arXiv 2605.26099 (cycles
of up to 75 nodes, ten Jet layers, 100,000 steps), checked by shape alone.

`long` has the FLOPs of `passes_4` with one pass, in more steps. `exact_k4`,
say, is the share of answers right among questions of four edges. The paper
finds that one pass does not learn k = 4, two do not learn 8, and that four
begin to learn 16.

  python -m experiments.run --config=experiments/configs/depo.py \
      --workdir=runs/depo
"""

import ml_collections

from experiments.configs import common

_STEPS = 1200


def _paper(c: common.Config) -> None:
  """The paper's own cycles; its d = 512, and Jet layers in turn."""
  c.task = ml_collections.ConfigDict(dict(name='depo', episodes=10))
  c.model = common.hybrid(512, 10, 1365, vocab=119, mixers=('attention', 'jet'))
  c.model.recurrent.update(key=96, value=256)
  c.model.heads = 8
  c.model.dtype = 'bfloat16'
  c.recurrence.remat = True
  c.training.update(
    steps=100_000, batch=128, muon_learning_rate=2e-3, adam_learning_rate=5e-5
  )
  c.seeds = (1, 2, 3)
  del c.arms['long']  # Its steps are those of the small size.


def get_config(variant: str = '') -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  # One-token names: every edge is two tokens. On a ring of five, two steps are
  # no shorter the other way round.
  c = common.window_task(
    'depo',
    episodes=10,
    nodes=5,
    smallest=3,
    vocab=12,
    word_min=1,
    word_max=1,
    hops=2,
    queries=4,
    window=11,
    windows=1,
  )
  c.model = common.hybrid(32, 2, 64, vocab=31)
  c.model.recurrent.update(heads=2, key=16, value=16)
  c.training.update(
    steps=_STEPS, batch=128, muon_learning_rate=2e-2, adam_learning_rate=2e-3
  )
  c.reference = 'passes_4'
  c.seeds = tuple(range(1, 9))
  c.arms = {
    f'passes_{n}': dict(recurrence=dict(passes=n)) for n in (1, 2, 4)
  } | {'long': dict(training=dict(steps=11 * _STEPS // 5))}
  common.vary(c, variant, paper=_paper)
  return c
