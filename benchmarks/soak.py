"""A long life in a small body: nothing grows with its nights.

  python -m benchmarks.soak --steps=10000 --out=results/soak.json

The life is one of `facts`, tiny, as the harness lives it: checkpoints after
every phase, records, TensorBoard. It has one slot, which is recycled, and its
nights have 48 optimizer steps, awake and asleep; --steps=48000 is a thousand of
them. Memory, file descriptors, programs that were compiled, bytes of the folder
and seconds are measured where a night is evaluated; what is reported begins
after the nights in which everything is compiled.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from typing import Any, ClassVar

import jax
import numpy as np

from benchmarks import run
from experiments.configs import quickstart
from sleep_jax.data import experience as experience_lib
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.tasks import base as task_lib
from sleep_jax.tasks import facts

_WARM = 5  # Nights; the first checkpoints and evaluations allocate buffers.
_COMPILED = '/jax/core/compile/backend_compile_duration'
_STEPS = 48  # Of a night: 8 awake.


def resident() -> float:
  """Resident memory of this process in MB."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def files() -> int:
  """Open file descriptors."""
  return len(os.listdir('/proc/self/fd'))


class MeasuredFacts(facts.Facts):
  """`facts` of one episode, told again every night; evaluations measure."""

  name: ClassVar[str] = 'measured_facts'
  measurements: ClassVar[list[tuple[float, ...]]] = []
  programs: ClassVar[list[str]] = []
  folder: ClassVar[pathlib.Path] = pathlib.Path()

  def __init__(self, cfg: facts.FactsConfig, seed: int):
    nights = cfg.episodes
    super().__init__(facts.FactsConfig(**(vars(cfg) | {'episodes': 1})), seed)
    self.episodes = nights

  def experience(self, episode: int) -> experience_lib.Experience:
    return super().experience(0)

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    result = super().evaluate(student, 0)
    self.measurements.append(
      (
        resident(),
        files(),
        len(self.programs),
        *_sizes(self.folder),
        time.perf_counter(),
      )
    )
    return result


def _sizes(folder: pathlib.Path) -> tuple[int, int]:
  """Bytes of the checkpoints, and of all other files."""
  checkpoints, others = 0, 0
  for path, _, names in os.walk(folder):
    for name in names:
      try:
        size = os.stat(os.path.join(path, name)).st_size
      except FileNotFoundError:  # Of a checkpoint that was replaced meanwhile.
        continue
      if 'checkpoints' in path:
        checkpoints += size
      else:
        others += size
  return checkpoints, others


def settings(nights: int) -> build_lib.Settings:
  """A life of so many nights."""
  c = quickstart.get_config()
  c.task.update(rows=64, probes=1, episodes=nights)
  c.task.name = f'{__name__}:MeasuredFacts'
  c.model.levels[0].sleep_every = 8
  c.model.levels[1].update(slots=1, rank=4, top_k=1)
  c.sleep.update(
      steps=_STEPS - 8, dreams=32, batch=4, slot_policy='recycle',
      max_kl_share=1e9, prefixes=4, rollout_every=20,
    )  # fmt: skip
  return json.loads(c.to_json())


def soak(steps: int, folder: pathlib.Path) -> dict[str, Any]:
  """Lives until `steps` optimizer steps were made."""
  compiled, measured = MeasuredFacts.programs, MeasuredFacts.measurements
  compiled.clear()
  measured.clear()

  def listen(event: str, duration_secs: float, **_: Any) -> None:
    if event == _COMPILED:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  MeasuredFacts.folder = folder
  start = time.perf_counter()
  summary = live_lib.live(settings(steps // _STEPS), 'sleep', 1, folder, 0)
  values = np.array(measured[_WARM:]).T
  memory, descriptors, programs, checkpoints, others, ended = values
  done = _STEPS * np.arange(len(memory))
  half = len(memory) // 2

  def halves(x: np.ndarray, average=np.median) -> list[float]:
    return [float(average(part)) for part in (x[:half], x[half:])]

  return {
    'steps': int(summary['steps']),
    'nights': len(measured),
    'seconds': time.perf_counter() - start,
    'measured_from_night': _WARM,
    'rss_mb': {'first': memory[0], 'last': memory[-1], 'most': memory.max()},
    'rss_mb_per_1000_steps': float(np.polyfit(done / 1000, memory, 1)[0]),
    # While nothing is saved: a save opens some of its own.
    'file_descriptors': halves(descriptors, np.min),
    'compilations_in_warm_nights': int(measured[_WARM][2]),
    'compilations_after': int(programs[-1] - programs[0]),
    # Of the first half of the nights, and of the second.
    'bytes_of_checkpoints': halves(checkpoints),
    'bytes_written_a_night': halves(np.diff(others), np.mean),
    'seconds_a_night': halves(np.diff(ended)),
  }


def grows(results: dict[str, Any]) -> list[str]:
  """What grows with the nights."""
  first, last = results['file_descriptors']
  wrong = {
    'memory': results['rss_mb_per_1000_steps'] >= 1.0,
    'file descriptors': last > first,
    'programs': results['compilations_after'] > 0,
  }
  # Numbers in records have more digits as they rise; other processes may have
  # a share of the machine.
  for name, most in (
    ('bytes_of_checkpoints', 1.1),
    ('bytes_written_a_night', 1.1),
    ('seconds_a_night', 1.5),
  ):
    first, last = results[name]
    wrong[name] = last > most * first
  return [name for name, is_wrong in wrong.items() if is_wrong]


def main(argv: list[str] | None = None) -> None:
  """The command line; exits with 1 if something grows."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=10_000)
  parser.add_argument('--out', default='results/soak.json')
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as scratch:
    results = soak(args.steps, pathlib.Path(scratch))
  run.write(pathlib.Path(args.out), results | {'machine': run.machine(2)})
  print(json.dumps(results, indent=1))
  if growing := grows(results):
    raise SystemExit(f'grows: {", ".join(growing)}')
  raise SystemExit(0)


if __name__ == '__main__':
  main()
