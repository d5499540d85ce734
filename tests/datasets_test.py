"""Datasets: their records, hostile raw files, downloads, prepared copies."""

from collections.abc import Iterator
import contextlib
import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from tensorflow_datasets.core.download import checksums

from sleep_jax import config
from sleep_jax.data import datasets
from sleep_jax.data.datasets import builders
from sleep_jax.data.datasets import class_incremental
from sleep_jax.data.datasets import download
from sleep_jax.data.datasets import prepared
from sleep_jax.data.datasets import squad
from sleep_jax.tasks.arc import dataset as arc_dataset

needs_data = pytest.mark.skipif(
  not os.environ.get('SLEEP_JAX_DATA'), reason='SLEEP_JAX_DATA is not set'
)
CSV = b'text,label\n"a, b",x\n"two\r\nlines",y\n,z\n' + b'more,x\n' * 50
PATH = 'tiny/train.csv'
NOWHERE = 'http://127.0.0.1:9/train.csv'


class Tiny(builders.ClassIncremental):
  """One file of two columns."""

  BUILDER_CONFIGS = []

  @classmethod
  def files(cls, variant):
    return {'train': [PATH]}


def tiny(monkeypatch, content: bytes = CSV, url: str = NOWHERE) -> None:
  """Makes `tiny` the one known dataset."""
  sha256 = hashlib.sha256(content).hexdigest()
  file = download.RawFile(PATH, url, len(content), sha256)
  info = checksums.UrlInfo(file.size, sha256, PATH)
  monkeypatch.setattr(download, 'FILES', {PATH: file})
  monkeypatch.setattr(Tiny, 'url_infos', {url: info})
  monkeypatch.setattr(builders, 'by_name', lambda: {'tiny': (Tiny, '')})


