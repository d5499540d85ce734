"""Formal languages by mixer: which of them track a state (NL Table 5).

Two layers of one mixer read words of up to 40 symbols and say after each what
may follow (arXiv 2009.11264); then words of 41 to 80. A variant for every
language: `:parity` (default), `:aa_star`, `:abab_star`, `:a_n_b_n`,
`:a_n_b_n_c_n`, `:shuffle_2`. The paper: Hope has 100 % of all of them, and a
Transformer does not learn parity.

`hope` reads a token at a time: what a chunk reads at once, it reads with the
memories of the chunk's beginning, and is linear in them. `hope_chunk_8` shows
what that costs, `hope_positive` what factors from 0 to 1 do.

  python -m experiments.run \
      --config=experiments/configs/formal_languages.py:parity \
      --workdir=runs/parity
"""

import dataclasses
from typing import Any

from experiments.configs import common
from sleep_jax.models.mixers import deltanet
from sleep_jax.models.mixers import hope
from sleep_jax.models.mixers import sliding_window
from sleep_jax.models.mixers import titans
from sleep_jax.tasks.algorithmic import formal_languages


def _mixer(mixer: Any, **changes: Any) -> dict[str, Any]:
  """Both layers have `mixer`, with these of its settings changed."""
  settings = dataclasses.asdict(mixer.Config(**changes))
  return dict(model=dict(mixers=(mixer.name,), recurrent=settings))


def get_config(variant: str = 'parity') -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  c = common.window_task(
    'formal_languages',
    language=variant,
    length=40,
    long_length=80,
    episodes=10,
    eval_rows=512,
  )
  c.name = f'formal_languages_{variant}'
  c.model = common.hybrid(32, 2, 64, vocab=10)
  c.training.update(
    steps=2000, batch=64, muon_learning_rate=2e-2, adam_learning_rate=5e-3
  )
  c.reference = 'hope'
  size = dict(heads=2, width=16)
  c.arms = {
    # A window as long as the longest word.
    'attention': _mixer(
      sliding_window.SlidingWindow, window=c.task.long_length, sinks=0
    ),
    'sliding_window': _mixer(sliding_window.SlidingWindow, window=16, sinks=1),
    'gdn': _mixer(deltanet.GatedDeltaNet, heads=2, key=16, value=16),
    'titans': _mixer(titans.Titans, **size, chunk=1),
    'hope': _mixer(hope.Hope, **size, chunk=1, negative=True),
    'hope_chunk_8': _mixer(hope.Hope, **size, chunk=8, negative=True),
    'hope_positive': _mixer(hope.Hope, **size, chunk=1),
  }
  formal_languages.FormalLanguagesConfig(language=variant)  # Is there such?
  return c
