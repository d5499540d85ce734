"""Damaged files of every kind are refused in one line, or read as they are."""

import pytest

from sleep_jax import config
from tests import fuzzing

pytest.importorskip('jinja2')


@pytest.mark.parametrize(
  'cases, seed', [(30, 0), pytest.param(1000, 1, marks=pytest.mark.slow)]
)
def test_damaged_files_are_refused_or_read(tmp_path, cases, seed):
  assert not fuzzing.Fuzzer(tmp_path).run(cases, seed)


def test_a_reader_that_goes_wrong_is_caught(tmp_path, monkeypatch):
  """Tracebacks, several lines, bytes from outside, numbers that are not."""
  root = [tmp_path]

  def raises(error: Exception):
    raise error

  outcomes = {
    'ValueError: x': lambda _, out: raises(ValueError('x')),
    'has several lines': lambda _, out: raises(config.ConfigError('a\nb')),
    'not finite': lambda _, out: float('nan'),
    'was opened': lambda _, out: (root[0] / 'secret/x').open().close(),
    'was copied': lambda _, out: (out / 'y').write_bytes(fuzzing._SECRET),
    'was written': lambda _, out: (root[0] / 'stray').write_text(''),
  }
  for i, (words, read) in enumerate(outcomes.items()):
    kind = fuzzing.Kind('k', lambda folder: (folder / 'f').touch(), read)
    monkeypatch.setattr(fuzzing, 'KINDS', (kind,))
    root[0] = tmp_path / f'{i}'
    root[0].mkdir()
    [wrong] = fuzzing.Fuzzer(root[0]).run(1, 0)
    assert words in wrong
