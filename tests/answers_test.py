"""Final answers, against cases of MathArena's and GSM8K's kinds."""

import subprocess
import sys
import threading

import pytest

from sleep_jax import config
from sleep_jax.data import answers


@pytest.mark.parametrize(
  'text, wanted',
  [
    (r'So x is \boxed{7}.', '7'),
    (r'\boxed{1} no, \boxed{\frac{1}{2}} indeed', r'\frac{1}{2}'),
    (r'\boxed{ 12 }', '12'),
    (r'\boxed{\sqrt{2}', None),  # It was cut off.
    (r'\boxed{}', None),
    (r'\boxed{' + '9' * 999 + '}', None),
    ('6 apples.\n#### 6', '6'),
    ('#### 6\n#### 1,234', '1,234'),
    ('it is 7', None),
    ('', None),
  ],
)
def test_the_final_answer(text, wanted):
  assert answers.final(text) == wanted


@pytest.mark.parametrize(
  'text, wanted',
  [
    ('12', 12), ('-3', -3), ('1,234,567', 1234567), ('$18', 18), (r'\$18', 18),
    ('18.00', 18), ('18.', 18), ('$012$', 12), ('1,23', None), ('1.5', None),
    (r'\frac{1}{2}', None), ('seven', None), ('', None), (r'1\!000', 1000),
  ],
)  # fmt: skip
def test_whole_numbers(text, wanted):
  assert answers.integer(text) == wanted


@pytest.mark.parametrize(
  'wanted, found, agree',
  [
    ('7', '7', True),
    ('007', '7', True),
    ('7', '8', False),
    (r'\frac{1}{2}', '0.5', True),
    (r'\frac{1}{2}', r'\dfrac{2}{4}', True),
    (r'\frac{1}{2}', r'\frac{1}{3}', False),
    (r'\frac{9\sqrt{23}}{23}', r'\frac{9}{\sqrt{23}}', True),
    (r'6 - \sqrt{5}', r'-\sqrt{5}+6', True),
    ('7', 'seven', False),
    (r'\frac{', r'\FRAC {', True),  # Nothing can be parsed: as text.
  ],
)
def test_agreement(wanted, found, agree):
  pytest.importorskip('math_verify')
  assert answers.agree(wanted, found) == agree


def test_integers_agree_as_math_verify_says():
  math_verify = pytest.importorskip('math_verify')
  for a in (0, 1, -7, 12, 999):
    for b in (a, a + 1, -a):
      gold, found = (math_verify.parse(f'${x}$') for x in (a, b))
      assert answers.agree(str(a), str(b)) == math_verify.verify(gold, found)


def test_an_answer_that_hangs_the_parser_ends_by_its_limit(monkeypatch):
  pytest.importorskip('math_verify')
  monkeypatch.setattr(answers, '_SECONDS', 1)
  tower = '9^{9^{9^{9^{9}}}}'
  assert not answers.agree(r'\sqrt{2}', tower)


def test_it_works_in_a_thread_that_may_not_have_signals():
  pytest.importorskip('math_verify')
  seen = []
  thread = threading.Thread(
    target=lambda: seen.append(answers.agree(r'\frac{1}{2}', '0.5'))
  )
  thread.start()
  thread.join()
  assert seen == [True]


def test_answers_that_cannot_be_compared_are_refused():
  """Without the extra; whole numbers need none."""
  code = (
    'import sys; sys.modules["math_verify"] = None\n'
    'from sleep_jax.data import answers\n'
    'answers.check_comparable(["7", "1,000"])\n'
    'answers.check_comparable(["7", "1/2"])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert done.stderr.strip().endswith(
    "the answer '1/2' is no whole number; to compare it, `pip install "
    "'sleep_jax[math]'`."
  )
  assert config.ConfigError.__name__ in done.stderr
