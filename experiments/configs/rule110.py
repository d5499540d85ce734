"""Rule 110: does a sleep of N passes compute what one pass cannot?

The context is strings of an automaton; the target is each one's first bit after
`t` steps. Variants: none, accuracy against depth, three seeds at a size for two
cores; `:controls`, what the passes owe to what, at t = 4; `:eviction`, the same
depth with a sliding window, and with the middle of four layers looped alone;
`:gentle`, half the learning rate at t = 5; `:paper`, the sizes of arXiv
2605.26099 (t = 32, about 5B tokens a run), checked by shape alone.

The arms see the same tokens, so N passes cost more FLOPs. `long` and `deep`
have the FLOPs of `passes_4` with one pass, in four times the steps or the
layers, at the depth that one pass is furthest from. Controls: `no_features` and
`no_states` do not hand either from one pass to the next; `drawn` trains with N
drawn anew at each call and is also evaluated with a larger N; `halting` learns
when to stop. The paper finds, with N = 1, 2, 3, 4 at
t = 32: about 10, 20, 30 and 30 % of the sequences right, chance being 10 %.

  python -m experiments.run --config=experiments/configs/rule110.py \
      --workdir=runs/rule110
"""

from typing import Any

from experiments.configs import common

_STEPS, _LAYERS, _DEEPEST = 1000, 2, 6
_FOUR = dict(recurrence=dict(passes=4))
_PASSES: dict[str, dict[str, Any]] = {
  'passes_1': {},
  'passes_2': dict(recurrence=dict(passes=2)),
  'passes_4': _FOUR,
}
_MATCHED: dict[str, dict[str, Any]] = {
  'long': dict(training=dict(steps=4 * _STEPS)),
  'deep': dict(model=dict(layers=4 * _LAYERS)),
}
_CONTROLS: dict[str, dict[str, Any]] = {
  'passes_4': _FOUR,
  'no_features': dict(recurrence=dict(passes=4, carry_features=False)),
  'no_states': dict(recurrence=dict(passes=4, carry_states=False)),
  'drawn': dict(
    recurrence=dict(passes=4),
    training=dict(random_passes=(1, 2, 4)),
    task=dict(eval_passes=(1, 2, 8)),
  ),
  'halting': dict(recurrence=dict(passes=4, halting=True)),
}
_EVICTIONS: dict[str, dict[str, Any]] = {
  'passes_1': {},
  'passes_4': _FOUR,
  'sliding_1': dict(recurrence=dict(eviction='sliding')),
  'sliding_4': dict(recurrence=dict(eviction='sliding', passes=4)),
  'middle': dict(model=dict(layers=4), recurrence=dict(passes=4, loop=(1, 3))),
}
_SHORT = 600  # Steps at the shallowest depth.


def _at(steps: int, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """The arms at one depth."""
  return {
    f'{arm}_t{steps}': change | dict(task=dict(steps=steps))
    for arm, change in arms.items()
  }


def _controls(c: common.Config) -> None:
  c.training.steps = _SHORT
  c.arms = _CONTROLS


def _eviction(c: common.Config) -> None:
  c.training.steps = _SHORT
  c.arms = _EVICTIONS


def _gentle(c: common.Config) -> None:
  c.task.steps = 5
  c.training.muon_learning_rate /= 2
  c.arms = _PASSES


def _paper(c: common.Config) -> None:
  """d = 256, width 24, t = 32, batches of 512, about 98,000 steps."""
  c.task.update(width=24, strings=4, steps=32)
  c.model = common.hybrid(256, 4, 683, vocab=3)
  c.model.recurrent.update(key=48, value=96)
  c.model.dtype = 'bfloat16'
  c.recurrence.remat = True
  c.training.update(
    steps=98_000, batch=512, muon_learning_rate=2e-3, adam_learning_rate=5e-5
  )
  c.arms = {
    f'passes_{n}': dict(recurrence=dict(passes=n)) for n in (1, 2, 3, 4)
  }


def get_config(variant: str = '') -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  c = common.window_task(
    'rule110', width=12, strings=2, steps=4, episodes=5, eval_passes=()
  )
  c.model = common.hybrid(32, _LAYERS, 64, vocab=3)
  c.model.recurrent.update(heads=2, key=16, value=32)
  # Larger than the paper's: there are a hundred times fewer steps.
  c.training.update(
    steps=_STEPS,
    batch=128,
    muon_learning_rate=5e-3,
    adam_learning_rate=2e-3,
  )
  c.reference = 'passes_4'
  c.arms = _at(4, _PASSES) | _at(5, _PASSES) | _at(_DEEPEST, _PASSES | _MATCHED)
  common.vary(
    c,
    variant,
    controls=_controls,
    eviction=_eviction,
    gentle=_gentle,
    paper=_paper,
  )
  return c
