"""Reasoning on `modular_chains`: SFT, GRPO, OPSD, SDFT and Sleep; 5 seeds.

The twin of the paper's mathematics (its Table 2, Qwen3 on AIME and HMMT): four
days of 256 problems two steps deeper than the base has solved. `sft` reads the
reference solutions, `grpo` is rewarded for the right answer, `opsd`, `sdft` and
the day of `sleep` are corrected by a self that has seen the solution; `sleep`
also dreams of problems that it makes up. Asked on new problems of these depths,
of deeper ones (`_out`) and of shallow ones (`_old`); avg@16 and pass@16 at
temperature 1. Each table says what an arm spent: tokens, FLOPs and seconds by
phase (rollout, teacher, update); an arm's own completions are
`generated_tokens` of a day.

Expected from the paper (Qwen3-1.7B, avg@16 of AIME24): base 49.8, SFT 47.3,
GRPO 51.0, OPSD 51.6, Sleep 53.2. Differences of under 2 points are within noise
of 64 problems. `dr_grpo` is grpo without its biases of length and spread, so
that a gap is not that of the loss alone.

Variants:
  :ablations    the paper's (its Table 3; for OPSD with expansion,
                `opsd_low_rank`), and `sleep_reads`, which reads the solutions
                as `sft` does
  :tune         four rates of every learner, in two ways, over two days, on
                seed 100; the arms have the best of what was run
  :many_nights  20 nights of dreams alone: what is dreamt is trained on if it
                was rewarded, or (`unrewarded`) whatever it is
  :quick        one day of every arm in a few steps

  python -m experiments.run --config=experiments/configs/reasoning.py \
      --workdir=runs/reasoning
"""

from typing import Any

from experiments.configs import base_chains
from experiments.configs import common
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.models import lora
from sleep_jax.tasks import modular_chains

DAYS, PROBLEMS, READS, BATCH = 4, 256, 4, 32
_WAKE_BATCH = 8
_GROUP = 8
_RANK = 32
_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
_CLIPPED = dict(divergence='forward_kl', clip=0.05)
_DR_GRPO = dict(loss='dr_grpo', scale='none')
_REVERSE = dict(divergence='reverse_kl', clip=None)


def model(rows: int, length: int) -> common.Config:
  """The base with clocks: level 1 is fast, level 2 grows experts.

  Args:
    rows: of a day.
    length: tokens of one.
  """
  model = base_chains.model()
  fast, slow = model.levels
  fast.update(
    chunk=length,
    sleep_every=rows // _WAKE_BATCH,  # Once a day.
    optimizer='adam',
    learning_rate=1e-3,
    fast_weights='backbone',
  )
  slow.update(slots=DAYS, rank=_RANK, top_k=DAYS)
  return model


def _trained(
  rate: float, *, passes: int = READS, batch: int = BATCH
) -> dict[str, Any]:
  """Every problem is solved as often as `sft` reads it."""
  return dict(finetune=dict(batch=batch, passes=passes, learning_rate=rate))


def _grpo(rate: float, **settings: str) -> dict[str, Any]:
  """Eight completions of each problem."""
  learner_config = dict(group=_GROUP) | settings
  return _trained(rate, passes=1) | dict(
    learner='grpo', learner_config=learner_config
  )


def _opsd(rate: float, **settings: Any) -> dict[str, Any]:
  return _trained(rate) | dict(learner='opsd', learner_config=settings)


def _sdft(rate: float) -> dict[str, Any]:
  return _trained(rate) | dict(
    learner='opsd',
    learner_config=dict(teacher='average', divergence='reverse_kl'),
  )


def _sft(rate: float, batch: int = BATCH) -> dict[str, Any]:
  # Its rows are there as often as they are read.
  return _trained(rate, passes=1, batch=batch) | dict(learner='sft')


def _sleep(rate: float, **sleep: Any) -> dict[str, Any]:
  """A day of `opsd`, and a night with these settings.

  A night has one teacher: two would solve the same problems, each in its way,
  and with the previous one a night undoes the day.
  """
  sleep = dict(teachers='current') | sleep
  arm = _trained(rate) | dict(
    learner='privileged_sleep', learner_config=_REVERSE, sleep=sleep
  )
  return arm


