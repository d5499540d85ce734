"""Files of others: nothing outside their folder is read, and one line refuses.

`tests/fuzzing.py` damages such files at random; these are the cases that once
went through, or ended in a traceback.
"""

import json
import os
import pathlib
import shutil
import sys
from typing import Any
import zipfile

import jax
import numpy as np
import pytest

import sleep_jax
from sleep_jax import config
from sleep_jax.data import documents
from sleep_jax.data import tokenizers
from sleep_jax.data import untrusted
from sleep_jax.weights import convert
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import llama2c
from sleep_jax.weights import load as load_lib
from sleep_jax.weights import npz
from tests import checkpoints
from tests import conftest
from tests import gguf_files
from tests import tiny_checkpoint

DEEP = '{"a":' * 200_000
INDEX = 'model.safetensors.index.json'
NORM = 'model.norm.weight'


def hub(folder: pathlib.Path, files: int = 1, **changes) -> pathlib.Path:
  """A Hugging Face folder with a tokenizer, `changes` in its config.json."""
  c = checkpoints.settings('llama3_2', True, vocab_size=320)
  checkpoints.write(folder, c | changes, checkpoints.tensors(c), files)
  tiny_checkpoint.write_tokenizer(folder)
  (folder / 'LICENSE').write_text('free')
  return folder


def refused(words: str, function, *args) -> None:
  """The call ends with a ConfigError of one line."""
  with pytest.raises(config.ConfigError, match=words) as error:
    function(*args)
  assert '\n' not in str(error.value)


def edit(path: pathlib.Path, *keys: Any, value: Any = None) -> None:
  """Sets a value in a JSON file; None deletes it."""
  content = outer = json.loads(path.read_text())
  for key in keys[:-1]:
    outer = outer[key]
  if value is None:
    del outer[keys[-1]]
  else:
    outer[keys[-1]] = value
  path.write_text(json.dumps(content))


@pytest.mark.parametrize('absolute', [False, True])
def test_a_shard_outside_the_folder_is_not_read(tmp_path, absolute):
  folder = hub(tmp_path / 'hf', files=2)
  outside = tmp_path / 'outside'
  outside.mkdir()
  shard = sorted(folder.glob('*.safetensors'))[1]
  shutil.move(shard, outside / shard.name)
  index = json.loads((folder / INDEX).read_text())
  name = outside / shard.name if absolute else f'../outside/{shard.name}'
  index['weight_map'] = {
    k: str(name) if v == shard.name else v
    for k, v in index['weight_map'].items()
  }
  (folder / INDEX).write_text(json.dumps(index))
  out = tmp_path / 'ours'
  refused('is not a plain file name', convert.convert, folder, out)
  (folder / INDEX).unlink()
  (folder / 'model.safetensors').symlink_to(outside / shard.name)
  refused('a symbolic link out', convert.convert, folder, out)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['hf', 'outside']


@pytest.mark.parametrize('name', ['LICENSE', 'tokenizer.json', 'NOTICE'])
def test_what_a_link_points_to_does_not_travel(tmp_path, model, name):
  secret = tmp_path / 'secret'
  secret.write_text('password')
  folder = hub(tmp_path / 'hf')
  (folder / name).unlink(missing_ok=True)
  (folder / name).symlink_to(secret)
  refused('a symbolic link out', convert.convert, folder, tmp_path / 'ours')
  assert not (tmp_path / 'ours').exists()
  # And not from a folder of ours, either in an export or in a saved life.
  ours = tmp_path / 'model'
  shutil.copytree(model, ours)
  (ours / 'source' / name).unlink(missing_ok=True)
  (ours / 'source' / name).symlink_to(secret)
  refused('a symbolic link out', convert.convert, ours, tmp_path / 'out')
  if name == 'LICENSE':
    m = sleep_jax.load(ours)
    refused('a symbolic link out', m.save, tmp_path / 'life')
  (ours / 'source').rename(tmp_path / 'elsewhere')
  (ours / 'source').symlink_to(tmp_path / 'elsewhere')
  refused('a symbolic link out', tokenizers.load, ours)


