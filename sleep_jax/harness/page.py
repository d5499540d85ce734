"""A report as one HTML page: no other file, no network and no JavaScript."""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jinja2
from matplotlib import image

from sleep_jax.metrics import table as table_lib

_SCALE = 0.75  # Pixels of the page per pixel of a picture, if there is room.
CAPTIONS = {
  'retention.png': 'What is left of episodes, night by night. Bands are 95% '
  'intervals over seeds.',
  'cost.png': 'What was reached, and what it cost.',
  'recall.png': 'Score of each episode (column) after each night (row).',
  'curves.png': 'Over training, mean over seeds.',
  'depths.png': 'By depth, mean and 95% interval over seeds.',
}


@dataclasses.dataclass(frozen=True)
class Page:
  """What a page shows.

  title: name of the experiment.
  headline: what was lived, in a sentence.
  tables: in their order; the row `reference` is emphasized.
  pictures: files, in their order.
  dreams: by arm and night, as records have them.
  settings: by name, see `writers.flatten`.
  """

  title: str
  headline: str
  tables: Sequence[table_lib.Table]
  pictures: Sequence[pathlib.Path]
  reference: str = ''
  dreams: Mapping[str, Mapping[int, Sequence[Mapping[str, str]]]] = (
    dataclasses.field(default_factory=dict)
  )
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def html(self) -> str:
    """The page; all text in it is escaped."""
    environment = jinja2.Environment(
      loader=jinja2.PackageLoader('sleep_jax', 'assets'),
      autoescape=True,
      undefined=jinja2.StrictUndefined,
      trim_blocks=True,
      lstrip_blocks=True,
    )
    pictures = [
      {
        'name': path.stem,
        'caption': CAPTIONS[path.name],
        'width': round(_SCALE * image.imread(path).shape[1]),
        'data': base64.b64encode(path.read_bytes()).decode(),
      }
      for path in self.pictures
    ]
    fields = vars(self) | {'pictures': pictures}
    return environment.get_template('report.html').render(fields)
