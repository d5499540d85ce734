"""Parity with Hugging Face transformers, on tiny random models.

Runs where the `bench` extra is installed; the NumPy oracle of interop_test.py
stands in for it elsewhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.data import padding
from sleep_jax.inference import sampling
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.weights import convert
from sleep_jax.weights import folder as folder_lib
from tests import checkpoints  # noqa: E402  (needs safetensors)

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('safetensors')

MODELS = [
  (family, tied) for family in checkpoints.FAMILIES for tied in (True, False)
]


@pytest.fixture(name='pair', params=MODELS, ids=str)
def _pair(request, tmp_path):
  """A model of theirs, random, saved by them and converted by us."""
  c = checkpoints.settings(*request.param)
  made = transformers.AutoConfig.for_model(**c)
  torch.manual_seed(0)
  theirs = transformers.AutoModelForCausalLM.from_config(made).eval()
  with torch.no_grad():
    # Also norms and biases, born as constants. Blocks get more, or the model
    # would say one token over and over, and greedy decoding would prove little.
    for name, p in theirs.named_parameters():
      p.add_((0.4 if 'layers' in name else 0.2) * torch.randn_like(p))
  theirs.save_pretrained(tmp_path / 'theirs')
  convert.convert(tmp_path / 'theirs', tmp_path / 'ours')
  ours = folder_lib.load(tmp_path / 'ours')
  return theirs, ours.cfg, jax.tree.map(jnp.asarray, ours.params), tmp_path


def test_logits_agree(pair):
  theirs, cfg, params, _ = pair
  tokens = np.random.default_rng(1).integers(0, cfg.vocab, (2, 60))
  with torch.no_grad():
    want = theirs(torch.tensor(tokens)).logits.numpy()
  got = transformer.forward(cfg, params, jnp.asarray(tokens)).logits
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_greedy_output_is_token_identical(pair):
  theirs, cfg, params, _ = pair
  rng = np.random.default_rng(2)
  prompts = [rng.integers(2, cfg.vocab, n).tolist() for n in (3, 9, 6)]
  tokens, lengths = padding.left_pad(prompts, 0)
  got = sampling.generate(
    model_lib.Model(cfg, params),
    jnp.asarray(tokens),
    jnp.asarray(lengths),
    jax.random.key(0),
    sampling.SamplerConfig(max_new=24, temperature=0.0),
  )
  real = np.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
  want = theirs.generate(
    torch.tensor(tokens, dtype=torch.long),
    attention_mask=torch.tensor(real.astype(int)),
    max_new_tokens=24,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
  )
  assert min(len(set(row)) for row in want[:, -24:].tolist()) > 2
  np.testing.assert_array_equal(got.tokens, want[:, tokens.shape[1] :].numpy())


def test_an_exported_model_loads_in_transformers(pair):
  theirs, _, _, tmp_path = pair
  convert.convert(tmp_path / 'ours', tmp_path / 'exported')
  exported = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'exported'
  )
  assert exported.config.to_diff_dict() == theirs.config.to_diff_dict()
  for (name, a), (_, b) in zip(
    theirs.state_dict().items(), exported.state_dict().items(), strict=True
  ):
    assert torch.equal(a, b), name


def test_a_generated_config_loads_in_transformers(pair):
  theirs, cfg, params, tmp_path = pair
  folder_lib.save(tmp_path / 'unsourced', cfg, params)
  convert.convert(tmp_path / 'unsourced', tmp_path / 'exported')
  exported = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'exported'
  )
  tokens = torch.arange(30)[None]
  with torch.no_grad():
    assert torch.equal(exported(tokens).logits, theirs(tokens).logits)