def test_the_hubs_cache_of_links_is_read(tmp_path):
  """Its snapshots are links into `blobs`."""
  real = hub(tmp_path / 'hf', files=2)
  cache = tmp_path / 'models--org--name'
  snapshot, blobs = cache / 'snapshots' / ('a' * 40), cache / 'blobs'
  snapshot.mkdir(parents=True)
  blobs.mkdir()
  for i, file in enumerate(sorted(real.iterdir())):
    shutil.move(file, blobs / f'{i:040x}')
    (snapshot / file.name).symlink_to(f'../../blobs/{i:040x}')
  convert.convert(snapshot, tmp_path / 'ours')
  assert tokenizers.load(tmp_path / 'ours').vocab == 320
  assert not any(p.is_symlink() for p in (tmp_path / 'ours').rglob('*'))
  assert tokenizers.load(snapshot).vocab == 320
  # The blobs of a model beside it are not its own.
  other = tmp_path / 'models--org--other' / 'blobs'
  other.mkdir(parents=True)
  shutil.move(blobs / f'{0:040x}', other / 'x')
  (snapshot / 'LICENSE').unlink()
  (snapshot / 'LICENSE').symlink_to('../../../models--org--other/blobs/x')
  refused('a symbolic link out', convert.convert, snapshot, tmp_path / 'more')


@pytest.mark.parametrize(
  'file', ['config.json', INDEX, 'tokenizer_config.json', 'chat_template.jinja']
)
@pytest.mark.parametrize(
  'content, words',
  [
    (DEEP, 'cannot be read'),
    ('[]', 'holds a list'),
    ('null', 'holds a NoneType'),
    (b'{"a": "\xe9"}', 'codec'),
    ('', 'Expecting value'),
    ('{"a": ' + '[' * 60 + ']' * 60 + '}', 'nested more than'),
    (None, 'no regular file'),
    ('pipe', 'no regular file'),
  ],
)
def test_a_file_of_another_kind_is_named(tmp_path, file, content, words):
  if file.endswith('.jinja') and content not in (None, b'{"a": "\xe9"}'):
    pytest.skip('a template may be any text')
  folder = hub(tmp_path / 'hf', files=2)
  path = folder / file
  path.unlink(missing_ok=True)
  if content is None:
    path.mkdir()
  elif content == 'pipe':
    os.mkfifo(path)
  else:
    path.write_bytes(
      content if isinstance(content, bytes) else content.encode()
    )
  if file in ('config.json', INDEX):
    if file == 'config.json' and words == 'no regular file':
      words = 'neither a folder with a config.json'
    elif words == 'no regular file':
      words = 'cannot be read'
    refused(words, convert.convert, folder, tmp_path / 'ours')
  else:
    refused(words, lambda: tokenizers.load(folder).apply_chat_template([]))
  assert not (tmp_path / 'ours').exists()


@pytest.mark.parametrize(
  'weight_map', [[1, 2], {'a': 3}, {'a': ['b']}, {'a': ''}, 'x', {}]
)
def test_an_index_that_names_no_files_is_refused(tmp_path, weight_map):
  folder = hub(tmp_path / 'hf', files=2)
  edit(folder / INDEX, 'weight_map', value=weight_map)
  refused('index.json|plain file', convert.convert, folder, tmp_path / 'ours')


@pytest.mark.parametrize(
  'name, values',
  [
    ('rope_theta', [float('nan'), -1.0, 0, 'x', None, True]),
    ('rms_norm_eps', [float('nan'), float('inf'), -1e-5, 'x', None]),
    ('num_hidden_layers', [10**9, 10**400, 0, -1, 2.0, '3']),
    ('hidden_size', [0, -16, 'x', None, 16.5]),
    ('num_attention_heads', [0, None, [], 3]),
    ('num_key_value_heads', [0.5, 'x', -2]),
    ('head_dim', [-8, '8', 7]),
    ('max_position_embeddings', [float('inf'), None, 0]),
    ('tie_word_embeddings', ['yes', 1, None]),
    ('torch_dtype', ['float64', ['x'], 3]),
    ('layer_types', [3, [[]], ['mamba']]),
    ('architectures', ['', [], 0, ['x'], {}]),
    ('rope_scaling', ['x', 3, [1], {'rope_type': []}]),
    ('factor', [float('nan'), -8.0, 0.0, '8', None]),
    ('original_max_position_embeddings', [0, 0.5, 'x']),
  ],
)
def test_a_setting_that_cannot_be_is_refused_before_work(
  tmp_path, name, values
):
  for i, value in enumerate(values):
    changes = {name: value}
    if name in checkpoints.ROPE_SCALING:
      changes = {'rope_scaling': checkpoints.ROPE_SCALING | changes}
    folder = hub(tmp_path / f'{i}', **changes)
    refused('', convert.convert, folder, tmp_path / 'ours')
  assert not (tmp_path / 'ours').exists()


