"""Does the importance of a dream predict its reward, and do dreams differ?

After one night, every dream about the next day's contexts is scored by every
importance rule and tried; once with a random expert mixed in, once without.

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
import numpy as np
import tqdm

from experiments import command_line
from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import tables
from sleep_jax.learners import sleep
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
  positive, negative = omega[rewarded], omega[~rewarded]
  if not len(positive) or not len(negative):
    return float('nan')
  difference = positive[:, None] - negative[None]
  return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def by_rank(omega: np.ndarray, rewarded: np.ndarray) -> list[float]:
  """Reward rate of each quarter of the ranking, the most important first."""
  order = np.argsort(-omega, kind='stable')
  return [
    float(part.mean()) for part in np.array_split(rewarded[order], _RANKS)
  ]


def diversity(dreams: Sequence[propose_lib.Dream], pad: int) -> DreamScores:
  """Share of distinct dreams, and mean relative edit distance of two."""
  tokens = [d.tokens for d in dreams]
  longest = max(1, *map(len, tokens))
  rows = np.full((len(tokens), longest), pad, np.int32)
  for row, of_dream in zip(rows, tokens, strict=True):
    row[: len(of_dream)] = of_dream
  lengths = np.array([len(of_dream) for of_dream in tokens], np.int32)
  a, b = np.triu_indices(len(tokens), 1)
  distance = rewards.levenshtein(rows[a], lengths[a], rows[b], lengths[b])
  longer = np.maximum(np.maximum(lengths[a], lengths[b]), 1)
  return {
    'distinct': len({tuple(of_dream) for of_dream in tokens}) / len(tokens),
    'distance': float((np.asarray(distance) / longer).mean()),
  }


def _mean(rows: Sequence[DreamScores]) -> DreamScores:
  """Means by key; nan, a context without a comparison, does not count."""
  return {k: float(np.nanmean([r[k] for r in rows])) for k in rows[0]}


def measure(
  c: build_lib.Settings, seed: int, random_expert: float, num_dreams: int
) -> DreamScores:
  """One life, one night: scores of all its dreams, means over contexts.

  Args:
    c: of an experiment with an arm `sleep` and a task with contexts.
    seed: of the life.
    random_expert: gate of the random expert.
    num_dreams: of every context.
  """
  settings = build_lib.arm_config(c, 'sleep')
  settings['dreaming'] = settings['dreaming'] | {'enabled': False}
  task, learner, _ = build_lib.build(settings, seed)
  if not isinstance(learner, sleep.Sleep) or learner.dreamer is None:
    raise config.ConfigError(
      'The arm `sleep` has no dreams; use a config with learner sleep, and a '
      'task with contexts to dream about.'
    )
  life, _ = learner.wake(
    learner.init(jax.random.PRNGKey(seed)), task.experience(0)
  )
  life, _ = learner.sleep(life)
  cfg = dataclasses.replace(
    learner.dreamer.cfg, enabled=True, random_expert=random_expert
  )
  dreamer = dataclasses.replace(learner.dreamer, cfg=cfg)
  contexts = task.experience(1).contexts
  keys = jax.random.split(jax.random.fold_in(life.rng, 99), 3)
  dreams = propose_lib.propose(
    dreamer, life.model, contexts, num_dreams, keys[0]
  )
  omega = importance.importance_scores(
    dreamer, life.model, dreams, keys[1], RULES
  )
  usable = [d for of_context in dreams for d in of_context if d.usable]
  results = reward_lib.run_trials(
    dreamer, life.model, [(d, 0.0) for d in usable], keys[2]
  )
  reward = {id(x.dream): x.reward for x in results}
  rows = []
  for i, of_context in enumerate(dreams):
    scores = {rule: omega[rule][i] for rule in RULES}
    pad = dreamer.tokenizer.pad
    rows.append(_of_context(of_context, scores, reward, pad))
  return _mean(rows)


def _of_context(
  dreams: Sequence[propose_lib.Dream],
  omega: dict[str, np.ndarray],
  reward: dict[int, bool],
  pad: int,
) -> DreamScores:
  """Scores of one context's dreams.

  Args:
    dreams: m of them.
    omega: importance `[m]` by rule.
    reward: of usable dreams, by id.
    pad: a token.
  """
  usable = [i for i, d in enumerate(dreams) if d.usable]
  rewarded = np.array([reward[id(dreams[i])] for i in usable])
  row = diversity(dreams, pad)
  row |= {'usable': len(usable) / len(dreams), 'reward': rewarded.mean()}
  for rule in RULES:
    of_rule = omega[rule][usable]
    row[f'{rule}/auc'] = auc(of_rule, rewarded)
    for rank, rate in enumerate(by_rank(of_rule, rewarded)):
      row[f'{rule}/rank_{rank}'] = rate
  return row


def report(scores: dict[str, list[DreamScores]]) -> str:
  """The tables as Markdown; `scores` by arm, a row per seed."""

  def cells(rows: list[DreamScores], keys: Sequence[str]) -> list[str]:
    return [tables.cell([row[k] for row in rows]) for k in keys]

  with_expert = scores['with a random expert']
  quarters = [f'quarter {i + 1}' for i in range(_RANKS)]
  text = (
    f'{len(with_expert)} seeds; ± is a 95% t interval over them.\n\n'
    'Does omega predict reward? AUC within a context (chance: 0.5), and reward '
    'rate by rank:\n\n'
  )
  by_rule = {
    rule: [f'{rule}/auc', *(f'{rule}/rank_{i}' for i in range(_RANKS))]
    for rule in RULES
  }
  text += tables.markdown(
    ['omega', 'AUC', *quarters],
    [[rule, *cells(with_expert, keys)] for rule, keys in by_rule.items()],
  )
  keys = ('distinct', 'distance', 'usable', 'reward')
  text += '\nDreams about one context, with and without a random expert:\n\n'
  text += tables.markdown(
    ['dreams', *keys],
    [[arm, *cells(rows, keys)] for arm, rows in scores.items()],
  )
  differences = [
    {k: a[k] - b[k] for k in keys}
    for a, b in zip(*scores.values(), strict=True)
  ]
  return text + tables.markdown(
    ['with minus without, paired', *keys],
    [['', *(tables.cell([d[k] for d in differences], '+') for k in keys)]],
  )


def define_flags() -> None:
  """Called by `main` alone: other commands have flags of the same names."""
  command_line.define_config()
  flags.DEFINE_string('out', None, 'A folder.', required=True)
  flags.DEFINE_integer('dreams', 16, 'Dreams of each context.')


def main(_) -> None:
  values = flags.FLAGS
  c: dict[str, Any] = json.loads(values.config.to_json())
  compilation.enable_cache()
  weight = c['dreaming']['random_expert']
  if not weight:
    raise config.ConfigError(
      'dreaming.random_expert=0 leaves nothing to compare; set it above 0.'
    )
  arms = {'with a random expert': weight, 'without': 0.0}
  scores = {arm: [] for arm in arms}
  for seed in tqdm.tqdm(c['seeds'], unit='seed'):
    for arm, value in arms.items():
      scores[arm].append(measure(c, seed, value, values.dreams))
  out = pathlib.Path(values.out)
  out.mkdir(parents=True, exist_ok=True)
  (out / 'scores.json').write_text(json.dumps(scores, indent=1) + '\n')
  (out / 'table.md').write_text(report(scores))
  print(report(scores))


if __name__ == '__main__':
  define_flags()
  app.run(main, flags_parser=command_line.parse)
