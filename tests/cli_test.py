"""The command `sleep-jax`, as it is typed."""

from importlib import machinery
import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import sleep_jax
from sleep_jax import api
from sleep_jax import cli
from sleep_jax import doctor
from tests import tiny_checkpoint

ROOT = pathlib.Path(__file__).parent.parent
SET = (
  'window=64', 'passes=8', 'fast_learning_rate=1e-2', 'dreams=32', 'steps=60',
  'expert_learning_rate=0.1', 'rank=16', 'slots=2',
)  # fmt: skip
NOTES = '\n\n'.join(tiny_checkpoint.FACTS) + '\n\n'


@pytest.fixture(name='files', scope='module')
def _files(tmp_path_factory):
  """A model, two notes and a quiz."""
  pytest.importorskip('tokenizers')
  folder = tmp_path_factory.mktemp('cli')
  tiny_checkpoint.write(folder / 'tiny')
  (folder / 'a.md').write_text(NOTES)
  (folder / 'b.txt').write_text('Tolm has an engineer, and a lighthouse.' * 3)
  lines = [json.dumps(q) for q in tiny_checkpoint.QUIZ]
  (folder / 'quiz.jsonl').write_text('\n'.join(lines))
  return folder


def sleep_command(folder, out, *more: str) -> list[str]:
  return [
    'sleep',
    f'--model={folder}/tiny',
    '--docs',
    f'{folder}/a.md',
    f'{folder}/b.txt',
    f'--qa={folder}/quiz.jsonl',
    f'--out={out}',
    '--nights=2',
    '--allow-failure',
    *(f'--set={x}' for x in SET),
    *more,
  ]


@pytest.fixture(name='slept', scope='module')
def _slept(files):
  out = files / 'slept'
  assert cli.main(sleep_command(files, out, '--export=custom,merged')) == 0
  return out


def test_one_command_leaves_a_life_a_table_a_picture_and_an_export(slept):
  records = json.loads((slept / 'report.json').read_text())
  phases = ['before', 'day 1', 'night 1', 'day 2', 'night 2', 'merged']
  assert [r['phase'] for r in records] == phases
  for record in records:
    assert record['documents_ppl'] > 1 and record['neutral_ppl'] > 1
    assert 0 <= record['quiz'] <= 1
  assert records[1]['documents_ppl'] < records[0]['documents_ppl']
  table = (slept / 'report.md').read_text()
  assert 'after night 2, context gone' in table
  # The plain checkpoint was loaded anew, and does what it was written to do.
  assert '| export: merged ' in table
  merged = sleep_jax.load(slept / 'merged')
  assert merged.quiz(tiny_checkpoint.QUIZ).accuracy == records[-1]['quiz']
  assert (slept / 'sleep.png').read_bytes().startswith(b'\x89PNG')
  assert (slept / 'custom' / 'tokenizer.json').exists()
  assert not slept.with_name('slept.part').exists()
  assert sleep_jax.load(slept).nights == 2


def test_the_life_answers_and_converses(slept, capsys, monkeypatch):
  asked = ['--max-new=8']
  assert cli.main(['ask', str(slept), 'Who?', *asked]) == 0
  answer = sleep_jax.load(slept).ask('Who?', max_new=8)
  assert capsys.readouterr().out == f'{answer}\n'
  said = iter(['Who?', 'And when?', '/quit'])
  monkeypatch.setattr('builtins.input', lambda prompt: next(said))
  heard = []

  def chat(self, messages, **_):
    heard.append([m['content'] for m in messages])
    return f'reply {len(heard)}'

  monkeypatch.setattr(api.Sleeper, 'chat', chat)
  assert cli.main(['chat', str(slept), *asked]) == 0
  assert heard == [['Who?'], ['Who?', 'reply 1', 'And when?']]
  assert capsys.readouterr().out == 'reply 1\nreply 2\n'


@pytest.mark.parametrize('killed_in', ['sleep', 'measure'])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
  files, slept, tmp_path, capsys, monkeypatch, killed_in
):
  """Killed in the second night, or while it is measured."""
  out, calls = tmp_path / 'slept', []
  with monkeypatch.context() as patch:
    owner = api.Sleeper if killed_in == 'sleep' else sleep_jax.overnight.Exam
    original = getattr(owner, killed_in)

    def killed(self, *args, **kwargs):
      calls.append(killed_in)
      if len(calls) == (2 if killed_in == 'sleep' else 5):
        raise KeyboardInterrupt
      return original(self, *args, **kwargs)

    patch.setattr(owner, killed_in, killed)
    assert cli.main(sleep_command(files, out)) == 130
  assert not out.exists()
  # Another command is not mixed up with it.
  assert cli.main(sleep_command(files, out, '--seed=5')) == 1
  assert 'another seed' in capsys.readouterr().err
  assert cli.main(sleep_command(files, out)) == 0
  assert 'going on after' in capsys.readouterr().out
  for file in sorted(slept.glob('memory.*.npy')):
    np.testing.assert_array_equal(np.load(file), np.load(out / file.name))
  records = [
    [
      {k: v for k, v in r.items() if k != 'seconds'}
      for r in json.loads((folder / 'report.json').read_text())
    ]
    for folder in (slept, out)
  ]
  assert records[0][:-1] == records[1]  # `merged` was not asked for again.


