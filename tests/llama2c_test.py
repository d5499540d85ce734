"""llama2.c checkpoints: the published sample, round trips, bad files."""

import os
import pathlib
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.inference import sampling
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.weights import convert
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import llama2c
from tests import conftest

STORIES = (
  pathlib.Path(os.environ.get('SLEEP_JAX_DATA', '/nowhere')) / 'stories260k'
)
MODEL = STORIES / 'stories260K.bin'

needs_data = pytest.mark.skipif(
  not MODEL.exists(), reason='SLEEP_JAX_DATA holds no stories260k'
)


def plain(**changes) -> config.ModelConfig:
  settings = dict(levels=(config.LevelConfig(24),), kv_heads=2, max_len=32)
  return conftest.tiny(**(settings | changes))


def published_sample() -> str:
  """The greedy sample that the model's authors print beside it."""
  text = (STORIES / 'stories260K.md').read_text(encoding='utf-8')
  return re.search(r'-t 0\.0\n(.*?)\n```', text, re.DOTALL)[1]


@needs_data
def test_the_published_greedy_sample_token_for_token():
  cfg, params = llama2c.read(MODEL)
  tok = tokenizers.load(STORIES / 'tok512.bin')
  got = sampling.generate(
    model_lib.Model(cfg, params),
    jnp.array([[tok.bos]]),
    jnp.array([1]),
    jax.random.key(0),
    sampling.SamplerConfig(max_new=256, temperature=0.0, stop=tok.stop),
  )
  assert tok.decode(got.tokens[0].tolist()) == published_sample()
  assert got.tokens[0].tolist() == tok.encode(published_sample())


@needs_data
def test_the_published_model_is_written_byte_for_byte(tmp_path):
  cfg, params = llama2c.read(MODEL)
  llama2c.write(tmp_path / 'x.bin', cfg, params)
  old, new = MODEL.read_bytes(), (tmp_path / 'x.bin').read_bytes()
  tables = 2 * 4 * cfg.max_len * cfg.resolved_head_dim // 2
  assert new[:-tables] == old[:-tables]  # The tables are nobody's weights.
  np.testing.assert_allclose(
    np.frombuffer(new[-tables:], '<f4'),
    np.frombuffer(old[-tables:], '<f4'),
    atol=1e-4,
  )


@pytest.mark.parametrize('tied', [True, False])
def test_what_is_written_is_read_byte_for_byte(tmp_path, tied):
  cfg = plain(tie_embeddings=tied)
  params = jax.tree.map(np.asarray, conftest.weights(cfg))
  llama2c.write(tmp_path / 'a.bin', cfg, params)
  same, back = llama2c.read(tmp_path / 'a.bin')
  assert same == cfg
  assert jax.tree.structure(back) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params)):
    np.testing.assert_array_equal(a, b, strict=True)
  llama2c.write(tmp_path / 'b.bin', same, back)
  a, b = ((tmp_path / x).read_bytes() for x in ('a.bin', 'b.bin'))
  assert a == b
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a.bin', 'b.bin']


