"""Conversions are byte-exact both ways; bad checkpoints are refused."""

import dataclasses
import functools
import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import memory_init
from sleep_jax.models import transformer
from sleep_jax.runtime import tree_paths
from sleep_jax.weights import add_levels
from sleep_jax.weights import convert
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import huggingface
from sleep_jax.weights import npz
from tests import checkpoints  # noqa: E402  (needs safetensors)
from tests import conftest

pytest.importorskip('safetensors')

TOKENS = np.random.default_rng(3).integers(0, checkpoints.VOCAB, (2, 40))


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg, params, memory):
  return transformer.forward(cfg, params, jnp.asarray(TOKENS), memory).logits


def logits(cfg, params, memory=None):
  return _logits(cfg, jax.tree.map(jnp.asarray, params), memory)


def source(tmp_path, family='llama3_2', tied=True, files=1, **changes):
  """A checkpoint folder: its path, config.json and tensors."""
  dtype = changes.pop('dtype', np.float32)
  c = checkpoints.settings(family, tied, **changes)
  w = checkpoints.tensors(c, dtype)
  return checkpoints.write(tmp_path / 'hf', c, w, files), c, w


def leftover_files(folder: pathlib.Path) -> list[str]:
  """Files that a failed conversion to `ours` left."""
  return [p.name for p in folder.iterdir() if p.name.startswith('ours')]


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('family', checkpoints.FAMILIES)
def test_logits_equal_a_numpy_forward_pass(tmp_path, family, tied):
  folder, c, w = source(tmp_path, family, tied)
  convert.convert(folder, tmp_path / 'ours')
  saved = folder_lib.load(tmp_path / 'ours')
  want = checkpoints.forward(c, w, TOKENS)
  np.testing.assert_allclose(
    logits(saved.cfg, saved.params), want, rtol=0, atol=1e-4
  )


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('family', checkpoints.FAMILIES)
def test_in_out_in_is_byte_equal(tmp_path, family, tied, dtype):
  np_dtype = np.dtype(checkpoints.BF16 if dtype == 'bfloat16' else dtype)
  folder, _, w = source(
    tmp_path, family, tied, files=3, dtype=np_dtype, torch_dtype=dtype
  )
  once, exported, twice = (tmp_path / n for n in ('ours', 'exported', 'again'))
  convert.convert(folder, once)
  convert.convert(once, exported)
  convert.convert(exported, twice)
  assert checkpoints.same_bytes(checkpoints.read(exported), w)
  assert ('lm_head.weight' in checkpoints.read(exported)) != tied
  for name in ('config.json', 'tokenizer.json'):
    assert (exported / name).read_bytes() == (folder / name).read_bytes()
  files = sorted(p.relative_to(once) for p in once.rglob('*') if p.is_file())
  assert len(files) > 10
  for file in files:
    assert (once / file).read_bytes() == (twice / file).read_bytes()


@pytest.mark.parametrize('family', checkpoints.FAMILIES)
def test_a_model_without_source_files_gets_a_config(tmp_path, family):
  folder, _, w = source(tmp_path, family, tied=False)
  convert.convert(folder, tmp_path / 'small.npz')
  convert.convert(tmp_path / 'small.npz', tmp_path / 'exported')
  convert.convert(tmp_path / 'exported', tmp_path / 'ours')
  assert checkpoints.same_bytes(checkpoints.read(tmp_path / 'exported'), w)
  want, _ = npz.read(tmp_path / 'small.npz')
  assert folder_lib.load(tmp_path / 'ours').cfg == want


def test_transformers_5_keeps_rope_in_another_place(tmp_path):
  old, c, w = source(tmp_path)
  rope = c.pop('rope_scaling') | {'rope_theta': c.pop('rope_theta')}
  new = checkpoints.write(tmp_path / 'new', c | {'rope_parameters': rope}, w)
  cfgs = []
  for i, folder in enumerate((old, new)):
    convert.convert(folder, tmp_path / f'ours{i}')
    cfgs.append(folder_lib.load(tmp_path / f'ours{i}').cfg)
  assert cfgs[0] == cfgs[1] and cfgs[0].rope_scaling is not None


