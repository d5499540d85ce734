"""Streams of any length, read in constant memory."""

import dataclasses

import jax
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.inference import sampling
from sleep_jax.inference import streaming
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import memory_init
from sleep_jax.models import transformer
from tests import chunked_mixers_test
from tests import conftest

SETTINGS = chunked_mixers_test.SETTINGS | {
  'gdn': config.RecurrentConfig(heads=2, key=4, value=4, chunk=4)
}


def build(mixer='titans_mac'):
  cfg = conftest.tiny(mixers=(mixer,), recurrent=SETTINGS[mixer])
  return conftest.build_model(cfg, memory_init.init_memory(cfg))


def assert_close(a, b):
  for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('mixer', ['gdn', 'titans_mac'])
def test_pieces_and_chunks_do_not_matter(mixer, tokens):
  """One pass over the whole is a stream in pieces, whatever the chunk."""
  model = build(mixer)
  cache = cache_lib.init_cache(model.cfg, 4, 16, model.memory)
  whole = transformer.forward(
    model.cfg, model.params, tokens, model.memory, cache=cache
  )
  text = np.asarray(tokens)
  for chunk, cuts in ((5, (3, 4, 11)), (16, ()), (64, (8,))):
    pieces = np.split(text, cuts, axis=1)
    stream = streaming.read(
      model, streaming.begin(model, 4), iter(pieces), chunk
    )
    assert stream.tokens.tolist() == [16] * 4
    assert whole.cache is not None
    assert_close(stream.layers, whole.cache.layers)


def test_a_saved_stream_goes_on(tmp_path, tokens):
  model, text = build(), np.asarray(tokens)
  whole = streaming.read(model, streaming.begin(model, 4), [text], 4)
  half = streaming.read(model, streaming.begin(model, 4), [text[:, :6]], 4)
  streaming.save(half, tmp_path / 'stream.npz')
  loaded = streaming.load(model, tmp_path / 'stream.npz')
  assert_close(streaming.read(model, loaded, [text[:, 6:]], 4), whole)
  other = dataclasses.replace(SETTINGS['titans_mac'], heads=1)
  cfg = dataclasses.replace(model.cfg, recurrent=other)
  with pytest.raises(config.ConfigError, match='the stream of another model'):
    streaming.load(conftest.build_model(cfg), tmp_path / 'stream.npz')
  (tmp_path / 'broken.npz').write_bytes(b'nothing')
  for name in ('broken', 'absent'):
    with pytest.raises(config.ConfigError, match='holds no stream'):
      streaming.load(model, tmp_path / f'{name}.npz')


def test_what_is_kept_does_not_grow_and_is_asked(tokens):
  model, text = build('gdn'), np.asarray(tokens)
  begun = streaming.begin(model, 4)
  shapes = [x.shape for x in jax.tree.leaves(begun)]
  stream = streaming.read(model, begun, [text] * 20, 32)
  assert [x.shape for x in jax.tree.leaves(stream)] == shapes
  after = streaming.model_after(model, stream)
  sampler = sampling.SamplerConfig(max_new=3, temperature=0.0)
  prompts = [[1, 5]] * 4
  asked = sampling.complete(after, prompts, jax.random.key(0), sampler)
  assert [len(a) for a in asked] == [3] * 4
  logits = [m.forward(np.array(prompts)).logits for m in (after, model)]
  assert np.abs(logits[0] - logits[1]).max() > 1e-3


@pytest.mark.parametrize('mixers', [(), ('attention', 'gdn')])
def test_attention_keeps_everything(mixers):
  cfg = conftest.tiny(mixers=mixers, recurrent=SETTINGS['gdn'])
  with pytest.raises(config.ConfigError, match='use sliding_window'):
    streaming.begin(conftest.build_model(cfg), 1)
