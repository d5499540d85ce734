"""The command `sleep-jax`, with a sub-command for everything that a user runs.

Nothing heavy is imported before a command needs it, so that `--help` is quick.
"""

import argparse
from collections.abc import Sequence
import importlib
import importlib.resources
import importlib.util
import os
import pathlib
import runpy
import sys
from typing import Any, NoReturn

import sleep_jax
from sleep_jax import config

_EPILOG = """\
examples:
  sleep-jax fetch smollm2
  sleep-jax sleep --model=smollm2 --docs notes/*.md --qa quiz.jsonl --out=slept
  sleep-jax ask slept "Who built the lighthouse?"
  sleep-jax chat slept
"""
# Modules that stand above this package, which therefore does not import them.
_MODULES = {
  'run': ('experiments.run', 'run an experiment, by --config=NAME or FILE'),
  'report': ('experiments.report', 'write the tables of lives that have ended'),
  'launch': ('launch.cli', 'run an experiment on a cluster (docs/launch.md)'),
}
_DOCS_HELP = (
  'txt, md, or jsonl with "text", or "question" and "answer", or "messages"'
)


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one line, and end with exit code 1."""

  def error(self, message: str) -> NoReturn:
    self.exit(1, f'error: {message}\n')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Returns:
    The exit code: 0; 1 after an error, which the last line names; 130 if it was
    interrupted.
  """
  args, rest = _parser().parse_known_args(argv)
  if rest and args.command not in (_run_module, _doctor):
    _parser().error(f'unrecognized arguments: {" ".join(rest)}')
  try:
    args.command(args, rest)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return 130
  except Exception as e:  # Sorted below; what is not expected goes on.
    if not _is_expected(e):
      raise
    print(f'error: {e}', file=sys.stderr)
    return 1
  return 0


def run() -> NoReturn:
  """The console script."""
  sys.exit(main())


def _is_expected(error: Exception) -> bool:
  """Whether an error's message is for people, and no bug."""
  kinds: tuple[type[Exception], ...] = (config.ConfigError, OSError)
  if 'sleep_jax.api' in sys.modules:
    from sleep_jax import reports
    from sleep_jax.runtime import finite

    kinds += (reports.NotTransferred, finite.NotFinite)
  return isinstance(error, kinds)


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog='sleep-jax',
    description='Language models that read by day and consolidate by night.',
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--version', action='version', version=sleep_jax.__version__
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  _add_sleep(commands)
  for name, function, text in (
    ('ask', _ask, 'ask one question, closed book'),
    ('chat', _chat, 'converse; an empty line or /quit ends it'),
  ):
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument('model', metavar='MODEL', help='a name, or a folder')
    if name == 'ask':
      command.add_argument('question', metavar='QUESTION')
    command.add_argument('--max-new', type=int, default=128, metavar='TOKENS')
    command.add_argument('--temperature', type=float, default=0.0)
    command.set_defaults(command=function)
  text = 'download a pretrained model that has a name here, and keep it'
  command = commands.add_parser('fetch', help=text, description=text)
  command.add_argument('name', metavar='NAME')
  command.set_defaults(command=_fetch)
  text = 'convert a checkpoint between formats (docs/weights.md)'
  command = commands.add_parser('convert', help=text, description=text)
  command.add_argument('source', metavar='IN', type=pathlib.Path)
  command.add_argument('out', metavar='OUT', type=pathlib.Path)
  command.set_defaults(command=_convert)
  for name, (module, text) in _MODULES.items():
    command = commands.add_parser(name, help=text, add_help=False)
    command.set_defaults(command=_run_module, module=module)
  text = 'check this machine, and a job if the arguments of launch are given'
  command = commands.add_parser(
    'doctor', help=text, description=text, allow_abbrev=False
  )
  command.set_defaults(command=_doctor)
  return parser


