"""Tasks that ask an instruct model by its chat template."""

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data.tokenizers import chat
from sleep_jax.learners import base as learner_lib
from sleep_jax.learners import in_context
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from tests import backbone_lives_test
from tests import conftest
from tests import tasks_test
from tests import tiny_backbones


@pytest.fixture(name='bases', scope='module')
def _bases(tmp_path_factory):
  folder = tmp_path_factory.mktemp('chat')
  return {
    family: tiny_backbones.write(folder / family, family)
    for family in tiny_backbones.FAMILIES
  }


@pytest.mark.parametrize('family', tiny_backbones.FAMILIES)
def test_a_prompt_is_one_turn_after_one_bos(family, bases):
  tokenizer = tokenizers.load(bases[family])
  ids = chat.prompt(tokenizer, 'Please book a flight.')
  assert ids[0] == tokenizer.bos
  text = tokenizer._model.decode(ids, skip_special_tokens=False)
  assert 'user' in text and 'Please book a flight.' in text
  assert text.rstrip().endswith(('assistant', '<|end_header_id|>'))
  if family == 'llama3_2':  # The template has BOS: there are no two.
    assert ids.count(tokenizer.bos) == 1
  # A special token is one id.
  assert tokenizer.stop in ids and len(ids) < len(text)


def test_a_tokenizer_without_a_template_is_refused():
  plain = tokenizers.load('sleep_jax/assets/text.model')
  with pytest.raises(config.ConfigError, match='task.chat=True needs the'):
    chat.prompt(plain, 'Hello.')


@tasks_test.needs_data
@pytest.mark.parametrize('length', [256, 160])
def test_classes_are_asked_in_chat_and_no_frame_is_cut(
  bases, length, monkeypatch
):
  backbone_lives_test.shorten(monkeypatch)
  settings = dict(tokenizer=bases['qwen2_5'], chat=True, dataset='banking')
  task = tasks.build('class_incremental', settings | dict(length=length), 0)
  prompt, answer = task.encode('hello ' * 200, 'card_arrival')
  assert len(prompt) + len(answer) <= length
  whole = task.tokenizer._model.decode(prompt, skip_special_tokens=False)
  assert whole.endswith('<|im_start|>assistant\n') and 'hello hello' in whole
  assert answer[-1] == task.tokenizer.stop
  assert task.tokenizer.decode(answer) == 'card arrival'
  rows = task.experience(0)
  assert (rows.tokens[:, 0] == task.tokenizer.bos).all()


@tasks_test.needs_data
def test_passages_are_asked_in_chat_and_trained_on_as_text(bases):
  settings = dict(
    tokenizer=bases['llama3_2'], episodes=1, train=1, test=1, joint=1
  )
  plain, chats = (
    tasks.build('knowledge_incorporation', settings | dict(chat=x), seed=0)
    for x in (False, True)
  )
  a, b = (t.experience(0) for t in (plain, chats))
  assert np.array_equal(a.tokens, b.tokens)
  tokenizer, context = chats.tokenizer, b.contexts[0]
  head = chat.prompt(tokenizer, '')[-4:]  # Of the assistant's turn.
  assert all(q[-4:] == head for q in (context.prompt, *context.questions))
  book = chats.format.open_book(context, context.questions[1])
  assert book[-4:] == head and book.count(tokenizer.bos) == 1
  text = tokenizer.decode(book)
  assert context.source.text[:40] in text
  assert context.source.questions[1][0] in text


@pytest.mark.parametrize('family', ['llama3_2', 'smollm2'])
def test_what_stands_before_a_question_can_be_read(family, bases):
  """SmolLM2's BOS begins every turn, so none is left out of a context."""
  tokenizer = tokenizers.load(bases[family])
  cfg = conftest.tiny(vocab=512, max_len=512)
  model = model_lib.Model(cfg, conftest.weights(cfg), None)
  costs = costs_lib.CostTracker(cfg, 16)
  learner = in_context.InContext(
    in_context.InContextConfig(max_context=40),
    learner_lib.Setup(model, tokenizer, costs),
  )
  turns = [
    [*chat.prompt(tokenizer, text), *tokenizer.encode('yes'), tokenizer.stop]
    for text in ('a fox', 'the dog')
  ]
  tokens = np.zeros((2, max(map(len, turns)) + 3), np.int32)
  weight = np.zeros(tokens.shape, np.float32)
  for row, row_weight, turn in zip(tokens, weight, turns):
    row[: len(turn)] = turn
    row_weight[len(turn) - 2 : len(turn)] = 1.0
  life, _ = learner.wake(
    learner.init(conftest.jax.random.PRNGKey(0)),
    experience_lib.Experience(tokens, weight),
  )
  context = life.learner_state['context'].tolist()
  bos = [] if family == 'smollm2' else [tokenizer.bos]
  whole = [i for turn in turns for i in turn if i not in bos]
  assert context == whole[-40:]
