"""What leaves as a Hugging Face folder computes what the model computed."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data.tokenizers import huggingface as hf_tokenizer
from sleep_jax.inference import sampling
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.weights import add_levels
from sleep_jax.weights import architectures
from sleep_jax.weights import export
from sleep_jax.weights import huggingface
from tests import checkpoints
from tests import exported_folders

pytest.importorskip('safetensors')
tokenizers = pytest.importorskip('tokenizers')

PLACES = {
  'partition': dict(partition=(2, 1)),
  'stack': {},
}
FAMILIES = ('llama3_2', 'qwen2_5', 'qwen3')
CASES = [(family, place) for family in FAMILIES for place in PLACES]


def base_folder(path: pathlib.Path, family: str) -> tuple[dict, dict]:
  """A base with a tokenizer of 257 bytes and an end: config and tensors."""
  c = checkpoints.settings(family, False, vocab_size=258, eos_token_id=257)
  checkpoints.write(path, c, w := checkpoints.tensors(c))
  characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {char: i for i, char in enumerate(characters)} | {'he': 256}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab=vocab, merges=[('h', 'e')])
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(['<end>'])
  tokenizer.save(str(path / 'tokenizer.json'))
  (path / 'tokenizer_config.json').write_text('{"eos_token": "<end>"}')
  (path / 'LICENSE').write_text('free')
  return c, w


def slept_model(folder: pathlib.Path, family: str, place: str):
  """A model with fast changes, and with experts locked and in use."""
  base_folder(folder, family)
  plain = architectures.model_config(
    huggingface.read_json(folder / 'config.json')
  )
  hidden = plain.levels[0].hidden
  levels = (
    config.LevelConfig(
      hidden, chunk=4, sleep_every=2, slots=2, rank=3, top_k=1
    ),
    config.LevelConfig(hidden, chunk=8, slots=5, rank=4, top_k=2),
  )
  cfg = dataclasses.replace(plain, levels=levels, **PLACES[place])
  params = add_levels.add_levels(
    plain, huggingface.load(folder, plain), cfg, jax.random.key(0)
  )
  params = jax.tree.map(jnp.asarray, params)
  return model_lib.Model(cfg, params, slept_memory(cfg))


def slept_memory(cfg: config.ModelConfig) -> memory_lib.Memory:
  """Fast changes and experts of a size that clearly moves the logits."""
  keys = iter(jax.random.split(jax.random.key(7), 200))

  def noise(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return 0.1 * jax.random.normal(next(keys), x.shape)

  memory = jax.tree.map(noise, memory_lib.init_memory(cfg))
  for i, status in enumerate(([2, 0], [2, 0, 2, 1, 2])):
    bank = memory.bank(i)
    experts = jax.tree.map(lambda x: 3 * x, bank.experts)
    experts = experts.replace(router=6 * experts.router)
    memory = memory.with_level(
      i, bank=bank.replace(experts=experts, status=jnp.array(status))
    )
  return memory


def ask(folder: pathlib.Path, model: model_lib.Model) -> None:
  """Writes the request that `exported_folders` answers."""
  rng = np.random.default_rng(3)
  np.savez(
    folder / 'request.npz',
    tokens=rng.integers(0, model.cfg.vocab, (2, 40)),
    prompt=rng.integers(0, model.cfg.vocab, 7),
  )


@pytest.fixture(name='exports', scope='module')
def _exports(tmp_path_factory):
  """Per case: the folder, our model and transformers' answers, if it is there.

  All folders are loaded by one process, since its imports take ten seconds.
  """
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  root = tmp_path_factory.mktemp('exports')
  models = {}
  for family, place in CASES:
    folder = root / f'{family}_{place}'
    model = slept_model(folder / 'source', family, place)
    export.custom(model, folder / 'hf', folder / 'source')
    ask(folder, model)
    models[family, place] = folder, model
  request = root / 'request.json'
  request.write_text(json.dumps([str(f) for f, _ in models.values()]))
  subprocess.run(
    [sys.executable, '-m', 'tests.exported_folders', str(request)],
    check=True,
    env=os.environ | {'HF_MODULES_CACHE': str(root / 'code')},
    timeout=300,
  )
  return {
    case: (folder, model, np.load(folder / 'answer.npz'))
    for case, (folder, model) in models.items()
  }


@pytest.mark.parametrize('case', CASES, ids='-'.join)
def test_custom_code_gives_our_logits(exports, case):
  folder, model, theirs = exports[case]
  tokens = np.load(folder / 'request.npz')['tokens']
  ours = model.forward(tokens).logits
  base = transformer.forward(model.cfg, model.params, tokens).logits
  np.testing.assert_allclose(theirs['logits'], ours, rtol=0, atol=1e-4)
  assert np.abs(theirs['logits'] - base).max() > 1e-2
  assert str(theirs['kind']).startswith('Sleep')


@pytest.mark.parametrize('case', CASES, ids='-'.join)
def test_custom_code_generates_with_its_cache_what_we_sample(exports, case):
  folder, model, theirs = exports[case]
  prompt = np.load(folder / 'request.npz')['prompt'].tolist()
  sampler = sampling.SamplerConfig(exported_folders.MAX_NEW, temperature=0.0)
  (ours,) = sampling.complete(model, [prompt], jax.random.key(0), sampler)
  assert theirs['said'].tolist() == ours
  assert len(set(ours)) > 2


@pytest.mark.parametrize('case', CASES, ids='-'.join)
def test_the_tokenizer_and_the_end_of_a_text_travel(exports, case):
  folder, _, theirs = exports[case]
  ours = hf_tokenizer.HuggingFaceTokenizer(folder / 'source')
  assert theirs['text'].tolist() == ours.encode(exported_folders.TEXT)
  assert theirs['text'][0] == 256  # The merge of the tokenizer, not bytes.
  assert theirs['eos'] == ours.stop == 257
