"""Lives one life: a task, a learner, a seed; resumable phase by phase."""

from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
import tqdm

from experiments import bases
from experiments import plots
from experiments import tables
from sleep_jax import config
from sleep_jax import learners
from sleep_jax import tasks
from sleep_jax import typing as t
from sleep_jax.data import tokenizers
from sleep_jax.learners import learner as learner_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.runtime import accounts
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import distributed
from sleep_jax.runtime import files
from sleep_jax.runtime import goodput
from sleep_jax.runtime import health
from sleep_jax.runtime import metrics as metrics_lib
from sleep_jax.runtime import profiling
from sleep_jax.runtime import sharding
from sleep_jax.runtime import sinks
from sleep_jax.runtime import termination
from sleep_jax.tasks import task as task_lib

Settings = dict[str, Any]

# Settings of how lives are run; what a life becomes does not depend on them.
_HOW = ('workers', 'writers', 'profile', 'mesh')

# Sections that only some experiments need.
_SOME = {
  'recurrence': config.RecurrenceConfig,
  'lora': config.LoraConfig,
  'trial': config.TrialConfig,
  'dreaming': config.DreamingConfig,
}


def settings_of(c: Settings, arm: str) -> Settings:
  """The config of one arm: the common one with the arm's changes put in.

  Raises:
    ConfigError: if an arm changes a section or setting that is not there.
  """
  arms = c['arms']
  change = dict(config.choose(arm, arms, 'arm'))
  out = {k: v for k, v in c.items() if k != 'arms'}
  out['learner'] = change.pop('learner', arm)
  for section, values in change.items():
    if section not in out:
      raise config.ConfigError(
        f'arms.{arm}.{section}: there is no section {section!r} to change; '
        f'known are {", ".join(sorted(out))}.'
      )
    out[section] = {**out[section], **values}
  return out


def build(
  c: Settings, seed: int
) -> tuple[task_lib.Task, learner_lib.Learner, accounts.Ledger]:
  """Everything that one life needs; every bad setting is refused here."""
  given = dict(c['task'])
  task = tasks.build(given.pop('name'), given, seed)
  model = config.ModelConfig.of(c['model'])
  tokenizers.check_fits(task.tokenizer, model.vocab)
  ledger = accounts.Ledger(model, given['length'])
  setup = learner_lib.Setup(
    model=model,
    params=sharding.lay(bases.load(c['base'], model, given.get('data_dir'))),
    tokenizer=task.tokenizer,
    wake=config.from_mapping(config.WakeConfig, c['wake'], 'wake'),
    sleep=config.from_mapping(config.SeedingConfig, c['sleep'], 'sleep'),
    finetune=config.from_mapping(
      config.FinetuneConfig, c['finetune'], 'finetune'
    ),
    ledger=ledger,
    reader=getattr(task, 'reader', None),
    **{
      name: config.from_mapping(cls, c[name], name)
      for name, cls in _SOME.items()
      if name in c
    },
  )
  check_slots(setup, task.episodes)
  check_mesh(setup)
  return task, learners.build(c['learner'], setup), ledger


def check_slots(setup: learner_lib.Setup, nights: int) -> None:
  """Refuses, before the first day, a life that would run out of slots."""
  levels = setup.model.levels
  nights += bool(setup.reader and setup.dreaming.study_night)
  for i, level in enumerate(levels[:-1]):
    slots = levels[i + 1].slots
    # Whatever this level's own sleep prunes is free again.
    frees = bool(levels[i + 1].sleep_every)
    limited = setup.sleep.slot_policy == 'error' and setup.sleep.expand
    if level.sleep_every and limited and not frees and nights > slots:
      raise config.ConfigError(
        f'{nights} nights need {nights} slots, but model.levels[{i + 1}].'
        f'slots={slots} and sleep.slot_policy=error; raise slots, or set '
        'sleep.slot_policy=merge or recycle.'
      )


def check_mesh(setup: learner_lib.Setup) -> None:
  """Refuses, before the first day, what does not divide over the mesh."""
  how = setup.sleep
  sharding.check_rows(
    {
      'wake.lanes': setup.wake.lanes,
      'finetune.batch': setup.finetune.batch,
      'sleep.batch': how.batch,
      'half of sleep.dreams': how.dreams // 2,
      'sleep.prefixes x sleep.group': how.prefixes * how.group,
      'sleep.rollout_groups x sleep.group': how.rollout_groups * how.group,
    }
  )
  sharding.check_leaves(
    jax.eval_shape(lambda: memory_lib.fresh_memory(setup.model))
  )


