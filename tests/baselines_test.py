"""The baselines that replay, or that keep what they read before a question."""

import jax
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.learners import distilled_replay
from sleep_jax.lifecycle import wake
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.runtime import checkpoint
from sleep_jax.training import loss as loss_lib
from tests import learners_test

TASK, SECTIONS = learners_test.TASK, learners_test.SECTIONS
ADAPTER = dict(target='lora', learning_rate=0.05, batch=4)
FAST = dict(learning_rate=0.03)


# What `distilled_replay` shares with the learner sleep.
ARCHIVED = dict(
  wake=SECTIONS['wake'] | dict(rehearsed=2),
  sleep=SECTIONS['sleep'] | dict(archive=8, teacher_top_k=8),
)


def build(name, setup=None, finetune=None, shared=None, **own):
  sections = SECTIONS | {'learner_config': own} | (shared or {})
  sections['finetune'] = SECTIONS['finetune'] | (finetune or {})
  learner = learners_test.learners.build(
    name, sections, setup or learners_test.setup()
  )
  return learner, learner.init(jax.random.PRNGKey(0))


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('finetune', [{}, ADAPTER], ids=['all', 'lora'])
def test_what_is_replayed_is_written_by_the_model_of_the_morning(
  monkeypatch, finetune
):
  setup = learners_test.setup()
  learner, life = build('replay', setup, finetune, min_p=0.1, temperature=0.7)
  life, _ = learner.sleep(learner.wake(life, TASK.experience(0))[0])
  morning = jax.tree.map(np.array, life.model.merged())
  calls, sample = [], generation.sample

  def spy(cfg, model, tokenizer, rows, rng, frames):
    out = sample(cfg, model, tokenizer, rows, rng, frames)
    calls.append((cfg, jax.tree.map(np.array, model), rows, out))
    return out

  monkeypatch.setattr(generation, 'sample', spy)
  before = setup.costs.totals()
  day = TASK.experience(1)
  blocks = list(learner._blocks(life, day))
  (cfg, model, rows, (tokens, lengths, *_)), *more = calls
  assert not more and rows == len(day.tokens)
  assert (cfg.min_p, cfg.temperature) == (0.1, 0.7)
  assert cfg.dream_length == SECTIONS['sleep']['dream_length']
  assert_same(model, morning)
  after = setup.costs.totals()
  assert after['rollout']['tokens'] - before['rollout']['tokens'] == tokens.size
  # Half of each batch is the day in its order, half documents, each once.
  (all_rows, all_weights) = blocks[0]
  batches = all_rows.reshape(-1, 4, all_rows.shape[1])
  np.testing.assert_array_equal(
    batches[:, :2].reshape(day.tokens.shape), day.tokens
  )
  replayed = batches[:, 2:].reshape(tokens.shape)
  assert sorted(replayed.tolist()) == sorted(tokens.tolist())
  weights = all_weights.reshape(*batches.shape)[:, 2:]
  assert weights.sum() == lengths.sum()
  life, metrics = learner.wake(life, day)
  assert metrics['loss'] > 0
  spent = setup.costs.totals()['wake']['tokens'] - after['wake']['tokens']
  assert spent == 2 * day.tokens.size


def test_what_is_archived_is_written_in_the_evening_and_rehearsed(
  monkeypatch,
):
  written, sample = [], replay_lib.sample_new

  def spy(cfg, models, *args):
    same = [np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, models))]
    out = sample(cfg, models, *args)
    written.append((not all(same), out.tokens))
    return out

  monkeypatch.setattr(replay_lib, 'sample_new', spy)
  learner, life = build('replay', archive=8)
  for episode in range(2):
    life, _ = learner.wake(life, TASK.experience(episode))
    life, _ = learner.sleep(life)
  (changed, first), (_, second) = written
  assert changed and (len(first), len(second)) == (8, 4)
  state = life.learner_state
  assert state['night'].tolist() == [0] * 4 + [1] * 4
  np.testing.assert_array_equal(state['tokens'][:4], first[:4])
  np.testing.assert_array_equal(state['tokens'][4:], second)
  tokens, _ = learner.documents(life, TASK.experience(1).tokens.shape)
  np.testing.assert_array_equal(tokens, state['tokens'])
  with pytest.raises(config.ConfigError, match='archive=-1 must be at least 0'):
    build('replay', archive=-1)