def _add_sleep(commands: Any) -> None:
  text = 'read documents, sleep on them, measure and export'
  command = commands.add_parser('sleep', help=text, description=text)
  command.add_argument('--model', required=True, help='a name, or a folder')
  command.add_argument(
    '--docs', required=True, nargs='+', type=pathlib.Path, metavar='FILE',
    help=_DOCS_HELP,
  )  # fmt: skip
  command.add_argument(
    '--qa', type=pathlib.Path, metavar='FILE',
    help='jsonl with "question" and "answer": asked, never read',
  )  # fmt: skip
  command.add_argument('--out', required=True, type=pathlib.Path)
  command.add_argument('--nights', type=int, help='default: by amount of text')
  command.add_argument('--seed', type=int, default=0)
  command.add_argument(
    '--set', action='append', default=[], metavar='NAME=VALUE', dest='plan',
    help='a field of the plan that is printed first; may be given again',
  )  # fmt: skip
  command.add_argument(
    '--export', default='custom', metavar='FORMS',
    help='custom, merged, or both with a comma; none',
  )  # fmt: skip
  command.add_argument(
    '--allow-failure', action='store_true',
    help='go on after a night that moved nothing',
  )  # fmt: skip
  command.set_defaults(command=_sleep)


def _sleep(args: argparse.Namespace, rest: list[str]) -> None:
  from sleep_jax import overnight
  from sleep_jax import plan as plan_lib
  from sleep_jax.runtime import compilation

  plan = dict(_setting(text) for text in args.plan)
  if args.nights is not None:
    plan['nights'] = args.nights
  plan_lib.check_fields(plan)
  exports = () if args.export == 'none' else tuple(args.export.split(','))
  compilation.enable_cache()
  overnight.run(
    overnight.Request(
      model=args.model,
      docs=tuple(args.docs),
      qa=args.qa,
      out=args.out,
      plan=plan,
      seed=args.seed,
      export=exports,
      allow_failure=args.allow_failure,
    )
  )


def _setting(text: str) -> tuple[str, int | float]:
  """NAME=VALUE; the name is checked elsewhere."""
  name, equals, value = text.partition('=')
  for kind in (int, float):
    try:
      return name, kind(value)
    except ValueError:
      pass
  raise config.ConfigError(
    f'--set {text}: give a name and a number, as in --set passes=5.'
    if equals
    else f'--set {text}: there is no =; write NAME=VALUE.'
  )


def _load(name: str) -> 'sleep_jax.Sleeper':
  from sleep_jax.runtime import compilation

  compilation.enable_cache()
  return sleep_jax.load(name)


def _ask(args: argparse.Namespace, rest: list[str]) -> None:
  m = _load(args.model)
  print(
    m.ask(args.question, max_new=args.max_new, temperature=args.temperature)
  )


def _chat(args: argparse.Namespace, rest: list[str]) -> None:
  m, messages = _load(args.model), []
  while True:
    try:
      text = input('> ').strip()
    except EOFError:
      return
    if text in ('', '/quit'):
      return
    messages.append({'role': 'user', 'content': text})
    reply = m.chat(messages, max_new=args.max_new, temperature=args.temperature)
    messages.append({'role': 'assistant', 'content': reply})
    print(reply, flush=True)


def _fetch(args: argparse.Namespace, rest: list[str]) -> None:
  from sleep_jax.weights import fetch

  print(fetch.fetch(args.name))


def _convert(args: argparse.Namespace, rest: list[str]) -> None:
  from sleep_jax.weights import convert

  print(convert.convert(args.source, args.out))


def _run_module(args: argparse.Namespace, rest: list[str]) -> None:
  """Does what `python -m MODULE` does in a checkout."""
  _extend_path()
  sys.argv[1:] = rest
  runpy.run_module(args.module, run_name='__main__', alter_sys=True)


def _extend_path() -> None:
  """Makes `experiments`, `launch` and the user's own modules importable.

  Here, and in the processes that a launch starts on this machine. A wheel has
  the first two in the folder `commands`; else this is a checkout.
  """
  package = pathlib.Path(str(importlib.resources.files('sleep_jax')))
  wheel = package / 'commands'
  root = wheel if wheel.is_dir() else package.parent
  sys.path[:0] = [str(root), os.getcwd()]
  others = os.environ.get('PYTHONPATH')
  os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, (str(root), others)))


def _doctor(args: argparse.Namespace, rest: list[str]) -> None:
  from sleep_jax import doctor

  _extend_path()
  if rest and not importlib.util.find_spec('launch.doctor'):
    raise config.ConfigError(f'no check of a job takes {" ".join(rest)}.')
  failed = doctor.main()
  if rest:
    failed |= importlib.import_module('launch.doctor').main(rest)
  sys.exit(failed)
