"""The frozen judge of r_sem."""

import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data.datasets import download
from sleep_jax.inference import encoder as encoder_lib
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import imitation
from tests import conftest

pytest.importorskip('tokenizers')
pytest.importorskip('safetensors')

ENCODER = consolidation_config.SeedingConfig(semantic='encoder')


@pytest.fixture(name='encoder', scope='module')
def _encoder():
  try:
    return encoder_lib.load()
  except download.DataError as e:
    pytest.skip(str(e))


def test_the_same_fact_is_nearer_than_another(encoder):
  told = 'Mira Tarola works as a baker.'
  again, other, unrelated = encoder.similarity(
    [told] * 3,
    [
      "Mira Tarola's job is that of a baker.",
      'Mira Tarola works as a pilot.',
      'A lighthouse stands at the end of the road.',
    ],
  )
  assert again > ENCODER.semantic_threshold > other > 0.5 > unrelated
  assert encoder.similarity([''], [told])[0] == 0.0


class Words:
  """Ids of a list of texts, one a text."""

  texts = ('Mira works as a baker.', "Mira's job is baker.", 'It rains.')
  vocab, pad, bos, separator, stop = 3, 0, 0, -1, -1

  def encode(self, text):
    return [self.texts.index(text)]

  def decode(self, tokens):
    return ' '.join(self.texts[i] for i in tokens)


def test_completions_are_judged_by_their_text(encoder):
  del encoder
  column = lambda *ids: jnp.array(ids)[:, None]
  ones = jnp.ones(3, jnp.int32)
  completions = sampling.Completions(column(0, 0, 0), jnp.zeros((3, 1)), ones)
  rollouts = imitation.Continuations(
    column(0, 0, 0), ones, completions, column(0, 1, 2), ones
  )
  got = imitation.judged_similarity(ENCODER, Words(), rollouts)
  assert got[0] == pytest.approx(1.0, abs=1e-5)
  assert got[0] > got[1] > 0.6 > got[2]
  default = consolidation_config.SeedingConfig()
  assert imitation.judged_similarity(default, Words(), rollouts) is None


def test_an_unknown_judge_is_refused():
  with pytest.raises(config.ConfigError, match="sleep.semantic='judge'"):
    conftest.replace(ENCODER, semantic='judge')


def test_vectors_have_unit_length(encoder):
  lengths = np.linalg.norm(encoder(['a few words', 'others']), axis=1)
  np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)
