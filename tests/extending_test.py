"""The examples of docs/extending.md, run from their text."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from sleep_jax import config
from sleep_jax.config import registry

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / 'docs' / 'extending.md'
FILES = ('codes.py', 'rehearsal.py', 'codes_config.py')


def code_blocks() -> dict[str, str]:
  """The page's Python files: a line with a name, then a code block."""
  text = PAGE.read_text(encoding='utf-8')
  return dict(
    re.findall(r'^`(\w+\.py)`:\n\n```python\n(.*?)^```', text, re.M | re.S)
  )


def commands() -> list[list[str]]:
  """The arguments of the page's commands, without `sleep-jax`."""
  text = PAGE.read_text(encoding='utf-8')
  lines = re.findall(r'^```bash\n(.*?)^```', text, re.M | re.S)
  return [line.split()[1:] for line in lines]


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp('extending')
  for name, code in code_blocks().items():
    (out / name).write_text(code, encoding='utf-8')
  return out


def run(args: list[str], folder: pathlib.Path) -> subprocess.CompletedProcess:
  """`sleep-jax` with these arguments."""
  path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
  return subprocess.run(
    [sys.executable, '-m', 'sleep_jax', *args],
    cwd=folder,
    env=os.environ | {'PYTHONPATH': path},
    capture_output=True,
    text=True,
    timeout=500,
    check=False,
  )


def test_the_examples_of_the_page_run_without_an_edit_in_the_package(folder):
  assert set(code_blocks()) == set(FILES)
  (command,) = commands()
  result = run([*command, '--config.seeds=(1,)'], folder)
  assert result.returncode == 0, result.stderr
  for arm in ('sft', 'rehearsal'):
    assert f'| {arm} |' in result.stdout
  assert 'rehearsal minus' in result.stdout
  lives = {
    life['learner']: life
    for life in json.loads((folder / 'runs/codes/lives.json').read_text())
  }
  assert set(lives) == {'sft', 'rehearsal'}
  for life in lives.values():
    assert life['task'] == 'codes'
    assert [len(scores) for scores in life['matrix']] == [1, 2]
  # Without stored rows the first day's codes are lost; with them they are not.
  assert lives['sft']['final']['accuracy_last'] == 1.0
  assert lives['sft']['final']['accuracy_first'] < 1.0
  assert lives['rehearsal']['final']['accuracy'] == 1.0


def test_a_module_that_cannot_be_imported_is_named():
  with pytest.raises(config.ConfigError, match="'absent:Codes' cannot be imp"):
    registry.find('absent:Codes', 'sleep_jax.tasks', 'task.name')
