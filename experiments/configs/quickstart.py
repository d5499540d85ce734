"""The quickstart: three nights of `facts` under four learners.

A small base model (shipped; `base_facts.py` is its recipe) reads new facts for
three days. Cost: under 5 minutes on 2 CPU cores from cold. Expect `sleep` to
keep all three days and the base's own facts; `sft` and `wake_only` to lose
much of the earlier days; `icl` to recall little.

  python -m experiments.run --config=experiments/configs/quickstart.py
"""

from experiments.configs import common
from experiments.configs import facts


def get_config() -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  c = facts.get_config()
  c.name = 'quickstart'
  c.seeds = (1,)
  c.task.episodes = 3
  c.arms = {
    name: facts.LEARNERS[name] for name in ('icl', 'sft', 'wake_only', 'sleep')
  }
  return c
