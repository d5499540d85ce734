"""Lives one life: a task, a learner, a seed; resumable phase by phase."""

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
import tqdm

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import student as student_lib
from sleep_jax.harness import summary as summary_lib
from sleep_jax.learners import base as learner_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.metrics import goodput as goodput_lib
from sleep_jax.metrics import observation
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
from sleep_jax.weights import npz


def live(
  c: build_lib.Settings,
  arm: str,
  seed: int,
  folder: pathlib.Path,
  bar_position: int,
) -> dict[str, Any]:
  """Lives all episodes and returns the summary of the life.

  A life that has ended is not lived again; one that was interrupted continues
  after the last phase that was saved.

  Args:
    c: of the experiment.
    arm: name of a variant in `c['arms']`.
    seed: of the task's stream and of the life.
    folder: of this life alone: checkpoints, metrics, summary.
    bar_position: line of the progress bar.

  Raises:
    ConfigError: if the folder is of another config, or cannot be read.
    SaveError: if the disk is full, or may not be written.
    NotFinite: if a loss or a weight is not finite.
  """
  done = folder / 'summary.json'
  settings = build_lib.arm_config(c, arm)
  if done.exists():
    summary = summary_lib.read(done, build_lib.life_digest(settings, seed))
    if not _export_is_missing(settings):
      return summary
  with sharding.use_mesh(c.get('mesh', {})):
    if not distributed.is_primary():
      return _live(settings, arm, seed, folder, bar_position)
    with files.lock_dir(folder):
      summary = _live(settings, arm, seed, folder, bar_position)
      files.write(done, json.dumps(summary))
  return summary


def _live(
  c: build_lib.Settings,
  arm: str,
  seed: int,
  folder: pathlib.Path,
  bar_position: int,
) -> dict[str, Any]:
  """`live` of an arm's config, within the mesh and the lock."""
  goodput = goodput_lib.Goodput()
  with goodput.lost_to('start'):
    task, learner, costs = build_lib.build(c, seed)
  digest = build_lib.life_digest(c, seed)
  checkpoints = checkpoint.Checkpoints(
    folder / 'checkpoints', digest, base_digest(learner)
  )
  title = f'{arm} seed {seed}'
  snapshot = _first_snapshot(checkpoints, task, learner, seed)
  if snapshot.phase:
    print(f'{title}: going on after {snapshot}')
    costs.restore(snapshot.notes['costs'])
  else:
    _check_new(folder)
  writer = _writer(c, f'{arm}_{seed}', folder, snapshot)
  window = profiling.Window(
    c.get('profile', {}).get('steps', ''), folder / 'profile'
  )
  costs.on_phase = window.at
  episodes = tqdm.trange(
    snapshot.night,
    task.episodes,
    initial=snapshot.night,
    total=task.episodes,
    desc=title,
    unit='night',
    position=bar_position,
    leave=False,
    disable=not distributed.is_primary(),
  )
  run = _Run(
    task, learner, costs, checkpoints, writer, goodput, costs.seconds()
  )
  # Whatever ends the loop, the save under way is completed first.
  with (
    contextlib.closing(checkpoints),
    termination.call_on_exit(checkpoints.wait),
  ):
    for episode in episodes:
      snapshot = _run_episode(run, episode, snapshot)
      episodes.set_postfix(run.progress_metrics())
  window.close()
  writer.close()
  if c.get('export'):
    _export(snapshot.life, pathlib.Path(c['export']))
  return summary_lib.summarize(
    task, c['task'], writer.records(), snapshot.life.model.params
  ) | {'learner': arm, 'seed': seed, 'identity': digest}


def base_digest(learner: learner_lib.Learner) -> str:
  """Of the base, if a life never changes it; else ''."""
  if learner.trains_backbone:
    return ''
  setup = learner.setup
  return setup.base_digest or checkpoint.weights_digest(setup.model.params)


def _first_snapshot(
  checkpoints: checkpoint.Checkpoints,
  task: task_lib.Task,
  learner: learner_lib.Learner,
  seed: int,
) -> checkpoint.Snapshot:
  """The newest snapshot; of a new life one with phase '' and no notes."""
  life = sharding.shard_params(learner.init(jax.random.PRNGKey(seed)))
  snapshot = checkpoints.newest(life)
  if snapshot is None:
    return checkpoint.Snapshot(0, '', life, {'records': None})
  life = snapshot.life.replace(frames=frames_of(snapshot))
  if snapshot.notes['contexts']:
    contexts = task.experience(snapshot.night).contexts
    life = life.replace(contexts=contexts)
  return dataclasses.replace(snapshot, life=life)


def frames_of(
  snapshot: checkpoint.Snapshot,
) -> tuple[experience_lib.Frame, ...]:
  """The `Life.frames` of a snapshot; its arrays do not hold them."""
  return _as_tuples(snapshot.notes['frames'])


def _as_tuples(value: Any) -> Any:
  """Nested lists, as JSON has them, as tuples."""
  if isinstance(value, (list, tuple)):
    return tuple(map(_as_tuples, value))
  return value


def _check_new(folder: pathlib.Path) -> None:
  """Refuses a new life in a folder with records but no checkpoint."""
  records = folder / writer_lib.FILE
  if records.exists() and records.stat().st_size:
    raise config.ConfigError(
      f'{records} tells of nights, but {folder}/checkpoints holds none of '
      f'them. Bring them back, or, to begin again, delete {folder} yourself.'
    )


def _writer(
  c: build_lib.Settings,
  life: str,
  folder: pathlib.Path,
  snapshot: checkpoint.Snapshot,
) -> writer_lib.Writer:
  """Where the records go; processes other than the first write nothing."""
  sinks = None
  if distributed.is_primary():
    sinks = writers_lib.build(folder, life, c)
  return writer_lib.Writer(folder, snapshot.notes['records'], sinks)


