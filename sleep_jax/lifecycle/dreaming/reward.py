"""Steps 3 and 4 of dreaming: try every dream that was kept, and reward it."""

import dataclasses

import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.lifecycle.dreaming import propose as propose_lib
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.models import model as model_lib


@dataclasses.dataclass(frozen=True)
class TrialResult:
  """A dream that was tried.

  omega: its importance.
  score: under tau; mean over the repeats, and over tau's questions.
  baseline_score: the same of the untuned model.
  rejected: `diverged` if its instance did not stay finite.
  """

  dream: propose_lib.Dream
  omega: float
  score: float
  baseline_score: float
  rejected: str = ''

  @property
  def reward(self) -> bool:
    """Eq. 5, strictly better."""
    return not self.rejected and self.score > self.baseline_score


def run_trials(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  selected: list[tuple[propose_lib.Dream, float]],
  rng: at.Key,
) -> list[TrialResult]:
  """Tries every (dream, omega), and scores it against tau.

  The untuned model is one more instance per context, with no rows: it is asked
  in the same rollout.
  """
  if not selected:
    return []
  contexts = list({id(d.context): d.context for d, _ in selected}.values())
  repeats = dreamer.trial.repeats
  updates = [d.required_rows() for d, _ in selected for _ in range(repeats)]
  asked = [d.context for d, _ in selected for _ in range(repeats)] + contexts
  completions, finite = trials.run(
    dreamer,
    model,
    updates + [None] * len(contexts),
    [context.questions for context in asked],
    rng,
  )
  scores = np.array(
    [
      np.mean(dreamer.format.grade(context, answers))
      for context, answers in zip(asked, completions, strict=True)
    ]
  )
  baselines = scores[len(updates) :]
  baseline_of = {id(c): s for c, s in zip(contexts, baselines)}
  results = []
  for i, (dream, omega) in enumerate(selected):
    part = slice(i * repeats, (i + 1) * repeats)
    results.append(
      TrialResult(
        dream,
        omega,
        float(scores[part].mean()),
        float(baseline_of[id(dream.context)]),
        '' if finite[part].all() else 'diverged',
      )
    )
  return results


def select_rewarded(
  cfg: dreaming_config.DreamingConfig, results: list[TrialResult]
) -> list[propose_lib.Dream]:
  """ReST^EM's E step: all rewarded dreams, or the best of each context's.

  With `learn_from=tried` reward selects nothing.
  """
  if cfg.learn_from == 'tried':
    return [x.dream for x in results if not x.rejected]
  rewarded = [x for x in results if x.reward]
  if cfg.learn_from == 'all':
    return [x.dream for x in rewarded]
  best: dict[int, TrialResult] = {}
  for result in rewarded:
    previous = best.get(id(result.dream.context))
    if previous is None or result.score > previous.score:
      best[id(result.dream.context)] = result
  return [x.dream for x in best.values()]
