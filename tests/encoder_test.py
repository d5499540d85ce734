"""The frozen judge of r_sem."""

import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data.datasets import catalog
from sleep_jax.data.datasets import download
from sleep_jax.data.datasets import gutenberg
from sleep_jax.inference import encoder as encoder_lib
from sleep_jax.inference import sampling
from sleep_jax.learners import checks
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


def passages(name: str, size: int, number: int) -> list[list[str]]:
  """Passages of `size` words, drawn from a novel."""
  try:
    words = catalog.read(gutenberg.BOOKS[name].path).decode().split()
  except download.DataError as e:
    pytest.skip(str(e))
  starts = np.random.default_rng(0).integers(0, len(words) - size, number)
  return [words[start : start + size] for start in starts]


@pytest.mark.parametrize('novel', ['Emma_158', 'Middlemarch_145'])
def test_the_threshold_tells_content_from_wording(encoder, novel):
  """Function words removed should pass, another content word should not."""
  drawn = [p for p in passages(novel, 12, 600) if any(len(w) > 5 for w in p)]
  rng = np.random.default_rng(1)
  content = [w for p in drawn for w in p if len(w) > 5]
  changed = []
  for words in map(list, drawn):
    place = rng.choice([i for i, w in enumerate(words) if len(w) > 5])
    words[place] = content[rng.integers(len(content))]
    changed.append(' '.join(words))
  whole = [' '.join(words) for words in drawn]
  reworded = [' '.join(w for w in words if len(w) > 3) for words in drawn]
  share = lambda others: np.mean(
    encoder.similarity(whole, others) >= ENCODER.semantic_threshold
  )
  assert share(reworded) > 0.7
  assert share(changed) < 0.35
  assert share(whole[1:] + whole[:1]) == 0.0
  # No truncation: the last word of a long text counts.
  long = ' '.join(whole)
  assert encoder.similarity([long], [f'{long} zebra'])[0] < 1.0


def test_the_judge_is_fetched_before_the_first_day(monkeypatch):
  def absent():
    raise download.DataError('pip cannot download wordllama')

  monkeypatch.setattr(encoder_lib, 'load', absent)
  for alpha, lam, needed in ((0.9, 0.0, True), (1.0, 0.0, False)):
    cfg = conftest.replace(ENCODER, alpha=alpha, lam=lam)
    if needed:
      with pytest.raises(config.ConfigError, match='cannot download wordllama'):
        checks.check_judge(cfg)
    else:
      checks.check_judge(cfg)  # There are no rollouts to judge.


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