_BAD = [
  pytest.param(np.nan, id='nan'),
  pytest.param(-np.inf, id='inf'),
]


@pytest.mark.parametrize('value', _BAD)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, dtype):
  array = np.linspace(-1, 1, 24).astype(np.dtype(dtype)).reshape(4, 6)
  folder_lib.check_finite(array.T, 'x')
  array[1, 2] = value
  refused('x holds a NaN or an inf', folder_lib.check_finite, array.T, 'x')


@pytest.mark.parametrize('value', _BAD)
def test_every_reader_refuses_weights_that_are_not_finite(tmp_path, value):
  c = checkpoints.settings('llama3_2', True)
  w = checkpoints.tensors(c)
  w[NORM][3] = value
  words, out = 'holds a NaN or an infinite', tmp_path / 'ours'
  checkpoints.write(tmp_path / 'hf', c, w)
  refused(words, convert.convert, tmp_path / 'hf', out)
  c = gguf_files.settings('llama2', True)
  w = checkpoints.tensors(c)
  w[NORM][3] = value
  gguf_files.write(tmp_path / 'm.gguf', c, w, 'Q8_0')
  refused(words, convert.convert, tmp_path / 'm.gguf', out)
  assert not out.exists()
  cfg, params = small_base()
  params['norm']['scale'][3] = value
  npz.save(tmp_path / 'b.npz', params, cfg)
  refused(words, npz.read, tmp_path / 'b.npz')
  llama2c.write(tmp_path / 'b.bin', cfg, params)
  refused(words, llama2c.read, tmp_path / 'b.bin')
  folder_lib.save(tmp_path / 'folder', cfg, params)
  refused(words, folder_lib.load, tmp_path / 'folder')


def small_base() -> tuple[config.ModelConfig, Any]:
  cfg = config.ModelConfig(
    vocab=32,
    dim=16,
    layers=2,
    heads=4,
    levels=(config.LevelConfig(16),),
    max_len=32,
  )
  return cfg, jax.tree.map(np.array, conftest.weights(cfg))


@pytest.fixture(name='ours', scope='module')
def _ours(tmp_path_factory):
  """A folder of ours, with a memory."""
  path = tmp_path_factory.mktemp('models') / 'ours'
  cfg = conftest.tiny()
  memory = conftest.random_memory(cfg)
  folder_lib.save(path, cfg, conftest.weights(cfg), memory)
  return path


SCALE = ('tensors', 'params.norm.scale')


@pytest.mark.parametrize(
  'keys, value, words',
  [
    (('tensors', 'params.x'), ['float32', [3]], r'params.x.npy. is missing'),
    (('tensors', 'x.y'), ['float32', [3]], 'tensors.x.y is unknown'),
    (('tensors', 'params./../x'), ['float32', [3]], 'not a plain file name'),
    (SCALE, ['floof', [16]], "'floof' is unknown"),
    (SCALE, ['float64', [16]], "'float64' is unknown"),
    (SCALE, [3, [16]], 'must be a string'),
    (SCALE, ['float32', 'x'], 'must be a sequence'),
    (SCALE, ['float32', [15]], r'is float32\[16\], but float32\[15\]'),
    (SCALE, 3, 'no type and shape'),
    (('tensors',), [], 'must be a section'),
    (('model',), [], 'must be a section'),
    (('model', 'dim'), None, 'model.dim is missing'),
    (('model', 'levels'), None, 'model.levels'),
    (('model', 'levels'), 3, 'must be a sequence'),
    (('model', 'levels', 0), 3, r'levels\[0\]=3 must be a section'),
    (('model', 'dim'), 'x', 'must be a whole number'),
    (('model', 'dim'), 10**9, 'no model of these|is float32'),
    (('model', 'dim'), 10**18, 'must be at most 2147483647'),
    (('model', 'layers'), 10**9, 'layers=1000000000, but'),
    (('model', 'layers'), 10**400, 'must be a finite number'),
    (('model', 'rope_theta'), float('nan'), 'must be a finite number'),
    (('model', 'norm_eps'), -1.0, 'must be at least 0'),
    (('model', 'rope_scaling'), 'x', 'must be a section'),
    (('model', 'recurrent'), [1], 'must be a section'),
    (('model', 'partition'), 3, 'must be a sequence'),
    (('model', 'mixers'), ['nowhere:Mixer'], 'import nowhere first'),
    (('model', 'dtype'), 'float99', 'model.dtype='),
  ],
)
def test_a_folder_of_ours_that_does_not_match_is_refused(
  ours, tmp_path, keys, value, words
):
  shutil.copytree(ours, tmp_path / 'm')
  edit(tmp_path / 'm' / 'config.json', *keys, value=value)
  refused(words, folder_lib.load, tmp_path / 'm')


