"""Renders chat templates; a program of its own, so that it may be killed.

  python template_worker.py

A line of standard input is a JSON list [template, variables], the line of
standard output that answers it {"text": ...} or {"error": ...}. A template is
code of whoever made the checkpoint. Jinja's sandbox keeps it from this machine,
but not from filling its memory or from never ending, and one operation of
Python cannot be interrupted from inside. So limits of the kernel hold here: a
template that takes too much memory has its answer, one that takes too long ends
this process by SIGPROF.
"""

from collections.abc import Callable
import contextlib
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.sandbox

SECONDS = 2.0  # Of the processor, for one conversation.
_MEMORY = 1 << 30  # Bytes.
_CHARACTERS = 1 << 22  # Of the text.


def _environment() -> jinja2.Environment:
  """The environment that templates expect, in a sandbox."""

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=['jinja2.ext.loopcontrols'],
  )
  environment.globals['raise_exception'] = refuse
  # Jinja's filter of this name escapes HTML characters.
  environment.filters['tojson'] = lambda x, indent=None: json.dumps(
    x, ensure_ascii=False, indent=indent
  )
  return environment


def _answer(
  compiled: Callable[[str], jinja2.Template],
  template: str,
  variables: dict[str, Any],
) -> dict[str, str]:
  try:
    text = compiled(template).render(variables)
  except MemoryError:
    return {'error': f'it needs more than {_MEMORY >> 20} MB of memory'}
  except jinja2.TemplateError as e:
    return {'error': str(e)[:500]}
  except Exception as e:  # A template is a program.
    return {'error': f'{type(e).__name__}: {e}'[:500]}
  if len(text) > _CHARACTERS:
    return {'error': f'its text has more than {_CHARACTERS:,} characters'}
  return {'text': text}


def main() -> None:
  """Answers until standard input ends."""
  with contextlib.suppress(OSError, ValueError):  # Not every system has it.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
  # Compiled once: a task has thousands of prompts.
  compiled = functools.lru_cache(8)(_environment().from_string)
  for line in sys.stdin:
    template, variables = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    answer = _answer(compiled, template, variables)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
