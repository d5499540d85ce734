"""This checkout against another commit, in three minutes.

  python -m benchmarks.quick --against=main

A short life of `facts` is lived in turn by both, each time in a process of its
own, and the seconds of each of its phases are compared from the second night
on, when everything is compiled. Nothing else should run meanwhile. The table
says how many times as fast this checkout is, with a 95% t interval over the
rounds of the ratio's logarithm: an interval that holds 1.00 shows nothing.
"""

import argparse
from collections.abc import Iterator
import contextlib
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from sleep_jax.metrics import statistics

ROOT = pathlib.Path(__file__).parent.parent
_NIGHTS = 3
_TIMEOUT = 600
# What a life is asked to do, small; run by both checkouts as it stands here.
_LIFE = f"""
import json, time
import jax
from experiments.configs import quickstart
from sleep_jax.harness import build, student
from sleep_jax.runtime import compilation

compilation.enable_cache()
c = quickstart.get_config()
c.task.update(rows=160)
c.sleep.update(dreams=256, steps=60)
c.model.levels[0].sleep_every = c.task.rows // c.wake.batch
c = json.loads(c.to_json())
task, learner, costs = build.build(build.arm_config(c, 'sleep'), 1)
life = learner.init(jax.random.PRNGKey(1))
before = {{}}
for night in range({_NIGHTS}):
  if night == 1:
    before = costs.totals()
  life, _ = learner.wake(life, task.experience(night))
  life, _ = learner.sleep(life)
  task.evaluate(student.Student(learner, life), night)
after = costs.totals()
print(json.dumps({{
  name: (after[name]['seconds'] - before[name]['seconds']) / {_NIGHTS - 1}
  for name in after if after[name]['seconds'] > before[name]['seconds']
}}))
"""


def live(checkout: pathlib.Path, cache: pathlib.Path) -> dict[str, float]:
  """Seconds of a night's phases, of the code in `checkout`.

  Raises:
    SystemExit: it could not live.
  """
  env = os.environ | {
    'PYTHONPATH': str(checkout),
    'JAX_COMPILATION_CACHE_DIR': str(cache),
  }
  done = subprocess.run(
    [sys.executable, '-c', _LIFE],
    cwd=checkout,
    env=env,
    capture_output=True,
    text=True,
    timeout=_TIMEOUT,
  )
  if done.returncode:
    last = (done.stderr.strip() or 'no message').splitlines()[-1]
    raise SystemExit(f'{checkout} could not live: {last}')
  return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def checkout_of(commit: str) -> Iterator[pathlib.Path]:
  """A worktree of another commit, which is removed again.

  Raises:
    SystemExit: there is no such commit.
  """

  def git(*args: str) -> subprocess.CompletedProcess[str]:
    command = ['git', '-C', str(ROOT), *args]
    return subprocess.run(command, capture_output=True, text=True)

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'other'
    done = git('worktree', 'add', '--detach', str(path), commit)
    if done.returncode:
      raise SystemExit(
        f'--against={commit}: {done.stderr.strip().splitlines()[-1]}'
      )
    try:
      yield path
    finally:
      git('worktree', 'remove', '--force', str(path))


def compare(rounds: list[tuple[dict[str, float], dict[str, float]]]) -> str:
  """A Markdown table of phases, from (ours, theirs) of each round."""
  lines = [
    '| phase | this checkout, ms a night | times as fast |',
    '|---|---|---|',
  ]
  totals = [tuple(sum(side.values()) for side in pair) for pair in rounds]
  phases = {
    name: [(ours[name], theirs[name]) for ours, theirs in rounds]
    for name in rounds[0][0]
    if all(name in side for pair in rounds for side in pair)
  }
  for name, pairs in (phases | {'all': totals}).items():
    mean, half = statistics.interval([math.log(b / a) for a, b in pairs])
    low, high = math.exp(mean - half), math.exp(mean + half)
    ours = 1e3 * sum(a for a, _ in pairs) / len(pairs)
    ratio = f'{math.exp(mean):.2f} ({low:.2f} to {high:.2f})'
    lines.append(f'| {name} | {ours:.0f} | {ratio} |')
  return '\n'.join(lines)


def main(argv: list[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description='Compares with another commit.')
  parser.add_argument('--against', default='HEAD', help='a commit')
  parser.add_argument('--rounds', type=int, default=4)
  args = parser.parse_args(argv)
  if args.rounds < 2:
    parser.error(f'--rounds={args.rounds} has no interval; give at least 2.')
  rounds: list[Any] = []
  with (
    tempfile.TemporaryDirectory() as cache,
    checkout_of(args.against) as path,
  ):
    sides = ROOT, path
    for side in sides:  # Compiles; what is the same is compiled once.
      live(side, pathlib.Path(cache))
    for i in range(args.rounds):
      order = sides if i % 2 == 0 else sides[::-1]
      seconds = {side: live(side, pathlib.Path(cache)) for side in order}
      rounds.append(tuple(seconds[side] for side in sides))
      print(f'round {i + 1} of {args.rounds}', file=sys.stderr, flush=True)
  print(compare(rounds))


if __name__ == '__main__':
  main()