def identity(c: Settings) -> Settings:
  """The settings that make a life what it is, without how it is run."""
  return {k: v for k, v in c.items() if k not in _HOW}


def live(
  c: Settings, arm: str, seed: int, folder: pathlib.Path, bar_position: int
) -> dict[str, Any]:
  """Lives all episodes and returns the life's summary.

  A life that has ended is not lived again; one that was interrupted goes on
  after the last phase that was saved.

  Raises:
    ConfigError: if what is there is of another config, or cannot be read.
    SaveError: if the disk is full, or may not be written.
    NotFinite: if a loss or a weight is not finite.
  """
  done = folder / 'summary.json'
  if done.exists():
    return json.loads(done.read_text(encoding='utf-8'))
  with sharding.over(c.get('mesh', {})):
    if not distributed.primary():
      return _live(c, arm, seed, folder, bar_position)
    with files.owned(folder):
      summary = _live(c, arm, seed, folder, bar_position)
      files.write(done, json.dumps(summary))
  return summary


def _live(c, arm, seed, folder, bar_position) -> dict[str, Any]:
  spent = goodput.Goodput()
  settings = settings_of(c, arm)
  with spent.losing('start'):
    task, learner, ledger = build(settings, seed)
  text = json.dumps([identity(settings), seed], sort_keys=True)
  saved = checkpoint.Checkpoints(
    folder / 'checkpoints', hashlib.sha256(text.encode()).hexdigest()
  )
  born = sharding.lay(learner.init(jax.random.PRNGKey(seed)))
  now = saved.newest(born)
  if now is None:
    _check_new(folder)
    now = checkpoint.Moment(0, '', born, {'records': []})
  else:
    print(f'{arm} seed {seed}: going on after {now}')
    ledger.restore(now.notes['costs'])
    if now.notes['contexts']:
      contexts = task.experience(now.night).contexts
      now = dataclasses.replace(now, life=now.life.replace(contexts=contexts))
  quiet = not distributed.primary()
  writer = metrics_lib.Writer(
    folder,
    now.notes['records'],
    quiet=quiet,
    sinks=[]
    if quiet
    else sinks.build(
      c.get('writers', ()), c['name'], f'{arm}_{seed}', settings
    ),
  )
  window = profiling.Window(
    c.get('profile', {}).get('steps', ''), folder / 'profile'
  )
  ledger.watch = window.at
  nights = tqdm.trange(
    now.night,
    task.episodes,
    initial=now.night,
    total=task.episodes,
    desc=f'{arm} seed {seed}',
    unit='night',
    position=bar_position,
    leave=False,
    disable=quiet,
  )
  run = _Run(task, learner, ledger, saved, writer, spent, ledger.seconds())
  # Whatever ends the loop, the save under way is finished first.
  with contextlib.closing(saved), termination.finishes(saved.finish):
    for night in nights:
      now = _one_day(run, night, now)
      nights.set_postfix(_glance(writer.records()[-1]['scalars']))
  window.close()
  writer.close()
  return _summary(task, arm, seed, writer.records())


def _check_new(folder: pathlib.Path) -> None:
  """Refuses to begin a life anew where one has been lived."""
  lost = folder / metrics_lib.FILE
  if lost.exists() and lost.stat().st_size:
    raise config.ConfigError(
      f'{lost} tells of nights, but {folder}/checkpoints holds none of them. '
      f'Bring them back, or, to begin again, delete {folder} yourself.'
    )


@dataclasses.dataclass(frozen=True)
class _Run:
  """What lives a life, and what writes it down."""

  task: task_lib.Task
  learner: learner_lib.Learner
  ledger: accounts.Ledger
  saved: checkpoint.Checkpoints
  writer: metrics_lib.Writer
  spent: goodput.Goodput
  earlier: dict[str, float]  # Seconds by phase, of processes before this one.

  def shares(self) -> dict[str, float]:
    """Goodput of this process, and what the rest of its time went to."""
    seconds = self.ledger.seconds()
    return self.spent.report(
      {phase: s - self.earlier[phase] for phase, s in seconds.items()}
    )