def test_weights_import_no_module(ours, tmp_path, monkeypatch):
  (tmp_path / 'evil_mixer.py').write_text(
    f'open({str(tmp_path / "ran")!r}, "w")\nclass Mixer: pass\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  shutil.copytree(ours, tmp_path / 'm')
  file = tmp_path / 'm' / 'config.json'
  edit(file, 'model', 'mixers', value=['evil_mixer:Mixer'])
  refused('import evil_mixer first', folder_lib.load, tmp_path / 'm')
  assert 'evil_mixer' not in sys.modules and not (tmp_path / 'ran').exists()


def test_a_tensor_file_that_is_none_is_named(ours, tmp_path):
  shutil.copytree(ours, tmp_path / 'm')
  file = tmp_path / 'm' / 'params.norm.scale.npy'
  for content in (b'', b'\x93NUMPY', b'PK\x03\x04', os.urandom(200)):
    file.write_bytes(content)
    refused('norm.scale.npy. cannot be read', folder_lib.load, tmp_path / 'm')
  np.save(file, np.array([{}] * 16), allow_pickle=True)
  refused('norm.scale.npy. cannot be read', folder_lib.load, tmp_path / 'm')
  file.unlink()
  file.mkdir()
  refused('norm.scale.npy. is missing', folder_lib.load, tmp_path / 'm')


@pytest.mark.parametrize(
  'name, change, words',
  [
    ('norm/scale', lambda x: np.zeros(16, np.int8), "type='int8' is unknown"),
    ('norm/scale', lambda x: x.astype(np.float64), "'float64' is unknown"),
    ('norm/scale', lambda x: x[:15], r'is float32\[15\], but float32\[16\]'),
    ('norm/scale', lambda x: np.array(['x'] * 16), 'is unknown'),
    ('norm/scale', lambda x: None, 'lacks the tensor norm.scale'),
    ('norm/more', lambda x: np.ones(3), 'has an unknown tensor norm.more'),
    ('norm', lambda x: np.ones(3), 'has an unknown tensor norm'),
    ('__model__', lambda x: None, '__model__ cannot be read'),
    ('__model__', lambda x: np.asarray(DEEP), '__model__ cannot be read'),
    ('__model__', lambda x: np.asarray('[1]'), 'holds a list'),
    (
      '__model__',
      lambda x: np.asarray(str(x).replace('"layers": 2', '"layers": 1000000')),
      'layers=1000000, but',
    ),
  ],
)
def test_a_base_that_does_not_match_is_refused(tmp_path, name, change, words):
  cfg, params = small_base()
  path = tmp_path / 'b.npz'
  npz.save(path, params, cfg)
  with np.load(path) as file:
    arrays = dict(file)
  arrays[name] = change(arrays.get(name))
  arrays = {k: x for k, x in arrays.items() if x is not None}
  np.savez(path, **arrays)
  refused(words, load_lib.load, str(path), cfg)


def test_an_archive_that_unpacks_to_far_more_is_not_unpacked(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(untrusted, '_SMALL', 1 << 20)
  with zipfile.ZipFile(
    tmp_path / 'b.npz', 'w', zipfile.ZIP_DEFLATED
  ) as archive:
    archive.writestr('norm/scale.npy', b'\0' * (1 << 23))
  refused('8,388,608 bytes when unpacked', npz.read, tmp_path / 'b.npz')


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'llama.block_count': 10**9}, 'block_count=1000000000, but there are'),
    ({'llama.rope.freq_base': float('nan')}, 'must be a finite number'),
    ({'llama.rope.freq_base': -1.0}, 'must be above 0'),
    ({'llama.rope.freq_base': 'x'}, 'must be a number'),
    ({'llama.attention.layer_norm_rms_epsilon': -1.0}, 'must be at least 0'),
    ({'llama.attention.head_count': 0}, 'head_count'),
    ({'llama.embedding_length': 'x'}, 'must be a whole number'),
    ({'split.count': 'x'}, 'one of x parts'),
    ({'tokenizer.ggml.bos_token_id': 'x'}, "bos_token is token 'x'"),
    ({'tokenizer.ggml.eot_token_id': 10**8}, 'eot_token is token 100000000'),
    ({'tokenizer.ggml.tokens': 'x'}, 'must be a sequence'),
    ({'tokenizer.ggml.tokens': [1] * 400}, 'must be a string'),
    ({'tokenizer.ggml.token_type': 3}, 'must be a sequence'),
    ({'tokenizer.ggml.merges': ['ab']}, 'merges do not fit'),
    ({'tokenizer.chat_template': 3}, 'must be a string'),
  ],
)
def test_a_gguf_file_that_cannot_be_is_refused(tmp_path, fields, words):
  c = gguf_files.settings('llama2', True)
  path = tmp_path / 'm.gguf'
  gguf_files.write(path, c, checkpoints.tensors(c), 'Q8_0', fields)
  refused(words, convert.convert, path, tmp_path / 'ours')
  assert not (tmp_path / 'ours').exists()


