"""The wheel and the editable install, used from a folder of the user's own."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
  'PYTHONPATH': os.pathsep.join(
    path
    for path in os.environ.get('PYTHONPATH', '').split(os.pathsep)
    if path and pathlib.Path(path).resolve() != ROOT.resolve()
  )
}
PACKAGES = ('sleep_jax', 'experiments', 'launch')
MINE = """
from experiments.configs import quickstart
import mine_size


def get_config():
  c = quickstart.get_config()
  c.model.dim = mine_size.DIM
  return c
"""


def run(*argv: str | pathlib.Path, cwd: pathlib.Path, status: int = 0) -> str:
  """What a program prints, without this checkout on the Python path."""
  done = subprocess.run(
    list(map(str, argv)),
    cwd=cwd,
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=500,
    check=False,
  )
  assert done.returncode == status, done.stdout + done.stderr
  return done.stdout + done.stderr


@pytest.fixture(name='source', scope='module')
def _source(tmp_path_factory) -> pathlib.Path:
  """The checkout without what earlier builds have left in it."""
  out = tmp_path_factory.mktemp('source')
  for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, out)
  for name in PACKAGES:
    shutil.copytree(
      ROOT / name, out / name, ignore=shutil.ignore_patterns('__pycache__')
    )
  return out


@pytest.fixture(name='wheel', scope='module')
def _wheel(source) -> pathlib.Path:
  """Built from the sdist, without a network."""
  build = ('build', '--no-isolation', '--outdir=dist')
  run(sys.executable, '-m', *build, cwd=source)
  (path,) = (source / 'dist').glob('*.whl')
  return path


@pytest.fixture(name='bin', scope='module', params=['wheel', 'editable'])
def _bin(request, source, tmp_path_factory) -> pathlib.Path:
  """The programs of an environment in which the package is installed.

  It has the requirements from this one, by a .pth file. Such a file does not
  lead on to others, so that an editable install here is not seen there.
  """
  out = tmp_path_factory.mktemp(request.param)
  venv.create(out, symlinks=True)
  paths = sysconfig.get_paths(vars={'base': str(out), 'platbase': str(out)})
  (pathlib.Path(paths['purelib']) / 'requirements.pth').write_text(
    '\n'.join(p for p in sys.path if pathlib.Path(p).name == 'site-packages')
  )
  programs = pathlib.Path(paths['scripts'])
  package = (
    [request.getfixturevalue('wheel')]
    if request.param == 'wheel'
    else ['--no-build-isolation', '--editable', source]
  )
  pip = [sys.executable, '-m', 'pip', '--python', programs / 'python']
  run(*pip, 'install', '--no-deps', '--no-index', *package, cwd=out)
  return programs


def test_the_wheel_has_every_file_below_one_name(source, wheel):
  expected = {
    str(path.relative_to(source))
    for name in PACKAGES
    for path in (source / name).rglob('*')
    if path.is_file()
  }
  with zipfile.ZipFile(wheel) as archive:
    files = [name for name in archive.namelist() if '.dist-info/' not in name]
  assert {name.partition('/')[0] for name in files} == {'sleep_jax'}
  assert {x.removeprefix('sleep_jax/commands/') for x in files} == expected


@pytest.mark.parametrize('name', ['experiments', 'launch', 'tests'])
def test_no_general_name_is_installed(bin, tmp_path, name):
  error = run(bin / 'python', '-c', f'import {name}', cwd=tmp_path, status=1)
  assert f"No module named '{name}'" in error


def test_a_config_of_ones_own_builds_on_a_shipped_one(bin, tmp_path):
  (tmp_path / 'mine.py').write_text(MINE)
  (tmp_path / 'mine_size.py').write_text('DIM = 32')
  # It is no obstacle that a name as general as ours is taken.
  (tmp_path / 'experiments').mkdir()
  (tmp_path / 'experiments/__init__.py').touch()
  before = set(tmp_path.iterdir())
  command = (bin / 'sleep-jax', 'run', '--config=mine.py')
  error = run(*command, cwd=tmp_path, status=1)
  # Its base is a file of the package.
  assert 'base_facts.npz: ' in error and 'trained with dim=64' in error
  assert {p for p in tmp_path.iterdir() if p.name != '__pycache__'} == before


def test_the_other_commands_are_found(bin, tmp_path):
  command = ('report', '--workdir=nowhere', '--out=report')
  error = run(bin / 'sleep-jax', *command, cwd=tmp_path, status=1)
  assert error.startswith('error: nowhere/config.json does not exist')


def test_a_launch_on_this_machine_starts_and_is_deleted(bin, tmp_path):
  command = (bin / 'sleep-jax', 'launch', '--platform=local')
  run(*command, 'run', '--config=quickstart', cwd=tmp_path)
  started = json.loads((tmp_path / 'runs/quickstart/pid').read_text())
  line = pathlib.Path(f'/proc/{started["pid"]}/cmdline').read_text()
  run(*command, 'delete', '--config=quickstart', cwd=tmp_path)
  assert 'experiments.run' in line
