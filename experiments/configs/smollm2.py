"""SmolLM2-135M-Instruct on invented facts in English: three days of eight.

  python -m experiments.run --config=experiments/configs/smollm2.py \
      --workdir=runs/smollm2
"""

from experiments.configs import common
from sleep_jax import config
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.tasks import invented_facts

NIGHTS, LENGTH, BATCH = 3, 128, 2
# Numbers of general questions that the base answers.
KNOWN = (
  0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15, 17, 18, 21, 25, 29, 30, 31, 32,
  33, 34, 36, 40, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 57, 61, 62,
  66, 70, 73, 74, 76, 78, 79, 80, 83,
)  # fmt: skip


def model(rate: float = 3e-4, rank: int = 32) -> common.Config:
  """The last layers fast, those beneath with experts, the others frozen."""
  level = lambda **values: common.settings(
    config.LevelConfig, hidden=1536, **values
  )
  return common.ml_collections.ConfigDict(
    dict(
      vocab=49_152,
      dim=576,
      layers=30,
      heads=9,
      kv_heads=3,
      head_dim=64,
      rope_theta=1e5,
      norm_eps=1e-5,
      max_len=2048,
      levels=(
        level(chunk=LENGTH, sleep_every=40, learning_rate=rate),
        level(slots=NIGHTS, rank=rank, top_k=NIGHTS),
        level(),
      ),
      partition=(6, 8, 16),
      partition_from='output',
    )
  )


def get_config(variant: str = '') -> common.Config:
  """Settings; override any with `--config.section.name=value`."""
  del variant
  c = common.experiment('smollm2')
  c.seeds = (1, 2, 3)
  c.workers = 1
  c.reference = 'sleep'
  c.base = 'smollm2'
  c.model = model()
  c.task = common.settings(
    invented_facts.InventedFactsConfig,
    tokenizer=c.base,
    episodes=NIGHTS,
    length=LENGTH,
    general=KNOWN,
  )
  c.task.name = 'invented_facts'
  c.wake = common.settings(wake_lib.WakeConfig, batch=BATCH)
  c.sleep = common.settings(
    consolidation_config.SeedingConfig,
    dreams=256,
    dream_length=80,
    min_p=0.1,
    day_dreams=1.0,
    teacher_top_k=64,
    dream_vocab=True,
    steps=200,
    batch=8,
    learning_rate=2e-3,
    alpha=1.0,
    lam=0.0,
  )
  c.arms = {'sleep': {}, 'wake_only': common.WAKE_ONLY}
  return c
