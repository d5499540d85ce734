"""Ends small lives with SIGKILL, has the same command go on, and compares.

  python -m tests.killing --kills=20 --out=results/kill.json
  python -m tests.killing --all --kills=5 --out=results/kill_all.json

The first kills a life that does everything so often, each time another one, at
moments of a night. The second kills one life of every learner so often. The
moments are drawn by --seed; the command exits with 1 if a life that was killed
ends unlike the one that was not.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from absl import app
import numpy as np
import orbax.checkpoint as ocp

from experiments import run
from sleep_jax.runtime import checkpoint
from tests import small_life

ROOT = pathlib.Path(__file__).parent.parent
_FLAGS = ('--config=tests/small_life.py',)
_TIMEOUT = 900


@dataclasses.dataclass(frozen=True)
class Moment:
  """`delay` seconds into call number `nth` of a function, or `after` it.

  Without a function: `delay` seconds after the start of the process.
  """

  name: str
  function: str = ''
  nth: int = 1
  delay: float = 0.0
  after: bool = False


# Function, calls to choose from, longest delay in seconds, after it returned.
_MOMENTS = {
  'awake': ('sleep_jax.lifecycle.wake:read_day', 2, 0.3, False),
  'mid-save': ('sleep_jax.runtime.checkpoint:Checkpoints.save', 4, 0.2, False),
  'mid-consolidation': (
    'sleep_jax.lifecycle.consolidation.seeding:seed_steps',
    4,
    0.3,
    False,
  ),
  'mid-rollout': (
    'sleep_jax.lifecycle.consolidation.imitation:sample_continuations',
    4,
    0.3,
    False,
  ),
  'mid-dream': ('sleep_jax.lifecycle.dreaming.propose:propose', 2, 0.3, False),
  'slot unlocked': ('sleep_jax.models.memory:Bank.unlock', 2, 0.0, True),
  'mid-trial': (
    'sleep_jax.lifecycle.dreaming.trials:train_instances',
    2,
    0.3,
    False,
  ),
  'mid-learning': (
    'sleep_jax.lifecycle.dreaming.rest_em:finetune_steps',
    2,
    0.2,
    False,
  ),
  'writing a file': ('os:fsync', 4, 0.0, False),
}
_ANY_TIME = 'any time'
# The same, of every life.
_MOMENTS_OF_ALL = {
  'in a phase': ('sleep_jax.harness.live:_run_phase', 3, 0.5, False),
  'phase not saved': ('sleep_jax.harness.live:_run_phase', 3, 0.0, True),
  'mid-save': _MOMENTS['mid-save'],
  'writing a file': _MOMENTS['writing a file'],
}


def draw(name: str, rng: random.Random, seconds: float) -> Moment:
  """A random moment of this name in a life that takes so many seconds."""
  if name == _ANY_TIME:
    return Moment(name, delay=rng.uniform(0.1, 0.9) * seconds)
  function, calls, longest, after = (_MOMENTS | _MOMENTS_OF_ALL)[name]
  nth, delay = rng.randint(1, calls), rng.uniform(0.0, longest)
  return Moment(name, function, nth, delay, after)


def die(moment: Moment) -> None:
  """Runs the experiment named by the flags until the moment has come."""
  module, _, path = moment.function.partition(':')
  owner = importlib.import_module(module)
  *outer, name = path.split('.')
  owner = functools.reduce(getattr, outer, owner)
  function, calls = getattr(owner, name), []

  def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

  def deadly(*args, **kwargs):
    calls.append(None)
    now = len(calls) == moment.nth
    if now and moment.delay and not moment.after:
      threading.Timer(moment.delay, kill).start()
    elif now and not moment.after:
      kill()
    out = function(*args, **kwargs)
    if now and moment.after:
      kill()
    return out

  setattr(owner, name, deadly)
  app.run(run.main)


def command(
  workdir: pathlib.Path,
  moment: Moment | None = None,
  *flags: str,
) -> list[str]:
  """The command of the small life, unless the flags name another config; it
  dies at the moment, if that is a call."""
  start = ['-m', 'experiments.run']
  if moment and moment.function:
    start = ['-c', f'from tests.killing import Moment, die; die({moment!r})']
  named = any(flag.startswith('--config=') for flag in flags)
  flags = flags if named else (*_FLAGS, *flags)
  return [sys.executable, *start, f'--workdir={workdir}', *flags]


def live(
  workdir: pathlib.Path,
  moment: Moment | None = None,
  *flags: str,
  may_end: bool = False,
) -> str:
  """Runs the command, until the moment if there is one; returns its output.

  Args:
    workdir: of the life.
    moment: when it is killed.
    *flags: of the command.
    may_end: whether the life may have ended before that moment.

  Raises:
    RuntimeError: if it failed, or ended before the moment had come.
  """
  done = subprocess.Popen(
    command(workdir, moment, *flags),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  if moment and not moment.function:
    time.sleep(moment.delay)
    done.kill()
  out, _ = done.communicate(timeout=_TIMEOUT)
  expected = {-signal.SIGKILL if moment else 0} | ({0} if may_end else set())
  if done.returncode not in expected:
    raise RuntimeError(f'exit {done.returncode} at {moment}:\n{out}')
  return out


def _without_times(x: Any) -> Any:
  if isinstance(x, dict):
    return {
      k: _without_times(v)
      for k, v in x.items()
      if k not in ('seconds', 'goodput')
    }
  return [_without_times(v) for v in x] if isinstance(x, list) else x


def fingerprint(workdir: pathlib.Path) -> dict[str, Any]:
  """All that a life left, but for timings: its leaves, metrics and summary."""
  folder = next((workdir / 'lives').iterdir())
  handlers = {
    'life': ocp.StandardCheckpointHandler(),
    'meta': ocp.JsonCheckpointHandler(),
  }
  with ocp.CheckpointManager(
    folder / 'checkpoints', item_handlers=handlers
  ) as manager:
    step = manager.latest_step()
    # Of NumPy, on whichever devices they were: those may not be here.
    like = {
      k: np.empty(x.shape, x.dtype)
      for k, x in manager.item_metadata(step)['life'].items()
    }
    last = manager.restore(
      step,
      args=ocp.args.Composite(
        life=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore()
      ),
    )
  leaves = checkpoint.unpack(last.life, last.meta['packed'])
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return {
    'leaves': {
      name: (str(x.dtype), x.shape, hashlib.sha256(x.tobytes()).hexdigest())
      for name, x in ((k, np.asarray(x)) for k, x in leaves.items())
    },
    'moment': (last.meta['night'], last.meta['phase']),
    # The mark of the records is a digest of their timings too.
    'notes': _without_times(last.meta['notes'] | {'records': None}),
    'metrics': _without_times([json.loads(line) for line in lines]),
    'summary': _without_times(
      json.loads((folder / 'summary.json').read_text())
    ),
  }


def went_on_after(output: str) -> str:
  """Which moment a run says that it resumed from."""
  found = re.search(r'going on after (.*)', output)
  return found[1] if found else 'the beginning'


def prove(kills: int, seed: int) -> dict[str, Any]:
  """One life that is not killed, and so many that are, each once."""
  rng = random.Random(seed)
  names = [*_MOMENTS, _ANY_TIME]
  told = []
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    live(folder / 'compiled')  # Programs are compiled, and kept.
    start = time.monotonic()
    live(folder / 'whole')
    seconds = time.monotonic() - start
    whole = fingerprint(folder / 'whole')
    for i in range(kills):
      moment = draw(names[i % len(names)], rng, seconds)
      live(folder / f'{i}', moment)
      resumed = went_on_after(live(folder / f'{i}'))
      equal = fingerprint(folder / f'{i}') == whole
      told.append(
        dataclasses.asdict(moment) | {'from': resumed, 'equal': equal}
      )
      print(told[-1], flush=True)
  return {
    'command': f'python -m tests.killing --kills={kills} --seed={seed}',
    'kills': kills,
    'equal': sum(x['equal'] for x in told),
    'seconds_of_a_life': round(seconds, 1),
    'moments': told,
  }


def prove_all(
  kills: int, seed: int, lives: Sequence[str] = small_life.VARIANTS
) -> list[dict[str, Any]]:
  """One life of each kind that is not killed, and one that is, so often.

  Args:
    kills: of each life, one after the other; fewer if it ends before.
    seed: of the moments.
    lives: of `small_life.VARIANTS`.
  """
  rng, told = random.Random(seed), []
  for life in lives:
    config = f'--config=tests/small_life.py{":" if life else ""}{life}'
    with tempfile.TemporaryDirectory() as folder:
      folder, start = pathlib.Path(folder), time.monotonic()
      live(folder / 'whole', None, config)
      seconds = time.monotonic() - start
      names = [*_MOMENTS_OF_ALL, _ANY_TIME]
      moments = [draw(rng.choice(names), rng, seconds) for _ in range(kills)]
      outputs = []
      for moment in (*moments, None):
        if not any((folder / 'cut').glob('lives/*/summary.json')):
          outputs.append(live(folder / 'cut', moment, config, may_end=True))
      equal = fingerprint(folder / 'cut') == fingerprint(folder / 'whole')
    told.append(
      {
        'life': life or 'sleep',
        'moments': [moment.name for moment in moments[: len(outputs)]],
        'from': [went_on_after(output) for output in outputs],
        'equal': equal,
      }
    )
    print(told[-1], flush=True)
  return told


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--all', action='store_true')
  parser.add_argument('--lives', default=','.join(small_life.VARIANTS))
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=1)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  args = parser.parse_args()
  if args.all:
    told = prove_all(args.kills, args.seed, args.lives.split(','))
    result = {
      'command': f'python -m tests.killing {" ".join(sys.argv[1:])}',
      'kills': len(told),
      'equal': sum(x['equal'] for x in told),
      'lives': told,
    }
  else:
    result = prove(args.kills, args.seed)
  args.out.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
  if result['equal'] != result['kills']:
    sys.exit(f'{result["equal"]} of {result["kills"]} lives ended the same')


if __name__ == '__main__':
  main()
