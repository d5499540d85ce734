"""Facts hidden in a book, in context, in weights, and in what a mixer carries.

Twenty questions of bAbI, each with a text of 1,024 tokens (`task.babilong`), on
SmolLM2-135M: `icl` has the text before the question and `rag` (an extra) its
three likeliest sentences, `wake_only` and `sleep` read it eight times and are
asked with nothing in context, `frozen` is the floor, and `unread` the same
question without the text. Variants: `qa1` (default) to `qa5`.

  python -m experiments.run --config=experiments/configs/babilong.py \
      --workdir=runs/babilong

The variant `:train` trains small models on qa1 through segments of 128 tokens,
one more stage after the other (`task.babilong_windows`), and asks about
contexts of up to 64k tokens, 64 times what was trained on. All arms read the
same tokens. `attention` sees the last 1,024 tokens: all of a sequence to train
on, and a part of the longer ones. `sliding_window` sees 128, and is the
control without a memory. `gdn`, `hope` and `titans` attend within a segment in
every other layer, and carry a state in the others; `armt` does both in each.

  python -m experiments.run --config=experiments/configs/babilong.py:train \
      --workdir=runs/babilong_train
"""

import dataclasses
from typing import Any

from experiments.configs import common
from experiments.configs import niah
from sleep_jax import config
from sleep_jax.models.mixers import armt
from sleep_jax.models.mixers import hope
from sleep_jax.models.mixers import sliding_window
from sleep_jax.models.mixers import titans
from sleep_jax.tasks import babilong
from sleep_jax.tasks import babilong_windows

_KINDS = dict.fromkeys(f'qa{i}' for i in range(1, 6))
_SEGMENT, _SEGMENTS = 128, (1, 2, 3, 5, 8)


def get_config(variant: str = 'qa1') -> common.Config:
  """Settings; `variant` is a question of bAbI, or `train`."""
  config.lookup(variant, _KINDS | {'train': None}, 'variant')
  if variant == 'train':
    return _train()
  return niah.studied(
    f'babilong_{variant}', 'babilong', babilong.BabilongConfig, kind=variant
  )


def _mixer(
  mixer: Any, *, alone: bool = False, **changes: Any
) -> dict[str, Any]:
  """What an arm changes; `alone`: the mixer is that of every layer."""
  return dict(
    model=dict(
      mixers=(mixer.name,) if alone else ('attention', mixer.name),
      recurrent=dataclasses.asdict(mixer.Config(**changes)),
    )
  )


def _train() -> common.Config:
  task = common.settings(
    babilong_windows.BabilongWindowsConfig,
    window=_SEGMENT,
    segments=_SEGMENTS,
    episodes=10,
    lengths=(0, *(1024 * 2**i for i in range(7))),
  )
  c = common.window_task('babilong_windows', **task)
  c.name = 'babilong_train'
  c.model = common.hybrid(64, 4, 128, vocab=1024)
  c.model.recurrent.update(heads=2, key=32, value=32)
  c.training.update(
    steps=2000, batch=16, muon_learning_rate=2e-2, adam_learning_rate=5e-3
  )
  c.reference = 'armt'
  window, longest = sliding_window.SlidingWindow, _SEGMENT * _SEGMENTS[-1]
  c.arms = {
    'attention': _mixer(window, alone=True, window=longest, sinks=0),
    'sliding_window': _mixer(window, alone=True, window=_SEGMENT, sinks=4),
    'gdn': {},
    'hope': _mixer(hope.Hope, heads=2, width=32),
    'titans': _mixer(titans.Titans, heads=2, width=32),
    'armt': _mixer(armt.ARMT, alone=True, segment=_SEGMENT, width=32),
  }
  return c
