"""The notebooks run from the first cell to the last, at reduced size."""

import pathlib

import nbclient
import nbformat
import pytest

from tests import tiny_checkpoint

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', ('quickstart', 'invented_facts', 'reproduce_paper')
)
def test_a_notebook_runs(name, monkeypatch, tmp_path):
  pytest.importorskip('tokenizers')
  base = tiny_checkpoint.write(tmp_path / 'tiny')
  monkeypatch.setenv('SLEEP_JAX_BASE', str(base))
  monkeypatch.setenv('SLEEP_JAX_SMALL', '1')
  notebook = nbformat.read(ROOT / 'notebooks' / f'{name}.ipynb', as_version=4)
  nbclient.NotebookClient(
    notebook,
    timeout=500,
    kernel_name='python3',
    resources={'metadata': {'path': str(ROOT / 'notebooks')}},
  ).execute()
  shown = [
    kind
    for cell in notebook.cells
    for output in cell.get('outputs', ())
    for kind in output.get('data', ())
  ]
  assert 'text/markdown' in shown and 'image/png' in shown
