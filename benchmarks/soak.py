"""A long life in a small body: memory, files and compilations over many nights.

  python -m benchmarks.soak --steps=10000 --out=results/soak.json

The life is one of `facts`, tiny, with a checkpoint every night and one slot,
which is recycled. Steps are optimizer steps, awake and asleep. What is measured
begins after the nights in which everything is compiled.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks import run
from experiments.configs import quickstart
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import student as student_lib
from sleep_jax.runtime import checkpoint

_WARM = 5  # Nights; the first checkpoints and evaluations allocate buffers.
_COMPILED = '/jax/core/compile/backend_compile_duration'


def resident() -> float:
  """Resident memory of this process in MB."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def files() -> int:
  """Open file descriptors."""
  return len(os.listdir('/proc/self/fd'))


def settings() -> build_lib.Settings:
  """A night of some fifty steps."""
  c = quickstart.get_config()
  c.task.update(episodes=1, rows=64, probes=1)
  c.model.levels[0].sleep_every = 8
  c.model.levels[1].update(slots=1, rank=4, top_k=1)
  c.sleep.update(
      steps=40, dreams=32, batch=4, slot_policy='recycle', max_kl_share=1e9,
      prefixes=4, rollout_every=20,
    )  # fmt: skip
  return json.loads(c.to_json())


def soak(steps: int, folder: pathlib.Path) -> dict[str, Any]:
  """Lives until `steps` optimizer steps were made."""
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if name == _COMPILED else None
  )
  c = build_lib.arm_config(settings(), 'sleep')
  task, learner, costs = build_lib.build(c, seed=1)
  life = learner.init(jax.random.PRNGKey(1))
  saved = checkpoint.Checkpoints(folder, 'soak')
  measurements, start = [], time.perf_counter()
  while not measurements or measurements[-1][0] < steps:
    life, _ = learner.wake(life, task.experience(0))
    life, _ = learner.sleep(life)
    task.evaluate(student_lib.Student(learner, life), 0)
    saved.save(checkpoint.Snapshot(len(measurements), 'sleep', life, {}))
    saved.wait()  # A save under way has files open, and buffers.
    done = sum(x['steps'] for x in costs.totals().values())
    measurements.append((done, resident(), files(), len(compiled)))
  saved.close()
  done, memory, descriptors, programs = np.array(measurements[_WARM:], float).T
  return {
    'steps': int(measurements[-1][0]),
    'nights': len(measurements),
    'seconds': time.perf_counter() - start,
    'measured_from_night': _WARM,
    'rss_mb': {'first': memory[0], 'last': memory[-1], 'most': memory.max()},
    'rss_mb_per_1000_steps': float(np.polyfit(done / 1000, memory, 1)[0]),
    'file_descriptors': [int(descriptors.min()), int(descriptors.max())],
    'compilations_in_warm_nights': int(measurements[_WARM][3]),
    'compilations_after': int(programs[-1] - programs[0]),
  }


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
  low, high = results['file_descriptors']
  grows = results['rss_mb_per_1000_steps'] >= 1.0 or low != high
  raise SystemExit(int(grows or results['compilations_after'] > 0))


if __name__ == '__main__':
  main()