def test_a_tied_checkpoint_may_repeat_its_embedding(tmp_path):
  _, c, w = source(tmp_path)
  embedding = w['model.embed_tokens.weight']
  twice = checkpoints.write(
    tmp_path / 'twice', c, w | {'lm_head.weight': embedding}
  )
  convert.convert(twice, tmp_path / 'ours')
  assert 'head' not in folder_lib.load(tmp_path / 'ours').params


def test_conversion_holds_one_tensor_in_ram(tmp_path):
  big = dict(
    hidden_size=256,
    intermediate_size=1024,
    vocab_size=2048,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
  )
  warm, *_ = source(tmp_path, files=2)
  convert.convert(warm, tmp_path / 'ours')
  convert.convert(tmp_path / 'ours', tmp_path / 'exported')
  c = checkpoints.settings('llama3_2', True, **big)
  w = checkpoints.tensors(c)
  folder = checkpoints.write(tmp_path / 'big', c, w, files=5)
  largest = max(x.nbytes for x in w.values())
  total = sum(x.nbytes for x in w.values())
  del w
  overhead = 1 << 20
  assert total > 3 * (2 * largest + overhead)
  tracemalloc.start()
  try:
    convert.convert(folder, tmp_path / 'ours_big')
    assert tracemalloc.get_traced_memory()[1] < 2 * largest + overhead
    saved = folder_lib.load(tmp_path / 'ours_big')
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    (tmp_path / 'out').mkdir()
    tensors = huggingface.lazy_tensors(
      saved.params, huggingface.tensor_slots(saved.cfg)
    )
    huggingface.save(tmp_path / 'out', tensors, shard_bytes=2 * largest)
    peak = tracemalloc.get_traced_memory()[1] - before
    assert peak < 2 * largest + largest + overhead
  finally:
    tracemalloc.stop()
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 5
  assert checkpoints.same_bytes(
    checkpoints.read(tmp_path / 'out'), checkpoints.read(folder)
  )


def with_levels(cfg: config.ModelConfig, reading: str) -> config.ModelConfig:
  """Two or three levels on a converted model of three layers."""
  hidden = cfg.levels[0].hidden
  fast = config.LevelConfig(hidden, chunk=4, sleep_every=2)
  if reading == 'backbone':  # Of a model in parts, too.
    fast = dataclasses.replace(fast, fast_weights='backbone')
  slow = config.LevelConfig(hidden, slots=3, rank=4, top_k=2)
  split = () if reading == 'stack' else (1, 2)
  return dataclasses.replace(cfg, levels=(fast, slow), partition=split)


def save_with_memory(folder, tmp_path, reading, memory_of, **changes):
  """A converted model with levels and a memory, saved; and its parts."""
  convert.convert(folder, tmp_path / 'plain')
  plain = folder_lib.load(tmp_path / 'plain')
  cfg = with_levels(dataclasses.replace(plain.cfg, **changes), reading)
  params = add_levels.add_levels(
    plain.cfg, plain.params, cfg, jax.random.key(0)
  )
  memory = memory_of(cfg)
  folder_lib.save(tmp_path / 'ours', cfg, params, memory)
  return cfg, params, memory


def fast_only(cfg: config.ModelConfig) -> memory_lib.Memory:
  """A memory with a fast change, and with locked slots."""
  return memory_init.init_memory(cfg).with_deltas(
    conftest.random_memory(cfg).deltas()
  )


