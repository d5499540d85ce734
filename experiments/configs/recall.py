"""Associative recall from evicted windows, by what carries them.

A hybrid of two layers reads pairs of a key and a value in windows that are
evicted; what its second layer carries must answer (MQAR, arXiv 2312.04927).
Arms: `gdn`, `jet`, self-modifying Titans (`hope`), and Titans' neural memory
with two layers (`titans`), one (`titans_linear`), without momentum
(`titans_plain`), and with attention (`titans_mac`, `titans_mag`, `titans_mal`).
`sliding_window` has no memory, the control. In the variant `:rewritten` two
keys are told again with another value.

States are 2 heads of 16 x 16 numbers for `gdn` and `jet`; Titans carries as
many again for momentum, and `titans` four times these for its two layers;
`hope` carries 2 x 16 x 50.

  python -m experiments.run --config=experiments/configs/recall.py \
      --workdir=runs/recall
"""

import dataclasses
from typing import Any

from experiments.configs import common
from sleep_jax.models.mixers import hope
from sleep_jax.models.mixers import sliding_window
from sleep_jax.models.mixers import titans
from sleep_jax.models.mixers import titans_attention
from sleep_jax.models.mixers import titans_mac


def _mixer(mixer: Any, **changes: Any) -> dict[str, Any]:
  """What an arm with another mixer changes, at the same width."""
  if mixer is not sliding_window.SlidingWindow:
    changes = dict(heads=2, width=16, chunk=8) | changes
  settings = mixer.Config(**changes)
  return dict(
    model=dict(
      mixers=('attention', mixer.name),
      recurrent=dataclasses.asdict(settings),
    )
  )


def _rewritten(c: common.Config) -> None:
  """Some keys get another value in the last window."""
  c.task.rewritten = 2


def get_config(variant: str = '') -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  c = common.window_task(
    'recall',
    windows=2,
    pairs=8,
    rewritten=0,
    keys=16,
    values=16,
    queries=4,
    episodes=10,
    eval_rows=512,
  )
  c.model = common.hybrid(64, 2, 128, vocab=33)
  c.model.recurrent.update(heads=2, key=16, value=16)
  c.training.update(
    steps=5000, batch=64, muon_learning_rate=2e-2, adam_learning_rate=5e-3
  )
  c.reference = 'titans'
  c.arms = {
    'gdn': {},
    'jet': dict(model=dict(mixers=('attention', 'jet'))),
    'hope': _mixer(hope.Hope),
    'titans': _mixer(titans.Titans),
    'titans_linear': _mixer(titans.Titans, depth=1),
    'titans_plain': _mixer(titans.Titans, momentum=False),
    'titans_mac': _mixer(titans_mac.TitansMAC),
    'titans_mag': _mixer(titans_attention.TitansMAG, window=8),
    'titans_mal': _mixer(titans_attention.TitansMAL, window=8),
    # No memory: it sees the last window, and half of the pairs were before.
    'sliding_window': _mixer(sliding_window.SlidingWindow, window=8, sinks=0),
  }
  common.vary(c, variant, rewritten=_rewritten)
  return c