@pytest.fixture(name='cache')
def _cache(tmp_path, monkeypatch):
  monkeypatch.setenv('SLEEP_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.delenv('SLEEP_JAX_DATA', raising=False)
  return tmp_path / 'cache'


@pytest.fixture(name='data')
def _data(tmp_path, cache, monkeypatch):
  tiny(monkeypatch)
  (tmp_path / 'data/tiny').mkdir(parents=True)
  return tmp_path / 'data'


def raw(path: str) -> str:
  """A file of the data folder, read by nothing of ours."""
  file = pathlib.Path(os.environ['SLEEP_JAX_DATA'], path)
  if file.exists():
    return file.read_bytes().decode()
  return gzip.decompress(pathlib.Path(f'{file}.gz').read_bytes()).decode()


def rows(content: str) -> list[tuple[str, str]]:
  reader = csv.DictReader(io.StringIO(content))
  return [(row['text'], row['label']) for row in reader]


@needs_data
@pytest.mark.parametrize('name', ['clinc', 'banking', 'dbpedia'])
def test_examples_are_those_of_the_csv_file_in_its_order(name):
  for split in ('train', 'test'):
    wanted = rows(raw(f'cil/{name}_{split}.csv'))
    assert class_incremental.examples(name, split, '') == wanted


@needs_data
def test_passages_are_those_of_the_json_file_in_its_order():
  def read(name):
    return [
      squad.SquadPassage(
        p['title'],
        p['context'],
        tuple((q['question'], q['answer']) for q in p['questions']),
      )
      for p in json.loads(raw(f'seal_squad/{name}.json'))
    ]

  wanted = read('squad_val')
  random.Random(42).shuffle(wanted)
  assert squad.test_passages() == wanted[:200]
  for i in range(2):
    wanted = read(f'synthetic__train__iter{i}_train')
    assert squad.train_passages(i) == wanted[:50]


@needs_data
def test_puzzles_are_those_of_the_json_files():
  for split, part, suffix in (
    ('train', 'training', 'training'),
    ('test', 'evaluation', 'eval'),
  ):
    challenges, solutions = (
      json.loads(
        raw(
          f'seal_fewshot_arc/arc-agi_{part}_{kind}_filtered_1B_{suffix}_set'
          '.json'
        )
      )
      for kind in ('challenges', 'solutions')
    )
    puzzles = arc_dataset.load(split, '')
    assert sorted(p.name for p in puzzles) == sorted(challenges)
    for puzzle in puzzles:
      given = challenges[puzzle.name]
      got = [
        (p.input.tolist(), p.output.tolist())
        for p in puzzle.train_pairs + puzzle.test_pairs
      ]
      assert got == [(p['input'], p['output']) for p in given['train']] + [
        (p['input'], output)
        for p, output in zip(given['test'], solutions[puzzle.name], strict=True)
      ]
      assert puzzle.train_pairs[0].input.dtype == np.int64


@needs_data
def test_problems_are_those_of_the_jsonl_file_in_its_order():
  lines = raw('gsm8k/test.jsonl').split('\n')
  wanted = [json.loads(line) for line in lines if line]
  assert datasets.load('gsm8k', 'test') == wanted
  assert all(re.search(r'#### -?[\d,.]+$', x['answer']) for x in wanted)


@needs_data
def test_the_facts_of_a_question_are_those_of_its_story_before_it():
  records = datasets.load('babi/qa1', 'test')
  text = raw('babi/en-10k/qa1_single-supporting-fact_test.txt')
  asked = re.findall(r'^\d+ (.*?) ?\t(\w+)\t(\d+)$', text, re.M)
  assert [(r['question'], r['answer']) for r in records] == [
    (question, answer) for question, answer, _ in asked
  ]
  # A story has two facts before each of its five questions.
  assert [len(r['facts']) for r in records] == [2, 4, 6, 8, 10] * 200
  for record in records:
    (fact,) = (record['facts'][i] for i in record['supporting'])
    person = record['question'].removeprefix('Where is ').removesuffix('?')
    assert fact.startswith(person) and fact.endswith(f'{record["answer"]}.')


def test_every_dataset_has_its_files_in_the_table():
  for name, (cls, variant) in builders.by_name().items():
    splits = cls.files(variant)
    assert set(splits) >= {'test'} or name == 'seal_squad'
    for path in sum(splits.values(), []):
      file = download.FILES[path]
      info = cls.url_infos[file.url]
      assert (info.filename, info.checksum) == (path, file.sha256)
      assert (int(info.size), info.checksum) == (file.size, file.sha256)
  assert len(builders.by_name()) == 26


def test_an_unknown_dataset_is_named():
  with pytest.raises(config.ConfigError, match="dataset='babi' .*babi/qa1, "):
    datasets.load('babi', 'test')


@pytest.mark.parametrize('form', ['plain', 'gzip', 'folder of the user'])
def test_a_local_file_is_read_as_it_is_or_gzipped(data, monkeypatch, form):
  if form == 'gzip':
    (data / f'{PATH}.gz').write_bytes(gzip.compress(CSV))
  else:
    (data / PATH).write_bytes(CSV)
  if form == 'folder of the user':
    data = data.rename(data.with_name('mine'))
    monkeypatch.setenv('SLEEP_JAX_DATA', str(data))
  before = sorted(data.rglob('*'))
  for path in before:
    path.chmod(0o555 if path.is_dir() else 0o444)
  got = datasets.load('tiny', 'train', '' if 'user' in form else str(data))
  assert [(r['text'], r['label']) for r in got] == rows(CSV.decode())
  assert got[1]['text'] == 'two\r\nlines'
  assert sorted(data.rglob('*')) == before


def bomb() -> bytes:
  """Four megabytes that expand to four gigabytes."""
  return gzip.compress(bytes(1 << 24)) * 256


def flip(seed: int) -> bytes:
  """A gzipped file with one bit changed."""
  content = bytearray(gzip.compress(CSV, mtime=0))
  rng = random.Random(seed)
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  return bytes(content)


HOSTILE = {
  'altered': (PATH, CSV.replace(b'two', b'owt'), 'SHA-256 is'),
  'cut': (PATH, CSV[:-9], 'SHA-256 is'),
  'empty': (PATH, b'', 'SHA-256 is'),
  'cut gzip': (f'{PATH}.gz', gzip.compress(CSV)[:-9], 'not a whole gzip'),
  'no gzip': (f'{PATH}.gz', CSV, 'not a whole gzip'),
  'bomb': (f'{PATH}.gz', bomb(), f'more than the {len(CSV)} bytes'),
  'cell of 10 MB': (PATH, b'text,label\n' + b'x' * 10**7 + b',y\n', 'more th'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_file_that_is_not_the_listed_one_is_refused(data, cache, name):
  path, content, message = HOSTILE[name]
  (data / path).write_bytes(content)
  with pytest.raises(download.DataError, match=message) as e:
    datasets.load('tiny', 'train', str(data))
  assert str(data / path) in str(e.value) and '\n' not in str(e.value)
  assert not list((cache / 'datasets').iterdir())


def test_a_flipped_bit_of_a_gzip_file_changes_nothing_or_is_refused(data):
  refused = 0
  for seed in range(200):
    (data / f'{PATH}.gz').write_bytes(flip(seed))
    try:
      assert download.local(download.FILES[PATH], str(data)) == CSV
    except download.DataError as e:
      assert '\n' not in str(e)
      refused += 1
  assert refused > 100


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'dangling link'])
def test_what_is_no_file_is_refused(data, kind):
  path = data / PATH
  {
    'folder': path.mkdir,
    'pipe': lambda: os.mkfifo(path),
    'dangling link': lambda: path.symlink_to(data / 'gone'),
  }[kind]()
  with pytest.raises(download.DataError, match=f'{path} is not a file'):
    datasets.load('tiny', 'train', str(data))


def test_an_absent_file_names_the_ways_out_and_leaves_nothing(data, cache):
  with pytest.raises(download.DataError) as e:
    datasets.load('tiny', 'train', str(data))
  assert f'$SLEEP_JAX_DATA to a folder that holds {PATH}[.gz]' in str(e.value)
  assert NOWHERE in str(e.value) and '\n' not in str(e.value)
  assert not list((cache / 'datasets').iterdir())


def test_an_absent_folder_is_named_even_if_it_is_not_needed(data):
  (data / PATH).write_bytes(CSV)
  datasets.load('tiny', 'train', str(data))
  datasets.load('tiny', 'train')
  with pytest.raises(download.DataError, match="'/nowhere' does not exist"):
    datasets.load('tiny', 'train', '/nowhere')


@contextlib.contextmanager
def served(folder: pathlib.Path) -> Iterator[str]:
  """Serves the files of a folder over HTTP."""

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=str(folder))

    def log_message(self, format, *args):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def test_a_dataset_is_downloaded_once_and_read_from_the_cache(
  tmp_path, cache, monkeypatch
):
  (tmp_path / 'train.csv').write_bytes(CSV)
  with served(tmp_path) as origin:
    tiny(monkeypatch, url=f'{origin}/train.csv')
    first = datasets.load('tiny', 'train')
  prepared._records.cache_clear()
  assert datasets.load('tiny', 'train') == first
  assert [(r['text'], r['label']) for r in first] == rows(CSV.decode())
  (folder,) = (cache / 'datasets').iterdir()
  assert {p.name for p in folder.iterdir()} == {'tiny', 'SHA256'}


