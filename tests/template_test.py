"""Chat templates are programs of others: they run within limits."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from sleep_jax import config
from sleep_jax.data import chat as chat_lib
from sleep_jax.data import tokenizers
from sleep_jax.data.tokenizers import template
from tests import tiny_checkpoint

pytest.importorskip('jinja2')
pytest.importorskip('tokenizers')

_NESTED = (
  '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}'
  '{% endfor %}'
)
_DOUBLED = (
  "{% set x = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
  '{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}'
)


@pytest.mark.parametrize(
  'text, words',
  [
    ('{{ 1 / 0 }}', 'ZeroDivisionError'),
    ('{{ messages + 1 }}', 'TypeError'),
    ("{{ 'a'.encode('nope') }}", 'LookupError'),
    ("{% include '/etc/passwd' %}", 'no loader'),
    ("{{ ''.__class__.__mro__ }}", 'unsafe'),
    ('{% for %}', 'Expected an expression'),
    ('{{ ' + '(' * 20_000 + '1' + ')' * 20_000 + ' }}', 'RecursionError'),
    ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'RecursionError'),
    ('{% for i in range(10**9) %}x{% endfor %}', 'Range too big'),
    ("{{ 'a' * 10**10 }}", 'needs more than 1024 MB'),
    ("{{ 'a' | center(10**10) }}", 'needs more than 1024 MB'),
    ("{{ [1] | batch(10**9, 'x') | list }}", 'needs more than 1024 MB'),
    (_DOUBLED, 'needs more than 1024 MB'),
    ("{{ 'a' * 5000000 }}", 'more than 4,194,304 characters'),
    (_NESTED, 'takes too long'),
    pytest.param(
      '{{ lipsum(n=10**8) }}', 'takes too long', marks=pytest.mark.slow
    ),
    pytest.param(
      "{{ ('a' * 10000000) | wordwrap(1) }}",
      'takes too long',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_template_that_goes_too_far_is_refused(text, words):
  with pytest.raises(config.ConfigError, match=words) as error:
    template.render(text, {'messages': []})
  assert '\n' not in str(error.value)
  # The next one is rendered.
  assert template.render('{{ a }}é', {'a': 'ü'}) == 'üé'


def test_a_template_that_fails_is_not_passed_over(tmp_path):
  """In plain words an instruct model would be asked wrongly, unsaid."""
  tiny_checkpoint.write_tokenizer(tmp_path / 'a', '{{ 1 / 0 }}')
  with pytest.raises(config.ConfigError, match='ZeroDivisionError'):
    chat_lib.of(tokenizers.load(tmp_path / 'a'))
  tiny_checkpoint.write_tokenizer(tmp_path / 'b', None)
  plain = chat_lib.of(tokenizers.load(tmp_path / 'b'))
  assert isinstance(plain, chat_lib.PlainChat)
  twice = "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}"
  tiny_checkpoint.write_tokenizer(tmp_path / 'c', twice)
  with pytest.raises(config.ConfigError, match='once each'):
    chat_lib.of(tokenizers.load(tmp_path / 'c'))


@pytest.mark.parametrize(
  'chat_template', [3, [3], [{'name': 'default', 'template': 4}], True]
)
def test_a_template_that_is_no_text_is_refused(tmp_path, chat_template):
  tiny_checkpoint.write_tokenizer(tmp_path, chat_template)
  with pytest.raises(config.ConfigError, match='chat_template'):
    chat_lib.of(tokenizers.load(tmp_path))


def test_threads_have_their_own_answers():
  answers: dict[int, str] = {}

  def render(i: int) -> None:
    answers[i] = template.render('{{ i }}', {'i': i})

  threads = [threading.Thread(target=render, args=(i,)) for i in range(20)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert answers == {i: str(i) for i in range(20)}


def test_an_interrupted_answer_is_not_that_of_the_next():
  assert template.render('{{ 1 }}', {}) == '1'

  def interrupt(*_) -> None:
    raise KeyboardInterrupt

  handler = signal.signal(signal.SIGALRM, interrupt)
  signal.setitimer(signal.ITIMER_REAL, 0.2)
  try:
    with pytest.raises(KeyboardInterrupt):
      while True:
        template.render(_NESTED.replace('99999', '2000'), {})
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)
  assert template.render('{{ 2 }}', {}) == '2'


def test_no_process_is_left_behind(tmp_path):
  """Not at the end, nor where the process that asked is killed."""
  code = (
    'import os, sys, time\n'
    'from sleep_jax.data.tokenizers import template\n'
    "template.render('{{ 1 }}', {})\n"
    'print(template._renderer._worker.pid, flush=True)\n'
    "time.sleep(60 if sys.argv[1] == 'stay' else 0)\n"
  )
  for what in ('leave', 'stay'):
    process = subprocess.Popen(
      [sys.executable, '-c', code, what], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    worker = pathlib.Path('/proc', process.stdout.readline().strip())
    assert worker.name.isdecimal()
    if what == 'stay':
      process.kill()
    process.wait(timeout=60)
    end = time.monotonic() + 60
    while worker.exists() and 'zombie' not in (worker / 'status').read_text():
      assert time.monotonic() < end
      time.sleep(0.05)
    process.stdout.close()


def test_a_forked_process_has_a_worker_of_its_own():
  assert template.render('{{ 1 }}', {}) == '1'
  child = os.fork()
  if not child:
    os._exit(0 if template.render('{{ 2 }}', {}) == '2' else 1)
  assert os.waitpid(child, 0)[1] == 0
  assert template.render('{{ 3 }}', {}) == '3'