def _one_day(
  run: _Run, night: int, now: checkpoint.Moment
) -> checkpoint.Moment:
  """Wake, sleep, exam; saved after each phase, and written down at the end.

  Phases of this night that `now` has behind it are not lived again.
  """
  start = time.perf_counter()
  task, learner = run.task, run.learner
  begun = now.night == night and now.phase
  past = checkpoint.PHASES.index(now.phase) + 1 if begun else 0
  scalars = dict(now.notes['scalars']) if begun else {}
  earlier = now.notes['seconds'] if begun else 0.0

  def seconds() -> float:
    return earlier + time.perf_counter() - start

  verbs = (
    lambda life: learner.wake(life, task.experience(night)),
    learner.sleep,
  )
  for phase, verb in list(zip(checkpoint.PHASES, verbs, strict=True))[past:]:
    try:
      life, told = verb(now.life)
      life = sharding.lay(life)
    except health.NotFinite as e:
      raise health.NotFinite(f'night {night}: {e}') from e
    told = {f'{phase}/{k}': v for k, v in told.items()}
    _check_finite(f'night {night}: {phase}', told, life)
    scalars |= told
    notes = {
      'records': run.writer.records(),
      'scalars': scalars,
      'costs': run.ledger.totals(),
      'seconds': seconds(),
      'contexts': bool(life.contexts),
    }
    now = checkpoint.Moment(night, phase, life, notes)
    with run.spent.losing('checkpoint'):
      run.saved.save(now)

  def respond(prompts, answers):
    return learner.respond(now.life, prompts, answers)

  if hasattr(task, 'study_exam'):
    exam = task.study_exam(respond, lambda s: learner.study(now.life, s), night)
  else:
    exam = task.exam(respond, night)
  told = {f'exam/{k}': v for k, v in exam.metrics.items()}
  _check_finite(f'night {night}: exam', told, None)
  run.writer.write(
    {
      'night': night,
      'seconds': seconds(),
      'by_episode': exam.by_episode,
      'scalars': scalars | told,
      'costs': run.ledger.totals(),
      'goodput': run.shares(),
    }
  )
  return now


def _check_finite(where: str, told: dict[str, float], life: t.Tree) -> None:
  """Refuses figures and weights that are not finite; they are not saved."""
  bad = [f'{k} is {v}' for k, v in told.items() if not np.isfinite(v)]
  if leaf := health.bad_leaf(life):
    bad.append(f'the first bad leaf is {leaf}')
  if bad:
    raise health.NotFinite(
      f'{where}: {", ".join(bad)}. Lower the learning rate of this phase; what '
      'was saved before it is intact.'
    )


def _glance(scalars: dict[str, float]) -> dict[str, str]:
  """The few figures that a progress bar has room for."""
  keys = ('base', 'recall', 'accuracy', 'first', 'held_out_ppl', 'known_ppl')
  return {
    k: f'{scalars[f"exam/{k}"]:.2f}' for k in keys if f'exam/{k}' in scalars
  }


def _summary(task, arm, seed, records) -> dict[str, Any]:
  """What `summary.json` holds of one life."""
  matrix = [r['by_episode'] for r in records]
  last = records[-1]
  exam = {
    k.removeprefix('exam/'): v
    for k, v in last['scalars'].items()
    if k.startswith('exam/')
  }
  return {
    'task': type(task).__name__,
    'task_settings': dataclasses.asdict(task.cfg),
    'learner': arm,
    'seed': seed,
    'final': exam | backward_transfer(matrix),
    'matrix': matrix,
    'costs': last['costs'],
    'goodput': last['goodput'],
    'seconds': sum(r['seconds'] for r in records),
  }


def tell(
  lives: Sequence[dict[str, Any]], c: Settings, out: pathlib.Path
) -> str:
  """Writes table.md, lives.json and pictures of all lives into `out`."""
  table = tables.report(lives, c['reference'])
  files.write(out / 'table.md', table)
  files.write(
    out / 'lives.json',
    '[\n' + ',\n'.join(json.dumps(life) for life in lives) + '\n]\n',
  )
  plots.recall_matrices(lives, out / 'recall.png')
  plots.retention(lives, out / 'retention.png')
  return table


def backward_transfer(matrix: list[list[float]]) -> dict[str, float]:
  """Transfer and forgetting of the recall matrix `matrix[night][episode]`.

  backward_transfer: mean over earlier episodes of final minus just-learned
  score (Lopez-Paz and Ranzato 2017); forgetting: of best-ever minus final.
  """
  last = matrix[-1]
  if len(last) < 2:
    return {'backward_transfer': 0.0, 'forgetting': 0.0}
  earlier = range(len(last) - 1)
  learned = np.mean([last[e] - matrix[e][e] for e in earlier])
  best = [max(row[e] for row in matrix[e:]) for e in earlier]
  return {
    'backward_transfer': float(learned),
    'forgetting': float(np.mean([best[e] - last[e] for e in earlier])),
  }