def test_documents_of_the_base_are_kept_before_the_first_day():
  learner, life = build('replay', archive=8, archive_base=4)
  base = life.learner_state['tokens']
  assert life.learner_state['night'].tolist() == [-1] * 4
  tokens, _ = learner.documents(life, TASK.experience(0).tokens.shape)
  np.testing.assert_array_equal(tokens, base)
  life, _ = learner.wake(life, TASK.experience(0))
  assert life.learner_state['night'].tolist() == [-1] * 4 + [0] * 4
  np.testing.assert_array_equal(life.learner_state['tokens'][:4], base)
  with pytest.raises(
    config.ConfigError, match='archive_base=9 documents do no'
  ):
    build('replay', archive=8, archive_base=9)


@pytest.mark.parametrize(
  'name,settings',
  [
    ('replay', dict(finetune=ADAPTER | dict(passes=2))),
    ('experience_replay', dict(finetune=ADAPTER)),
    pytest.param(
      'distilled_replay', dict(shared=ARCHIVED), marks=pytest.mark.slow
    ),
  ],
)
def test_replay_goes_on_bit_for_bit_after_it_was_saved(
  tmp_path, name, settings
):
  def live(folder=None):
    learner, life = build(name, **settings)
    life, _ = learner.sleep(learner.wake(life, TASK.experience(0))[0])
    if folder:
      saved = checkpoint.Checkpoints(folder, 'me')
      saved.save(checkpoint.Snapshot(0, 'sleep', life, {}))
      saved.close()
      learner, fresh = build(name, **settings)
      life = checkpoint.Checkpoints(folder, 'me').newest(fresh).life
    return learner.wake(life, TASK.experience(1))[0]

  assert_same(live(), live(tmp_path))


def test_documents_of_another_length_and_number_fill_every_batch():
  learner, life = build(
    'replay', finetune=dict(batch=4, passes=2), documents=3, mix=0.25
  )
  day = TASK.experience(0)
  day = experience_lib.Experience(day.tokens[:7, :12], day.weight[:7, :12])
  first, second = learner._blocks(life, day)
  for tokens, weight in (first, second):
    assert tokens.shape == weight.shape == (12, 16)
    batches = weight.reshape(3, 4, 16)
    assert (batches[:, :3, 12:] == 0).all()
    assert batches[:, 3].any(axis=1).all()  # A document in each batch.
    assert not batches[2, 1:3].any()  # Seven rows are two batches and a third.
  # In each round of three batches each of the three documents comes once.
  rounds = [sorted(x[0][3::4].tolist()) for x in (first, second)]
  assert rounds[0] == rounds[1] and rounds[0][0] != rounds[0][1]


@pytest.mark.parametrize(
  'own,message',
  [
    (dict(mix=0.0), 'mix=0.0 of finetune.batch=4 rows'),
    (dict(mix=0.9), 'mix=0.9 of finetune.batch=4 rows'),
    (dict(documents=-1), 'documents=-1'),
  ],
)
def test_a_batch_has_rows_of_both_kinds(own, message):
  with pytest.raises(config.ConfigError, match=message):
    build('replay', **own)


def test_distilled_replay_is_sft_until_something_is_archived():
  learner, life = build('distilled_replay', shared=ARCHIVED)
  sft, same = build('sft')
  life, _ = learner.wake(life, TASK.experience(0))
  same, _ = sft.wake(same, TASK.experience(0))
  assert_same(life.model.params, same.model.params)
  assert life.archive.night.tolist() == [0] * 8
  # What it wrote is labelled by the model that wrote it.
  inside = np.asarray(life.archive.weight) > 0
  logits = life.model.merged().forward(life.archive.tokens).logits
  np.testing.assert_array_equal(
    life.archive.likeliest()[inside], logits.argmax(-1)[inside]
  )


def test_distilled_replay_keeps_what_the_next_day_says_nothing_of():
  def kl_after_another_day(name):
    learner, life = build('distilled_replay', shared=ARCHIVED, finetune=FAST)
    life, _ = learner.wake(life, TASK.experience(0))
    archive = life.archive
    if name == 'sft':
      learner, _ = build('sft', finetune=FAST)
    life, _ = learner.wake(life, TASK.experience(1))
    return float(wake.kl_of_archived(life.model.merged(), archive))

  kept, lost = map(kl_after_another_day, ('distilled_replay', 'sft'))
  assert kept < 0.7 * lost, (kept, lost)


