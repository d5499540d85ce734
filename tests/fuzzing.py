"""Damages files of every kind that is read, and reads them.

  python -m tests.fuzzing --cases=1000 --seed=7 --kinds=hub,life

A damaged file has two outcomes: a ConfigError of one line, or a result that
could have been in the file. The command prints the cases that had another, and
exits with 1 if there are any; `--seed` and `--cases` make the same ones again.
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from typing import Any
import zipfile

import jax
import numpy as np

import sleep_jax
from sleep_jax import config
from sleep_jax import overnight
from sleep_jax.data import chat as chat_lib
from sleep_jax.data import documents
from sleep_jax.data import tokenizers
from sleep_jax.harness import summary as summary_lib
from sleep_jax.harness import workers
from sleep_jax.runtime import checkpoint
from sleep_jax.weights import convert
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import llama2c
from sleep_jax.weights import npz
from tests import checkpoints
from tests import conftest
from tests import gguf_files
from tests import tiny_checkpoint

_SECRET = b'SECRETsecret'
_SECONDS = 20  # Of the processor, for one case.
_MEMORY = 4 << 30  # More than the process has, for all cases.
_SWAPS: tuple[Any, ...] = (
  None, True, -1, 0, 1, 0.5, 3, 10**9, 10**18, 10**400, 1e308, -1e308,
  float('nan'), float('inf'), '', 'x', '../secret/x', '/etc/passwd', '\ud800',
  'attention:x', 'os:system', [], [[]], {}, {'a': 1}, [0] * 5, ['../secret/x'],
)  # fmt: skip
_DEEP = b'{"format":' * 3 + b'[' * 100_000


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of file.

  make: writes a whole one into an empty folder.
  read: reads it from the folder, and may write to another; the leaves of what
    it returns are checked to be finite.
  """

  name: str
  make: Callable[[pathlib.Path], Any]
  read: Callable[[pathlib.Path, pathlib.Path], Any]


def _small() -> config.ModelConfig:
  return config.ModelConfig(
    vocab=32, dim=16, layers=2, heads=4, levels=(config.LevelConfig(16),),
    max_len=32,
  )  # fmt: skip


def _params() -> Any:
  return jax.tree.map(np.asarray, conftest.weights(_small()))


def _make_hub(files: int) -> Callable[[pathlib.Path], None]:
  def make(folder: pathlib.Path) -> None:
    c = checkpoints.settings('llama3_2', False, vocab_size=320)
    checkpoints.write(folder / 'hub', c, checkpoints.tensors(c), files)
    tiny_checkpoint.write_tokenizer(folder / 'hub')
    (folder / 'hub' / 'LICENSE').write_text('none')

  return make


def _read_hub(folder: pathlib.Path, out: pathlib.Path) -> Any:
  convert.convert(folder / 'hub', out / 'ours')
  saved = folder_lib.load(out / 'ours')
  tokenizer = tokenizers.load(out / 'ours')
  tokenizers.check_fits(tokenizer, saved.cfg.vocab)
  chat_lib.of(tokenizer).prompt('Who built it?')
  convert.convert(out / 'ours', out / 'hub')
  return saved.params


def _make_custom(folder: pathlib.Path) -> None:
  cfg = conftest.tiny()
  memory = conftest.random_memory(cfg)
  folder_lib.save(folder / 'ours', cfg, conftest.weights(cfg), memory)
  convert.convert(folder / 'ours', folder / 'custom')
  shutil.rmtree(folder / 'ours')


def _read_custom(folder: pathlib.Path, out: pathlib.Path) -> Any:
  convert.convert(folder / 'custom', out / 'ours')
  saved = folder_lib.load(out / 'ours')
  return saved.params, saved.memory


def _make_ours(folder: pathlib.Path) -> None:
  cfg = conftest.tiny()
  memory = conftest.random_memory(cfg)
  folder_lib.save(folder / 'ours', cfg, conftest.weights(cfg), memory)
  folder_lib.digest(folder / 'ours')


def _read_ours(folder: pathlib.Path, out: pathlib.Path) -> Any:
  saved = folder_lib.load(folder / 'ours')
  folder_lib.digest(folder / 'ours')
  return saved.params, saved.memory


def _make_life(folder: pathlib.Path) -> None:
  base = tiny_checkpoint.write(folder / 'base')
  m = sleep_jax.load(base, rank=2, slots=2, window=16)
  m.life = m.life.replace(frames=(((1, 2), (3,)),))
  m.save(folder / 'life')
  shutil.rmtree(base)


def _read_life(folder: pathlib.Path, out: pathlib.Path) -> Any:
  m = sleep_jax.load(folder / 'life')
  m.encode('Orvane has a lighthouse.')
  m.save(out / 'life')
  return m.life.memory, m.life.model.params


