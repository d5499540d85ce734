"""Metrics of one life as JSON lines and TensorBoard events."""

import json
import pathlib
import time
from typing import Any

from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto import summary_pb2
from tensorboard.summary.writer import event_file_writer


class Writer:
  """Writes one record a night.

  A resumed life rewrites what it had recorded up to its checkpoint and drops
  what came after, so a night is never recorded twice.
  """

  def __init__(self, folder: pathlib.Path):
    self._path = folder / 'metrics.jsonl'
    self._records: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    self._events = event_file_writer.EventFileWriter(str(folder))

  def resume(self, night: int) -> None:
    """Takes over the records up to and including `night`."""
    lines = self._path.read_text(encoding='utf-8').splitlines()
    records = [json.loads(line) for line in lines]
    self._records = [r for r in records if r['night'] <= night]
    self._flush()

  def write(self, record: dict[str, Any]) -> None:
    """Adds one night's record; its `scalars` go to TensorBoard as well."""
    self._records.append(record)
    self._flush()
    values = [
      summary_pb2.Summary.Value(tag=tag, simple_value=value)
      for tag, value in record['scalars'].items()
    ]
    self._events.add_event(
      event_pb2.Event(
        wall_time=time.time(),
        step=record['night'],
        summary=summary_pb2.Summary(value=values),
      )
    )
    self._events.flush()

  def records(self) -> list[dict[str, Any]]:
    """All nights so far."""
    return self._records

  def _flush(self) -> None:
    part = self._path.with_suffix('.part')
    text = ''.join(json.dumps(r) + '\n' for r in self._records)
    part.write_text(text, encoding='utf-8')
    part.replace(self._path)

  def close(self) -> None:
    """Closes the event file."""
    self._events.close()