def equal(a, b) -> bool:
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('reading', ['partition', 'backbone'])
def test_a_fast_change_alone_is_merged_exactly(tmp_path, dtype, reading):
  np_dtype = np.dtype(checkpoints.BF16 if dtype == 'bfloat16' else dtype)
  folder, *_ = source(tmp_path, dtype=np_dtype, torch_dtype=dtype)
  cfg, params, memory = save_with_memory(folder, tmp_path, reading, fast_only)
  summary = convert.convert(tmp_path / 'ours', tmp_path / 'exported')
  assert 'merged' in summary
  assert not (tmp_path / 'exported' / 'memory.safetensors').exists()
  convert.convert(tmp_path / 'exported', tmp_path / 'back')
  back = folder_lib.load(tmp_path / 'back')
  assert len(back.cfg.levels) == 1 and back.memory is None
  np.testing.assert_array_equal(
    logits(cfg, params, memory), logits(back.cfg, back.params)
  )
  assert not np.allclose(logits(cfg, params), logits(back.cfg, back.params))


@pytest.mark.parametrize(
  'reading, memory_of, changes, why',
  [
    ('partition', conftest.random_memory, {}, 'level 2 uses 2 of its experts'),
    ('backbone', conftest.random_memory, {}, 'level 2 uses 2 of its experts'),
    ('stack', conftest.random_memory, {}, 'level 1 adds a second MLP'),
    ('stack', fast_only, {}, 'level 1 adds a second MLP'),
    ('partition', conftest.random_memory, dict(dtype='float32'), 'gated'),
  ],
)
def test_otherwise_code_is_written_and_the_memory_comes_back_bit_for_bit(
  tmp_path, reading, memory_of, changes, why
):
  folder, _, w = source(
    tmp_path, dtype=np.dtype(checkpoints.BF16), torch_dtype='bfloat16'
  )
  cfg, params, memory = save_with_memory(
    folder, tmp_path, reading, memory_of, **changes
  )
  summary = convert.convert(tmp_path / 'ours', tmp_path / 'exported')
  assert 'code that transformers runs' in summary and why in summary
  values = json.loads((tmp_path / 'exported' / 'config.json').read_text())
  assert values['model_type'] == 'sleep_llama'  # Nobody takes it for the base.
  assert not checkpoints.same_bytes(checkpoints.read(tmp_path / 'exported'), w)
  convert.convert(tmp_path / 'exported', tmp_path / 'back')
  back = folder_lib.load(tmp_path / 'back')
  assert back.cfg == cfg
  assert equal(back.params, params) and equal(back.memory, memory)


def test_a_sum_in_a_wider_type_than_the_weights_is_not_rounded(tmp_path):
  folder, *_ = source(
    tmp_path, dtype=np.dtype(checkpoints.BF16), torch_dtype='bfloat16'
  )
  cfg, params, memory = save_with_memory(
    folder, tmp_path, 'partition', fast_only, dtype='float32'
  )
  convert.convert(tmp_path / 'ours', tmp_path / 'exported')
  values = json.loads((tmp_path / 'exported' / 'config.json').read_text())
  assert values['torch_dtype'] == 'float32'
  convert.convert(tmp_path / 'exported', tmp_path / 'back')
  back = folder_lib.load(tmp_path / 'back')
  np.testing.assert_array_equal(
    logits(cfg, params, memory), logits(back.cfg, back.params)
  )


def test_a_memory_file_of_version_0_2_is_read(tmp_path):
  """Its checkpoint was the plain backbone; it held faster levels itself."""
  folder, *_ = source(tmp_path)
  cfg, params, memory = save_with_memory(
    folder, tmp_path, 'stack', conftest.random_memory
  )
  plain = {slot.name for slot in huggingface.tensor_slots(cfg).values()}
  tensors = {f'memory.{k}': x for k, x in tree_paths.leaf_paths(memory).items()}
  tensors |= {
    f'params.{k}': x
    for k, x in tree_paths.leaf_paths(params).items()
    if k not in plain
  }
  meta = {'format': 'sleep_jax', 'model': json.dumps(dataclasses.asdict(cfg))}
  huggingface.write(
    folder / 'memory.safetensors',
    {k: np.asarray(x, order='C') for k, x in tensors.items()},
    meta,
  )
  convert.convert(folder, tmp_path / 'back')
  back = folder_lib.load(tmp_path / 'back')
  assert equal(back.params, params) and equal(back.memory, memory)


