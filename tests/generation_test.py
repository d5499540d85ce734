"""Dreams that begin in different ways, and the task of invented facts."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import dream_frames
from experiments.configs import smollm2
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import packing
from sleep_jax.data import tokenizers
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live
from sleep_jax.inference import scoring
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from sleep_jax.tasks import invented_facts
from sleep_jax.weights import load as load_lib
from tests import students
from tests import tiny_checkpoint

pytest.importorskip('tokenizers')

SEEDING = consolidation_config.SeedingConfig(dream_length=48)


@pytest.fixture(name='folder', scope='module')
def _folder(tmp_path_factory):
  return tiny_checkpoint.write(tmp_path_factory.mktemp('base') / 'tiny')


@pytest.fixture(name='pair', scope='module')
def _pair(folder):
  cfg = load_lib.model_config(str(folder))
  params = jax.tree.map(jax.numpy.asarray, load_lib.load(str(folder), cfg))
  return model_lib.Model(cfg, params), tokenizers.load(folder)


def sample(pair, rows=12, day=(), **shares):
  cfg = dataclasses.replace(SEEDING, **shares)
  return generation.sample(cfg, *pair, rows, jax.random.key(1), day)


@pytest.mark.slow
def test_shares_of_the_ways_to_begin(pair):
  _, tok = pair
  chat = tokenizers.chat_of(tok).frame(tok.stop)
  day = ((7, 8, 9),)
  got = sample(pair, 12, (day,), chat_dreams=0.5, day_dreams=0.25)
  starts = [tuple(row[:n]) for row, n in zip(got.tokens, got.starts)]
  assert starts.count((tok.bos,)) == 3
  assert starts.count((7, 8, 9)) == 3
  assert starts.count(chat[0]) == 6
  # Of a life that has read nothing, the day's share goes to BOS.
  assert set(sample(pair, 4, day_dreams=1.0).starts) == {1}


@pytest.mark.slow
def test_both_turns_of_a_chat_are_made_up_within_their_frame(pair):
  model, tok = pair
  tok = copy.copy(tok)
  # A random model hardly ever ends a turn: let its favourite token do so.
  generated = sample(pair, 16, chat_dreams=1.0)
  columns = slice(generated.starts[0], generated.starts[0] + 10)
  counts = np.bincount(generated.tokens[:, columns].reshape(-1))
  tok.stop = int(counts.argmax())
  first, second = tokenizers.chat_of(tok).frame(tok.stop)
  got = sample((model, tok), 16, chat_dreams=1.0)
  for row, length in zip(got.tokens, got.lengths):
    row = row[:length].tolist()
    assert row[: len(first)] == list(first)
    end = len(first) + row[len(first) :].index(tok.stop) + 1
    assert row[end : end + len(second)] == list(second)
    assert len(row) > end + len(second)
  assert len({tuple(row) for row in got.tokens}) > 1


def test_questions_have_a_temperature_of_their_own(pair):
  """Those are turns before the last; all else has the other."""
  day = (((7,), (8, 9)),)
  cold = dict(day_dreams=1.0, temperature=1.0, question_temperature=1e-3)
  got = sample(pair, 16, day, **cold)
  gap = (SEEDING.dream_length - 2) // 2
  questions, answers = got.tokens[:, 1 : 1 + gap], got.tokens[:, 2 + gap :]
  assert len({row.tobytes() for row in questions}) == 1
  assert len({row.tobytes() for row in answers}) > 8
  alone = sample(pair, 16, (((7,),),), **cold)
  assert len({row.tobytes() for row in alone.tokens}) > 8


def test_a_mark_ends_the_gap_before_it(pair):
  """A part of one token is written by the model itself, once."""
  model, tok = pair
  free = sample(pair, 16, (((7,), (8, 9)),), day_dreams=1.0)
  mark = int(np.bincount(free.tokens[:, 1:12].reshape(-1)).argmax())
  got = sample(pair, 16, (((7,), (mark,)),), day_dreams=1.0)
  for row, length, start, last in zip(*got[:4], strict=True):
    assert (start, row[0], row[last - 1]) == (1, 7, mark)
    assert last >= 3 and mark not in row[1 : last - 1]
    assert last < length <= SEEDING.dream_length
  again = scoring.score(
    model,
    [row[:last].tolist() for row, last in zip(got.tokens, got.last_turns)],
    [
      row[last:end].tolist()
      for row, last, end in zip(got.tokens, got.last_turns, got.lengths)
    ],
    pad=tok.pad,
    costs=costs_lib.CostTracker(model.cfg, SEEDING.dream_length),
  )
  size = got.lengths - got.last_turns
  np.testing.assert_allclose(
    got.logprobs, again.answer_logprob / size, rtol=1e-3
  )


def drafts_of(rows):
  """Documents `(question, answer, log-probability)`; 2 ends one."""
  tokens = np.zeros((len(rows), 8), np.int32)
  for row, (question, answer, _) in zip(tokens, rows):
    row[: len(question + answer)] = question + answer
  return generation.Documents(
    tokens,
    np.array([len(q + a) for q, a, _ in rows]),
    np.ones(len(rows), int),
    np.array([len(q) for q, *_ in rows]),
    np.array([logprob for *_, logprob in rows]),
  )


def test_drafts_are_kept_whole_different_and_evenly_over_endings():
  drafts = drafts_of(
    [
      ([1, 10], [5, 2], -0.3),
      ([1, 11], [5, 2], -0.1),
      ([1, 11], [5, 2], -0.1),
      ([1, 12], [5, 2], -0.2),
      ([1, 13], [6, 2], -0.9),
      ([1, 14], [6, 6], -0.0),
      ([1, 15], [7, 2], -0.8),
    ]
  )
  kept = generation.keep(drafts, 4, 2, jax.random.key(0))
  got = {tuple(row[1:3].tolist()) for row in kept.tokens}
  assert got == {(11, 5), (12, 5), (13, 6), (15, 7)}
  # The surest first; with too few, some come twice, and none that was cut.
  three = generation.keep(drafts, 3, 2, jax.random.key(0))
  assert sorted(three.tokens[:, 1]) == [11, 13, 15]
  many = generation.keep(drafts, 12, 2, jax.random.key(0))
  counts = np.bincount(many.tokens[:, 1])
  assert counts[[10, 11, 12, 13, 15]].sum() == 12 and counts.max() == 3
  none_whole = generation.keep(drafts, 2, 99, jax.random.key(0))
  assert len(none_whole.tokens) == 2


def test_documents_of_one_seed_are_the_same_documents(pair):
  a, b = (sample(pair, 8, chat_dreams=0.5) for _ in range(2))
  np.testing.assert_array_equal(a.tokens, b.tokens)


def test_a_frame_that_leaves_no_room_is_refused(pair):
  with pytest.raises(config.ConfigError, match='dream_length=4 leaves no room'):
    sample(pair, 4, chat_dreams=1.0, dream_length=4)
  with pytest.raises(config.ConfigError, match='shares of one whole'):
    dataclasses.replace(SEEDING, chat_dreams=0.7, day_dreams=0.7)


def test_a_prompt_is_a_document_cut_at_the_answer(pair):
  _, tok = pair
  chat = tokenizers.chat_of(tok, system='')
  document = chat.document(
    [
      {'role': 'user', 'content': 'Who built it?'},
      {'role': 'assistant', 'content': 'Ada.'},
    ]
  )
  prompt = chat.prompt('Who built it?')
  assert document[: len(prompt)] == prompt
  assert prompt[: len(chat.before_user)] == chat.before_user
  assert tok.decode(document[len(prompt) :]).strip() == 'Ada.'


def test_packing_keeps_every_token_in_order():
  documents = [[1, 2, 3], [4, 5], list(range(10, 19)), [6]]
  tokens, weight = packing.pack(documents, 5, pad=0)
  assert tokens[weight > 0].tolist() == sum(documents, [])
  assert tokens[0].tolist() == [1, 2, 3, 4, 5]
  assert (tokens[weight == 0] == 0).all()


def facts_config(folder, **task):
  c = smollm2.get_config('short')
  c.base = str(folder)
  c.model.partition = (1, 2, 1)
  c.model.levels[0].chunk = 64
  c.task.update(length=64, tokenizer='', **task)
  return json.loads(c.to_json())


def facts(folder, seed=1, **task):
  c = facts_config(folder, **task)
  task, *_ = build_lib.build(build_lib.arm_config(c, 'sleep'), seed)
  return task


def test_questions_are_worded_like_nothing_that_was_told(folder):
  told, asked = set(), set()
  for fact in facts(folder, episodes=2, facts=16).facts[0]:
    told |= {text for pair in fact.told() for text in pair}
    asked |= set(fact.asked())
    assert all(fact.value in answer for _, answer in fact.told())
    assert all(fact.subject in question for question in fact.asked())
    assert not any(fact.value in question for question in fact.asked())
  assert not told & asked


def test_a_day_tells_every_wording_as_often_and_facts_apart(folder):
  task = facts(folder, facts=4, passes=2)
  day = task.experience(0)
  text = task.tokenizer.decode(day.tokens[day.weight > 0].tolist())
  for fact in task.facts[0]:
    for _, answer in fact.told():
      assert text.count(f'assistant\n{answer}\n') == 2, answer
  frame = tokenizers.chat_of(task.tokenizer, '').frame(task.tokenizer.stop)
  assert day.frames[0] == frame
  for begin, end in day.frames[1:]:  # With an opening of its questions.
    assert begin[: len(frame[0])] == frame[0] and end == frame[1]
    assert len(begin) == len(frame[0]) + 2


def test_an_opening_is_what_different_contents_share():
  frame = ((1, 2), (3,))
  contents = [[5, 6, 7], [5, 6, 8], [9, 9, 1], [9, 9, 1], [4, 4]]
  got = experience_lib.with_openings(frame, contents, 2)
  assert got == (frame, ((1, 2, 5, 6), (3,)))


def parrot(task, known):
  """A student that knows the answers of some subjects."""
  tok = task.tokenizer

  def complete(prompt):
    text = tok.decode(prompt)
    return tok.encode(' '.join(v for s, v in known.items() if s in text))

  return students.FakeStudent(complete=complete)


def test_marks_are_those_of_the_answers(folder):
  task = facts(folder, episodes=2, facts=4, held_out_rows=0, general=())
  first, second = task.facts
  known = {f.subject: f'It is {f.value}, yes.' for f in first}
  result = task.evaluate(parrot(task, known), 1)
  assert result.by_episode == [1.0, 0.0]
  assert result.metrics['accuracy'] == 0.5
  wrong = {f.subject: f'un{f.value}' for f in first + second}
  assert task.evaluate(parrot(task, wrong), 1).metrics['accuracy'] == 0.0


@pytest.mark.slow  # `cli_test` has a night of the same parts.
def test_a_short_life_runs(folder, tmp_path):
  c = facts_config(folder, episodes=2)
  c['task']['general'] = []
  summary = live.live(c, 'sleep', 1, tmp_path, 0)
  assert len(summary['curve']) == 2


def test_dreams_are_scored_by_what_the_day_told():
  day = 'Brindo Talvick works as a baker.'
  dreams = ['Who is he? brindo talvick WORKS here.', 'He works as of now.']
  got = dream_frames.score(dreams, np.array([True, False]), day)
  assert got['about the day'] == 0.5 and got['ended'] == 0.5


def test_general_questions_have_distinct_text_and_answers():
  questions = invented_facts.general_questions()
  assert len({q for q, _ in questions}) == len(questions) >= 100
  assert all(answers for _, answers in questions)
