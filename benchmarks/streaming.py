"""A stream of ten million tokens: memory stays flat, and time is linear.

  python -m benchmarks.streaming --out=results/streaming.json

Small models read random tokens, which are drawn as they are needed, by
`inference.streaming`, one row, each mixer in its own turn; the sliding window
has no other memory. Seconds are those of a length's own reading; resident
memory is measured a hundred times on the way. What is compared is one length
with the next, not one mixer with the other.
"""

import argparse
from collections.abc import Iterator
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import run
from benchmarks import soak
from sleep_jax import config
from sleep_jax.inference import streaming
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.models.mixers import hope
from sleep_jax.models.mixers import sliding_window
from sleep_jax.models.mixers import titans

LENGTHS = (10**5, 10**6, 10**7)
VOCAB, CHUNK = 256, 4096
MIXERS = {
  'gdn': config.RecurrentConfig(heads=2, key=16, value=16),
  'sliding_window': sliding_window.SlidingWindowConfig(window=256),
  'hope': hope.HopeConfig(heads=2, width=16, chunk=64),
  'titans': titans.TitansConfig(heads=2, width=16, chunk=64),
}


def build(mixer: str) -> model_lib.Model:
  """Two layers of 64, with drawn weights."""
  cfg = config.ModelConfig(
    vocab=VOCAB,
    dim=64,
    layers=2,
    heads=4,
    levels=(config.LevelConfig(128),),
    mixers=(mixer,),
    recurrent=MIXERS[mixer],
  )
  params = transformer.init(cfg, jax.random.key(0))
  return model_lib.Model(cfg, params, memory_init.init_memory(cfg))


def text(length: int, resident: list[float]) -> Iterator[np.ndarray]:
  """Tokens; memory is measured between them."""
  rng, size = np.random.default_rng(0), max(CHUNK, length // 100)
  for start in range(0, length, size):
    yield rng.integers(0, VOCAB, (1, min(size, length - start)))
    resident.append(soak.resident())


def measure(mixer: str, lengths: list[int]) -> list[dict[str, Any]]:
  """One entry for each length."""
  model, out = build(mixer), []
  streaming.read(model, streaming.begin(model, 1), text(lengths[0], []), CHUNK)
  for length in lengths:
    resident: list[float] = []
    began = time.perf_counter()
    stream = streaming.read(
      model, streaming.begin(model, 1), text(length, resident), CHUNK
    )
    stream = jax.block_until_ready(stream)
    seconds = time.perf_counter() - began
    out.append(
      {
        'bench': 'streaming',
        'mixer': mixer,
        'tokens': int(stream.tokens[0]),
        'seconds': round(seconds, 2),
        'tokens_per_second': round(length / seconds),
        'state_bytes': sum(x.nbytes for x in jax.tree.leaves(stream)),
        'resident_mb': [round(f(resident), 1) for f in (min, max)],
      }
    )
    print(out[-1], flush=True)
  return out


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--mixers', default=','.join(MIXERS))
  parser.add_argument('--lengths', default=','.join(map(str, LENGTHS)))
  args = parser.parse_args()
  lengths = [int(n) for n in args.lengths.split(',')]
  entries = []
  for mixer in args.mixers.split(','):
    entries += measure(mixer, lengths)
  command = f'python -m benchmarks.streaming --out={args.out}'
  if args.mixers != ','.join(MIXERS):
    command += f' --mixers={args.mixers}'
  if args.lengths != ','.join(map(str, LENGTHS)):
    command += f' --lengths={args.lengths}'
  machine = run.machine(len(os.sched_getaffinity(0)))
  run.write(
    args.out, {'command': command, 'machine': machine, 'entries': entries}
  )
  print(json.dumps(str(args.out)))


if __name__ == '__main__':
  main()
