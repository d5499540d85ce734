"""experience_replay: sft beside a share of the rows of earlier days.

What most practitioners would try first (Chaudhry et al., arXiv 1902.10486):
rows themselves are kept, so that it needs outside data which the learner sleep
may not have. With `finetune.target=lora` it is LoRA with replay.
"""

from collections.abc import Iterator
import dataclasses
from typing import ClassVar

import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import mixing
from sleep_jax.data import order as order_lib
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import life as life_lib

_REPLAY_KEY, _KEPT_KEY = 1, 2  # Beside that of the day's order (`finetune`).


@dataclasses.dataclass(frozen=True)
class ExperienceReplayConfig(finetune.FinetunerConfig):
  """How much is kept, and how much of it is read again."""

  share: config.Fraction = 0.1  # Of a day's different rows, which are kept.
  mix: config.Fraction = 0.5  # Share of kept rows in the rows of a batch.

  def __post_init__(self):
    if not 0 < self.kept_per_batch < self.finetune.batch:
      raise config.ConfigError(
        f'learner_config.mix={self.mix} of finetune.batch='
        f'{self.finetune.batch} rows leaves no row for earlier days, or none '
        'for the day; choose another mix or a larger batch (without earlier '
        'days this is learner sft).'
      )
    if not self.share:
      raise config.ConfigError(
        'learner_config.share=0.0 keeps no row of a day; raise it, or take '
        'learner sft.'
      )

  @property
  def kept_per_batch(self) -> int:
    """Rows of a batch that are of earlier days."""
    return round(self.mix * self.finetune.batch)


class ExperienceReplay(finetune.Finetune):
  """Fine-tuning on the day's rows and on kept ones.

  `learner_state`: 'tokens' `[N, T]` and 'weight' `[N, T]` of rows kept.
  """

  name: ClassVar[str] = 'experience_replay'
  Config: ClassVar[type] = ExperienceReplayConfig

  def init(self, rng: at.Key) -> life_lib.Life:
    empty = np.zeros((0, 0), np.int32)
    state = {'tokens': empty, 'weight': empty.astype(np.float32)}
    return super().init(rng).replace(learner_state=state)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    day = experience_lib.in_memory(experience, self.name)
    tokens, weight = (
      np.asarray(life.learner_state[name]) for name in ('tokens', 'weight')
    )
    _, different = np.unique(day.tokens, axis=0, return_index=True)
    rng = order_lib.numpy_rng(self._key(life, _KEPT_KEY))
    size = max(1, round(self.cfg.share * len(different)))
    kept = np.sort(rng.permutation(different)[:size])
    life, metrics = super().wake(life, day)
    new = day.tokens[kept], day.weight[kept]
    if tokens.size:
      new = np.concatenate([tokens, new[0]]), np.concatenate([weight, new[1]])
    state = {'tokens': new[0], 'weight': new[1]}
    return life.replace(learner_state=state), metrics

  def _blocks(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> Iterator[mixing.Rows]:
    """The blocks of sft, with kept rows beside the rows of every batch.

    On the first day these are padding: every day has as many steps.
    """
    state, pad = life.learner_state, self.setup.tokenizer.pad
    kept = np.asarray(state['tokens']), np.asarray(state['weight'])
    if not kept[0].size:
      kept = np.full((1, 1), pad, np.int32), np.zeros((1, 1), np.float32)
    beside = mixing.Beside(
      kept,
      self.cfg.kept_per_batch,
      order_lib.numpy_rng(self._key(life, _REPLAY_KEY)),
    )
    for rows in super()._blocks(life, experience):
      yield beside.batches(rows, self.cfg.finetune.batch, pad)

  def _key(self, life: life_lib.Life, number: int) -> at.Key:
    key = jax.random.fold_in(life.rng, life.clock.nights)
    return jax.random.fold_in(key, number)
