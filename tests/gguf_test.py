"""GGUF files: the numbers, the model and the tokenizer that they stand for."""

import functools
import pathlib
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.models import transformer
from sleep_jax.weights import convert
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import gguf as gguf_lib

gguf = pytest.importorskip('gguf')
pytest.importorskip('safetensors')
pytest.importorskip('tokenizers')

from tests import checkpoints  # noqa: E402  (needs safetensors)
from tests import gguf_files  # noqa: E402  (needs gguf)

KINDS = ['F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0']
MODELS = [
  ('llama2', False),
  ('llama3_2', True),
  ('qwen2_5', True),
  ('qwen3', False),
]
TOKENS = np.random.default_rng(3).integers(0, gguf_files.VOCAB, (2, 40))
STRINGS = (
  '',
  gguf_files.TEXT,
  'Hello world, it is 12:34:56 on 2024-10-31!',
  "I'm sure they've gone; DON'T ask 3.14159 times.",
  '  two  spaces,\ttabs\n\n\nand lines  \r\n',
  'naïve Ωμέγα 数学 🙂🙃 e\u0301',
  '<|im_start|>user\nhi<|im_end|><tool_call>{"a": 10}',
)


def rope_factors(c):
  """The table of divisors that a Llama 3 file holds."""
  s, e = c['rope_scaling'], c['head_dim']
  freq = c['rope_theta'] ** (-np.arange(0, e, 2) / e)
  turns = s['original_max_position_embeddings'] * freq / (2 * np.pi)
  low, high = s['low_freq_factor'], s['high_freq_factor']
  smooth = (turns - low) / (high - low)
  middle = 1 / ((1 - smooth) / s['factor'] + smooth)
  table = np.where(
    turns > high, 1.0, np.where(turns < low, s['factor'], middle)
  )
  return table.astype(np.float32)


def model(tmp_path, family, tied, kind='F32', **changes):
  """A file, its config.json, and the weights that it stands for."""
  c = gguf_files.settings(family, tied)
  if 'rope_scaling' in c:
    c['rope_scaling']['original_max_position_embeddings'] = 8192
    c['max_position_embeddings'] = 32_768
    changes.setdefault('extra', {'rope_freqs.weight': rope_factors(c)})
  file = tmp_path / 'model.gguf'
  w = gguf_files.write(file, c, checkpoints.tensors(c), kind, **changes)
  return file, c, w


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params):
  return transformer.forward(cfg, params, jnp.asarray(TOKENS)).logits


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('family,tied', MODELS)
def test_a_file_is_the_checkpoint_that_it_stands_for(
  tmp_path, family, tied, kind
):
  file, c, w = model(tmp_path, family, tied, kind)
  dtype = {'F16': np.float16, 'BF16': checkpoints.BF16}.get(kind, np.float32)
  hf = {k: x.astype(dtype) if x.ndim == 2 else x for k, x in w.items()}
  if kind == 'BF16':
    c = c | {'torch_dtype': 'bfloat16'}
  checkpoints.write(tmp_path / 'hf', c, hf)
  convert.convert(file, tmp_path / 'ours')
  convert.convert(tmp_path / 'hf', tmp_path / 'want')
  got, want = (folder_lib.load(tmp_path / n) for n in ('ours', 'want'))
  assert got.cfg == want.cfg
  chex.assert_trees_all_equal_shapes_and_dtypes(got.params, want.params)
  chex.assert_trees_all_equal(got.params, want.params)
  if kind in ('F32', 'Q4_1'):
    y = logits(got.cfg, got.params)
    reference = checkpoints.forward(c, w, TOKENS)
    np.testing.assert_allclose(y, reference, rtol=0, atol=1e-3)


def test_types_that_differ_between_layers_become_float32(tmp_path):
  """As in the usual mixes, of which this library can write no other part."""
  file, c, w = model(tmp_path, 'llama2', True)
  name, shape = 'model.layers.1.mlp.down_proj.weight', (64, 256)
  raw = np.random.default_rng(0).integers(0, 40, (64, 210), np.uint8)
  qtype = gguf.GGMLQuantizationType.Q6_K
  opened = gguf_lib.opened(file)
  part = opened.tensors[gguf_files.name_of(name)]
  assert tuple(part.shape[::-1]) == shape
  mixed = part._replace(tensor_type=qtype, data=raw)
  tensors = dict(opened.tensors) | {mixed.name: mixed}
  got = gguf_lib.load(gguf_lib.File(file, opened.fields, tensors))
  down = got['blocks']['level_1']['down']
  want = gguf.quants.dequantize(raw, qtype)
  assert down.dtype == np.float32 and np.isfinite(want).all() and want.any()
  np.testing.assert_array_equal(down[1], want.T)
  np.testing.assert_array_equal(down[0], w[name.replace('1', '0')].T)


def test_ram_is_bound_by_the_largest_tensor(tmp_path):
  c = gguf_files.settings(
    'llama2', True, num_hidden_layers=24, hidden_size=256, vocab_size=2_048
  )
  w = checkpoints.tensors(c)
  gguf_files.write(tmp_path / 'model.gguf', c, w, 'Q4_0')
  sizes = [4 * x.size for x in w.values()]
  file = gguf_lib.opened(tmp_path / 'model.gguf')
  (tmp_path / 'ours').mkdir()
  allocate = folder_lib.allocator(tmp_path / 'ours')
  assert file.model.layers == 24
  tracemalloc.start()
  gguf_lib.load(file, allocate)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2 * max(sizes) + 5e5 < 0.3 * sum(sizes)