def _make_gguf(folder: pathlib.Path) -> None:
  c = gguf_files.settings('llama2', True)
  gguf_files.write(folder / 'm.gguf', c, checkpoints.tensors(c), 'Q8_0')


def _read_gguf(folder: pathlib.Path, out: pathlib.Path) -> Any:
  convert.convert(folder / 'm.gguf', out / 'ours')
  chat_lib.of(tokenizers.load(out / 'ours')).prompt('Who built it?')
  return folder_lib.load(out / 'ours').params


def _make_tokenizer(folder: pathlib.Path) -> None:
  tiny_checkpoint.write_tokenizer(folder / 'tokenizer')
  assets = pathlib.Path(sleep_jax.__file__).parent / 'assets'
  shutil.copy(assets / 'text.model', folder / 'text.model')


def _read_tokenizer(folder: pathlib.Path, out: pathlib.Path) -> Any:
  for name in ('tokenizer', 'text.model'):
    tokenizer = tokenizers.load(folder / name)
    tokenizer.decode(tokenizer.encode('Who built it?'))
    chat_lib.of(tokenizer).prompt('Who built it?')


def _make_documents(folder: pathlib.Path) -> None:
  (folder / 'quiz.jsonl').write_text(
    ''.join(json.dumps(row) + '\n' for row in tiny_checkpoint.QUIZ)
  )
  rows = [
    {'text': tiny_checkpoint.FACTS[0]},
    tiny_checkpoint.QUIZ[0],
    {'messages': [{'role': 'user', 'content': 'Who?'}]},
  ]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'docs.jsonl').write_text(text)
  (folder / 'docs.txt').write_text(tiny_checkpoint.FACTS[1])


def _read_documents(folder: pathlib.Path, out: pathlib.Path) -> Any:
  found = documents.read([folder / 'docs.jsonl', folder / 'docs.txt'])
  quiz = documents.read_questions(folder / 'quiz.jsonl')
  for text in (*(d.text for d in found), *(q.question for q in quiz)):
    text.encode('utf-8')


_LIFE = {'w': np.arange(64.0).reshape(8, 8), 'key': np.zeros(2, np.uint32)}


def _make_checkpoints(folder: pathlib.Path) -> None:
  saved = checkpoint.Checkpoints(folder / 'c', 'me')
  for night in (0, 1):
    life = _LIFE | {'w': _LIFE['w'] + night}
    saved.save(checkpoint.Snapshot(night, 'wake', life, {'x': [night]}))
  saved.close()


def _read_checkpoints(folder: pathlib.Path, out: pathlib.Path) -> Any:
  saved = checkpoint.Checkpoints(folder / 'c', 'me')
  try:
    found = saved.newest(_LIFE)
  finally:
    saved.close()
  if found is not None:  # All files that there were are gone.
    np.testing.assert_array_equal(found.life['w'], _LIFE['w'] + found.night)
    assert found.notes == {'x': [found.night]}


_RUN = {'name': 'x', 'wake': {'passes': 1}}
_SUMMARY = {
  'identity': 'me', 'learner': 'sleep', 'seed': 1, 'task': 'facts',
  'headline': ['accuracy'], 'columns': ['accuracy'], 'final': {'accuracy': 1.0},
  'matrix': [], 'curve': [],
}  # fmt: skip


def _make_run(folder: pathlib.Path) -> None:
  workers.claim_workdir(folder / 'run', _RUN)
  (folder / 'summary.json').write_text(json.dumps(_SUMMARY))
  state = overnight._State(folder / 'night')
  with state.claimed({'model': 'x'}):
    state.add('before', {'quiz': 0.5})


def _read_run(folder: pathlib.Path, out: pathlib.Path) -> Any:
  workers.claim_workdir(folder / 'run', _RUN)
  summary_lib.read(folder / 'summary.json', 'me')
  with overnight._State(folder / 'night').claimed({'model': 'x'}):
    pass


KINDS = (
  Kind('hub', _make_hub(1), _read_hub),
  Kind('shards', _make_hub(3), _read_hub),
  Kind('custom', _make_custom, _read_custom),
  Kind('ours', _make_ours, _read_ours),
  Kind('life', _make_life, _read_life),
  Kind('gguf', _make_gguf, _read_gguf),
  Kind(
    'npz',
    lambda folder: npz.save(folder / 'b.npz', _params(), _small()),
    lambda folder, out: npz.read(folder / 'b.npz')[1],
  ),
  Kind(
    'llama2c',
    lambda folder: llama2c.write(folder / 'b.bin', _small(), _params()),
    lambda folder, out: llama2c.read(folder / 'b.bin')[1],
  ),
  Kind('tokenizer', _make_tokenizer, _read_tokenizer),
  Kind('documents', _make_documents, _read_documents),
  Kind('checkpoints', _make_checkpoints, _read_checkpoints),
  Kind('run', _make_run, _read_run),
)


