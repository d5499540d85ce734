"""An alarm for policies that collapse while they train on their own samples."""

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from sleep_jax.data import contexts

_WINDOW = 8  # Steps that are averaged, at the beginning of a life and now.
_NGRAM = 4


class Collapsed(RuntimeError):
  """A policy's samples are degenerate; the message says how."""


def repetition(completions: Sequence[contexts.TokenIds]) -> float:
  """The share of a completion's 4-grams that it had before; mean over all."""
  shares = []
  for tokens in completions:
    grams = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - 3)]
    shares.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
  return float(np.mean(shares))


class Alarm:
  """Compares the last steps with the first ones that it was told of.

  It never rings where the reward has not fallen: a policy that solves its
  problems may well be brief and sure of itself.
  """

  def __init__(self) -> None:
    self._first: list[Mapping[str, float]] = []
    self._last: collections.deque[Mapping[str, float]] = collections.deque(
      maxlen=_WINDOW
    )

  def tell(self, step: Mapping[str, float]) -> None:
    """Takes in a step's reward, entropy, length, truncated and repetition.

    Raises:
      Collapsed: if the last steps are degenerate beside the first.
    """
    if len(self._first) < _WINDOW:
      self._first.append(step)
      return
    self._last.append(step)
    if len(self._last) < _WINDOW:
      return
    was, now = self._mean(self._first), self._mean(self._last)
    if now['reward'] >= was['reward']:
      return
    for name, rings in (
      ('truncated', now['truncated'] > 0.5 + 0.5 * was['truncated']),
      ('repetition', now['repetition'] > 0.5 + 0.5 * was['repetition']),
      ('length', now['length'] < 0.25 * was['length']),
      ('entropy', now['entropy'] < 0.1 * was['entropy']),
      ('entropy', now['entropy'] > 2.0 * was['entropy'] + 1.0),
    ):
      if rings:
        raise Collapsed(
          f'the policy has collapsed: {name} went from {was[name]:.3g} to '
          f'{now[name]:.3g}, and the reward from {was["reward"]:.3g} to '
          f'{now["reward"]:.3g}. Lower finetune.learning_rate, or clip more '
          '(learner_config.clip); earlier checkpoints are intact.'
        )

  def _mean(self, steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {k: float(np.mean([s[k] for s in steps])) for k in steps[0]}
