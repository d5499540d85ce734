"""Listed raw files: by name, by checksum, and from their origin."""

import hashlib
import os

import pytest

from sleep_jax.data.datasets import catalog
from sleep_jax.data.datasets import download
from sleep_jax.data.datasets import gutenberg

needs_data = pytest.mark.skipif(
  not os.environ.get('SLEEP_JAX_DATA'), reason='SLEEP_JAX_DATA is not set'
)

TEXT = 'Produced by A. Nobody\n\n\nA TALE\n\nIt was “night”.\n'
RAW = (
  '\ufeffThe Project Gutenberg EBook of A Tale\n\n'
  '*** START OF THIS PROJECT GUTENBERG EBOOK A\nTALE ***\n\n\n'
  f'{TEXT}\n\nEnd of the Project Gutenberg EBook of A Tale\n'
  '*** END OF THIS PROJECT GUTENBERG EBOOK A TALE ***\n\nThe licence.\n'
).replace('\n', '\r\n')


@pytest.mark.parametrize('encoding', ['utf-8', 'cp1252'])
def test_a_book_loses_all_but_its_text(encoding):
  raw = RAW if encoding == 'utf-8' else RAW.removeprefix('\ufeff')
  assert gutenberg.strip_header(raw.encode(encoding)).decode() == TEXT


def test_a_text_without_the_marks_is_refused():
  with pytest.raises(download.DataError, match='START and END'):
    gutenberg.strip_header(b'<html>404</html>')


def test_a_download_is_prepared_checked_and_kept(tmp_path, monkeypatch):
  monkeypatch.setenv('SLEEP_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.delenv('SLEEP_JAX_DATA', raising=False)
  origin = tmp_path / 'raw.txt'
  origin.write_bytes(RAW.encode())

  def file(content: str) -> download.RawFile:
    raw = content.encode()
    sha = hashlib.sha256(raw).hexdigest()
    return download.RawFile(
      'b/tale.txt', origin.as_uri(), len(raw), sha, gutenberg.strip_header
    )

  with pytest.raises(download.DataError, match='SHA-256'):
    download.read(file(RAW))
  origin.write_bytes(b'\xff\x81 not found')
  with pytest.raises(download.DataError, match='raw.txt: no START and END'):
    download.read(file(TEXT))
  origin.write_bytes(RAW.encode())
  assert not (tmp_path / 'cache').exists()
  assert download.read(file(TEXT)).decode() == TEXT
  origin.unlink()
  assert download.read(file(TEXT)).decode() == TEXT  # From the cache.


def test_a_file_by_path_or_by_listed_name(tmp_path):
  (tmp_path / 'mine.txt').write_text('Mine.')
  assert catalog.read(str(tmp_path / 'mine.txt')) == b'Mine.'
  with pytest.raises(
    download.DataError, match="'x.txt'.*listed gutenberg/Anna"
  ):
    catalog.read('x.txt')
  with pytest.raises(download.DataError, match='is not a file'):
    catalog.read(str(tmp_path))


def test_every_listed_file_has_an_origin_and_a_hash():
  for path, file in download.FILES.items():
    assert path == file.path and file.url.startswith('https://')
    assert len(bytes.fromhex(file.sha256)) == 32 and file.size > 0
  assert len({f.sha256 for f in download.FILES.values()}) == 72


def test_every_book_is_stripped_of_its_licence():
  assert len(gutenberg.BOOKS) == 15
  for name, book in gutenberg.BOOKS.items():
    assert book.path == f'gutenberg/{name}.txt'
    assert book.prepare is gutenberg.strip_header


@needs_data
@pytest.mark.parametrize('name', sorted(download.FILES))
def test_local_files_are_the_listed_ones(name):
  file = download.FILES[name]
  assert len(download.read(file)) == file.size


def test_an_unreachable_origin_names_the_way_out(tmp_path, monkeypatch):
  monkeypatch.setenv('SLEEP_JAX_CACHE', str(tmp_path / 'cache'))
  file = download.RawFile('y.csv', 'http://127.0.0.1:9/y.csv', 1, '0' * 64)
  with pytest.raises(download.DataError, match='SLEEP_JAX_DATA to a folder'):
    download.read(file, str(tmp_path))
  assert not list(tmp_path.rglob('*.part'))


def test_a_download_is_no_longer_than_it_may_be(tmp_path, monkeypatch):
  monkeypatch.setenv('SLEEP_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.delenv('SLEEP_JAX_DATA', raising=False)
  monkeypatch.setattr(download, '_MARGIN', 10)
  origin = tmp_path / 'long.txt'
  origin.write_bytes(b'x' * 100)
  file = download.RawFile('long.txt', origin.as_uri(), 20, '0' * 64)
  with pytest.raises(download.DataError, match='more than the 20 bytes'):
    download.read(file)
  assert not (tmp_path / 'cache').exists()


def test_a_book_that_is_not_utf_8_is_refused_with_a_way_out(tmp_path):
  path = tmp_path / 'book.txt'
  path.write_bytes('Ein Märchen.'.encode('latin-1'))
  with pytest.raises(download.DataError, match='iconv -f latin1') as e:
    catalog.read_text(str(path))
  assert '\n' not in str(e.value)
  path.write_text('Ein Märchen.', encoding='utf-8')
  assert catalog.read_text(str(path)) == 'Ein Märchen.'


def test_paragraphs_stand_on_one_line_each():
  assert gutenberg.paragraphs('A\n  b\n\n \nC\n\n\n') == ['A b', 'C']
