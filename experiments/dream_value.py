"""What dreams are worth: does importance predict reward; do dreams differ?

Every dream of one night is weighed by every rule and tried, once with a random
expert mixed in and once without, by lives that have slept one night.

  python -m experiments.dream_value --config=experiments/configs/bulletins.py \
      --out=results/dreams_worth
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any

from absl import app
from absl import flags
import jax
from ml_collections import config_flags
import numpy as np
import tqdm

from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import tables
from sleep_jax.lifecycle.dreaming import importance
from sleep_jax.lifecycle.dreaming import propose as propose_lib
from sleep_jax.lifecycle.dreaming import reward as reward_lib
from sleep_jax.objectives import rewards
from sleep_jax.runtime import compilation

RULES = ('grad_cosine', 'greats', 'grad_norm', 'loss', 'random')
_RANKS = 4  # Quarters of the ranking.

DreamScores = dict[str, float]


def auc(omega: np.ndarray, rewarded: np.ndarray) -> float:
  """Probability that a rewarded dream outranks another; ties count half."""
  good, bad = omega[rewarded], omega[~rewarded]
  if not len(good) or not len(bad):
    return float('nan')
  apart = good[:, None] - bad[None]
  return float(np.mean((apart > 0) + 0.5 * (apart == 0)))


def by_rank(omega: np.ndarray, rewarded: np.ndarray) -> list[float]:
  """Reward rate of each quarter of the ranking, the most important first."""
  order = np.argsort(-omega, kind='stable')
  return [
    float(part.mean()) for part in np.array_split(rewarded[order], _RANKS)
  ]


def diversity(dreamt: Sequence[propose_lib.Dream], pad: int) -> DreamScores:
  """Share of different dreams, and mean edit distance of two, by length."""
  tokens = [d.tokens for d in dreamt]
  longest = max(1, *map(len, tokens))
  rows = np.full((len(tokens), longest), pad, np.int32)
  for row, own in zip(rows, tokens, strict=True):
    row[: len(own)] = own
  sizes = np.array([len(own) for own in tokens], np.int32)
  a, b = np.triu_indices(len(tokens), 1)
  apart = rewards.levenshtein(rows[a], sizes[a], rows[b], sizes[b])
  relative = np.asarray(apart) / np.maximum(np.maximum(sizes[a], sizes[b]), 1)
  return {
    'distinct': len({tuple(own) for own in tokens}) / len(tokens),
    'distance': float(relative.mean()),
  }


def _mean(rows: Sequence[DreamScores]) -> DreamScores:
  """Means by key; nan, a context without a comparison, does not count."""
  return {k: float(np.nanmean([r[k] for r in rows])) for k in rows[0]}


def measure(
  c: build_lib.Settings, seed: int, random_expert: float, each: int
) -> DreamScores:
  """One life, one night: marks of all its dreams, means over contexts.

  `each` is how many dreams every context has.
  """
  settings = build_lib.arm_config(c, 'sleep')
  settings['dreaming'] = settings['dreaming'] | {'enabled': False}
  task, learner, _ = build_lib.build(settings, seed)
  life, _ = learner.wake(
    learner.init(jax.random.PRNGKey(seed)), task.experience(0)
  )
  life, _ = learner.sleep(life)
  how = dataclasses.replace(
    learner.dreamer.how, enabled=True, random_expert=random_expert
  )
  dreamer = dataclasses.replace(learner.dreamer, how=how)
  about = task.experience(1).contexts
  keys = jax.random.split(jax.random.fold_in(life.rng, 99), 3)
  dreamt = propose_lib.propose(dreamer, life, about, each, keys[0])
  omega = importance.importance_scores(dreamer, life, dreamt, keys[1], RULES)
  usable = [d for of_one in dreamt for d in of_one if d.usable]
  tried = reward_lib.run_trials(
    dreamer, life, [(d, 0.0) for d in usable], keys[2]
  )
  reward = {id(x.dream): x.reward for x in tried}
  rows = []
  for i, of_one in enumerate(dreamt):
    own = [j for j, d in enumerate(of_one) if d.usable]
    rewarded = np.array([reward[id(of_one[j])] for j in own])
    row = diversity(of_one, dreamer.tokenizer.pad)
    row |= {'usable': len(own) / len(of_one), 'reward': rewarded.mean()}
    for rule in RULES:
      scored = omega[rule][i][own]
      row[f'{rule}/auc'] = auc(scored, rewarded)
      for rank, rate in enumerate(by_rank(scored, rewarded)):
        row[f'{rule}/rank_{rank}'] = rate
    rows.append(row)
  return _mean(rows)


def report(found: dict[str, list[DreamScores]]) -> str:
  """The tables as Markdown; `found` by arm, a row per seed."""

  def cells(marks: list[DreamScores], keys: Sequence[str]) -> list[str]:
    return [tables.cell([m[k] for m in marks]) for k in keys]

  plain = found['with a random expert']
  quarters = [f'quarter {i + 1}' for i in range(_RANKS)]
  text = (
    f'{len(plain)} seeds; ± is a 95% t interval over them.\n\n'
    'Does omega predict reward? AUC within a context (chance: 0.5), and reward '
    'rate by rank:\n\n'
  )
  text += tables.markdown(
    ['omega', 'AUC', *quarters],
    [
      [
        rule,
        *cells(
          plain,
          [f'{rule}/auc', *(f'{rule}/rank_{i}' for i in range(_RANKS))],
        ),
      ]
      for rule in RULES
    ],
  )
  keys = ('distinct', 'distance', 'usable', 'reward')
  text += '\nDreams about one context, with and without a random expert:\n\n'
  text += tables.markdown(
    ['dreams', *keys],
    [[arm, *cells(marks, keys)] for arm, marks in found.items()],
  )
  apart = [
    {k: a[k] - b[k] for k in keys} for a, b in zip(*found.values(), strict=True)
  ]
  return text + tables.markdown(
    ['with minus without, paired', *keys],
    [['', *(tables.cell([m[k] for m in apart], '+') for k in keys)]],
  )


def define_flags() -> None:
  """Of the command line alone: other commands have flags of these names."""
  config_flags.DEFINE_config_file('config')
  flags.DEFINE_string('out', None, 'A folder.', required=True)
  flags.DEFINE_integer('dreams', 16, 'Dreams of each context.')


def main(_) -> None:
  given = flags.FLAGS
  c: dict[str, Any] = json.loads(given.config.to_json())
  compilation.enable_cache()
  weight = c['dreaming']['random_expert']
  if not weight:
    raise config.ConfigError(
      'dreaming.random_expert=0 leaves nothing to compare; set it above 0.'
    )
  arms = {'with a random expert': weight, 'without': 0.0}
  found = {arm: [] for arm in arms}
  for seed in tqdm.tqdm(c['seeds'], unit='seed'):
    for arm, value in arms.items():
      found[arm].append(measure(c, seed, value, given.dreams))
  out = pathlib.Path(given.out)
  out.mkdir(parents=True, exist_ok=True)
  (out / 'marks.json').write_text(json.dumps(found, indent=1) + '\n')
  (out / 'table.md').write_text(report(found))
  print(report(found))


if __name__ == '__main__':
  define_flags()
  app.run(main)