@pytest.mark.parametrize('reading', ['partition', 'stack'])
def test_a_model_with_an_initial_memory_is_exported_unchanged(
  tmp_path, reading
):
  c = checkpoints.settings('llama3_2', True)
  w = checkpoints.tensors(c)
  w['model.layers.0.mlp.up_proj.weight'][0, :3] = -0.0
  folder = checkpoints.write(tmp_path / 'hf', c, w)
  save_with_memory(folder, tmp_path, reading, memory_init.init_memory)
  assert 'merged' in convert.convert(tmp_path / 'ours', tmp_path / 'exported')
  assert checkpoints.same_bytes(checkpoints.read(tmp_path / 'exported'), w)


def test_a_model_trained_with_levels_is_exported_with_code(tmp_path):
  cfg = conftest.tiny()
  params = conftest.weights(cfg)
  npz.save(tmp_path / 'base.npz', params, cfg)
  summary = convert.convert(tmp_path / 'base.npz', tmp_path / 'exported')
  assert 'level 1 adds a second MLP' in summary
  convert.convert(tmp_path / 'exported', tmp_path / 'back')
  back = folder_lib.load(tmp_path / 'back')
  assert back.cfg == cfg and back.memory is None
  assert equal(back.params, params)


def truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-9])


def test_a_truncated_file_is_named(tmp_path):
  folder, *_ = source(tmp_path, files=3)
  victim = sorted(folder.glob('*.safetensors'))[1]
  truncate(victim)
  with pytest.raises(config.ConfigError, match=f'{victim.name} is truncated'):
    convert.convert(folder, tmp_path / 'ours')
  assert not leftover_files(tmp_path)


@pytest.mark.parametrize(
  'file', ['config.json', 'model.safetensors.index.json']
)
def test_a_truncated_json_is_named(tmp_path, file):
  folder, *_ = source(tmp_path, files=3)
  truncate(folder / file)
  with pytest.raises(config.ConfigError, match=f'{file} cannot be read'):
    convert.convert(folder, tmp_path / 'ours')
  assert not leftover_files(tmp_path)


def test_a_truncated_npz_is_named(tmp_path):
  folder, *_ = source(tmp_path)
  convert.convert(folder, tmp_path / 'small.npz')
  truncate(tmp_path / 'small.npz')
  with pytest.raises(config.ConfigError, match='small.npz is truncated'):
    convert.convert(tmp_path / 'small.npz', tmp_path / 'ours')
  assert not leftover_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
  folder, *_ = source(tmp_path, files=3)
  victim = sorted(folder.glob('*.safetensors'))[2]
  victim.unlink()
  with pytest.raises(config.ConfigError, match=f'{victim.name}.* is missing'):
    convert.convert(folder, tmp_path / 'ours')
  assert not leftover_files(tmp_path)


@pytest.mark.parametrize(
  'change, words',
  [
    (dict(model_type='gpt2'), "model_type='gpt2'"),
    (dict(architectures=['LlamaForTokenClassification']), 'LlamaForToken'),
    (dict(attention_bias=True), 'attention_bias=True'),
    (dict(hidden_act='gelu'), "hidden_act='gelu'"),
    (dict(rope_scaling={'rope_type': 'yarn'}), "rope_type='yarn'"),
    (dict(rope_scaling={'rope_type': 'llama3'}), 'factor is missing'),
    (dict(layer_types=['sliding_attention']), 'layer_types'),
    (dict(torch_dtype='int8'), "dtype='int8'"),
    (dict(quantization_config={'bits': 4}), 'quantization_config'),
    (dict(hidden_size=12, head_dim=6), 'embed_tokens.weight has shape'),
    (dict(num_hidden_layers=4), r'layers\.3\.\S+ is in none'),
    (dict(num_hidden_layers=2), r'layers\.2\.\S+ is unknown'),
  ],
)
def test_an_unsupported_config_is_refused(tmp_path, change, words):
  c = checkpoints.settings('llama3_2', True)
  w = checkpoints.tensors(c)
  folder = checkpoints.write(tmp_path / 'hf', c | change, w)
  with pytest.raises(config.ConfigError, match=words):
    convert.convert(folder, tmp_path / 'ours')
  assert not leftover_files(tmp_path)


