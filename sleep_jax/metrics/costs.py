"""The cost of a life: tokens, analytic FLOPs and seconds of every phase."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import time

from sleep_jax import config
from sleep_jax.models import flops

PHASES = ('wake', 'rollout', 'teacher', 'update', 'reward', 'trials', 'eval')


@dataclasses.dataclass
class PhaseCost:
  """Totals of one phase."""

  cfg: config.ModelConfig
  context: float
  tokens: float = 0.0
  flops: float = 0.0
  seconds: float = 0.0
  steps: int = 0

  def add(self, *, tokens: float, flops: float, steps: int = 0) -> None:
    """What was counted elsewhere."""
    self.tokens += tokens
    self.flops += flops
    self.steps += steps

  def forward(self, tokens: float, times: int = 1) -> None:
    """Forward passes over `tokens`, `times` over."""
    self.tokens += tokens * times
    self.flops += tokens * times * flops.forward_flops(self.cfg, self.context)

  def full(self, tokens: float, steps: int) -> None:
    """Training steps that give every weight a gradient."""
    self.tokens += tokens
    self.flops += tokens * flops.train_flops(self.cfg, self.context)
    self.steps += steps

  def online(self, tokens: float, steps: int) -> None:
    """Eq. 2 over `tokens`: gradients for the levels that have a clock."""
    self.tokens += tokens
    self.flops += tokens * flops.wake_flops(self.cfg, self.context)
    self.steps += steps

  def partial(self, tokens: float, steps: int) -> None:
    """Training steps that give only a small part a gradient."""
    self.tokens += tokens
    self.flops += tokens * flops.partial_train_flops(self.cfg, self.context)
    self.steps += steps


class CostTracker:
  """One account per phase.

  Args:
    cfg: the model, for the FLOP formula.
    length: tokens of a typical row; a query sees half of them on average.
  """

  # Called with the steps so far before and after every phase.
  on_phase: Callable[[int], None] | None = None

  def __init__(self, cfg: config.ModelConfig, length: int):
    self._accounts = {p: PhaseCost(cfg, length / 2) for p in PHASES}

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[PhaseCost]:
    """Times a phase; whoever enters it says what it computed.

    The block must wait for its results (`block_until_ready`), or the seconds
    would be those of the dispatch alone.
    """
    account = self._accounts[name]
    self._notify()
    start = time.perf_counter()
    try:
      yield account
    finally:
      account.seconds += time.perf_counter() - start
      self._notify()

  def _notify(self) -> None:
    if self.on_phase:
      self.on_phase(sum(a.steps for a in self._accounts.values()))

  def seconds(self) -> dict[str, float]:
    """Seconds by phase."""
    return {name: a.seconds for name, a in self._accounts.items()}

  def totals(self) -> dict[str, dict[str, float]]:
    """`{phase: {tokens, flops, seconds, steps}}`."""
    return {
      name: {
        'tokens': a.tokens,
        'flops': a.flops,
        'seconds': a.seconds,
        'steps': a.steps,
      }
      for name, a in self._accounts.items()
    }

  def restore(self, totals: dict[str, dict[str, float]]) -> None:
    """Continues the accounts of an interrupted run."""
    for name, values in totals.items():
      for key, value in values.items():
        setattr(self._accounts[name], key, value)
