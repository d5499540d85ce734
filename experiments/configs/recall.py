"""Associative recall from evicted windows, by what carries them.

A hybrid of two layers reads pairs of a key and a value in windows that are
evicted; what its second layer carries must answer (MQAR, arXiv 2312.04927).
Arms: `gdn`, `jet`, and Titans' neural memory with two layers (`titans`), one
(`titans_linear`), and without momentum (`titans_plain`). In the variant
`:rewritten` six keys are told again with another value.

States are 2 heads of 16 x 16 numbers for `gdn` and `jet`; Titans carries as
many again for momentum, and `titans` four times these for its two layers.

  python -m experiments.run --config=experiments/configs/recall.py \
      --workdir=runs/recall
"""

from typing import Any

from experiments.configs import common
from sleep_jax.models.mixers import titans


def _titans(**changes: Any) -> dict[str, Any]:
  """What an arm with Titans' memory changes."""
  recurrent = common.settings(
    titans.TitansConfig, heads=2, width=16, chunk=8, **changes
  )
  return dict(
    model=dict(mixers=('attention', 'titans'), recurrent=recurrent.to_dict())
  )


def _rewritten(c: common.Config) -> None:
  """Some keys get another value in the last window."""
  c.task.rewritten = 6


def get_config(variant: str = '') -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  c = common.window_task(
    'recall',
    windows=4,
    pairs=24,
    rewritten=0,
    keys=32,
    values=32,
    queries=8,
    episodes=10,
    eval_rows=512,
  )
  c.model = common.hybrid(64, 2, 128, vocab=65)
  c.model.recurrent.update(heads=2, key=16, value=16)
  c.training.update(
    steps=1500, batch=64, muon_learning_rate=1e-2, adam_learning_rate=2e-3
  )
  c.reference = 'titans'
  c.arms = {
    'gdn': {},
    'jet': dict(model=dict(mixers=('attention', 'jet'))),
    'titans': _titans(),
    'titans_linear': _titans(depth=1),
    'titans_plain': _titans(momentum=False),
  }
  common.vary(c, variant, rewritten=_rewritten)
  return c