def _swap(value: Any, rng: random.Random) -> Any:
  """A JSON value with one of its parts replaced, moved or left out."""
  places: list[tuple[Any, Any]] = []
  todo = [value]
  while todo:
    outer = todo.pop()
    keys = outer if isinstance(outer, dict) else range(len(outer))
    for key in keys:
      places.append((outer, key))
      if isinstance(outer[key], (dict, list)):
        todo.append(outer[key])
  if not places or rng.random() < 0.05:
    return rng.choice(_SWAPS)
  (outer, key), (other, at) = rng.choice(places), rng.choice(places)
  action = rng.random()
  if action < 0.6:
    outer[key] = rng.choice(_SWAPS)
  elif action < 0.8:
    outer[key] = json.loads(json.dumps(other[at]))
  elif isinstance(outer, dict) and action < 0.9:
    outer[rng.choice(['../secret/x', 'params.x', 'x', ''])] = outer.pop(key)
  else:
    del outer[key]
  return value


def _swapped(path: pathlib.Path, rng: random.Random) -> bytes | None:
  """A file with a field swapped; None if it has no fields."""
  raw = path.read_bytes()
  if path.suffix == '.safetensors':
    size = struct.unpack('<Q', raw[:8])[0]
    header = json.dumps(_swap(json.loads(raw[8 : 8 + size]), rng)).encode()
    return struct.pack('<Q', len(header)) + header + raw[8 + size :]
  if path.suffix == '.npz':
    return _swapped_npz(raw, rng)
  if path.suffix == '.npy':
    return _npy(_swapped_array(np.load(path), rng))
  try:
    lines = [json.loads(line) for line in raw.splitlines() if line.strip()]
    whole = lines if path.suffix == '.jsonl' else [json.loads(raw)]
  except ValueError:
    return None
  i = rng.randrange(len(whole))
  whole[i] = _swap(whole[i], rng)
  return b''.join(json.dumps(x).encode() + b'\n' for x in whole)


def _npy(array: np.ndarray) -> bytes:
  out = io.BytesIO()
  np.save(out, array)
  return out.getvalue()


def _swapped_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
  """Another shape, type or value."""
  if array.dtype.kind == 'U':
    return np.asarray(json.dumps(_swap(json.loads(str(array)), rng)))
  flat = array.reshape(-1)
  changes: list[Callable[[], np.ndarray]] = [
    lambda: flat[:-1],
    lambda: array[None],
    lambda: array.astype(np.int8),
    lambda: array.astype('U3'),
    lambda: array.astype(np.float64) * np.nan,
    lambda: np.full(array.shape, -5).astype(array.dtype),
    lambda: array.T.copy(order='F'),
  ]
  return rng.choice(changes)()


def _swapped_npz(raw: bytes, rng: random.Random) -> bytes:
  with np.load(io.BytesIO(raw)) as file:
    arrays = dict(file)
  name = rng.choice(sorted(arrays))
  if rng.random() < 0.3:
    arrays[rng.choice(['x', '../x', 'rng', 'norm'])] = arrays.pop(name)
  else:
    arrays[name] = _swapped_array(arrays[name], rng)
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w') as archive:
    for name, array in arrays.items():
      archive.writestr(f'{name}.npy', _npy(array))
  return out.getvalue()


def damage(
  folder: pathlib.Path, secret: pathlib.Path, rng: random.Random
) -> str:
  """Damages one file of a folder; says what was done."""
  files = [p for p in folder.rglob('*') if p.is_file() and p.name != '.lock']
  path = rng.choice(sorted(files))
  raw, action = path.read_bytes(), rng.random()
  said = path.relative_to(folder)
  if action < 0.4 and (changed := _swapped(path, rng)) is not None:
    path.write_bytes(changed)
    return f'{said}: a field was swapped'
  if action < 0.75 and raw:
    out = bytearray(raw)
    # Headers are small, and most of a file is not its header.
    end = len(out) if rng.random() < 0.4 else min(len(out), 400)
    for _ in range(rng.choice([1, 1, 2, 8])):
      out[rng.randrange(end)] ^= 1 << rng.randrange(8)
    path.write_bytes(out)
    return f'{said}: bytes were flipped'
  if action < 0.85:
    path.write_bytes(raw[: rng.randrange(len(raw) + 1)])
    return f'{said}: it was cut'
  path.unlink()
  others: dict[str, Callable[[], Any]] = {
    'it is gone': lambda: None,
    'a directory': path.mkdir,
    'a pipe': lambda: os.mkfifo(path),
    'a link out': lambda: path.symlink_to(secret / 'x'),
    'a link to itself': lambda: path.symlink_to(path),
    'null': lambda: path.write_text('null'),
    'nested deep': lambda: path.write_bytes(_DEEP),
    'not UTF-8': lambda: path.write_bytes(b'{"a": "\xe9"}'),
  }
  if len(said.parts) == 1 or said.parts[0] == 'c':  # A user may link these.
    del others['a link out']
  if path.suffix in ('.jsonl', '.txt') or 'c' in said.parts:
    del others['a pipe']  # May be meant; and checkpoints are our own.
  name = rng.choice(sorted(others))
  others[name]()
  return f'{said}: {name}'


