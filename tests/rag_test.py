"""rag: BM25 over what was read."""

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.learners import rag
from sleep_jax.tasks import long_text
from tests import baselines_test
from tests import learners_test

pytest.importorskip('rank_bm25')

TASK = baselines_test.TASK


class Words:
  """A tokenizer whose text is readable: token 10 + i is word i."""

  vocab, pad, bos, separator, stop, prepends_bos = 100, 0, 1, 2, 2, True
  words = 'the cat dog sat ran on mat road . where is king'.split()

  def encode(self, text: str) -> list[int]:
    return [10 + self.words.index(w) for w in text.replace('.', ' .').split()]

  def decode(self, tokens: list[int]) -> str:
    known = (self.words[t - 10] for t in tokens if t >= 10)
    return ' '.join(known).replace(' .', '.')


TOKENIZER = Words()
DOCUMENTS = 'the cat sat on the mat.', 'the dog ran on the road.', 'the king.'


def build(documents=DOCUMENTS, **settings):
  setup = learners_test.setup(tokenizer=TOKENIZER)
  learner, life = baselines_test.build('rag', setup, **settings)
  assert isinstance(learner, rag.Rag)
  rows = [[1, *TOKENIZER.encode(text)] for text in documents]
  return setup, learner, baselines_test.read(life, learner, rows)


def prompt(text: str) -> list[int]:
  return [1, *TOKENIZER.encode(text)]


@pytest.mark.parametrize(
  'settings, before',
  [
    (dict(top=1), [DOCUMENTS[1]]),
    (dict(top=2), [DOCUMENTS[1], DOCUMENTS[0]]),
    (dict(top=2, order='stream'), [DOCUMENTS[0], DOCUMENTS[1]]),
    (dict(top=9, order='stream'), list(DOCUMENTS)),
  ],
)
def test_the_likest_documents_stand_before_the_question(settings, before):
  setup, learner, life = build(**settings)
  question, answer = prompt('where is dog on'), TOKENIZER.encode('road')
  whole = prompt(' '.join([*before, 'where is dog on']))
  frozen, base = baselines_test.build('frozen', setup)
  want = frozen.respond(base, [whole], [answer])
  got = learner.respond(life, [question], [answer])
  np.testing.assert_allclose(got.answer_logprob, want.answer_logprob, rtol=1e-5)
  assert learner.complete(life, [question], 3) == frozen.complete(
    base, [whole], 3
  )


def test_all_that_was_read_is_kept_once():
  _, learner, life = build()
  rows = [prompt(DOCUMENTS[0])]
  life = baselines_test.read(life, learner, rows)
  kept = [learner.setup.tokenizer.decode(p) for p in learner.pieces_of(life)]
  assert kept == [DOCUMENTS[1], DOCUMENTS[2], DOCUMENTS[0]]


def test_pieces_may_be_sentences_that_go_over_rows():
  texts = 'the cat sat on the mat. the dog', 'ran on the road. the king.'
  _, learner, life = build(texts, pieces='sentence')
  kept = [learner.setup.tokenizer.decode(p) for p in learner.pieces_of(life)]
  assert kept == list(DOCUMENTS)


def test_a_study_retrieves_from_its_own_contexts(monkeypatch):
  cfg = long_text.LongTextConfig(context=32, length=8)
  form = long_text.LongTextFormat(cfg, TOKENIZER, 4, lambda *_: True)
  setup = learners_test.setup(tokenizer=TOKENIZER, format=form)
  learner, life = baselines_test.build('rag', setup, top=1, pieces='sentence')
  sample = long_text.Sample(
    ' '.join(DOCUMENTS), '{text} ', 'where is king', '', 'road'
  )
  asked = []
  monkeypatch.setattr(
    'sleep_jax.lifecycle.dreaming.study.answer',
    lambda model, form, prompts, **_: asked.extend(prompts) or prompts,
  )
  learner.study(life, [contexts.StudyRequest((form.context('', sample),))])
  assert asked == [prompt(f'{DOCUMENTS[2]} where is king')]


def test_nothing_asked_is_nothing_answered():
  _, learner, life = build()
  assert learner.complete(life, [], 4) == []
  assert len(learner.respond(life, [], []).exact) == 0


def test_too_many_pieces_are_refused():
  long = 'the cat sat on the mat . the dog ran on the road .'
  _, learner, life = build([f'{long} {long} king'], top=3)
  with pytest.raises(config.ConfigError, match='lower learner_config.top'):
    learner.respond(life, [prompt('where is king')], [[12]])


@pytest.mark.parametrize(
  'settings, words',
  [(dict(pieces='word'), 'pieces'), (dict(order='best'), 'order')],
)
def test_an_unknown_choice_is_refused(settings, words):
  with pytest.raises(config.ConfigError, match=f'learner_config.{words}'):
    build(**settings)


def test_pieces_may_be_ranked_by_word_vectors(monkeypatch):
  """By the cosine alone: no word of the question need be in a piece."""

  class Vectors:
    def __call__(self, texts):
      like_dog = [float('dog' in t or 'king' in t) for t in texts]
      return np.array([[x, 1 - x] for x in like_dog])

  monkeypatch.setattr(rag.encoder_lib, 'load', Vectors)
  _, learner, life = build(top=1, retriever='encoder')
  pieces = learner.pieces_of(life)
  (found,) = learner._retrieve(pieces, [prompt('where is king')], 1)
  assert TOKENIZER.decode(found) == f'{DOCUMENTS[1]} where is king'
  with pytest.raises(config.ConfigError, match='learner_config.retriever'):
    build(retriever='faiss')