@pytest.mark.parametrize('threshold', [0.0, 1.0])
def test_distilled_replay_drops_at_midday_what_the_day_contradicts(
  monkeypatch, threshold
):
  section = ARCHIVED['wake'] | dict(contradicted=threshold)
  learner, life = build(
    'distilled_replay', shared=ARCHIVED | dict(wake=section), finetune=FAST
  )
  life, _ = learner.wake(life, TASK.experience(0))
  weights, train = [], distilled_replay.train_steps

  def spy(optimizer, model, opt_state, batches):
    weights.append(np.asarray(batches[2].weight))
    return train(optimizer, model, opt_state, batches)

  monkeypatch.setattr(distilled_replay, 'train_steps', spy)
  learner.wake(life, TASK.experience(1))
  before_noon, after_noon = weights
  assert before_noon.shape == after_noon.shape
  assert (before_noon > 0).mean() > 0.3
  if threshold == 0.0:  # Whatever it now says otherwise.
    assert (after_noon > 0).sum() < (before_noon > 0).sum()
  else:
    assert (after_noon > 0).sum() >= 0.9 * (before_noon > 0).sum()


@pytest.mark.parametrize(
  'section,message',
  [
    (dict(wake=SECTIONS['wake']), 'wake.rehearsed=0: learner distilled_replay'),
    (dict(sleep=SECTIONS['sleep']), 'sleep.archive=0: learner distilled_repla'),
  ],
)
def test_distilled_replay_needs_documents(section, message):
  with pytest.raises(config.ConfigError, match=message):
    build('distilled_replay', shared=ARCHIVED | section)
  with pytest.raises(config.ConfigError, match='finetune.target=lora: learner'):
    build('distilled_replay', shared=ARCHIVED, finetune=ADAPTER)


def read(life, learner, rows, weights=None):
  """The life after a day of these rows, which are padded to one length."""
  length = max(map(len, rows))
  tokens = np.array([r + [0] * (length - len(r)) for r in rows], np.int32)
  weight = np.array([[1.0] * len(r) + [0.0] * (length - len(r)) for r in rows])
  for row, column in weights or []:
    weight[row, column] = 0.0
  return learner.wake(
    life, experience_lib.Experience(tokens, weight.astype(np.float32))
  )[0]


def test_icl_keeps_the_end_of_the_stream():
  learner, life = build('icl')
  life, _ = learner.wake(life, TASK.experience(0))
  life, _ = learner.wake(life, TASK.experience(1))
  rows = TASK.experience(1).tokens
  want = rows[rows != TASK.tokenizer.bos][-16:]  # Half of max_len.
  np.testing.assert_array_equal(life.learner_state['context'], want)


def test_icl_keeps_whole_documents_and_each_once():
  learner, life = build('icl', context=9)
  life = read(life, learner, [[1, 50, 51], [1, 60, 61, 62, 63]])
  # A token without weight is part of its document; padding is not.
  life = read(life, learner, [[1, 70, 71, 72], [1, 50, 51]], [(0, 2)])
  assert life.learner_state['context'].tolist() == [
    *(60, 61, 62, 63),
    *(70, 71, 72),
    *(50, 51),
  ]
  life = read(life, learner, [[1, 80]])
  assert life.learner_state['context'].tolist() == [70, 71, 72, 50, 51, 80]
  assert life.learner_state['lengths'].tolist() == [3, 2, 1]
  life = read(life, learner, [[1, *range(100, 120)]])  # Longer than all room.
  assert life.learner_state['context'].tolist() == [*range(111, 120)]


def test_icl_tells_packed_documents_apart_by_their_frame():
  learner, life = build('icl', context=20)
  frame = ((1, 7), (2, 1, 8))  # Its gaps are what a document says.
  packed = [1, 7, 50, 2, 1, 8, 51, 2]
  other = [1, 7, 60, 2, 1, 8, 61, 2]
  weight = np.ones((2, 16), np.float32)
  day = experience_lib.Experience(
    np.array([packed + other, other + packed], np.int32), weight, (), (frame,)
  )
  life, _ = learner.wake(life, day)
  # Each once, the latest last, without the BOS before it.
  want = [*other[1:], *packed[1:]]
  assert life.learner_state['context'].tolist() == want


