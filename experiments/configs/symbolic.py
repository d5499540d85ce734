"""Symbolic arithmetic: the answer after so many operations, in one pass.

Problems in the manner of GSM-Infinite's symbolic form, by a generator of our
own. The question stands before the statements, so the passes may work on its
answer. Variants: none, three seeds at a size for two cores; `:paper`, problems
of up to 8 operations in contexts of 2,000 to 3,300 tokens and windows of 2,000
on a Qwen2.5-1.5B-shaped hybrid, 14 of 28 blocks looped, checked by shape alone.

  python -m experiments.run --config=experiments/configs/symbolic.py \
      --workdir=runs/symbolic
"""

from experiments.configs import common

_STEPS = 1200


def _paper(c: common.Config) -> None:
  """Jet-Nemotron 2B's shape, trained from scratch in our vocabulary."""
  c.task.update(max_ops=8, statements=400, window=2000, windows=2)
  c.model = common.hybrid(1536, 28, 8960, vocab=151_936)
  c.model.update(
    heads=12, kv_heads=2, mixers=('jet',) * 6 + ('attention',), qkv_bias=True
  )
  c.model.recurrent.update(heads=12, key=96, value=256)
  c.model.dtype, c.model.remat = 'bfloat16', True
  c.recurrence.update(remat=True, loop=(7, 21))
  c.training.update(
    steps=700, batch=256, muon_learning_rate=1e-3, adam_learning_rate=5e-5
  )
  c.arms = {
    f'passes_{n}': dict(recurrence=dict(passes=n)) for n in (1, 2, 4, 6)
  }


def get_config(variant: str = '') -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  c = common.window_task(
    'symbolic',
    episodes=10,
    max_ops=4,
    statements=9,
    modulus=5,
    window=20,
    windows=3,
  )
  c.model = common.hybrid(32, 2, 64, vocab=21)
  c.model.recurrent.update(heads=2, key=16, value=16)
  c.training.update(
    steps=_STEPS, batch=128, muon_learning_rate=2e-2, adam_learning_rate=2e-3
  )
  c.reference = 'passes_4'
  c.arms = {f'passes_{n}': dict(recurrence=dict(passes=n)) for n in (1, 2, 4)}
  common.vary(c, variant, paper=_paper)
  return c