def _export_is_missing(c: build_lib.Settings) -> bool:
  """Whether an export is asked for and not there."""
  return bool(c.get('export')) and not pathlib.Path(c['export']).exists()


def _export(life: life_lib.Life, path: pathlib.Path) -> None:
  """Writes the life's backbone weights, a LoRA merged, as a base."""
  model = life.model.merged()
  params = sharding.fetch(model.params)
  if distributed.is_primary():
    npz.save(path, params, model.cfg)
    print(f'{path}: the weights of this life')


@dataclasses.dataclass(frozen=True)
class _Run:
  """What the episodes of a life are run with, and recorded by."""

  task: task_lib.Task
  learner: learner_lib.Learner
  costs: costs_lib.CostTracker
  checkpoints: checkpoint.Checkpoints
  writer: writer_lib.Writer
  goodput: goodput_lib.Goodput
  earlier: dict[str, float]  # Seconds by phase, of processes before this one.

  def goodput_shares(self) -> dict[str, float]:
    """Goodput of this process, and the shares of the rest of its time."""
    seconds = self.costs.seconds()
    return self.goodput.report(
      {phase: s - self.earlier[phase] for phase, s in seconds.items()}
    )

  def progress_metrics(self) -> dict[str, str]:
    """The headline of the last record, for a progress bar."""
    scalars = self.writer.records()[-1]['scalars']
    return {
      k: f'{scalars[f"eval/{k}"]:.2f}'
      for k in self.task.headline
      if f'eval/{k}' in scalars
    }


def _run_episode(
  run: _Run, episode: int, snapshot: checkpoint.Snapshot
) -> checkpoint.Snapshot:
  """Wake, sleep, evaluate; saved after each phase, recorded at the end.

  Phases of this episode that precede `snapshot` are not run again.
  """
  start = time.perf_counter()
  resumed = snapshot.night == episode and snapshot.phase
  done = checkpoint.PHASES.index(snapshot.phase) + 1 if resumed else 0
  scalars = dict(snapshot.notes['scalars']) if resumed else {}
  dreams = list(snapshot.notes.get('dreams', ())) if resumed else []
  earlier = snapshot.notes['seconds'] if resumed else 0.0

  def seconds() -> float:
    return earlier + time.perf_counter() - start

  for phase in checkpoint.PHASES[done:]:
    observer = writer_lib.PhaseObserver(
      run.writer, run.costs, run.task.tokenizer.decode, episode, phase
    )
    with observation.use(observer):
      life, metrics = _run_phase(run, episode, phase, snapshot.life)
    # New objects: the checkpoint of the phase before may still be written.
    scalars, dreams = scalars | metrics, dreams + observer.dreams
    notes = {
      'records': run.writer.mark(),
      'scalars': scalars,
      'dreams': dreams,
      'costs': run.costs.totals(),
      'seconds': seconds(),
      'contexts': bool(life.contexts),
      'frames': life.frames,
    }
    snapshot = checkpoint.Snapshot(episode, phase, life, notes)
    with run.goodput.lost_to('checkpoint'):
      run.checkpoints.save(snapshot)
  student = student_lib.Student(run.learner, snapshot.life)
  result = run.task.evaluate(student, episode)
  metrics = {f'eval/{k}': v for k, v in result.metrics.items()}
  _check_finite(f'night {episode}: eval', metrics, None)
  run.writer.write(
    {
      'night': episode,
      'seconds': seconds(),
      'by_episode': result.by_episode,
      'scalars': scalars | metrics,
      'dreams': dreams,
      'costs': run.costs.totals(),
      'goodput': run.goodput_shares(),
    }
  )
  return snapshot


def _run_phase(
  run: _Run, episode: int, phase: str, life: life_lib.Life
) -> tuple[life_lib.Life, at.Metrics]:
  """One phase of `checkpoint.PHASES`: the life after it, and its metrics."""
  try:
    if phase == 'wake':
      life, metrics = run.learner.wake(life, run.task.experience(episode))
    else:
      life, metrics = run.learner.sleep(life)
    life = sharding.shard_params(life)
  except finite.NotFinite as e:
    raise finite.NotFinite(f'night {episode}: {e}') from e
  metrics = {f'{phase}/{k}': v for k, v in metrics.items()}
  changed = life
  if not run.learner.trains_backbone:
    _check_base(run.learner, life)
    changed = life.replace(model=life.model.replace(params={}))
  _check_finite(f'night {episode}: {phase}', metrics, changed)
  return life, metrics


def _check_base(learner: learner_lib.Learner, life: life_lib.Life) -> None:
  """Refuses a life whose backbone is not the base, which is not saved.

  Leaves are compared as buffers: there is one copy of the base.
  """
  base = jax.tree.leaves(learner.setup.model.params)
  own = jax.tree.leaves(life.model.params)
  if len(own) != len(base) or any(a is not b for a, b in zip(own, base)):
    raise config.ConfigError(
      f'learner {learner.name} says that it does not train the backbone, but '
      'its life has other weights than the base; let its trains_backbone be '
      'True.'
    )


def _check_finite(where: str, metrics: at.Metrics, life: at.Tree) -> None:
  """Refuses metrics and weights that are not finite; they are not saved."""
  bad = [f'{k} is {v}' for k, v in metrics.items() if not np.isfinite(v)]
  if leaf := finite.nonfinite_leaf(life):
    bad.append(f'the first bad leaf is {leaf}')
  if bad:
    raise finite.NotFinite(
      f'{where}: {", ".join(bad)}. Lower the learning rate of this phase; what '
      'was saved before it is intact.'
    )
