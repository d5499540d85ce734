"""Tasks that ask an instruct model by its chat template."""

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.data import tokenizers
from tests import backbone_lives_test
from tests import tasks_test
from tests import tiny_backbones


@pytest.fixture(name='bases', scope='module')
def _bases(tmp_path_factory):
  folder = tmp_path_factory.mktemp('chat')
  return {
    family: tiny_backbones.write(folder / family, family)
    for family in tiny_backbones.FAMILIES
  }


def test_a_tokenizer_without_a_template_is_refused():
  plain = 'sleep_jax/assets/text.model'
  for name in ('class_incremental', 'knowledge_incorporation'):
    with pytest.raises(config.ConfigError, match='has no chat template'):
      tasks.build(name, dict(tokenizer=plain, chat=True), 0)


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
  # A dream's frame is an example's without what it is about.
  stream = task.experience(0)
  ((before, between),) = stream.frames
  prompt, _ = task.encode('hello', 'card_arrival')
  assert tuple(prompt[: len(before)]) == before
  assert tuple(prompt[-len(between) :]) == between
  assert prompt[len(before) : -len(between) - 1] == (
    task.tokenizer.encode('hello')
  )


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
  # Of the assistant's turn.
  head = tokenizers.chat_of(tokenizer).prompt('')[-4:]
  assert all(q[-4:] == head for q in (context.prompt, *context.questions))
  book = chats.format.open_book(context, context.questions[1])
  assert book[-4:] == head and book.count(tokenizer.bos) == 1
  text = tokenizer.decode(book)
  assert context.source.text[:40] in text
  assert context.source.questions[1][0] in text
