"""Damaged files of every kind are refused in one line, or read as they are."""

import pytest

from tests import fuzzing

pytest.importorskip('jinja2')


@pytest.mark.parametrize(
  'cases, seed', [(60, 0), pytest.param(1000, 1, marks=pytest.mark.slow)]
)
def test_damaged_files_are_refused_or_read(tmp_path, cases, seed):
  assert not fuzzing.Fuzzer(tmp_path).run(cases, seed)


def test_a_reader_that_goes_wrong_is_caught(tmp_path, monkeypatch):
  """Tracebacks, several lines, bytes from outside, numbers that are not."""
  outcomes = {
    'ValueError: x': _raiser(ValueError('x')),
    'has several lines': _raiser(fuzzing.config.ConfigError('a\nb')),
    'not finite': lambda folder, out: float('nan'),
    'was opened': lambda folder, out: (
      folder.parents[1] / 'secret' / 'x'
    ).read_bytes(),
    'was copied': lambda folder, out: (out / 'y').write_bytes(fuzzing._SECRET),
    'was written': lambda folder, out: (folder.parents[1] / 'stray').write_text(
      ''
    ),
  }
  for i, (words, read) in enumerate(outcomes.items()):
    kind = fuzzing.Kind('k', lambda folder: (folder / 'f').touch(), read)
    monkeypatch.setattr(fuzzing, 'KINDS', (kind,))
    (tmp_path / f'{i}').mkdir()
    [wrong] = fuzzing.Fuzzer(tmp_path / f'{i}').run(1, 0)
    assert words in wrong


def _raiser(error: Exception):
  def read(folder, out):
    raise error

  return read