def interleaved_logits(content: bytes, tokens: list[int]) -> np.ndarray:
  """llama2.c's own forward pass on a file's raw rows, in NumPy."""
  d, f, l, h, kv, v, s = struct.unpack_from('<7i', content)
  v, e, at = abs(v), d // h, 28

  def take(*shape):
    nonlocal at
    x = np.frombuffer(content, '<f4', int(np.prod(shape)), at)
    at += x.nbytes
    return x.reshape(shape).astype(np.float64)

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

  def turn(x):  # [T, heads * E], neighbours as complex numbers.
    x = x.reshape(len(x), -1, e // 2, 2) @ [1, 1j]
    angle = np.arange(len(x))[:, None] * 1e4 ** (-2 * np.arange(e // 2) / e)
    x = x * np.exp(1j * angle)[:, None]
    return np.stack([x.real, x.imag], -1).reshape(len(x), -1, e)

  embed, n1 = take(v, d), take(l, d)
  wq, wk, wv = take(l, d, d), take(l, kv * e, d), take(l, kv * e, d)
  wo, n2, w1 = take(l, d, d), take(l, d), take(l, f, d)
  w2, w3, n3 = take(l, d, f), take(l, f, d), take(d)
  at += 4 * s * e
  head = embed if at == len(content) else take(v, d)
  assert at == len(content)
  x = embed[tokens]
  n = len(tokens)
  for i in range(l):
    y = norm(x, n1[i])
    q, k = turn(y @ wq[i].T), turn(y @ wk[i].T)
    k, val = (
      np.repeat(z, h // kv, 1) for z in (k, (y @ wv[i].T).reshape(n, kv, e))
    )
    scores = np.einsum('the,she->hts', q, k) / e**0.5
    scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    x = x + np.einsum('hts,she->the', p, val).reshape(n, d) @ wo[i].T
    y = norm(x, n2[i])
    gate = y @ w1[i].T
    x = x + (gate / (1 + np.exp(-gate)) * (y @ w3[i].T)) @ w2[i].T
  return norm(x, n3) @ head.T


@pytest.mark.parametrize('tied', [True, False])
def test_logits_are_those_of_the_formats_own_program(tmp_path, tied):
  cfg = plain(tie_embeddings=tied)
  params = conftest.weights(cfg)
  llama2c.write(tmp_path / 'a.bin', cfg, params)
  tokens = [1, 5, 9, 30, 2, 7]
  got = transformer.forward(cfg, params, jnp.array([tokens])).logits[0]
  want = interleaved_logits((tmp_path / 'a.bin').read_bytes(), tokens)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_command_line_converts_to_hugging_face(tmp_path):
  cfg = plain()
  params = jax.tree.map(np.asarray, conftest.weights(cfg))
  llama2c.write(tmp_path / 'a.bin', cfg, params)
  convert.convert(tmp_path / 'a.bin', tmp_path / 'a')
  saved = folder_lib.load(tmp_path / 'a')
  assert saved.cfg == cfg
  for a, b in zip(jax.tree.leaves(saved.params), jax.tree.leaves(params)):
    np.testing.assert_array_equal(a, b, strict=True)


def damaged(content: bytes, at: int, value: int) -> bytes:
  header = list(struct.unpack_from('<7i', content))
  header[at] = value
  return struct.pack('<7i', *header) + content[28:]


@pytest.mark.parametrize(
  'damage, words',
  [
    (lambda b: b[:-1], 'x.bin has .* bytes, but a model of its header'),
    (lambda b: b + b'\0' * 4, 'x.bin has .* bytes, but a model'),
    (lambda b: b[:20], 'x.bin has 20 bytes, less than the header'),
    (lambda b: damaged(b, 1, 0), 'x.bin: hidden_dim=0'),
    (lambda b: damaged(b, 5, 0), 'x.bin: vocab_size=0'),
    (
      lambda b: damaged(b, 3, 3),
      'x.bin is not a llama2.c checkpoint: model.dim',
    ),
    (lambda b: damaged(b, 0, 0x616B3432), 'x.bin is a .* later version'),
  ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, damage, words):
  cfg = plain()
  path = tmp_path / 'x.bin'
  llama2c.write(path, cfg, conftest.weights(cfg))
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(config.ConfigError, match=words):
    llama2c.read(path)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(levels=(config.LevelConfig(8),) * 2), 'model.levels is 2'),
    (dict(head_dim=8), 'model.head_dim is 8'),
    (dict(rope_theta=5e5), 'model.rope_theta is 500000.0'),
    (dict(norm_eps=1e-6), 'model.norm_eps is 1e-06'),
    (dict(qk_norm=True), 'model.qk_norm is True'),
  ],
)
def test_an_unsupported_model_is_not_written(tmp_path, changes, words):
  with pytest.raises(config.ConfigError, match=words):
    llama2c.write(tmp_path / 'x.bin', plain(**changes), {})
  assert not list(tmp_path.iterdir())