def arguments(folder, **changes) -> list[str]:
  values = dict(
    model=f'{folder}/tiny', docs=f'{folder}/a.md', out=f'{folder}/new'
  )
  return ['sleep', *(f'--{k}={v}' for k, v in (values | changes).items())]


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(model='nothing/of/this'), "'nothing/of/this'"),
    (dict(docs='none.md'), 'none.md cannot be read'),
    (dict(qa='none.jsonl'), 'none.jsonl cannot be read'),
    (dict(set='passes'), 'there is no =; write NAME=VALUE'),
    (dict(set='passes=many'), 'give a name and a number'),
    (dict(set='pases=3'), "unknown setting 'pases'"),
    (dict(nights=0), 'nights=0 must be positive'),
    (dict(nights=99), 'not enough text for so many days'),
    (dict(export='onnx'), "--export='onnx' is unknown"),
    (dict(colour='red'), 'unrecognized arguments: --colour=red'),
  ],
)
def test_an_error_is_one_line_and_leaves_nothing(
  files, capsys, changes, message
):
  before = sorted(files.iterdir())
  try:
    code = cli.main(arguments(files, **changes))
  except SystemExit as e:  # Of argparse.
    code = e.code
  error = capsys.readouterr().err
  assert code == 1
  assert error.startswith('error: ') and error.count('\n') == 1
  assert message in error
  assert sorted(files.iterdir()) == before


def test_a_night_that_moves_nothing_is_an_error(files, tmp_path, capsys):
  out = tmp_path / 'slept'
  command = sleep_command(files, out, '--set=steps=1', '--nights=1')
  command.remove('--allow-failure')
  assert cli.main(command) == 1
  assert 'error: night 1 did not move' in capsys.readouterr().err
  assert not out.exists()


def test_an_existing_folder_is_refused_before_any_work(files, capsys):
  assert cli.main(arguments(files, out=files)) == 1
  assert 'exists already' in capsys.readouterr().err


def test_convert_is_a_command(files, tmp_path, capsys):
  assert cli.main(['convert', f'{files}/tiny', f'{tmp_path}/hf']) == 0
  assert (tmp_path / 'hf' / 'tokenizer.json').exists()
  assert cli.main(['convert', f'{files}/tiny', f'{tmp_path}/hf']) == 1
  assert 'exists already' in capsys.readouterr().err


def module(*args: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', 'sleep_jax', *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=500,
  )


def test_the_module_is_the_command():
  assert module('--version').stdout.strip() == sleep_jax.__version__
  assert 'sleep-jax chat' in module('--help').stdout
  done = module('ask', 'nothing/of/this', 'Who?')
  assert done.returncode == 1 and done.stdout == ''
  assert done.stderr.splitlines()[-1].startswith('error: ')
  assert 'Traceback' not in done.stderr
  done = module('run', '--config=none.py')
  assert done.returncode == 1 and 'none.py' in done.stderr


def doctor_of(*args: str) -> int:
  """The exit status of `sleep-jax doctor`."""
  with pytest.raises(SystemExit) as e:
    cli.main(['doctor', *args])
  return e.value.code


def test_the_doctor_names_what_is_wrong_with_this_machine(
  monkeypatch, tmp_path, capsys
):
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.setenv('SLEEP_JAX_DATA', str(tmp_path))
  monkeypatch.setenv('SLEEP_JAX_CACHE', str(tmp_path / 'cache'))
  assert doctor_of() == 0
  out = capsys.readouterr().out
  assert f'jax {jax.__version__}' in out and "extra 'dev'" in out
  assert f'ok    devices: {len(jax.devices())} x ' in out
  assert f'ok    data: {tmp_path}: ' in out
  monkeypatch.setenv('SLEEP_JAX_DATA', str(tmp_path / 'nowhere'))
  (tmp_path / 'file').touch()
  monkeypatch.setenv('SLEEP_JAX_CACHE', str(tmp_path / 'file'))
  assert doctor_of() == 1
  out = capsys.readouterr().out
  assert f"FAIL  data: data folder '{tmp_path}/nowhere' does not exist" in out
  assert 'FAIL  cache: ' in out


def test_the_doctor_finds_what_a_package_requires_in_vain(
  monkeypatch, tmp_path
):
  for name, requires in (
    ('whole', ['part[more]', "none-of-this; extra == 'x'", 'numpy<1']),
    ('part', ["none-of-that; extra == 'more'", "old; python_version < '3'"]),
  ):
    folder = tmp_path / f'{name}-1.dist-info'
    folder.mkdir()
    lines = ['Metadata-Version: 2.1', f'Name: {name}', 'Version: 1']
    lines += [f'Requires-Dist: {text}' for text in requires]
    (folder / 'METADATA').write_text('\n'.join(lines) + '\n')
  monkeypatch.syspath_prepend(tmp_path)
  assert doctor._missing('whole') == ['none-of-that', 'numpy<1']
  assert doctor._missing('whole', 'x') == ['none-of-this']


def test_the_doctor_hands_a_job_over_to_the_launcher(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.setattr(doctor, 'main', lambda: 0)
  module = types.ModuleType('launch.doctor')
  module.__spec__ = machinery.ModuleSpec('launch.doctor', None)
  seen = []
  module.main = lambda argv: seen.append(argv) or 3
  monkeypatch.setitem(sys.modules, 'launch.doctor', module)
  argv = ['--platform=local', 'run', '--config=quickstart']
  assert doctor_of(*argv) == 3 and seen == [argv]
