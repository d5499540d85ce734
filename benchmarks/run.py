"""Runs the suite: `python -m benchmarks.run --out=results/benchmarks.json`.

Each benchmark asserts that both sides compute the same before it times them. A
table of the speed-ups is written beside the JSON file, whose path is the last
line on stdout. `--only` runs some benchmarks and keeps the entries of the
others.
"""

import argparse
import importlib
import importlib.util
import json
import os
import pathlib
import platform
import sys
from typing import Any

from benchmarks import timing

# Packages that each needs besides the base install.
BENCHES = {
  'train': ('torch', 'transformers'),
  'decode': ('torch', 'transformers'),
  'gkd': ('torch', 'transformers', 'trl'),
  'on_policy': ('torch', 'transformers', 'trl'),
  'jsd': ('torch', 'trl'),
  'levenshtein': ('rapidfuzz',),
  'trials': ('torch', 'transformers', 'peft'),
  'eviction': (),
  'attention': (),
  'long_rows': (),
  'saves': (),
  'accelerator': (),
}


def pin(threads: int) -> None:
  """Restricts this process to `threads` cores; XLA and torch follow.

  Must be called before either is imported.
  """
  cores = sorted(os.sched_getaffinity(0))
  if threads > len(cores):
    raise SystemExit(
      f'--threads={threads}, but this process may use {len(cores)} cores; '
      f'choose --threads={len(cores)} or fewer.'
    )
  os.sched_setaffinity(0, cores[:threads])
  os.environ['OMP_NUM_THREADS'] = str(threads)
  os.environ.setdefault('HF_HUB_OFFLINE', '1')


def machine(threads: int) -> dict[str, Any]:
  """CPU, cores, threads, and versions of the libraries."""
  from importlib import metadata

  cpu = platform.processor()
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    lines = info.read_text().splitlines()
    cpu = next(
      (l.split(':')[1].strip() for l in lines if 'model name' in l), ''
    )
  versions = {}
  for name in (
    'jax',
    'flax',
    'torch',
    'transformers',
    'trl',
    'peft',
    'rapidfuzz',
  ):
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions[name] = None
  return {
    'cpu': cpu,
    'cores': os.cpu_count(),
    'threads': threads,
    'python': platform.python_version(),
    'versions': versions,
  }


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes a JSON file atomically."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.partial')
  partial.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
  os.replace(partial, path)


def table(entries: list[dict[str, Any]]) -> str:
  """A Markdown table of the speed-ups over each library, by medians."""
  lines = ['| bench | shape | our ms | times as fast as |', '|---|---|---|---|']
  shapes = (
    'learner',
    'model',
    'windows',
    'rows',
    'length',
    'pairs',
    'vocab',
    'instances',
    'batch',
    'pass',
  )

  def shape_of(entry: dict[str, Any]) -> str:
    return ', '.join(f'{k} {entry[k]}' for k in shapes if k in entry)

  for entry in entries:
    if 'temporary_bytes' in entry:
      size = entry['temporary_bytes'] / 2**30
      row = f'{shape_of(entry)} | needs {size:.2f} GiB | |'
      lines.append(f'| {entry["bench"]} | {row}')
    if 'speedup' not in entry:
      continue
    shape = shape_of(entry)
    ours = entry['seconds']['sleep_jax']
    median = ours.get('median') or ours['step']['median']
    times = '; '.join(f'{k}: {v:.2f}' for k, v in entry['speedup'].items())
    lines.append(
      f'| {entry["bench"]} | {shape} | {1e3 * median:.1f} | {times} |'
    )
  return '\n'.join(lines) + '\n'


def main(argv: list[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', default='results/benchmarks.json')
  parser.add_argument('--only', default='', help='names, comma-separated')
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--tiny', action='store_true', help='shapes for a test')
  args = parser.parse_args(argv)
  names = [n for n in args.only.split(',') if n] or list(BENCHES)
  for name in names:
    if name not in BENCHES:
      parser.error(f'--only={name}: choose among {", ".join(BENCHES)}.')
    for needed in BENCHES[name]:
      if importlib.util.find_spec(needed) is None:
        parser.error(
          f'{name} compares with {needed}, which is not installed; run pip '
          "install -e '.[bench]', or leave it out with --only."
        )
  pin(args.threads)

  if any('torch' in BENCHES[name] for name in names):
    import torch

    torch.set_num_threads(args.threads)
  plan = timing.Plan(args.threads, args.repeats, args.tiny)
  out = pathlib.Path(args.out)
  old = json.loads(out.read_text('utf-8')) if out.exists() else {}
  entries = [e for e in old.get('entries', []) if e['bench'] not in names]
  for name in names:
    for entry in importlib.import_module(f'benchmarks.{name}').run(plan):
      entries.append(entry | {'machine': machine(args.threads)})
      print(json.dumps(entry), file=sys.stderr, flush=True)
    write(out, {'entries': entries})
  out.with_suffix('.md').write_text(table(entries), encoding='utf-8')
  print(out)


if __name__ == '__main__':
  main()
