"""klda: classes by their means, over an encoder that never changes."""

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.inference import encoder
from tests import baselines_test
from tests import learners_test

MARK, STOP = 3, 2
FRAME = ((1,), (MARK,))


class Tokenizer:
  """Token i is the word wi."""

  vocab, pad, bos, separator, stop, prepends_bos = 100, 0, 1, 2, STOP, True

  def encode(self, text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]

  def decode(self, tokens: list[int]) -> str:
    return ' '.join(f'w{i}' for i in tokens)


@pytest.fixture(autouse=True)
def _encoder(monkeypatch):
  """A direction of its own for each word; a text is their mean."""
  words = np.random.default_rng(0).normal(size=(100, 16))

  def embed(texts):
    means = [words[[int(w[1:]) for w in t.split()]].mean(0) for t in texts]
    return np.stack([m / np.linalg.norm(m) for m in means])

  monkeypatch.setattr(encoder, 'load', lambda: embed)


def build(**settings):
  setup = learners_test.setup(tokenizer=Tokenizer())
  return baselines_test.build(
    'klda', setup, **dict(features=64, gamma=0.5) | settings
  )


def day(*examples, frame=FRAME):
  """Texts and their classes, as rows of one frame."""
  before, between = frame
  rows = [[*before, *text, *between, *answer] for text, answer in examples]
  length = max(map(len, rows)) + 1
  tokens = np.array([r + [0] * (length - len(r)) for r in rows], np.int32)
  weight = (np.arange(length) < [[len(r)] for r in rows]).astype(np.float32)
  return experience_lib.Experience(tokens, weight, frames=(frame,))


def examples(topic: int, answer: list[int], seed=0, n=8):
  """Texts of a topic's three words and some of no topic's."""
  rng = np.random.default_rng([seed, topic])
  return [
    (rng.permutation([topic, topic + 1, *rng.integers(80, 99, 2)]).tolist(),
     answer)
    for _ in range(n)
  ]  # fmt: skip


A, B, C = (10, [50, STOP]), (20, [50, 51, STOP]), (30, [52, STOP])


def asked(learner, life, *topics):
  pairs = [pair for t in topics for pair in examples(*t, seed=9)]
  prompts = [[1, *text, MARK] for text, _ in pairs]
  answers = [answer for _, answer in pairs]
  return prompts, answers, learner.respond(life, prompts, answers)


def test_classes_of_every_day_are_told_apart():
  learner, life = build()
  for topics in ([A, B], [C]):
    stream = day(*(pair for t in topics for pair in examples(*t)))
    life, _ = learner.wake(life, stream)
    life, _ = learner.sleep(life)
  prompts, answers, response = asked(learner, life, A, B, C)
  assert response.exact.mean() > 0.9
  assert np.exp(response.answer_logprob).mean() > 0.7
  written = learner.complete(life, prompts, 9)
  np.testing.assert_array_equal(
    [w == a for w, a in zip(written, answers)], response.exact
  )


def test_the_order_of_examples_does_not_matter():
  pairs = examples(*A) + examples(*B)
  learner, life = build()
  at_once, _ = learner.wake(life, day(*pairs))
  for pair in pairs[::-1]:
    life, _ = learner.wake(life, day(pair))
  *_, ours = asked(learner, at_once, A, B)
  *_, theirs = asked(learner, life, A, B)
  np.testing.assert_allclose(
    ours.answer_logprob, theirs.answer_logprob, atol=1e-2
  )
  np.testing.assert_array_equal(ours.exact, theirs.exact)


def test_what_was_not_read_is_not_answered():
  learner, life = build()
  prompts, answers, response = asked(learner, life, A)
  assert not response.exact.any()
  assert learner.complete(life, prompts, 4) == [[]] * len(prompts)
  life, _ = learner.wake(life, day(*examples(*A)))
  *_, response = asked(learner, life, C)
  assert not response.exact.any()
  np.testing.assert_allclose(np.exp(response.answer_logprob), 1e-9, rtol=1e-3)


def test_what_stands_around_a_text_is_no_part_of_it(monkeypatch):
  """A chat's template, say; the encoder gets the text alone, read or asked."""
  embed, texts = encoder.load(), []
  monkeypatch.setattr(
    encoder, 'load', lambda: lambda new: texts.extend(new) or embed(new)
  )
  frame = ((1, 60, 61), (62, MARK))
  learner, life = build()
  texts.clear()
  life, _ = learner.wake(life, day(([10, 11], [50, STOP]), frame=frame))
  learner.complete(life, [[1, 60, 61, 20, 21, 62, MARK]], 4)
  assert texts == ['w10 w11', 'w20 w21']


def test_no_example_is_kept():
  """What a life carries does not grow with the examples of known classes."""
  learner, life = build()
  sizes = []
  for seed in range(3):
    stream = day(*examples(*A, seed=seed), *examples(*B, seed=seed))
    life, _ = learner.wake(life, stream)
    sizes.append({k: v.shape for k, v in life.learner_state.items()})
  assert sizes[0] == sizes[1] == sizes[2]
  assert life.learner_state['count'].tolist() == [24.0, 24.0]


def test_a_stream_without_one_frame_is_refused():
  learner, life = build()
  stream = day(*examples(*A))
  bare = experience_lib.Experience(stream.tokens, stream.weight)
  with pytest.raises(config.ConfigError, match='class_incremental'):
    learner.wake(life, bare)