@pytest.mark.parametrize(
  'content, message',
  [(None, 'HTTP code: 404'), (CSV + b'x', 'other content'), (b'', 'other con')],
)
def test_an_origin_that_has_changed_is_refused(
  tmp_path, cache, monkeypatch, content, message
):
  if content is not None:
    (tmp_path / 'train.csv').write_bytes(content)
  with served(tmp_path) as origin:
    tiny(monkeypatch, url=f'{origin}/train.csv')
    with pytest.raises(download.DataError, match=message) as e:
      datasets.load('tiny', 'train')
  assert '$SLEEP_JAX_DATA' in str(e.value) and '\n' not in str(e.value)
  assert not list((cache / 'datasets').iterdir())


def test_of_two_that_prepare_at_once_both_succeed(data, cache, monkeypatch):
  (data / PATH).write_bytes(CSV)
  records, results = Tiny.records, []

  def overtaken(self, *contents):
    monkeypatch.setattr(Tiny, 'records', records)
    results.append(datasets.load('tiny', 'train', str(data)))
    return records(self, *contents)

  monkeypatch.setattr(Tiny, 'records', overtaken)
  results.append(datasets.load('tiny', 'train', str(data)))
  assert results[0] == results[1] and len(results[0]) == 53
  assert len(list((cache / 'datasets').iterdir())) == 1