def test_a_gguf_array_longer_than_its_file_is_refused(tmp_path):
  c = gguf_files.settings('llama2', True)
  path = tmp_path / 'm.gguf'
  gguf_files.write(path, c, checkpoints.tensors(c), 'Q8_0')
  raw = path.read_bytes()
  name = b'tokenizer.ggml.token_type'
  at = raw.index(name) + len(name) + 8  # After its type and its elements'.
  path.write_bytes(raw[:at] + (1 << 60).to_bytes(8, 'little') + raw[at + 8 :])
  refused(
    'a length in its header|is truncated, damaged',
    convert.convert,
    path,
    tmp_path / 'ours',
  )


@pytest.mark.parametrize(
  'file, keys, value, words',
  [
    ('life.json', ('format',), 7, 'has format 7'),
    ('life.json', ('plan',), None, 'plan'),
    ('life.json', ('plan', 'window'), -1, 'must be at least'),
    ('life.json', ('plan', 'rank'), 3, 'are of two lives'),
    ('life.json', ('frames',), [[['x']]], 'must be a whole number'),
    ('life.json', ('frames',), [[[10**6]]], 'ids beyond 320'),
    ('life.json', ('given',), [], 'given='),
    ('source/tokenizer_config.json', ('eos_token',), {'x': 1}, 'eos_token'),
  ],
)
def test_a_saved_life_that_does_not_match_is_refused(
  life, tmp_path, file, keys, value, words
):
  shutil.copytree(life, tmp_path / 'life')
  edit(tmp_path / 'life' / file, *keys, value=value)
  refused(words, sleep_jax.load, tmp_path / 'life')


@pytest.fixture(name='model', scope='module')
def _model(tmp_path_factory):
  """A folder of ours with a tokenizer, and no memory."""
  return tiny_checkpoint.write(tmp_path_factory.mktemp('models') / 'tiny')


@pytest.fixture(name='life', scope='module')
def _life(model, tmp_path_factory):
  path = tmp_path_factory.mktemp('lives') / 'life'
  return sleep_jax.load(model, rank=2, slots=2, window=16).save(path)


@pytest.mark.parametrize(
  'name, change, words',
  [
    ('rng', lambda x: x[:1], r'rng is uint32\[1\]'),
    ('clock', lambda x: x.astype(np.float32), 'clock is float32'),
    ('clock', lambda x: None, 'clock is missing'),
    ('archive.tokens', lambda x: np.zeros((2, 3), np.int32), 'archive'),
  ],
)
def test_the_arrays_of_a_saved_life_are_checked(
  life, tmp_path, name, change, words
):
  shutil.copytree(life, tmp_path / 'life')
  path = tmp_path / 'life' / 'life.npz'
  with np.load(path) as file:
    arrays = dict(file)
  arrays[name] = change(arrays.get(name))
  np.savez(path, **{k: x for k, x in arrays.items() if x is not None})
  refused(words, sleep_jax.load, tmp_path / 'life')


@pytest.mark.parametrize(
  'line, words',
  [
    (DEEP, 'line 1 is not JSON'),
    ('{"text": ' + '1' * 5000 + '}', 'line 1 is not JSON'),
    ('{"text": "\\ud800"}', "'text' is no text"),
    ('{"question": "\\ud800", "answer": "x"}', "'question' is no text"),
    ('{"messages": [{"role": [], "content": "x"}]}', "'role' must be a text"),
  ],
)
def test_a_document_that_is_none_is_named(tmp_path, line, words):
  (tmp_path / 'a.jsonl').write_text(line)
  refused(words, documents.read, [tmp_path / 'a.jsonl'])
