"""Settings of sleep by recurrence, and of learning to sleep so."""

import dataclasses

from sleep_jax.config import base


@dataclasses.dataclass(frozen=True)
class RecurrenceConfig:
  """Sleep by recurrence (arXiv 2605.26099, Algorithm 1), and its controls."""

  # N: times the blocks pass over a window; 1 is no sleep.
  passes: base.Count = 1
  eviction: str = 'hard'  # or sliding: the last window stays attended to.
  loop: tuple[int, int] = (0, 0)  # First block that is looped, and the end.
  # Controls: what a pass hands to the next one.
  carry_features: bool = True  # False: each pass begins at the embeddings.
  carry_states: bool = True  # False: at the states that the window found.
  # A learned rule: each window stops by itself, after `passes` at the latest.
  halting: bool = False
  ponder: float = 0.01  # Loss per pass expected of it.
  remat: bool = True  # Compute a window's activations anew for its gradient.

  def __post_init__(self):
    base.lookup(self.eviction, {'hard': 0, 'sliding': 0}, 'recurrence.eviction')
    object.__setattr__(self, 'loop', tuple(self.loop))
    if self.passes < 1:
      raise base.ConfigError(
        f'recurrence.passes={self.passes} must be at least 1; 1 reads a window '
        'once, as a plain hybrid does.'
      )
    if self.halting and not self.carry_states:
      raise base.ConfigError(
        'recurrence.halting stops between states that are carried on; set '
        'recurrence.carry_states=True.'
      )

  def looped_layers(self, layers: int) -> range:
    """The blocks that every pass computes.

    Raises:
      ConfigError: if they are not a part of a model of so many layers.
    """
    first, end = self.loop if any(self.loop) else (0, layers)
    if not 0 <= first < end <= layers:
      raise base.ConfigError(
        f'recurrence.loop={self.loop} must be (first, end) with 0 <= first < '
        f'end <= {layers} (model.layers), or (0, 0) for all.'
      )
    return range(first, end)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """How a hybrid learns to sleep by recurrence; the paper's learning rates.

  Warm-up, clip, decay and weight decay are those of the recipe it follows.
  """

  steps: base.Count = 1000  # Over all episodes.
  batch: base.Count = 64  # Sequences of a step.
  muon_learning_rate: float = 2e-3  # Of matrices inside the blocks.
  adam_learning_rate: float = 5e-5  # Of everything else.
  weight_decay: float = 1e-4  # Of the matrices.
  warmup: base.Fraction = 0.01  # Fraction of the steps.
  decay: base.Fraction = 0.6  # And that at the end, falling to a thousandth.
  # N is drawn among these for every 20 steps; () = `recurrence.passes`.
  random_passes: tuple[base.Count, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, 'random_passes', tuple(self.random_passes))

  @property
  def warmup_steps(self) -> int:
    return max(1, round(self.warmup * self.steps))

  @property
  def decay_steps(self) -> int:
    return max(1, round(self.decay * self.steps))