class ChatTokenizer:
  """BOS is a token of the chat format, as it is in SmolLM2."""

  vocab, pad, bos, separator, stop, prepends_bos = 100, 0, 1, 2, 2, False

  def encode(self, text: str) -> list[int]:
    return [int(x) for x in text.split()]

  def decode(self, tokens: list[int]) -> str:
    return ' '.join(map(str, tokens))


@pytest.mark.parametrize(
  'tokenizer', [TASK.tokenizer, ChatTokenizer()], ids=['mark', 'chat']
)
def test_icl_puts_documents_before_the_prompt(tokenizer):
  setup = learners_test.setup(tokenizer=tokenizer)
  learner, life = build('icl', setup, context=12)
  life = read(life, learner, [[1, 7, 2, 1, 8, 2], [1, 9, 2]])
  prompt, answer = [1, 30, 2, 1, 31], [33, 34]
  documents = [1, 7, 2, 1, 8, 2, 1, 9, 2]
  whole = [*documents, *prompt]
  if tokenizer is TASK.tokenizer:  # One BOS, of everything.
    whole = [1, 7, 2, 1, 8, 2, 9, 2, *prompt[1:]]
  frozen, base = build('frozen', setup)
  want = frozen.respond(base, [whole], [answer])
  response = learner.respond(life, [prompt], [answer])
  np.testing.assert_allclose(
    response.answer_logprob, want.answer_logprob, rtol=1e-5
  )
  assert learner.complete(life, [prompt], 4) == frozen.complete(
    base, [whole], 4
  )
  closed = frozen.respond(base, [prompt], [answer]).answer_logprob
  assert abs(closed - want.answer_logprob) > 1e-3


def test_a_context_that_leaves_no_room_is_refused():
  with pytest.raises(
    config.ConfigError, match='context=32 must be .*max_len=32'
  ):
    build('icl', context=32)
  learner, life = build('icl', context=30)
  life = read(life, learner, [[1, *range(40, 69)]])
  with pytest.raises(config.ConfigError, match='29 tokens and .* of 4 exceed'):
    learner.respond(life, [[1, 5, 6]], [[7]])


KEPT = dict(learning_rate=0.03, batch=8)


def test_experience_replay_reads_a_share_of_the_days_before():
  learner, life = build('experience_replay', finetune=KEPT, share=0.25)
  days = [TASK.experience(episode) for episode in (0, 1, 0)]
  for day in days[:2]:
    life, _ = learner.sleep(learner.wake(life, day)[0])
  kept = life.learner_state['tokens']
  num = [len(np.unique(day.tokens, axis=0)) for day in days[:2]]
  assert len(kept) == sum(round(0.25 * n) for n in num)
  of_first = {tuple(row) for row in days[0].tokens.tolist()}
  assert {tuple(x) for x in kept[: round(0.25 * num[0])].tolist()} <= of_first
  (tokens, weight), *_ = learner._blocks(life, days[2])
  batches = tokens.reshape(-1, 8, tokens.shape[1])
  np.testing.assert_array_equal(
    batches[:, :4].reshape(days[2].tokens.shape), days[2].tokens
  )
  known = {tuple(row) for row in kept.tolist()}
  replayed = batches[:, 4:].reshape(-1, tokens.shape[1])
  assert {tuple(row) for row in replayed.tolist()} == known
  assert weight.reshape(batches.shape)[:, 4:].any(axis=(1, 2)).all()


def test_experience_replay_forgets_less_than_sft():
  def lost(name, finetune, **own):
    learner, life = build(name, finetune=finetune, **own)
    losses = []
    for episode in range(2):
      life, _ = learner.wake(life, TASK.experience(episode))
      first = TASK.experience(0)
      losses.append(
        float(
          loss_lib.next_token_loss(
            life.model.merged(), first.tokens, first.weight
          )
        )
      )
    return losses[-1] - losses[0]

  plain = lost('sft', KEPT | dict(batch=4))
  assert lost('experience_replay', KEPT, share=1.0) < 0.5 * plain


@pytest.mark.parametrize(
  'own,message',
  [
    (dict(mix=0.0), 'mix=0.0 of finetune.batch=8 rows'),
    (dict(mix=1.0), 'mix=1.0 of finetune.batch=8 rows'),
    (dict(share=0.0), 'share=0.0 keeps no row'),
    (dict(share=1.5), 'share=1.5'),
  ],
)
def test_experience_replay_keeps_something(own, message):
  with pytest.raises(config.ConfigError, match=message):
    build('experience_replay', finetune=KEPT, **own)
