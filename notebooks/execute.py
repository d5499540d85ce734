"""Runs notebooks and saves them with their outputs.

  python notebooks/execute.py notebooks/quickstart.ipynb

What goes to stderr (progress bars, warnings) is left out.
"""

import pathlib
import sys

import nbclient
import nbformat


def execute(path: pathlib.Path) -> None:
  """Runs one notebook in its own folder; if a cell fails it is not saved."""
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(
    notebook,
    kernel_name='python3',
    record_timing=False,
    resources={'metadata': {'path': str(path.parent)}},
  ).execute()
  drop_stderr(notebook)
  nbformat.write(notebook, path)


def drop_stderr(notebook: nbformat.NotebookNode) -> None:
  """Removes what code cells have written to stderr."""
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']


if __name__ == '__main__':
  for name in sys.argv[1:]:
    execute(pathlib.Path(name))
