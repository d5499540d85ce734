"""How cost grows: seconds and bytes against what a life has much of.

  python -m benchmarks.scaling --out=results/scaling.json

A small model (0.2M parameters) reads days of more tokens, scores rows with more
experts in use, with more rows and more layers, and lives more nights, each of
which adds an expert that it keeps. Every size is compiled before it is timed.
`exponent` is the slope of log seconds over log size between the two largest
sizes; below them what does not depend on size counts too.
"""

import argparse
from collections.abc import Callable
import json
import math
import os
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import run
from benchmarks import soak
from sleep_jax import config
from sleep_jax.harness import live as live_lib
from sleep_jax.lifecycle import wake
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.training import loss as loss_lib

_REPEATS = 5
_LENGTH, _BATCH, _ROWS = 64, 8, 32
SIZES = {
  'tokens_a_day': (2**12, 2**14, 2**16, 2**18, 2**20),
  'slots_in_use': (1, 4, 16, 64, 256, 1024),
  'rows': (1, 4, 16, 64, 256),
  'layers': (1, 2, 4, 8, 16),
  'nights': (4, 8, 16, 32, 64),
}


def build(*, layers: int = 4, slots: int = 1) -> model_lib.Model:
  """A model of 64 dimensions whose slots are all in use."""
  cfg = config.ModelConfig(
    vocab=512,
    dim=64,
    layers=layers,
    heads=4,
    max_len=_LENGTH,
    levels=(
      config.LevelConfig(128, chunk=_LENGTH),
      config.LevelConfig(128, slots=slots, rank=8, top_k=slots),
    ),
  )
  params = transformer.init(cfg, jax.random.key(0))
  memory = memory_init.init_memory(cfg)
  bank = memory.bank(1)
  bank = bank.replace(status=jnp.full_like(bank.status, memory_lib.ACTIVE))
  return model_lib.Model(cfg, params, memory.with_level(1, bank=bank))


def _tokens(rows: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.integers(1, 512, (rows, _LENGTH), np.int32)


def _bytes(model: model_lib.Model) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(model.memory))


def _seconds(call: Callable[[], Any], repeats: int = _REPEATS) -> float:
  """Median of what a call takes, after one that compiles."""
  jax.block_until_ready(call())
  taken = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(call())
    taken.append(time.perf_counter() - began)
  return float(np.median(taken))


def _scored(model: model_lib.Model, rows: int) -> float:
  tokens = _tokens(rows)
  score = jax.jit(loss_lib.token_logprobs)
  return _seconds(lambda: score(model, tokens))


def tokens_a_day(size: int) -> dict[str, float]:
  """A day is read by Eq. 2's updates."""
  model, tokens = build(), _tokens(size // _LENGTH)
  weight, clock = np.ones(tokens.shape, np.float32), jnp.zeros((), jnp.int32)
  cfg = wake.WakeConfig(batch=_BATCH)

  def read() -> Any:
    return wake.read_day(
      cfg, model, clock, tokens, weight, defer_due_update=False
    )

  return dict(seconds=_seconds(read, repeats=1), bytes=_bytes(model))


def slots_in_use(size: int) -> dict[str, float]:
  """Rows are scored with so many experts of rank 8."""
  model = build(slots=size)
  return dict(seconds=_scored(model, _ROWS), bytes=_bytes(model))


def rows(size: int) -> dict[str, float]:
  """So many rows are scored."""
  model = build()
  return dict(seconds=_scored(model, size), bytes=_bytes(model))


def layers(size: int) -> dict[str, float]:
  """Rows are scored by so many layers."""
  model = build(layers=size)
  return dict(seconds=_scored(model, _ROWS), bytes=_bytes(model))


def nights(sizes: tuple[int, ...]) -> list[dict[str, float]]:
  """The nights of one life around each size, and the folder after it."""
  settings = soak.settings(max(sizes) + 2)
  slots = settings['task']['episodes']
  settings['model']['levels'][1].update(slots=slots, top_k=slots)
  settings['sleep']['slot_policy'] = 'error'
  measured = soak.MeasuredFacts.measurements
  measured.clear()
  with tempfile.TemporaryDirectory() as folder:
    soak.MeasuredFacts.folder = pathlib.Path(folder)
    live_lib.live(settings, 'sleep', 1, pathlib.Path(folder), 0)
  *_, checkpoints, others, ended = np.array(measured).T
  taken = np.diff(ended)
  entries = []
  for size in sizes:
    # A bank has doubled after a power of two: those nights compile.
    around = taken[max(0, size - 3) : size - 1]
    entries.append(
      dict(
        size=size,
        seconds=float(np.median(around)),
        bytes=int(checkpoints[size] + others[size]),
      )
    )
  return entries


def measure(name: str, sizes: tuple[int, ...]) -> dict[str, Any]:
  """Seconds and bytes at each size, and the exponents."""
  if name == 'nights':
    entries = nights(sizes)
  else:
    of_size = {
      f.__name__: f for f in (tokens_a_day, slots_in_use, rows, layers)
    }[name]
    entries = [{'size': size} | of_size(size) for size in sizes]
  return {'entries': entries, 'exponent': exponent(entries)}


def exponent(entries: list[dict[str, float]]) -> float:
  """Of seconds, between the two largest sizes."""
  small, large = entries[-2:]
  ratio = math.log(large['seconds'] / small['seconds'])
  return round(ratio / math.log(large['size'] / small['size']), 2)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  args = parser.parse_args()
  results = {}
  for name, sizes in SIZES.items():
    results[name] = measure(name, sizes)
    print(name, json.dumps(results[name]), flush=True)
  command = f'python -m benchmarks.scaling --out={args.out}'
  machine = run.machine(len(os.sched_getaffinity(0)))
  run.write(args.out, {'command': command, 'machine': machine} | results)


if __name__ == '__main__':
  main()
