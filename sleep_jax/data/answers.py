"""Final answers of solutions in text: where they stand, and whether they agree.

Whole numbers are compared as such. For anything else, such as fractions and
roots in LaTeX, math-verify decides (extra `math`): on its own time limit, and
where it fails, by the text without case and spaces, as OPSD's evaluation does.
"""

import re
import threading

from absl import logging

from sleep_jax import config

_BOXED = '\\boxed{'
_AFTER = re.compile(r'####\s*(\S+)')
_GROUPED = re.compile(r'(?<=\d),(?=\d{3}(?!\d))')
_LONGEST = 300  # Characters of an answer; a longer one is not read.
_SECONDS = 5  # Most that math-verify may take for one.


def final(text: str) -> str | None:
  r"""What stands in the last `\boxed{}`, or behind the last `####`.

  None if there is neither, or a box that does not end.
  """
  start = text.rfind(_BOXED)
  if start < 0:
    found = _AFTER.findall(text)
    return found[-1] if found else None
  depth, begin = 1, start + len(_BOXED)
  for i in range(begin, len(text)):
    depth += {'{': 1, '}': -1}.get(text[i], 0)
    if not depth:
      answer = text[begin:i].strip()
      return answer if answer and len(answer) <= _LONGEST else None
  return None


def integer(text: str) -> int | None:
  """The whole number that a text is; None if it is something else."""
  text = _GROUPED.sub('', text.strip().strip('$').replace('\\!', '').strip())
  text = text.removeprefix('\\$').rstrip('.').removesuffix('.00')
  try:
    return int(text)
  except ValueError:
    return None


def agree(wanted: str, found: str) -> bool:
  """Whether an answer is the wanted one."""
  numbers = integer(wanted), integer(found)
  if None not in numbers:
    return numbers[0] == numbers[1]
  return _verify(wanted, found)


def check_comparable(answers: list[str]) -> None:
  """Refuses answers that cannot be compared.

  Raises:
    ConfigError: for the first that is no whole number, without math-verify.
  """
  if others := [x for x in answers if integer(x) is None]:
    try:
      import math_verify  # noqa: F401
    except ImportError as e:
      raise config.ConfigError(
        f'the answer {others[0]!r} is no whole number; to compare it, '
        "`pip install 'sleep_jax[math]'`."
      ) from e


def _verify(wanted: str, found: str) -> bool:
  import math_verify

  # It limits its time by SIGALRM, which the main thread alone may have.
  main = threading.current_thread() is threading.main_thread()
  seconds = _SECONDS if main else 0
  try:
    gold, answer = (
      math_verify.parse(
        f'${x}$', fallback_mode='no_fallback', parsing_timeout=seconds
      )
      for x in (wanted, found)
    )
    if gold and answer:
      # In this order: more is allowed for an answer than for the wanted one.
      return math_verify.verify(gold, answer, timeout_seconds=seconds)
  except Exception:  # pylint: disable=broad-except
    # A parser of anything may fail in any way.
    logging.debug('math-verify failed at %r and %r', wanted, found)
  return _plain(wanted) == _plain(found)


def _plain(text: str) -> str:
  return ''.join(text.lower().split())
