"""The cost of a life: tokens, analytic FLOPs, seconds and steps by phase."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import time

from sleep_jax import config
from sleep_jax.models import flops

PHASES = ('wake', 'rollout', 'teacher', 'update', 'reward', 'trials', 'eval')


@dataclasses.dataclass
class PhaseCost:
  """Totals of one phase.

  Attributes:
    cfg: the model, for the FLOP formulas.
    context: mean number of keys per query.
    tokens: tokens processed.
    flops: floating-point operations by formula, see `models.flops`.
    seconds: wall time.
    steps: optimizer steps.
  """

  cfg: config.ModelConfig
  context: float
  tokens: float = 0.0
  flops: float = 0.0
  seconds: float = 0.0
  steps: int = 0

  def add(self, *, tokens: float, flops: float, steps: int = 0) -> None:
    """Adds figures that were counted elsewhere."""
    self.tokens += tokens
    self.flops += flops
    self.steps += steps

  def add_forward(self, tokens: float, times: int = 1) -> None:
    """Adds `times` forward passes over `tokens`."""
    self.tokens += tokens * times
    self.flops += tokens * times * flops.forward_flops(self.cfg, self.context)

  def add_training(self, tokens: float, steps: int) -> None:
    """Adds training steps with gradients of all weights."""
    self.tokens += tokens
    self.flops += tokens * flops.train_flops(self.cfg, self.context)
    self.steps += steps

  def add_online(self, tokens: float, steps: int) -> None:
    """Adds wake steps (Eq. 2): gradients of the levels that are updated."""
    self.tokens += tokens
    self.flops += tokens * flops.wake_flops(self.cfg, self.context)
    self.steps += steps

  def add_partial_training(
    self, tokens: float, steps: int, first_layer: int = 0
  ) -> None:
    """Adds training steps of a small part, from layer `first_layer` up."""
    self.tokens += tokens
    self.flops += tokens * flops.partial_train_flops(
      self.cfg, self.context, first_layer
    )
    self.steps += steps


class CostTracker:
  """The costs of one life, by phase.

  Args:
    cfg: the model, for the FLOP formulas.
    length: tokens of a typical row; a query sees half of them on average.
  """

  # Called before and after every phase, with the number of steps so far.
  on_phase: Callable[[int], None] | None = None

  def __init__(self, cfg: config.ModelConfig, length: int):
    self._costs = {p: PhaseCost(cfg, length / 2) for p in PHASES}

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[PhaseCost]:
    """Times a phase; the block adds its work to the `PhaseCost` it is given.

    The block must wait for its results (`block_until_ready`); otherwise only
    the time of the dispatch is counted.
    """
    cost = self._costs[name]
    self._notify()
    start = time.perf_counter()
    try:
      yield cost
    finally:
      cost.seconds += time.perf_counter() - start
      self._notify()

  def _notify(self) -> None:
    if self.on_phase:
      self.on_phase(self.steps)

  @property
  def steps(self) -> int:
    """Optimizer steps of all phases."""
    return sum(c.steps for c in self._costs.values())

  def seconds(self) -> dict[str, float]:
    """Seconds by phase."""
    return {name: c.seconds for name, c in self._costs.items()}

  def totals(self) -> dict[str, dict[str, float]]:
    """`{phase: {tokens, flops, seconds, steps}}`."""
    return {
      name: {
        'tokens': c.tokens,
        'flops': c.flops,
        'seconds': c.seconds,
        'steps': c.steps,
      }
      for name, c in self._costs.items()
    }

  def restore(self, totals: dict[str, dict[str, float]]) -> None:
    """Sets the totals to those of an interrupted run."""
    for name, values in totals.items():
      for key, value in values.items():
        setattr(self._costs[name], key, value)
