"""sleep_jax.lifecycle.dreaming.reward."""

import dataclasses

import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.lifecycle.dreaming import propose as propose_lib
from sleep_jax.lifecycle.dreaming import trials


@dataclasses.dataclass(frozen=True)
class TrialResult:
  """A dream that was tried: its importance, marks under tau, and reward."""

  dream: propose_lib.Dream
  omega: float
  mark: float  # Mean over the repeats, and over tau's questions.
  untuned: float
  rejected: str = ''  # `diverged`: its instance did not stay finite.

  @property
  def reward(self) -> bool:
    """Eq. 5, strictly better."""
    return not self.rejected and self.mark > self.untuned


def run_trials(
  dreamer: dreamer_lib.Dreamer,
  life: life_lib.Life,
  chosen: list[tuple[propose_lib.Dream, float]],
  rng: at.Key,
) -> list[TrialResult]:
  """Steps 3 and 4: every (dream, omega) is tried, and marked against tau."""
  if not chosen:
    return []
  about = list({id(d.context): d.context for d, _ in chosen}.values())
  lab, repeats = dreamer.lab(life), dreamer.trial.repeats
  jobs = [(d.edit, d.context) for d, _ in chosen for _ in range(repeats)]
  jobs += [(None, context) for context in about]
  said, finite = trials.run(
    lab, [edit for edit, _ in jobs], [c.questions for _, c in jobs], rng
  )
  marks = np.array(
    [
      np.mean(dreamer.format.grade(c, answers))
      for (_, c), answers in zip(jobs, said, strict=True)
    ]
  )
  untuned = {id(c): m for c, m in zip(about, marks[len(jobs) - len(about) :])}
  tried = []
  for i, (one, omega) in enumerate(chosen):
    own = slice(i * repeats, (i + 1) * repeats)
    tried.append(
      TrialResult(
        one,
        omega,
        float(marks[own].mean()),
        float(untuned[id(one.context)]),
        '' if finite[own].all() else 'diverged',
      )
    )
  return tried


def select_rewarded(
  how: dreaming_config.DreamingConfig, tried: list[TrialResult]
) -> list[propose_lib.Dream]:
  """Step 5, E: all rewarded dreams, or the best of each context's."""
  rewarded = [x for x in tried if x.reward]
  if how.learn_from == 'all':
    return [x.dream for x in rewarded]
  best = {}
  for x in rewarded:
    now = best.get(id(x.dream.context))
    if now is None or x.mark > now.mark:
      best[id(x.dream.context)] = x
  return [x.dream for x in best.values()]