def test_a_preparation_that_is_cut_short_is_never_used(
  data, cache, monkeypatch
):
  (data / PATH).write_bytes(CSV)
  records = Tiny.records

  def cut_short(self, *contents):
    yield next(records(self, *contents))
    raise KeyboardInterrupt

  monkeypatch.setattr(Tiny, 'records', cut_short)
  with pytest.raises(KeyboardInterrupt):
    datasets.load('tiny', 'train', str(data))
  assert not list((cache / 'datasets').iterdir())
  monkeypatch.setattr(Tiny, 'records', records)
  # What a process that was killed leaves.
  (cache / 'datasets/part-x/made').mkdir(parents=True)
  assert len(datasets.load('tiny', 'train', str(data))) == 53


def test_a_damaged_copy_is_refused(data, cache):
  (data / PATH).write_bytes(CSV)
  datasets.load('tiny', 'train', str(data))
  (folder,) = (cache / 'datasets').iterdir()
  files = [p for p in folder.rglob('*') if p.is_file()]
  assert len(files) == 5
  for file in files:
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 0x80]) + content[1:])
    prepared._records.cache_clear()
    with pytest.raises(download.DataError, match=f'{folder} is damaged; remo'):
      datasets.load('tiny', 'train', str(data))
    file.write_bytes(content)
  assert len(datasets.load('tiny', 'train', str(data))) == 53


def test_a_cache_that_cannot_be_written_is_named(data, cache, monkeypatch):
  (data / PATH).write_bytes(CSV)
  (cache.parent / 'file').touch()
  monkeypatch.setenv('SLEEP_JAX_CACHE', str(cache.parent / 'file'))
  with pytest.raises(download.DataError, match='set .SLEEP_JAX_CACHE to a'):
    datasets.load('tiny', 'train', str(data))


@pytest.mark.parametrize('error', [OSError, RuntimeError])
def test_a_full_disk_is_one_line_and_leaves_nothing(
  data, cache, monkeypatch, error
):
  (data / PATH).write_bytes(CSV)

  def fail(self, **kwargs):
    raise error('No space left on device')

  monkeypatch.setattr(Tiny, 'download_and_prepare', fail)
  with pytest.raises(download.DataError, match=f'{cache} cannot .*No space'):
    datasets.load('tiny', 'train', str(data))
  assert not list((cache / 'datasets').iterdir())


def test_a_prepared_copy_belongs_to_the_checksums(data, cache, monkeypatch):
  (data / PATH).write_bytes(CSV)
  datasets.load('tiny', 'train', str(data))
  other = b'text,label\nb,c\n'
  tiny(monkeypatch, other)
  (data / PATH).write_bytes(other)
  got = datasets.load('tiny', 'train', str(data))
  assert got == [{'text': 'b', 'label': 'c'}]
  assert len(list((cache / 'datasets').iterdir())) == 2


def test_no_command_imports_tensorflow_datasets_before_it_reads_a_dataset():
  code = (
    'import sys\n'
    'from experiments import run\n'
    'from sleep_jax import cli, tasks\n'
    'from sleep_jax.data.datasets import class_incremental, squad\n'
    'tasks.build("facts", {}, 0)\n'
    'print([m for m in sys.modules if m.startswith("tensorflow")])\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout == '[]\n'
