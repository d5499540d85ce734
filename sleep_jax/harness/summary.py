"""`summary.json`: everything that a report needs of one life."""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import untrusted
from sleep_jax.metrics import continual
from sleep_jax.models import transformer
from sleep_jax.tasks import base as task_lib

# Phases whose optimizer steps change the life.
_TRAINING = ('wake', 'update')
# Of every summary.
_KEYS = {
  'learner', 'seed', 'task', 'headline', 'columns', 'final', 'matrix', 'curve',
}  # fmt: skip


def summarize(
  task: task_lib.Task,
  settings: dict[str, Any],
  records: Sequence[dict[str, Any]],
  params: at.Params,
) -> dict[str, Any]:
  """The summary of a life, from its task and the records of its episodes.

  `final` holds the metrics after the last night; `matrix[i][j]` the score of
  episode j after night i, empty where episodes have no score of their own;
  `curve` the metrics after every night, beside the steps, tokens and FLOPs of
  training so far, and what all phases but evaluations have `spent`; `costs`
  tokens, FLOPs, seconds and steps by phase;
  `task_settings` what the config says (`settings`) before what the task made of
  it, such as the folder in which a base's tokenizer lies on this machine.
  """
  matrix = [r['by_episode'] for r in records if r['by_episode']]
  last = records[-1]
  final = _eval_metrics(last)
  if matrix:
    final |= continual.backward_transfer(matrix)
  return {
    'task': task.name,
    'task_settings': dataclasses.asdict(task.cfg)
    | {k: v for k, v in settings.items() if k != 'name'},
    'columns': list(task.columns),
    'headline': list(task.headline),
    'chance_level': task.chance_level(),
    'final': final,
    'matrix': matrix,
    'curve': [
      _trained(r) | {'spent': _spent(r)} | _eval_metrics(r) for r in records
    ],
    'parameters': transformer.count(params),
    **_trained(last),
    'costs': last['costs'],
    'goodput': last['goodput'],
    'seconds': sum(r['seconds'] for r in records),
  }


def read(path: pathlib.Path, digest: str) -> dict[str, Any]:
  """The summary in a file, of the life whose `build.life_digest` is given.

  Raises:
    ConfigError: if the file is damaged, or of a life of another config, arm,
      seed or version.
  """
  summary = read_json(path)
  if summary.get('identity') != digest or not _KEYS <= summary.keys():
    raise config.ConfigError(
      f'{path} is of another config or version; give another --workdir, or '
      'delete that one yourself.'
    )
  return summary


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A file that a run has written to its work directory.

  Raises:
    ConfigError: naming the file, if it is damaged.
  """
  try:
    return untrusted.read_json(path)
  except config.ConfigError as e:
    raise config.ConfigError(
      f'{e} Bring it back from a copy, or delete {path.parent} yourself.'
    ) from None


def _eval_metrics(record: dict[str, Any]) -> dict[str, float]:
  """The metrics of one evaluation, without their prefix."""
  return {
    k.removeprefix('eval/'): v
    for k, v in record['scalars'].items()
    if k.startswith('eval/')
  }


def _trained(record: dict[str, Any]) -> dict[str, float]:
  """Steps, tokens and FLOPs of training up to one record."""
  costs = [record['costs'][phase] for phase in _TRAINING]
  return {
    key: sum(cost[key] for cost in costs)
    for key in ('steps', 'tokens', 'flops')
  }


def _spent(record: dict[str, Any]) -> dict[str, float]:
  """Tokens, FLOPs and seconds up to one record, without evaluations."""
  costs = [cost for phase, cost in record['costs'].items() if phase != 'eval']
  return {
    key: sum(cost[key] for cost in costs)
    for key in ('tokens', 'flops', 'seconds')
  }
