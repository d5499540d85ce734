"""sleep_jax.harness.report."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from sleep_jax.harness import build as build_lib
from sleep_jax.harness import plots
from sleep_jax.harness import tables
from sleep_jax.runtime import files


def write_report(
  lives: Sequence[dict[str, Any]], c: build_lib.Settings, out: pathlib.Path
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
