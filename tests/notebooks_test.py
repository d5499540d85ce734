"""Notebooks: as they are committed, their first cell, and at a reduced size."""

import json
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

from tests import install_test
from tests import tiny_checkpoint

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
# What is run after each cell with the tag `parameters`, to make it quick.
_FACTS = """
from experiments.configs import common

c.task.episodes, c.task.rows, c.task.probes = 1, 64, 1
c.model.levels[0].sleep_every = 8
c.sleep.steps, c.sleep.dreams, c.sleep.max_kl_share = 10, 64, 9.0
c.arms = {'wake_only': common.WAKE_ONLY, 'sleep': {}}
"""
_BULLETINS = """
c.task.episodes, c.task.train, c.task.test = 1, 2, 2
c.dreaming.dreams, c.dreaming.keep, c.dreaming.keep_random = 4, 2, 1
c.arms = {'ttt': {}, 'seal': {}}
"""
_INVENTED = """
c.base = {base!r}
c.task.update(facts=2, passes=1, length=64, held_out_rows=1)
c.task.general = c.task.general[:2]
c.model.partition = (1, 2, 1)
c.model.levels[0].update(chunk=64, sleep_every=1)
c.sleep.update(dreams=8, archive=8, steps=4, batch=2, max_kl_share=9.0)
settings = json.loads(c.to_json())
"""
SMALL = {
  'quickstart': [_FACTS],
  'invented_facts': [_INVENTED],
  'reproduce_paper': [_FACTS, _BULLETINS],
  'your_own_model': [''],
}
PICTURES = {'quickstart': 2, 'invented_facts': 2, 'reproduce_paper': 1}


def read(path: pathlib.Path) -> nbformat.NotebookNode:
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def shown(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
  """The data of this MIME type in all outputs."""
  return [
    output.data[kind]
    for cell in code_cells(notebook)
    for output in cell.outputs
    if kind in output.get('data', {})
  ]


def test_every_notebook_is_tested():
  assert {path.stem for path in NOTEBOOKS} == set(SMALL)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_one_run_left_it(path):
  cells = code_cells(read(path))
  assert [c.execution_count for c in cells] == [*range(1, len(cells) + 1)]
  outputs = [output for cell in cells for output in cell.outputs]
  assert {o.output_type for o in outputs} <= {
    'stream',
    'display_data',
    'execute_result',
  }
  assert all(o.get('name') != 'stderr' for o in outputs)
  pictures = shown(read(path), 'image/png')
  assert len(pictures) == PICTURES.get(path.stem, 0)
  assert all(len(picture) < 200_000 for picture in pictures)
  assert path.stat().st_size < 400_000


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_nothing_in_it_for_tests(path):
  for cell in code_cells(read(path)):
    for word in ('SMALL', 'environ', 'pytest', 'tests'):
      assert word not in cell.source


def first_cell() -> str:
  """What all notebooks begin with."""
  (source,) = {code_cells(read(path))[0].source for path in NOTEBOOKS}
  return source


@pytest.mark.parametrize('folder', ['.', 'notebooks'])
def test_the_first_cell_finds_its_checkout(folder):
  """It runs no command, and modules are those of the checkout."""
  refuse = 'import subprocess\nsubprocess.run = None\n'
  where = '\nimport experiments.configs\nprint(experiments.configs.__path__[0])'
  done = subprocess.run(
    [sys.executable, '-I', '-c', refuse + first_cell() + where],
    cwd=ROOT / folder,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == str(ROOT / 'experiments/configs')


@pytest.mark.parametrize(
  'device, extras',
  [
    ('', {'hf'}),
    pytest.param('/dev/nvidia0', {'hf', 'gpu'}, marks=pytest.mark.slow),
    pytest.param('/dev/vfio/0', {'hf', 'tpu'}, marks=pytest.mark.slow),
  ],
)
def test_the_first_cell_installs_what_the_runtime_needs(
  device, extras, tmp_path
):
  """The real git clones this checkout, and the real pip would install it."""
  devices = (
    'import fnmatch, glob\n'
    f'glob.glob = lambda p: fnmatch.filter([{device!r}], p)\n'
  )
  where = '\nprint(root, sys.path[0])'
  env = {
    'GIT_CONFIG_COUNT': '2',
    'GIT_CONFIG_KEY_0': f'url.{ROOT.as_uri()}.insteadOf',
    'GIT_CONFIG_VALUE_0': 'https://github.com/sleep-jax/sleep_jax',
    'GIT_CONFIG_KEY_1': 'safe.directory',
    'GIT_CONFIG_VALUE_1': '*',
    'PIP_DRY_RUN': '1',
    'PIP_NO_DEPS': '1',
    'PIP_NO_BUILD_ISOLATION': '0',  # Of this option, 0 means none.
    'PIP_REPORT': str(tmp_path / 'report.json'),
  }
  for _ in range(1 if device else 2):  # A restarted runtime has the clone.
    done = subprocess.run(
      [sys.executable, '-c', devices + first_cell() + where],
      cwd=tmp_path,
      env=install_test.ENVIRONMENT | env,
      capture_output=True,
      text=True,
      timeout=100,
    )
    assert done.returncode == 0, done.stderr
    clone = tmp_path / 'repository'
    assert done.stdout.split()[-2:] == [str(clone), str(clone)]
    report = json.loads((tmp_path / 'report.json').read_text())
    (package,) = report['install']
    assert package['metadata']['name'] == 'sleep_jax'
    assert set(package['requested_extras']) == extras


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
def test_a_notebook_runs(name, tmp_path):
  pytest.importorskip('tokenizers')
  base = tiny_checkpoint.write(tmp_path / 'tiny')
  notebook = read(ROOT / 'notebooks' / f'{name}.ipynb')
  snippets = iter(SMALL[name])
  cells = []
  for cell in notebook.cells:
    cells.append(cell)
    if 'parameters' in cell.metadata.get('tags', ()):
      source = next(snippets).replace('{base!r}', repr(str(base)))
      cells.append(nbformat.v4.new_code_cell(source))
  assert next(snippets, None) is None
  notebook.cells = cells
  nbclient.NotebookClient(
    notebook,
    timeout=500,
    kernel_name='python3',
    resources={'metadata': {'path': str(ROOT / 'notebooks')}},
  ).execute()
  assert len(shown(notebook, 'image/png')) == PICTURES.get(name, 0)
  if name in PICTURES:
    assert shown(notebook, 'text/markdown')
