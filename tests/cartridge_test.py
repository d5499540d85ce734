"""cartridge: a trained prefix, and the self-study that trains it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.inference import sampling
from sleep_jax.learners import cartridge
from sleep_jax.lifecycle import self_study
from sleep_jax.metrics import costs as costs_lib
from tests import conftest
from tests import learners_test

TASK = learners_test.TASK
SMALL = dict(tokens=4, batch=4, conversations=8, message=6, top_k=8, passes=2)


def build(setup=None, **own):
  sections = {'learner_config': SMALL | own}
  learner = learners_test.learners.build(
    'cartridge', sections, setup or learners_test.setup()
  )
  assert isinstance(learner, cartridge.Cartridge)
  return learner, learner.init(jax.random.PRNGKey(0))


def answers_of(learner, life):
  prompts = [[1, 5, 9, 7], [1, 4]]
  return learner.respond(life, prompts, [[3, 2], [6, 2]]).answer_logprob


def test_before_anything_is_read_it_is_the_base():
  learner, life = build()
  frozen = learners_test.build('frozen', learners_test.setup())
  want = answers_of(frozen, frozen.init(jax.random.PRNGKey(0)))
  np.testing.assert_array_equal(answers_of(learner, life), want)


def test_a_prefix_learns_what_is_read_and_nothing_else_changes():
  setup = learners_test.setup()
  base = jax.tree.map(np.array, setup.model.params)
  learner, life = build(setup, passes=6)
  day = TASK.experience(0)
  life, metrics = learner.wake(life, day)
  assert metrics['loss_last'] < metrics['loss']
  first = jax.tree.map(np.array, life.learner_state['layers'])
  life, _ = learner.sleep(life)
  life, again = learner.wake(life, day)
  assert again['loss'] < metrics['loss']
  for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(life.model.params)):
    np.testing.assert_array_equal(a, b)
  for (k, v), (old_k, old_v) in zip(life.learner_state['layers'], first):
    np.testing.assert_array_equal(k[..., 0], old_k[..., 0])
    np.testing.assert_array_equal(v[..., 0, :], old_v[..., 0, :])
    assert (k[..., 1:] != old_k[..., 1:]).any()
  tokens = learner.complete(life, [[1, 5], [1]], 3)
  assert [len(x) for x in tokens] == [3, 3]


def test_an_untrained_prefix_is_its_text_before_the_prompt():
  """Keys and values of a text say what the text says."""
  setup = learners_test.setup()
  learner, life = build(setup)
  text = [5, 9, 4]
  layers = learner._initial(life.model, text, jax.random.key(0))
  state = life.learner_state | {'layers': layers, 'read': jnp.ones((), int)}
  life = life.replace(learner_state=state)
  behind = learner.respond(life, [[7, 8]], [[3, 2]]).answer_logprob
  frozen = learners_test.build('frozen', setup)
  whole = frozen.respond(
    frozen.init(jax.random.PRNGKey(0)),
    [[setup.tokenizer.bos, *text, 7, 8]],
    [[3, 2]],
  ).answer_logprob
  np.testing.assert_allclose(behind, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('initial', ['text', 'random_tokens', 'normal'])
def test_a_prefix_may_begin_as_a_control(initial):
  learner, life = build(initial=initial)
  layers = learner._initial(life.model, [5, 9, 4, 4, 3], jax.random.key(0))
  same = learner._initial(life.model, [5, 9, 4, 4, 3], jax.random.key(0))
  other = learner._initial(life.model, [8, 8, 8, 8, 8], jax.random.key(0))
  for a, b, c in zip(*map(jax.tree.leaves, (layers, same, other))):
    assert a.shape == (1, 2, 4, 4) and np.isfinite(a).all()
    np.testing.assert_array_equal(a, b)
    assert (a != c).any() == (initial == 'text')


def study(model, length=6):
  costs = costs_lib.CostTracker(model.cfg, 16)
  tokenizer = learners_test.TASK.tokenizer
  return self_study.SelfStudy(model, tokenizer, costs, length, 1.0)


def test_labels_are_what_the_model_predicts_with_the_text():
  """By hand, a token at a time, and at no other place."""
  model = learners_test.setup().model
  talks = [
    self_study.Conversation([1, 7, 7, 5, 6], [1, 5, 6], 2, [4, 9, 3]),
    self_study.Conversation([1, 8, 5], [1], 0, [6]),
  ]
  rows = study(model).label(talks, top_k=5, rows=4)
  assert rows.tokens[0, :6].tolist() == [1, 5, 6, 4, 9, 3]
  assert np.flatnonzero(rows.weight[0]).tolist() == [0, 1, 2, 3, 4]
  assert np.flatnonzero(rows.weight[1]).tolist() == [0]
  for i, talk in enumerate(talks):
    whole = jnp.array([talk.teacher + talk.answer])
    logits = model.forward(whole).logits[0]
    for t in np.flatnonzero(rows.weight[i]):
      place = t + len(talk.teacher) - len(talk.student)
      assert rows.ids is not None and rows.logprobs is not None
      logp, ids = jax.lax.top_k(jax.nn.log_softmax(logits[place]), 5)
      np.testing.assert_allclose(rows.logprobs[i, t], logp, atol=1e-4)
      assert rows.ids[i, t].tolist() == ids.tolist()


def test_self_study_brings_the_model_nearer_to_what_it_says_with_the_text():
  setup = learners_test.setup()
  learner, life = build(setup)
  prompt = [1, 5, 9, 4, 4, 3, 8]
  talks = study(life.model).about_prompts([prompt] * 8, jax.random.key(2))
  assert len(talks) == 8 and all(t.student == [1] for t in talks)
  rows = study(life.model).label(talks, top_k=8, rows=4)
  layers = learner._initial(life.model, prompt[1:], jax.random.key(0))
  state = layers, learner.optimizer.init(layers)
  _, loss = learner._train(life.model, state, rows, jax.random.key(1), 30)
  # Not below the teacher's own entropy over what is kept.
  assert rows.logprobs is not None
  entropy = -(np.exp(rows.logprobs) * rows.logprobs).sum(-1)
  least = (entropy * rows.weight).sum() / rows.weight.sum()
  assert (
    least - 1e-3 < loss[-2:].mean() < least + 0.5 * (loss[:2].mean() - least)
  )


class _Chat:
  """Words, with a chat template of two marks."""

  vocab, pad, bos, separator, stop = 30, 0, 1, -1, 2

  def encode(self, text: str) -> list[int]:
    return [3 + ord(c) % 20 for c in text]

  def decode(self, tokens: list[int]) -> str:
    return ''.join(chr(97 + i) for i in tokens)


def test_messages_about_pieces_are_answered_with_the_piece(monkeypatch):
  asked = []

  class Format:
    def prompt(self, text):
      asked.append(text)
      return [1, *_Chat().encode(text), 29]

  def complete(model, prompts, rng, sampler):
    return [[5, 6, 2]] * len(prompts)

  monkeypatch.setattr(self_study.tokenizers, 'chat_of', lambda _: Format())
  monkeypatch.setattr(sampling, 'complete', complete)
  model = learners_test.setup().model
  talker = self_study.SelfStudy(
    model, _Chat(), costs_lib.CostTracker(model.cfg, 16), 6, 1.0
  )
  pieces = [[7, 8, 9]] * 6
  talks = talker.about_pieces(pieces, jax.random.key(0))
  kinds = [text.split('\n\n')[1] for text in asked[:6]]
  assert kinds == [*self_study.SEEDS, self_study.SEEDS[0]]
  for talk in talks:
    assert talk.answer == [5, 6, 2] and talk.shared == len(talk.student) - 1
    assert talk.teacher[-talk.shared :] == talk.student[1:]
    assert len(talk.teacher) > len(talk.student)


def test_a_study_has_a_prefix_of_its_own(monkeypatch):
  setup = learners_test.setup(format=learners_test.FactFormat())
  learner, life = build(setup, joint_passes=5)
  steps, train = [], learner._train
  monkeypatch.setattr(
    learner,
    '_train',
    lambda *args: steps.append(args[-1]) or train(*args),
  )
  requests = [
    dataclasses.replace(
      request,
      contexts=tuple(
        dataclasses.replace(c, prompt=[1, *c.source[0, :9].tolist()])
        for c in request.contexts
      ),
    )
    for request in learners_test.study_requests()
  ]
  first, second = (learner.study(life, requests) for _ in range(2))
  assert first == second
  # One context asked twice, and two together.
  assert steps[: len(steps) // 2] == [2, 2, 5]
  assert [len(x) for x in first] == [r.attempts for r in requests]
  assert int(life.learner_state['read']) == 0
  pieces = learner._pieces(list(range(40)), 50, np.random.default_rng(0))
  assert {len(p) for p in pieces} <= set(range(5, 41))
  assert all(p == list(range(p[0], p[0] + len(p))) for p in pieces)


@pytest.mark.parametrize(
  'own,message',
  [
    (dict(tokens=32), 'learner_config.tokens=32 leaves no room'),
    (dict(top_k=999), 'learner_config.top_k=999 exceeds model.vocab'),
    (dict(initial='zeros'), 'learner_config.initial'),
    (dict(seeds='none'), 'learner_config.seeds'),
  ],
)
def test_settings_are_checked(own, message):
  with pytest.raises(config.ConfigError, match=message):
    learner, _ = build(**own)
    learner.check()


def test_hybrids_are_refused():
  cfg = conftest.tiny(vocab=168, mixers=('attention', 'gdn'))
  setup = learners_test.setup(model=conftest.build_model(cfg))
  with pytest.raises(config.ConfigError, match='attention alone'):
    build(setup)[0].check()
