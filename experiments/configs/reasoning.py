"""Reasoning on `modular_chains`: SFT, GRPO, OPSD, SDFT and Sleep; 5 seeds.

The twin of the paper's mathematics (its Table 2, Qwen3 on AIME and HMMT): four
days of 128 problems two steps deeper than the base has solved. `sft` and
`sleep` read the reference solutions, `grpo` is rewarded for the right answer,
`opsd` and `sdft` are corrected by a self that has seen the solution. Asked on
new problems of these depths, of deeper ones (`_out`) and of shallow ones
(`_old`); avg@16 and pass@16 at temperature 1. Each table says what an arm
spent: tokens, FLOPs and seconds by phase (rollout, teacher, update); an arm's
own completions are `generated_tokens` of a day.

Expected from the paper (Qwen3-1.7B, avg@16 of AIME24): base 49.8, SFT 47.3,
GRPO 51.0, OPSD 51.6, Sleep 53.2. Differences of under 2 points are within noise
of 64 problems. `dr_grpo` is grpo without its biases of length and spread, so
that a gap is not that of the loss alone. Settings are not tuned. Variants:
none, and `:quick`, one day of every arm in a few steps.

  python -m experiments.run --config=experiments/configs/reasoning.py \
      --workdir=runs/reasoning
"""

from experiments.configs import base_chains
from experiments.configs import common
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.tasks import modular_chains

DAYS, PROBLEMS, READS, BATCH = 4, 128, 4, 32
_WAKE_BATCH = 8
_GROUP = 8
# Every problem is solved as often as `sft` reads it.
_ON_POLICY = dict(batch=BATCH, passes=READS, learning_rate=3e-4)


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
  )
  slow.update(slots=DAYS, rank=32, top_k=DAYS)
  return model


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
    dreams=512,
    dream_length=task.length,
    steps=200,
    batch=16,
    learning_rate=0.02,
  )
  c.finetune = common.settings(
    finetune.FinetuneConfig, batch=BATCH, learning_rate=3e-4
  )
  grouped = dict(_ON_POLICY, passes=1)  # Eight completions of each problem.
  c.arms = {
    'frozen': {},
    'sft': {},
    'grpo': dict(finetune=grouped, learner_config=dict(group=_GROUP)),
    'dr_grpo': dict(
      learner='grpo',
      finetune=grouped,
      learner_config=dict(group=_GROUP, loss='dr_grpo', scale='none'),
    ),
    'opsd': dict(
      finetune=_ON_POLICY,
      learner_config=dict(divergence='forward_kl', clip=0.05),
    ),
    'sdft': dict(
      learner='opsd',
      finetune=_ON_POLICY,
      learner_config=dict(teacher='average', divergence='reverse_kl'),
    ),
    'sleep': {},
  }
  common.vary(c, variant, quick=_quick)
  return c


def _quick(c: common.Config) -> None:
  """One day of few problems, for a look at every arm."""
  c.seeds = (1,)
  c.task.update(episodes=1, problems=32, reads=1, eval_problems=8, samples=4)
  c.model.levels[0].sleep_every = 32 // _WAKE_BATCH
  c.sleep.update(dreams=32, steps=10, max_kl_share=9.0)
