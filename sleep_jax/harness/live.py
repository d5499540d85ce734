"""Lives one life: a task, a learner, a seed; resumable phase by phase."""

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

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.learners import base as learner_lib
from sleep_jax.metrics import continual
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.metrics import goodput as goodput_lib
from sleep_jax.metrics import writer as writer_lib
from sleep_jax.metrics import writers as writers_lib
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import distributed
from sleep_jax.runtime import files
from sleep_jax.runtime import finite
from sleep_jax.runtime import profiling
from sleep_jax.runtime import sharding
from sleep_jax.runtime import termination
from sleep_jax.tasks import base as task_lib


def live(
  c: build_lib.Settings,
  arm: str,
  seed: int,
  folder: pathlib.Path,
  bar_position: int,
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
  with sharding.use_mesh(c.get('mesh', {})):
    if not distributed.is_primary():
      return _live(c, arm, seed, folder, bar_position)
    with files.lock_dir(folder):
      summary = _live(c, arm, seed, folder, bar_position)
      files.write(done, json.dumps(summary))
  return summary


def _live(c, arm, seed, folder, bar_position) -> dict[str, Any]:
  spent = goodput_lib.Goodput()
  settings = build_lib.arm_config(c, arm)
  with spent.lost_to('start'):
    task, learner, ledger = build_lib.build(settings, seed)
  text = json.dumps([build_lib.config_identity(settings), seed], sort_keys=True)
  saved = checkpoint.Checkpoints(
    folder / 'checkpoints', hashlib.sha256(text.encode()).hexdigest()
  )
  born = sharding.shard_params(learner.init(jax.random.PRNGKey(seed)))
  now = saved.newest(born)
  if now is None:
    _check_new(folder)
    now = checkpoint.Snapshot(0, '', born, {'records': []})
  else:
    print(f'{arm} seed {seed}: going on after {now}')
    ledger.restore(now.notes['costs'])
    if now.notes['contexts']:
      contexts = task.experience(now.night).contexts
      now = dataclasses.replace(now, life=now.life.replace(contexts=contexts))
  quiet = not distributed.is_primary()
  writer = writer_lib.Writer(
    folder,
    now.notes['records'],
    quiet=quiet,
    sinks=[]
    if quiet
    else writers_lib.build(
      c.get('writers', ()), c['name'], f'{arm}_{seed}', settings
    ),
  )
  window = profiling.Window(
    c.get('profile', {}).get('steps', ''), folder / 'profile'
  )
  ledger.on_phase = window.at
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
  with contextlib.closing(saved), termination.call_on_exit(saved.wait):
    for night in nights:
      now = _run_episode(run, night, now)
      nights.set_postfix(_progress_metrics(writer.records()[-1]['scalars']))
  window.close()
  writer.close()
  return _summary(task, arm, seed, writer.records())


def _check_new(folder: pathlib.Path) -> None:
  """Refuses to begin a life anew where one has been lived."""
  lost = folder / writer_lib.FILE
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
  costs: costs_lib.CostTracker
  saved: checkpoint.Checkpoints
  writer: writer_lib.Writer
  spent: goodput_lib.Goodput
  earlier: dict[str, float]  # Seconds by phase, of processes before this one.

  def shares(self) -> dict[str, float]:
    """Goodput of this process, and what the rest of its time went to."""
    seconds = self.costs.seconds()
    return self.spent.report(
      {phase: s - self.earlier[phase] for phase, s in seconds.items()}
    )


def _run_episode(
  run: _Run, night: int, now: checkpoint.Snapshot
) -> checkpoint.Snapshot:
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
      life = sharding.shard_params(life)
    except finite.NotFinite as e:
      raise finite.NotFinite(f'night {night}: {e}') from e
    told = {f'{phase}/{k}': v for k, v in told.items()}
    _check_finite(f'night {night}: {phase}', told, life)
    scalars |= told
    notes = {
      'records': run.writer.records(),
      'scalars': scalars,
      'costs': run.costs.totals(),
      'seconds': seconds(),
      'contexts': bool(life.contexts),
    }
    now = checkpoint.Snapshot(night, phase, life, notes)
    with run.spent.lost_to('checkpoint'):
      run.saved.save(now)

  def respond(prompts, answers):
    return learner.respond(now.life, prompts, answers)

  if hasattr(task, 'study_exam'):
    exam = task.study_exam(respond, lambda s: learner.study(now.life, s), night)
  else:
    exam = task.exam(respond, night)
  told = {f'eval/{k}': v for k, v in exam.metrics.items()}
  _check_finite(f'night {night}: exam', told, None)
  run.writer.write(
    {
      'night': night,
      'seconds': seconds(),
      'by_episode': exam.by_episode,
      'scalars': scalars | told,
      'costs': run.costs.totals(),
      'goodput': run.shares(),
    }
  )
  return now


def _check_finite(where: str, told: dict[str, float], life: at.Tree) -> None:
  """Refuses figures and weights that are not finite; they are not saved."""
  bad = [f'{k} is {v}' for k, v in told.items() if not np.isfinite(v)]
  if leaf := finite.nonfinite_leaf(life):
    bad.append(f'the first bad leaf is {leaf}')
  if bad:
    raise finite.NotFinite(
      f'{where}: {", ".join(bad)}. Lower the learning rate of this phase; what '
      'was saved before it is intact.'
    )


def _progress_metrics(scalars: dict[str, float]) -> dict[str, str]:
  """The few figures that a progress bar has room for."""
  keys = ('base', 'recall', 'accuracy', 'first', 'held_out_ppl', 'known_ppl')
  return {
    k: f'{scalars[f"eval/{k}"]:.2f}' for k in keys if f'eval/{k}' in scalars
  }


def _summary(task, arm, seed, records) -> dict[str, Any]:
  """What `summary.json` holds of one life."""
  matrix = [r['by_episode'] for r in records]
  last = records[-1]
  exam = {
    k.removeprefix('eval/'): v
    for k, v in last['scalars'].items()
    if k.startswith('eval/')
  }
  return {
    'task': type(task).__name__,
    'task_settings': dataclasses.asdict(task.cfg),
    'learner': arm,
    'seed': seed,
    'final': exam | continual.backward_transfer(matrix),
    'matrix': matrix,
    'costs': last['costs'],
    'goodput': last['goodput'],
    'seconds': sum(r['seconds'] for r in records),
  }
