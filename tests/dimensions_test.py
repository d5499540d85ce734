"""Dimensions come from the checkpoint, where a config gives none."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.configs import base_text
from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.harness import build as build_lib
from sleep_jax.models import transformer
from sleep_jax.weights import convert
from sleep_jax.weights import dimensions
from sleep_jax.weights import load as load_lib
from tests import checkpoints
from tests import run_test

CLOCKS = (
  {'hidden': 0, 'chunk': 8, 'sleep_every': 2},
  {'hidden': 0, 'slots': 3, 'rank': 4},
)


@pytest.fixture(name='folder', scope='module', params=['llama3_2', 'qwen2_5'])
def _folder(request, tmp_path_factory):
  path = tmp_path_factory.mktemp(request.param)
  c = checkpoints.settings(request.param, tied=False)
  checkpoints.write(path / 'theirs', c, checkpoints.tensors(c))
  convert.convert(path / 'theirs', path / 'ours')
  return path / 'ours'


@pytest.mark.parametrize('partition', [(), (2, 1), (0.7, 0.3)])
def test_levels_alone_make_a_model_of_any_base(folder, partition):
  section = {'levels': CLOCKS, 'partition': partition, 'remat': True}
  assert not dimensions.are_complete(section)
  base = load_lib.model_config(str(folder))
  cfg = dimensions.complete(section, base)
  assert cfg.partition == ((2, 1) if partition else ())
  assert [x.hidden for x in cfg.levels] == [checkpoints.HIDDEN] * 2
  assert [x.chunk for x in cfg.levels] == [8, 0] and cfg.remat
  levels = dict(levels=base.levels, partition=(), remat=base.remat)
  assert dataclasses.replace(cfg, **levels) == base
  # It is a model that runs with those weights.
  params = build_lib._weights(str(folder), cfg, 1, None)
  tokens = np.arange(8)[None]
  want = transformer.forward(
    base, build_lib._weights(str(folder), base, 1, None), tokens
  )
  got = transformer.forward(cfg, params, tokens)
  assert np.array_equal(got.logits, want.logits)


def test_a_setting_that_disagrees_is_refused(folder):
  base = load_lib.model_config(str(folder))
  for changes, words in (
    ({'layers': 4}, 'with layers=3, but model.layers=4'),
    ({'norm_eps': 1e-3}, 'with norm_eps=1e-05, but model.norm_eps=0.001'),
    ({'tie_embeddings': True}, 'model.tie_embeddings=True'),
  ):
    cfg = dimensions.complete({'levels': CLOCKS} | changes, base)
    with pytest.raises(config.ConfigError, match=words):
      build_lib._weights(str(folder), cfg, 1, None)


def test_a_section_that_has_all_dimensions_is_left_as_it_is():
  section = json.loads(base_text.model().to_json())
  assert dimensions.are_complete(section)
  c = {'model': section, 'base': 'no/such/file', 'task': {}}
  assert build_lib.model_config(c) == config.ModelConfig.from_mapping(section)


@pytest.mark.parametrize(
  'fractions, layers, want',
  [
    ((0.25, 0.25, 0.5), 16, (4, 4, 8)),
    ((0.25, 0.25, 0.5), 28, (7, 7, 14)),
    ((0.74, 0.26), 30, (22, 8)),
    ((0.98, 0.01, 0.01), 3, (1, 1, 1)),
    ((0.01, 0.01, 0.98), 30, (1, 1, 28)),
    ((0.333, 0.333, 0.334), 36, (12, 12, 12)),
  ],
)
def test_fractions_are_rounded_to_whole_layers(fractions, layers, want):
  assert dimensions.counts(fractions, layers) == want


@pytest.mark.parametrize(
  'fractions, words',
  [
    ((0.5, 0.6), 'have the sum 1'),
    ((1.5, -0.5), 'must be positive'),
    ((0.25,) * 4, '3 layers; use fewer levels'),
  ],
)
def test_fractions_that_cannot_be_are_refused(fractions, words):
  with pytest.raises(config.ConfigError, match=words):
    dimensions.counts(fractions, 3)


def test_dimensions_without_a_base_are_missing():
  c = run_test.small_config()
  c['model'] = {'levels': c['model']['levels']}
  with pytest.raises(config.ConfigError, match="base='' has none"):
    build_lib.model_config(c | {'base': ''})
  with pytest.raises(config.ConfigError, match="'no/base.npz' do not exist"):
    build_lib.model_config(c | {'base': 'no/base.npz'})


def test_a_life_on_a_base_alone_is_that_of_its_dimensions():
  c = run_test.small_config()
  whole = build_lib.model_config(c)
  c['model'] = {'levels': c['model']['levels']}
  task, learner, _ = build_lib.build(build_lib.arm_config(c, 'sleep'), 1)
  assert learner.setup.model.cfg == dataclasses.replace(
    whole, max_len=learner.setup.model.cfg.max_len
  )
  assert task.tokenizer.vocab <= whole.vocab
  del task
  jax.block_until_ready(learner.setup.model.params)


def test_an_empty_tokenizer_is_that_of_the_base():
  with pytest.raises(config.ConfigError, match='task.tokenizer is empty'):
    tokenizers.load('')