@pytest.mark.parametrize('pre', ['smollm', 'gpt-2', 'qwen2', 'llama-bpe'])
def test_text_survives_the_tokenizer(tmp_path, pre):
  convert.convert(
    model(tmp_path, 'qwen2_5', True, pre=pre)[0], tmp_path / 'ours'
  )
  tok = tokenizers.load(tmp_path / 'ours')
  assert (tok.bos, tok.stop, tok.pad) == (1, 2, 0)
  assert tok.vocab < gguf_files.VOCAB  # Unused ids are none of its.
  for text in STRINGS:
    want = text
    for token in gguf_files.SPECIAL:
      want = want.replace(token, '')
    if pre == 'qwen2':  # Normalises.
      want = want.replace('e\u0301', '\u00e9')
    assert tok.decode(tok.encode(text)) == want
  ids = tok.encode(f'<|im_start|>{gguf_files.TOOL}<|im_end|>')
  assert ids == [1, tok.vocab - 1, 2]
  text = tok.apply_chat_template(
    [{'role': 'user', 'content': 'hi'}], add_generation_prompt=True
  )
  assert text == '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'


@pytest.mark.parametrize('pre', ['smollm', 'gpt-2'])
def test_ids_are_those_of_the_tokenizer_that_was_written(tmp_path, pre):
  convert.convert(
    model(tmp_path, 'llama2', True, pre=pre)[0], tmp_path / 'ours'
  )
  tok, want = (
    tokenizers.load(tmp_path / 'ours'),
    gguf_files.trained(pre == 'smollm'),
  )
  for text in STRINGS:
    assert tok.encode(text) == want.encode(text, add_special_tokens=False).ids


def test_qwens_ids_are_those_of_transformers(tmp_path):
  transformers = pytest.importorskip('transformers')
  fields = gguf_files.tokenizer_fields('qwen2')
  tokens = fields['tokenizer.ggml.tokens']
  theirs = transformers.Qwen2Tokenizer(
    vocab={t: i for i, t in enumerate(tokens)},
    merges=[tuple(m.split(' ')) for m in fields['tokenizer.ggml.merges']],
    extra_special_tokens=list(gguf_files.SPECIAL),
  )
  theirs.add_tokens([gguf_files.TOOL])
  convert.convert(
    model(tmp_path, 'qwen2_5', True, pre='qwen2')[0], tmp_path / 'ours'
  )
  ours = tokenizers.load(tmp_path / 'ours')
  for text in STRINGS:
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_an_import_can_be_exported_with_its_tokenizer(tmp_path):
  file, c, w = model(tmp_path, 'llama3_2', True)
  convert.convert(file, tmp_path / 'ours')
  convert.convert(tmp_path / 'ours', tmp_path / 'hf')
  assert checkpoints.same_bytes(checkpoints.read(tmp_path / 'hf'), w)
  tok = tokenizers.load(tmp_path / 'hf')
  assert tok.encode('a<|im_end|>')[-1] == tok.stop == 2


# What is wrong with a file, and what the error must name.
BAD_FIELDS = {
  'gemma2.*llama, qwen2, qwen3': {'general.architecture': 'gemma2'},
  'llama.block_count is missing': {'llama.block_count': None},
  "rope.scaling.type='yarn'": {'llama.rope.scaling.type': 'yarn'},
  'expert_count=8': {'llama.expert_count': 8},
  'head_count_kv': {'llama.attention.head_count_kv': [1, 2, 2]},
  'dimension_count=8': {'llama.rope.dimension_count': 8},
  'has shape': {'llama.feed_forward_length': 128},
  'lacks a tensor.*layers.3': {'llama.block_count': 4},
  'unknown': {'llama.block_count': 2},
  'one of 2 parts': {'split.count': 2},
  "model='llama'": {'tokenizer.ggml.model': 'llama'},
  "pre='tekken'.*smollm": {'tokenizer.ggml.pre': 'tekken'},
  'eos_token is token 999': {'tokenizer.ggml.eos_token_id': 999},
  'merges do not fit': {'tokenizer.ggml.merges': ['nothing here']},
  'no tokens or no merges': {'tokenizer.ggml.merges': None},
  '401 tokens, but the embedding 400 rows': {
    'tokenizer.ggml.tokens': [str(i) for i in range(401)]
  },
}


@pytest.mark.parametrize('message', BAD_FIELDS)
def test_a_bad_file_is_refused_in_one_line(tmp_path, message):
  file, _, _ = model(tmp_path, 'llama2', True, fields=BAD_FIELDS[message])
  _check_refused(file, message)


def test_an_unknown_quantisation_is_refused(tmp_path):
  file, _, _ = model(tmp_path, 'llama2', True, 'MXFP4')
  _check_refused(file, "='MXFP4' is unknown; choose one of .*Q4_1")


def test_another_rope_table_is_refused(tmp_path):
  table = np.linspace(1, 4, 8, dtype=np.float32)
  extra = {'rope_freqs.weight': table}
  file, _, _ = model(tmp_path, 'llama2', True, extra=extra)
  _check_refused(file, 'rope_freqs.weight is not the table of a Llama 3')


@pytest.mark.parametrize('share', [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
  file, _, _ = model(tmp_path, 'llama2', True)
  content = file.read_bytes()
  file.write_bytes(content[: max(8, int(share * len(content)))])
  _check_refused(file, 'truncated')


def test_other_files_are_refused(tmp_path):
  file = tmp_path / 'model.gguf'
  for content in (b'', b'PK\x03\x04 something else'):
    file.write_bytes(content)
    _check_refused(file, 'is not a GGUF file')


def _check_refused(file: pathlib.Path, message: str) -> None:
  with pytest.raises(config.ConfigError, match=message) as e:
    convert.convert(file, file.with_name('ours'))
  assert '\n' not in str(e.value) and 'model.gguf' in str(e.value)
  assert [p.name for p in file.parent.iterdir()] == [file.name]
