"""Trains one hybrid to sleep by recurrence on a puzzle, and examines it.

The counterpart of `experiments.live` for configs that have a `puzzle`. Every
arm of a seed sees the same sequences in the same order.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
import numpy as np  # noqa: E402
import tqdm  # noqa: E402

from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import depth
from sleep_jax.harness import tables
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import training as recurrent_training
from sleep_jax.models import transformer
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import files
from sleep_jax.runtime import finite
from sleep_jax.runtime import termination
from sleep_jax.tasks import algorithmic as algorithmic_tasks
from sleep_jax.tasks.algorithmic import base as algorithmic
from sleep_jax.training import optimizers

matplotlib.use('Agg')

_STEPS_PER_CALL = 20
_FILE = 'metrics.jsonl'


@dataclasses.dataclass(frozen=True)
class Plan:
  """All that one arm is."""

  puzzle: algorithmic.WindowTask
  model: config.ModelConfig
  recurrence: recurrence_config.RecurrenceConfig
  training: recurrence_config.TrainingConfig

  def with_passes(self, passes: int) -> recurrence_config.RecurrenceConfig:
    """The same sleep with another N."""
    return dataclasses.replace(self.recurrence, passes=passes)


def build(c: build_lib.Settings, seed: int) -> Plan:
  """The arm of `c`; every bad setting is refused here."""
  del seed  # What a puzzle asks follows from the training's own generator.
  given = dict(c['puzzle'])
  puzzle = algorithmic_tasks.build(given.pop('name'), given)
  plan = Plan(
    puzzle,
    config.ModelConfig.from_mapping(c['model']),
    config.from_mapping(
      recurrence_config.RecurrenceConfig, c['recurrence'], 'recurrence'
    ),
    config.from_mapping(
      recurrence_config.TrainingConfig, c['training'], 'training'
    ),
  )
  if puzzle.vocab > plan.model.vocab:
    raise config.ConfigError(
      f'model.vocab={plan.model.vocab} is below the {puzzle.vocab} tokens of '
      f'puzzle {c["puzzle"]["name"]!r}; raise it.'
    )
  recurrent_training.check(plan.model, plan.recurrence)
  return plan


def train_flops(plan: Plan) -> float:
  """FLOPs of a training step, mean over the passes it may draw."""
  drawn = plan.training.random_passes or (plan.recurrence.passes,)
  rows = plan.training.batch
  return (
    3.0
    * rows
    * float(
      np.mean(
        [
          recurrent_training.forward_flops(
            plan.model, plan.with_passes(n), plan.puzzle
          )
          for n in drawn
        ]
      )
    )
  )


def _batches(plan: Plan, rng: np.random.Generator, steps: int):
  drawn = [plan.puzzle.batch(rng, plan.training.batch) for _ in range(steps)]
  return jax.tree.map(lambda *x: np.stack(x), *drawn)


def examine(
  plan: Plan,
  how: recurrence_config.RecurrenceConfig,
  params,
  rng: np.random.Generator,
  rows: int,
) -> dict[str, float]:
  """Marks over `rows` fresh sequences, and the passes that they took."""
  told, size = [], min(rows, plan.training.eval_rows)
  for _ in range(-(-rows // size)):
    batch = plan.puzzle.batch(rng, size, exam=True)
    verdict = recurrent_training.evaluate_batch(plan.model, how, params, batch)
    marks = plan.puzzle.metrics(
      batch, np.asarray(verdict.chosen), np.asarray(verdict.nll)
    )
    told.append(marks | {'passes': float(verdict.passes.mean())})
  keys = sorted({k for marks in told for k in marks})
  return {
    k: float(np.mean([marks[k] for marks in told if k in marks])) for k in keys
  }


def live(
  c: build_lib.Settings, arm: str, seed: int, folder: pathlib.Path, bar: int
) -> dict[str, Any]:
  """Trains and examines; saved at every exam, and gone on with from there."""
  done = folder / 'summary.json'
  if done.exists():
    return json.loads(done.read_text(encoding='utf-8'))
  with files.lock_dir(folder):
    summary = _live(c, arm, seed, folder, bar)
    files.write(done, json.dumps(summary))
  return summary


def _live(c, arm, seed, folder, bar) -> dict[str, Any]:
  settings = build_lib.arm_config(c, arm)
  plan = build(settings, seed)
  training = plan.training
  text = json.dumps([build_lib.config_identity(settings), seed], sort_keys=True)
  saved = checkpoint.Checkpoints(
    folder / 'checkpoints', hashlib.sha256(text.encode()).hexdigest()
  )
  params = recurrent_training.init(
    plan.model, plan.recurrence, jax.random.key(seed)
  )
  born = {'params': params, 'opt': optimizers.muon_adamw(training).init(params)}
  now = saved.newest(born) or checkpoint.Snapshot(
    -1, checkpoint.PHASES[-1], born, {'records': []}
  )
  every = training.steps // training.num_evals
  size = transformer.count(params)
  with contextlib.closing(saved), termination.finishes(saved.finish):
    for number in tqdm.trange(
      now.night + 1,
      training.num_evals,
      initial=now.night + 1,
      total=training.num_evals,
      desc=f'{arm} seed {seed}',
      unit='eval',
      position=bar,
      leave=False,
    ):
      now = _until_exam(plan, seed, number, every, now)
      saved.save(now)
      lines = [json.dumps(r) + '\n' for r in now.notes['records']]
      files.write(folder / _FILE, ''.join(lines))
  records = now.notes['records']
  return {
    'task': settings['puzzle']['name'],
    'learner': arm,
    'seed': seed,
    'final': _final_exam(plan, seed, now.life['params']),
    'chances': plan.puzzle.chances(),
    'records': records,
    'parameters': size,
    'steps': training.steps,
    'tokens': training.steps * training.batch * _tokens(plan.puzzle),
    'flops': training.steps * train_flops(plan),
    'seconds': sum(r['seconds'] for r in records),
  }


def _tokens(puzzle: algorithmic.WindowTask) -> int:
  """Of one sequence, padding included."""
  return puzzle.windows * puzzle.window + puzzle.prediction


def _until_exam(
  plan: Plan, seed: int, number: int, every: int, now: checkpoint.Snapshot
) -> checkpoint.Snapshot:
  """The steps up to exam `number`, and that exam."""
  start, loss = time.perf_counter(), []
  params, opt = now.life['params'], now.life['opt']
  rng = np.random.default_rng([seed, 1, number])
  passes = np.random.default_rng([seed, 2, number])
  choices = plan.training.random_passes or (plan.recurrence.passes,)
  for first in range(0, every, _STEPS_PER_CALL):
    steps = min(_STEPS_PER_CALL, every - first)
    how = plan.with_passes(int(passes.choice(choices)))
    params, opt, told = recurrent_training.train_steps(
      plan.model, how, plan.training, params, opt, _batches(plan, rng, steps)
    )
    loss.append(jax.device_get(told))
    at = number * every + first
    finite.check_finite('training', loss[-1], params, first_step=at)
  marks = examine(
    plan,
    plan.recurrence,
    params,
    np.random.default_rng([seed, 3]),
    plan.training.eval_rows,
  )
  record = {
    'step': (number + 1) * every,
    'train_loss': float(np.concatenate(loss)[-_STEPS_PER_CALL:].mean()),
    'seconds': time.perf_counter() - start,
    **marks,
  }
  return checkpoint.Snapshot(
    number,
    checkpoint.PHASES[-1],
    {'params': params, 'opt': opt},
    {'records': [*now.notes['records'], record]},
  )


def _final_exam(plan: Plan, seed: int, params) -> dict[str, float]:
  """The last exam, of four times the rows; also with other N, if asked."""

  def ask(how: recurrence_config.RecurrenceConfig) -> dict[str, float]:
    rng = np.random.default_rng([seed, 4])
    return examine(plan, how, params, rng, 4 * plan.training.eval_rows)

  final = ask(plan.recurrence)
  for n in plan.training.eval_passes:
    more = ask(plan.with_passes(n))
    final |= {f'{name}@{n}': value for name, value in more.items()}
  return final


def tell(
  lives: Sequence[dict[str, Any]], c: build_lib.Settings, out: pathlib.Path
) -> str:
  """Writes table.md, lives.json and pictures into `out`."""
  text = report(lives, c['reference'], c['headline'])
  files.write(out / 'table.md', text)
  files.write(
    out / 'lives.json',
    '[\n' + ',\n'.join(json.dumps(life) for life in lives) + '\n]\n',
  )
  curves(lives, c['headline'][0], out / 'curves.png')
  if len(depth.chances(lives, c['headline'][0])) > 1:
    depth.draw(lives, c['headline'][0], out / 'depths.png')
  return text


def report(
  lives: Sequence[dict[str, Any]], reference: str, headline: Sequence[str]
) -> str:
  """The whole report as Markdown."""
  arms = tables.by_arm(lives)
  counts = sorted({len(of_arm) for of_arm in arms.values()})
  text = f'{lives[0]["task"]}, {"-".join(map(str, counts))} seed(s)'
  text += '.\n\n' if counts == [1] else '; ± is a 95% t interval.\n\n'
  # Columns such as exact@4, where an arm was examined with another N.
  extra = sorted(
    {k for l in lives for k in l['final'] if k.split('@')[0] == headline[0]}
    - {headline[0]}
  )
  columns = [*headline, *extra, 'passes']
  rows = []
  if all(life['chances'] == lives[0]['chances'] for life in lives):
    chance = lives[0]['chances']
    known = [f'{chance[k]:.3f}' if k in chance else '' for k in columns]
    rows.append(['(chance)', *known])
  for arm, of_arm in arms.items():
    finals = [life['final'] for life in of_arm.values()]
    rows.append(
      [
        arm,
        *(
          tables.cell([f[k] for f in finals]) if k in finals[0] else ''
          for k in columns
        ),
      ]
    )
  text += tables.markdown(['arm', *columns], rows)
  if reference in arms and len(arms) > 1:
    text += f'\nPaired by seed:\n\n{_differences(arms, reference, headline)}'
  if by_depth := depth.report(lives, headline[0], reference):
    text += f'\n{by_depth}'
  return text + f'\nTraining, mean over seeds:\n\n{_costs(arms)}'


def _differences(arms, reference, headline) -> str:
  """`reference` minus every other arm, over the seeds that both have."""
  rows = []
  for arm, of_arm in arms.items():
    pairs = [
      (arms[reference][seed]['final'], life['final'])
      for seed, life in of_arm.items()
      if seed in arms[reference]
    ]
    if arm != reference and pairs:
      cells = (
        tables.cell([a[k] - b[k] for a, b in pairs], '+') for k in headline
      )
      rows.append([arm, *cells])
  return tables.markdown([f'{reference} minus', *headline], rows)


def _costs(arms) -> str:
  """What the arms were trained with."""
  rows = []
  for arm, of_arm in arms.items():
    one = next(iter(of_arm.values()))
    seconds = np.mean([life['seconds'] for life in of_arm.values()])
    rows.append(
      [
        arm,
        f'{one["parameters"]:,}',
        f'{one["steps"]}',
        f'{one["tokens"] / 1e6:.2f}M',
        f'{one["flops"] / 1e12:.2f}T',
        f'{seconds:.0f}',
      ]
    )
  header = ['arm', 'parameters', 'steps', 'tokens', 'FLOPs', 'seconds']
  return tables.markdown(header, rows)


def curves(
  lives: Sequence[dict[str, Any]], mark: str, path: pathlib.Path
) -> None:
  """`mark` over training FLOPs and tokens, mean over seeds."""
  figure, axes = plt.subplots(
    1, 2, figsize=(10, 4), sharey=True, layout='constrained'
  )
  for index, (arm, of_arm) in enumerate(tables.by_arm(lives).items()):
    some = list(of_arm.values())
    mean = np.mean([[r[mark] for r in l['records']] for l in some], axis=0)
    share = np.array([r['step'] for r in some[0]['records']])
    share = share / some[0]['steps']
    colour = plt.get_cmap('tab20').colors[index % 20]
    for axis, total in zip(axes, (some[0]['tokens'], some[0]['flops'])):
      axis.plot(share * total, mean, marker='.', label=arm, color=colour)
  axes[0].set(xlabel='training tokens', ylabel=mark)
  axes[1].set(xlabel='training FLOPs')
  for axis in axes:
    axis.grid(alpha=0.3)
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right center')
  figure.savefig(path, dpi=120)
  plt.close(figure)
