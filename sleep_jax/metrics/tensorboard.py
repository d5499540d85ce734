"""TensorBoard events: scalars, tables, pictures and hyperparameters.

The library's own functions for text and images need TensorFlow; its event
writer and its messages do not.
"""

import pathlib
import time
from typing import Any

from matplotlib import image
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer import event_file_writer
from tensorboard.util import tensor_util

from sleep_jax import array_typing as at
from sleep_jax.metrics import table as table_lib

# Generated modules; static checkers do not see their messages.
_event_pb2: Any = event_pb2
_summary_pb2: Any = summary_pb2


class TensorBoard:
  """A `writers.Sink` that writes an event file into `folder`.

  Args:
    folder: of the run.
    hparams: settings by name; numbers, booleans and text.
  """

  def __init__(self, folder: pathlib.Path, hparams: dict[str, Any]):
    folder.mkdir(parents=True, exist_ok=True)
    self._events = event_file_writer.EventFileWriter(str(folder))
    summary = hparams_summary.hparams_pb(hparams, trial_id=str(folder))
    self._add(summary, 0)

  def scalars(self, values: at.Metrics, axis: str, position: int) -> None:
    prefix = '' if axis == 'night' else f'{axis}/'
    self._add_values(
      position,
      *(
        _summary_pb2.Summary.Value(tag=prefix + tag, simple_value=value)
        for tag, value in values.items()
      ),
    )

  def table(self, name: str, table: table_lib.Table, night: int) -> None:
    text = table.markdown().encode()
    value = _summary_pb2.Summary.Value(
      tag=name,
      metadata=text_metadata.create_summary_metadata(name, table.title),
      tensor=tensor_util.make_tensor_proto([text], shape=(1,)),
    )
    self._add_values(night, value)

  def picture(self, name: str, path: pathlib.Path, night: int) -> None:
    height, width, _ = image.imread(path).shape
    value = _summary_pb2.Summary.Image(
      width=width,
      height=height,
      colorspace=4,
      encoded_image_string=path.read_bytes(),
    )
    self._add_values(night, _summary_pb2.Summary.Value(tag=name, image=value))

  def close(self) -> None:
    self._events.close()

  def _add_values(self, step: int, *values: Any) -> None:
    self._add(_summary_pb2.Summary(value=values), step)

  def _add(self, summary: Any, step: int) -> None:
    self._events.add_event(
      _event_pb2.Event(wall_time=time.time(), step=step, summary=summary)
    )
    self._events.flush()