@contextlib.contextmanager
def _limited() -> Iterator[None]:
  """Limits memory, and lets a case that never ends fail."""

  def late(*_) -> None:
    raise TimeoutError(f'more than {_SECONDS} s')

  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  status = pathlib.Path('/proc/self/status').read_text(encoding='utf-8')
  size = int(status.partition('VmSize:')[2].split()[0]) << 10
  resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, hard))
  kinds = signal.SIGVTALRM, signal.SIGALRM
  handlers = [signal.signal(kind, late) for kind in kinds]
  try:
    yield
  finally:
    for kind, handler in zip(kinds, handlers, strict=True):
      signal.signal(kind, handler)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Fuzzer:
  """Whole files of each kind, and what became of damaged ones.

  Args:
    root: an empty folder.
    kinds: names of `KINDS`.
  """

  _outside = ''  # What must not be opened.

  def __init__(self, root: pathlib.Path, kinds: tuple[str, ...] = ()):
    self._root = root
    self._kinds = [k for k in KINDS if k.name in (kinds or k.name)]
    for kind in self._kinds:
      (root / 'whole' / kind.name).mkdir(parents=True)
      kind.make(root / 'whole' / kind.name)
    self._secret = root / 'secret'
    self._secret.mkdir()
    (self._secret / 'x').write_bytes(_SECRET)
    self._opened: list[str] = []
    sys.addaudithook(self._audit)

  def _audit(self, event: str, args: tuple[Any, ...]) -> None:
    if event == 'open' and self._outside and isinstance(args[0], (str, bytes)):
      path = os.path.realpath(os.fsdecode(args[0]))
      if path.startswith(self._outside):
        self._opened.append(path)

  def run(self, cases: int, seed: int) -> list[str]:
    """Damages and reads so many files; the cases that went wrong."""
    wrong = []
    with _limited():
      for i in range(cases):
        rng = random.Random(f'{seed} {i}')
        kind = self._kinds[i % len(self._kinds)]
        place = self._root / 'case'
        shutil.copytree(self._root / 'whole' / kind.name, place / 'in')
        (place / 'out').mkdir()
        said = damage(place / 'in', self._secret, rng)
        if error := self._case(kind, place):
          wrong.append(f'case {i}, {kind.name}, {said}: {error}')
        shutil.rmtree(place)
    return wrong

  def _case(self, kind: Kind, place: pathlib.Path) -> str:
    """What went wrong; '' if nothing did."""
    self._opened.clear()
    self._outside = str(self._secret)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 20 * _SECONDS)  # It may only wait.
    try:
      result = kind.read(place / 'in', place / 'out')
      for leaf in jax.tree.leaves(result):
        values = np.asarray(leaf, np.float64)
        assert np.isfinite(values).all(), 'a number is not finite'
    except config.ConfigError as e:
      if '\n' in str(e):
        return f'its message has several lines: {e!r}'
    except Exception as e:  # What the test is about.
      return f'{type(e).__name__}: {e}'[:300]
    finally:
      signal.setitimer(signal.ITIMER_VIRTUAL, 0)
      signal.setitimer(signal.ITIMER_REAL, 0)
      self._outside = ''
    if self._opened:
      return f'{self._opened[0]} was opened'
    for path in (place / 'out').rglob('*'):
      if path.is_file() and _SECRET in path.read_bytes():
        return f'the secret was copied to {path.name}'
    if (self._secret / 'x').read_bytes() != _SECRET or sorted(
      p.name for p in self._root.iterdir()
    ) != ['case', 'secret', 'whole']:
      return 'something outside was written'
    return ''


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--cases', type=int, default=1000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--kinds', default='')
  args = parser.parse_args()
  start = time.monotonic()
  kinds = tuple(args.kinds.split(',')) if args.kinds else ()
  with tempfile.TemporaryDirectory() as root:
    wrong = Fuzzer(pathlib.Path(root), kinds).run(args.cases, args.seed)
  print('\n'.join(wrong))
  seconds = time.monotonic() - start
  print(f'{args.cases} cases, {len(wrong)} wrong, {seconds:.0f} s')
  sys.exit(bool(wrong))


if __name__ == '__main__':
  main()