def _arms() -> dict[str, dict[str, Any]]:
  """Of each learner the best of the trials of `:tune` that were run.

  `sft_gentle`, `dr_grpo` and `opsd_clipped` are the best of their other way.
  """
  return {
    'frozen': {},
    'sft': _sft(1e-3),
    'sft_gentle': _sft(3e-4, batch=BATCH // 2),
    'grpo': _grpo(1e-4),
    'dr_grpo': _grpo(1e-4, **_DR_GRPO),
    'opsd': _opsd(3e-4, **_REVERSE),
    'opsd_clipped': _opsd(3e-4, **_CLIPPED),
    'sdft': _sdft(3e-4),
    'wake_only': _sleep(3e-4, consolidate=False)
    | dict(dreaming=dict(enabled=False)),
    'sleep': _sleep(3e-4),
  }


def get_config(variant: str = '') -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  c = common.experiment('reasoning')
  c.seeds = (1, 2, 3, 4, 5)
  c.reference = 'sleep'
  c.base = 'sleep_jax/assets/base_chains.npz'
  task = modular_chains.ChainsConfig(
    episodes=DAYS, problems=PROBLEMS, reads=READS
  )
  c.model = model(PROBLEMS * READS, task.length)
  c.task = common.settings(
    modular_chains.ChainsConfig, episodes=DAYS, problems=PROBLEMS, reads=READS
  )
  c.task.name = 'modular_chains'
  c.wake = common.settings(wake_lib.WakeConfig, batch=_WAKE_BATCH)
  c.sleep = common.settings(
    consolidation_config.SeedingConfig,
    dreams=1024,
    dream_length=task.length,
    splice=False,  # A document is one problem.
    steps=300,
    batch=16,
    learning_rate=0.02,
    max_kl_share=2.0,
  )
  c.lora = common.settings(
    lora.LoraConfig,
    rank=16,
    alpha=16.0,
    targets=('q', 'v', 'gate', 'up', 'down'),
  )
  c.trial = common.settings(dreaming_config.TrialConfig)
  c.dreaming = common.settings(
    dreaming_config.DreamingConfig,
    learn_from='all',
    rehearsed=8,
    retention_length=task.length,
  )
  c.finetune = common.settings(finetune.FinetuneConfig, batch=BATCH)
  c.arms = _arms()
  common.vary(
    c,
    variant,
    quick=_quick,
    tune=_tune,
    ablations=_ablations,
    many_nights=_many_nights,
  )
  return c


def _ablations(c: common.Config) -> None:
  """Sleep without one of its parts."""
  slow = dict(c.model.levels[1], slots=1, rank=DAYS * _RANK, top_k=1)
  c.arms = {
    'sleep': c.arms['sleep'],
    'no_imitation': _sleep(3e-4, alpha=1.0),
    'no_semantic_reward': _sleep(3e-4, gamma=0.0),
    'no_expansion': _sleep(3e-4, expand=False)
    | dict(model=dict(levels=[dict(c.model.levels[0]), slow])),
    'previous_teacher': _sleep(3e-4, teachers='current+previous'),
    'no_dreaming': _sleep(3e-4) | dict(dreaming=dict(enabled=False)),
    'sleep_reads': dict(learner='sleep'),
    # New low-rank weights learn by OPSD, and there are no nights.
    'opsd_low_rank': dict(
      learner='opsd',
      learner_config=_REVERSE,
      finetune=_trained(3e-4)['finetune'] | dict(target='lora'),
    ),
  }


def _tune(c: common.Config) -> None:
  """Four rates of each learner in two ways, on a seed no table has."""
  c.task.episodes = 2
  other = {
    'sft': dict(finetune=dict(batch=BATCH // 2)),
    'grpo': dict(learner_config=_DR_GRPO),
    'opsd': dict(learner_config=_CLIPPED),
    'sdft': dict(learner_config=_CLIPPED),
    'sleep': dict(learner_config=_CLIPPED),
  }
  trials = {}
  for learner, changes in other.items():
    trials[learner] = {}
    for rate in _RATES:
      at_rate = dict(finetune=dict(learning_rate=rate))
      finetune = changes.get('finetune', {}) | at_rate['finetune']
      trials[learner][f'{rate:.0e}'] = at_rate
      trials[learner][f'other_{rate:.0e}'] = changes | dict(finetune=finetune)
  common.tune(c, 100, trials)


def _many_nights(c: common.Config) -> None:
  """Twenty nights without a day: dreams, rewarded by what can be solved."""
  c.seeds = (1, 2, 3)
  c.task.update(episodes=20, reads=1)
  dreaming = dict(keep=6, keep_random=2)
  c.arms = {
    'frozen': {},
    'rewarded': dict(learner='seal', dreaming=dreaming),
    'unrewarded': dict(
      learner='seal', dreaming=dict(dreaming, learn_from='tried')
    ),
  }
  c.reference = 'rewarded'


def _quick(c: common.Config) -> None:
  """One day of few problems, for a look at every arm."""
  c.seeds = (1,)
  c.task.update(episodes=1, problems=32, reads=1, eval_problems=8, samples=4)
  c.task.update(contexts=2, context_problems=4)
  c.model.levels[0].sleep_every = 32 // _WAKE_BATCH
  c.sleep.update(dreams=32, steps=10, max_kl_share=9.0)
