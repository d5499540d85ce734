"""Lives one life: a task, a learner, a seed; resumable night by night."""

import dataclasses
import json
import pathlib
import time
from typing import Any

from absl import logging
import jax
import numpy as np
import tqdm

from experiments import bases
from sleep_jax import config
from sleep_jax import learners
from sleep_jax import tasks
from sleep_jax.data import tokenizers
from sleep_jax.learners import learner as learner_lib
from sleep_jax.runtime import accounts
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import metrics as metrics_lib
from sleep_jax.tasks import task as task_lib

Settings = dict[str, Any]

# Sections that only tasks with contexts to dream about need.
_DREAMS = {
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
    params=bases.load(c['base'], model, given.get('data_dir')),
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
      for name, cls in _DREAMS.items()
      if name in c
    },
  )
  check_slots(setup, task.episodes)
  return task, learners.build(c['learner'], setup), ledger


def check_slots(setup: learner_lib.Setup, nights: int) -> None:
  """Refuses, before the first day, a life that would run out of slots."""
  levels = setup.model.levels
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


def live(
  c: Settings, arm: str, seed: int, folder: pathlib.Path, bar_position: int
) -> dict[str, Any]:
  """Lives all episodes and returns the life's summary.

  A life that has ended is not lived again; one that was interrupted goes on
  after the last night that was saved.
  """
  done = folder / 'summary.json'
  if done.exists():
    return json.loads(done.read_text(encoding='utf-8'))
  task, learner, ledger = build(settings_of(c, arm), seed)
  life = learner.init(jax.random.PRNGKey(seed))
  writer = metrics_lib.Writer(folder)
  saved = checkpoint.Checkpoints(folder / 'checkpoints')
  first = 0
  if (night := saved.newest()) is not None:
    life = saved.restore(night, life)
    writer.resume(night)
    ledger.restore(writer.records()[-1]['costs'])
    first = night + 1
    logging.info('%s seed %d: resuming after night %d', arm, seed, night)
  nights = tqdm.trange(
    first,
    task.episodes,
    initial=first,
    total=task.episodes,
    desc=f'{arm} seed {seed}',
    unit='night',
    position=bar_position,
    leave=False,
  )
  for night in nights:
    record, life = _one_day(task, learner, life, night)
    record['costs'] = ledger.totals()
    writer.write(record)
    saved.save(night, life)
    nights.set_postfix(_glance(record['scalars']))
  saved.close()
  writer.close()
  summary = _summary(task, arm, seed, writer.records())
  part = done.with_suffix('.part')
  part.write_text(json.dumps(summary), encoding='utf-8')
  part.replace(done)
  return summary


def _one_day(task, learner, life, night) -> tuple[dict[str, Any], Any]:
  """Wake, sleep, exam; returns the night's record and the life after it."""
  start = time.perf_counter()
  life, woke = learner.wake(life, task.experience(night))
  life, slept = learner.sleep(life)

  def respond(prompts, answers):
    return learner.respond(life, prompts, answers)

  if hasattr(task, 'study_exam'):
    exam = task.study_exam(respond, lambda s: learner.study(life, s), night)
  else:
    exam = task.exam(respond, night)
  scalars = {
    **{f'wake/{k}': v for k, v in woke.items()},
    **{f'sleep/{k}': v for k, v in slept.items()},
    **{f'exam/{k}': v for k, v in exam.metrics.items()},
  }
  if bad := [k for k, v in scalars.items() if not np.isfinite(v)]:
    raise FloatingPointError(
      f'night {night}: {bad[0]} is {scalars[bad[0]]}; lower the learning '
      'rate of the phase it names. The night before is saved.'
    )
  record = {
    'night': night,
    'seconds': time.perf_counter() - start,
    'by_episode': exam.by_episode,
    'scalars': scalars,
  }
  return record, life


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
    'seconds': sum(r['seconds'] for r in records),
  }


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
