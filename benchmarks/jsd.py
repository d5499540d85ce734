"""JSD of large vocabularies in token chunks, against trl's.

Each side runs in a process of its own, so that its peak memory is its own.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import timing
from sleep_jax.objectives import divergences

_BETA = 0.5
_CHUNK = 64


def run(plan: timing.Plan) -> list[dict[str, Any]]:
  """Value and gradient for two vocabularies; tokens and widths are fixed."""
  entries = []
  for vocab in plan.choose((32_000, 151_936), (64,)):
    rows, length, width = plan.choose((4, 128, 128), (2, 8, 4))
    shape = [rows, length, vocab, width]
    sides = {}
    with tempfile.TemporaryDirectory() as scratch:
      for side in ('sleep_jax', 'trl', 'trl', 'sleep_jax'):  # Interleaved.
        got = _in_a_process(side, plan, shape, pathlib.Path(scratch))
        got['seconds'] += sides.get(side, {'seconds': []})['seconds']
        sides[side] = got
    entries.append(
      {
        'bench': 'jsd',
        'vocab': vocab,
        'tokens': rows * length,
        'width': width,
        'chunk': _CHUNK,
        'parity': _parity(*(sides[s].pop('results') for s in sides)),
        'seconds': {k: timing.spread(v['seconds']) for k, v in sides.items()},
        'peak_bytes': {k: v['peak_bytes'] for k, v in sides.items()},
        'xla_temporary_bytes': sides['sleep_jax']['xla_temporary_bytes'],
        'peak_share_of_trl': sides['sleep_jax']['peak_bytes']
        / max(1, sides['trl']['peak_bytes']),
      }
    )
  return entries


def _parity(mine: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, Any]:
  """Largest differences of value and gradients, relative to the largest entry.

  Raises:
    AssertionError: one is above 1e-5.
  """
  names = ('value', 'gradient of hidden states', 'gradient of the matrix')
  apart = {
    name: float(np.abs(a - b).max() / np.abs(b).max())
    for name, a, b in zip(names, mine, theirs, strict=True)
  }
  if max(apart.values()) > 1e-5:
    raise AssertionError(f'jsd: the sides differ by {apart}, more than 1e-5.')
  return apart


def _in_a_process(
  side: str, plan: timing.Plan, shape: list[int], scratch: pathlib.Path
) -> dict[str, Any]:
  out = scratch / f'{side}.npz'
  command = [side, json.dumps(shape), str(plan.threads), str(plan.repeats), out]
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.jsd', *map(str, command)],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f'jsd: the side {side} failed:\n{done.stderr[-2000:]}')
  with np.load(out) as results:
    arrays = [results[k] for k in sorted(results)]
  return json.loads(done.stdout.splitlines()[-1]) | {'results': arrays}


def _resident(field: str) -> int:
  """`VmRSS` or `VmHWM` (its peak) of this process, in bytes."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith(field):
      return int(line.split()[1]) * 1024
  raise OSError(f'/proc/self/status has no {field}.')


def _inputs(shape: list[int]) -> list[np.ndarray]:
  rows, length, vocab, width = shape
  rng = np.random.default_rng(0)
  sizes = [(rows, length, width), (vocab, width)] * 2
  arrays = [rng.standard_normal(s, np.float32) for s in sizes]
  for i in (1, 3):
    arrays[i] *= 2 * width**-0.5  # Logits of a standard deviation of 2.
  return arrays


def _ours(arrays: list[np.ndarray]) -> tuple[Any, dict[str, int]]:
  import jax

  def loss(student, teacher):
    measure = divergences.divergence('jsd', _BETA)
    each = divergences.from_hidden(measure, teacher, student, chunk=_CHUNK)
    return each.mean()

  teacher, student = (jax.device_put(tuple(arrays[i : i + 2])) for i in (0, 2))
  step = jax.jit(jax.value_and_grad(loss)).lower(student, teacher).compile()

  def side():
    value, grads = step(student, teacher)
    return [np.asarray(x) for x in (value, *grads)]

  memory = step.memory_analysis()
  return side, {'xla_temporary_bytes': memory.temp_size_in_bytes}


def _trl(arrays: list[np.ndarray]) -> tuple[Any, dict[str, int]]:
  import torch
  from trl.experimental.gkd import GKDTrainer

  th, tw, sh, sw = (torch.from_numpy(x) for x in arrays)
  labels = torch.zeros(sh.shape[:2], dtype=torch.long)

  def side():
    hidden, matrix = (x.clone().requires_grad_() for x in (sh, sw))
    with torch.no_grad():
      teacher = th @ tw.T
    loss = GKDTrainer.generalized_jsd_loss(
      hidden @ matrix.T, teacher, labels=labels, beta=_BETA
    )
    loss.backward()
    return [x.numpy() for x in (loss.detach(), hidden.grad, matrix.grad)]

  return side, {}


def main(side: str, shape: str, threads: str, repeats: str, out: str) -> None:
  """One side: its results to `out`, its figures to stdout."""
  make = {'sleep_jax': _ours, 'trl': _trl}[side]
  if side == 'trl':
    import torch

    torch.set_num_threads(int(threads))
  arrays = _inputs(json.loads(shape))
  call, extra = make(arrays)
  before = _resident('VmRSS')
  results = call()
  peak = _resident('VmHWM')  # Later calls only find the allocator warm.
  seconds = []
  for _ in range(-(-int(repeats) // 2)):
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)
  np.savez(out, *results)
  figures = {'seconds': seconds, 'peak_bytes': peak - before}
  print(json.dumps(figures | extra))


if __name__ == '__main__':
  main(*sys.argv[1:])
