"""Metrics of one life as JSON lines and TensorBoard events."""

from collections.abc import Sequence
import json
import pathlib
import time
from typing import Any

from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto import summary_pb2
from tensorboard.summary.writer import event_file_writer

from sleep_jax.metrics import writers as writers_lib
from sleep_jax.runtime import files

FILE = 'metrics.jsonl'
# Generated modules; static checkers do not see their messages.
_event_pb2: Any = event_pb2
_summary_pb2: Any = summary_pb2


class Writer:
  """Writes one record per night.

  The records of a resumed life come from its checkpoint, so that every night is
  recorded exactly once.

  Args:
    folder: directory of the life.
    records: records of the previous nights.
    quiet: keep the records in memory only; for all processes except the first.
    sinks: further receivers of the scalars.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    records: list[dict[str, Any]],
    *,
    quiet: bool = False,
    sinks: Sequence[writers_lib.Sink] = (),
  ):
    self._sinks = sinks
    self._path = folder / FILE
    self._records = list(records)
    self._events = None
    if not quiet:
      folder.mkdir(parents=True, exist_ok=True)
      self._events = event_file_writer.EventFileWriter(str(folder))
      self._flush()

  def write(self, record: dict[str, Any]) -> None:
    """Adds one night's record; its `scalars` go to TensorBoard as well."""
    self._records.append(record)
    if self._events is None:
      return
    self._flush()
    values = [
      _summary_pb2.Summary.Value(tag=tag, simple_value=value)
      for tag, value in record['scalars'].items()
    ]
    self._events.add_event(
      _event_pb2.Event(
        wall_time=time.time(),
        step=record['night'],
        summary=_summary_pb2.Summary(value=values),
      )
    )
    self._events.flush()
    for sink in self._sinks:
      sink.log(record['scalars'], step=record['night'])

  def records(self) -> list[dict[str, Any]]:
    """The records of all nights so far."""
    return self._records

  def _flush(self) -> None:
    files.write(
      self._path, ''.join(json.dumps(r) + '\n' for r in self._records)
    )

  def close(self) -> None:
    """Closes the event file and the sinks."""
    if self._events is not None:
      self._events.close()
    for sink in self._sinks:
      sink.finish()