UP = 'model.layers.1.mlp.up_proj.weight'


@pytest.mark.parametrize(
  'name, change, words',
  [
    (UP, lambda x: x[:, :-1].copy(), f'{UP} has shape'),
    (UP, lambda x: x.astype(np.int8), f"tensor {UP}='I8'"),
    (UP, lambda x: x.astype(np.float16), f'{UP} is float16, but'),
    (UP, lambda x: None, f'{UP} is in none'),
    ('surprise', lambda x: np.ones(3), 'surprise is unknown'),
    ('lm_head.weight', lambda x: np.ones((40, 16)), 'lm_head.weight differs'),
  ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, name, change, words):
  c = checkpoints.settings('qwen3', True)
  w = checkpoints.tensors(c)
  w[name] = change(w.get(name))
  w = {k: x for k, x in w.items() if x is not None}
  folder = checkpoints.write(tmp_path / 'hf', c, w)
  with pytest.raises(config.ConfigError, match=words):
    convert.convert(folder, tmp_path / 'ours')
  assert not leftover_files(tmp_path)


def test_a_folder_of_ours_is_checked(tmp_path):
  folder, *_ = source(tmp_path)
  save_with_memory(folder, tmp_path, 'partition', conftest.random_memory)
  ours = tmp_path / 'ours'
  for file in (
    'params.embed.embedding.npy',
    'memory.levels.0.fast.delta.up.npy',
  ):
    content = (ours / file).read_bytes()
    truncate(ours / file)
    with pytest.raises(config.ConfigError, match=f'{file}.*cannot be read'):
      convert.convert(ours, tmp_path / 'exported')
    (ours / file).write_bytes(content)
  meta = json.loads((ours / 'config.json').read_text())
  del meta['tensors']['params.norm.scale']
  (ours / 'config.json').write_text(json.dumps(meta))
  with pytest.raises(config.ConfigError, match='lacks the tensor norm.scale'):
    convert.convert(ours, tmp_path / 'exported')
  assert not (tmp_path / 'exported').exists()


def test_a_memory_of_another_backbone_is_refused(tmp_path):
  folder, c, w = source(tmp_path)
  save_with_memory(folder, tmp_path, 'partition', conftest.random_memory)
  convert.convert(tmp_path / 'ours', tmp_path / 'exported')
  file = tmp_path / 'exported' / 'config.json'
  other = json.loads(file.read_text()) | {'rope_theta': 10_000.0}
  file.write_text(json.dumps(other))
  with pytest.raises(config.ConfigError, match='another backbone'):
    convert.convert(tmp_path / 'exported', tmp_path / 'back')


def test_the_command_prints_a_summary_and_never_overwrites(tmp_path, capsys):
  folder, *_ = source(tmp_path)
  convert.main([str(folder), str(tmp_path / 'ours')])
  assert 'parameters (float32)' in capsys.readouterr().out
  for args, words in (
    ((folder, tmp_path / 'ours'), 'exists already'),
    ((tmp_path / 'nowhere', tmp_path / 'new'), 'neither a folder'),
  ):
    with pytest.raises(SystemExit, match=words) as stopped:
      convert.main([str(a) for a in args])
    assert stopped.value.code not in (0, None)
  assert not (tmp_path / 'new').exists()
