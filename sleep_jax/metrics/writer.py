"""What one life measures, into its files and to its receivers.

Every night and every step is told once, however often the life is resumed.
"""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any

import numpy as np

from sleep_jax.metrics import costs as costs_lib
from sleep_jax.metrics import records as records_lib
from sleep_jax.metrics import table as table_lib
from sleep_jax.metrics import writers as writers_lib

FILE = 'metrics.jsonl'
_STEPS = 'steps.jsonl'
_STEPS_PER_POINT = 10  # Of a loss curve; a point is their mean.
_DREAMS_PER_KIND = 4  # Of a night.
_DREAM_LENGTH = 600  # Characters.


class Writer:
  """Writes a record a night, and losses every few steps.

  Args:
    folder: directory of the life.
    mark: see `records.Records`.
    sinks: further receivers; None for all processes but the first, which keep
      records in memory only.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    mark: records_lib.Mark | list[dict[str, Any]] | None,
    sinks: writers_lib.Sinks | None,
  ):
    quiet = sinks is None
    if not quiet:
      folder.mkdir(parents=True, exist_ok=True)
    self._records = records_lib.Records(folder / FILE, mark, quiet=quiet)
    self._sinks = sinks
    self._steps = None if quiet else records_lib.StepLog(folder / _STEPS)

  def write(self, record: dict[str, Any]) -> None:
    """Adds one night's record; receivers get its `scalars` and `dreams`."""
    self._records.append(record)
    night = record['night']
    if self._sinks is None or night < self._records.num_before:
      return
    self._sinks.scalars(record['scalars'], 'night', night)
    if record['dreams']:
      rows = [[d['kind'], d['text']] for d in record['dreams']]
      table = table_lib.Table('Dreams of the night', ['kind', 'dream'], rows)
      self._sinks.table('dreams', table, night)

  def write_steps(
    self, night: int, last: int, values: Mapping[str, np.ndarray]
  ) -> None:
    """Adds the K optimizer steps up to number `last` of a life, `[K]` each."""
    if self._steps is None:
      return
    size = len(next(iter(values.values())))
    points = []
    for start in range(0, size, _STEPS_PER_POINT):
      end = min(start + _STEPS_PER_POINT, size)
      means = {k: float(np.mean(x[start:end])) for k, x in values.items()}
      points.append({'step': last - size + end, 'night': night, **means})
    assert self._sinks is not None
    for point in self._steps.append(points):
      means = {k: x for k, x in point.items() if k in values}
      self._sinks.scalars(means, 'steps', point['step'])

  def records(self) -> list[dict[str, Any]]:
    """The records of all nights so far."""
    return list(self._records)

  def mark(self) -> records_lib.Mark:
    """Of all nights so far, for a checkpoint."""
    return self._records.mark()

  def close(self) -> None:
    """Closes the receivers."""
    if self._sinks is not None:
      self._sinks.close()


class PhaseObserver:
  """What one phase shows: losses for the writer, some dreams as text.

  Args:
    writer: of the life.
    costs: of the life, which count its steps.
    decode: token ids to text.
    night: number of the phase's night.
    phase: one of `checkpoint.PHASES`.

  Attributes:
    dreams: of each kind the same few whichever machine it is, as text.
  """

  def __init__(
    self,
    writer: Writer,
    costs: costs_lib.CostTracker,
    decode: Callable[[list[int]], str],
    night: int,
    phase: str,
  ):
    self._writer, self._costs, self._decode = writer, costs, decode
    self._night, self._phase = night, phase
    self.dreams: list[dict[str, str]] = []

  def on_steps(self, values: Mapping[str, np.ndarray]) -> None:
    named = {f'{self._phase}/{k}': x for k, x in values.items()}
    self._writer.write_steps(self._night, self._costs.steps, named)

  def on_dreams(self, kind: str, dreams: Sequence[Sequence[int]]) -> None:
    told = sum(dream['kind'] == kind for dream in self.dreams)
    # Evenly spread, as the first ones may all have begun in the same way.
    count = min(_DREAMS_PER_KIND - told, len(dreams))
    for i in np.linspace(0, len(dreams) - 1, count).round().astype(int):
      text = self._decode(list(dreams[i]))
      if len(text) > _DREAM_LENGTH:
        text = text[:_DREAM_LENGTH] + '…'
      self.dreams.append({'phase': self._phase, 'kind': kind, 'text': text})
