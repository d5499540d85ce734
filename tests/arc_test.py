"""Grids, self-edits and the few-shot task."""

import json
import os

import jax
import numpy as np
import pytest

from experiments.configs import arc as config_arc
from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.data import contexts
from sleep_jax.harness import build as build_lib
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.models import lora
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.tasks.arc import dataset as arc_dataset
from sleep_jax.tasks.arc import grids
from sleep_jax.tasks.arc import synthetic
from sleep_jax.tasks.arc import task as arc
from tests import students

needs_data = pytest.mark.skipif(
  not os.environ.get('SLEEP_JAX_DATA'), reason='SLEEP_JAX_DATA is not set'
)
GRID = np.array([[1, 2, 3], [4, 5, 0]])
SMALL = dict(train=3, test=2, attempts=2, probes=4, rows=16, max_row_passes=168)
PAPER = dict(
  source='real', tokenizer='stories260k/tok512.bin', length=9000, rows=8
)


@pytest.fixture(name='task', scope='module')
def _task():
  return tasks.build('arc_few_shot', SMALL, seed=1)


def written(families=(), strategy='train_using_output_tokens', **training):
  training = dict(learning_rate=0.01, num_train_epochs=2) | training
  flags = {
    f'use_{family}_augmentations': family in families
    for family in grids.AUGMENTATIONS
  }
  return json.dumps(
    {'data_generation': flags, 'training': dict(strategy=strategy) | training}
  )


def dream(task, words):
  for character in '{}:,':
    words = words.replace(character, f' {character} ')
  return task.tokenizer.encode(words)


def pairs_of(task, row):
  """The pairs of grids in a row of tokens."""
  row = row[1:][row[1:] != task.tokenizer.pad]
  pairs = task.tokenizer.decode(row.tolist()).split(synthetic.END)
  assert pairs[-1].strip() == ''
  return [
    tuple(grids.parse(half) for half in pair.split(synthetic.ARROW))
    for pair in pairs[:-1]
  ]


def test_a_grid_is_read_back_as_it_was_written():
  assert grids.text(GRID) == '1 2 3 / 4 5 0'
  np.testing.assert_array_equal(grids.parse(grids.text(GRID)), GRID)
  for broken in ('', '1 2 / 3', '1 x', '1 2 /', '11', '/', '1 ½', '1 -> 2'):
    assert grids.parse(broken) is None, broken


def test_symmetries_have_their_inverses():
  basic = grids.AUGMENTATIONS['basic']
  inverse = {name: name for name in basic} | {
    'rotate_90': 'rotate_270',
    'rotate_270': 'rotate_90',
  }
  for name, change in basic.items():
    assert not np.array_equal(change(GRID), GRID)
    np.testing.assert_array_equal(basic[inverse[name]](change(GRID)), GRID)


def test_augmentations_are_as_named():
  by = {k: v for f in grids.AUGMENTATIONS.values() for k, v in f.items()}
  row = np.array([[1, 2]])
  wanted = {
    'rotate_90': '2 / 1',
    'rotate_180': '2 1',
    'flip_columns': '2 1',
    'flip_rows': '1 2',
    'transpose': '1 / 2',
    'double': '1 1 2 2 / 1 1 2 2',
    'double_height': '1 2 / 1 2',
    'double_width': '1 1 2 2',
    'rotate_90_double': '2 2 / 2 2 / 1 1 / 1 1',
    'repeat_down': '1 2 / 1 2',
    'repeat_right': '1 2 1 2',
    'repeat_both': '1 2 1 2 / 1 2 1 2',
  }
  for name, words in wanted.items():
    assert grids.text(by[name](row)) == words, name


def test_grids_beyond_the_largest_are_left_out():
  pairs = (grids.Pair(np.zeros((16, 4), int), GRID),)
  changed = list(grids.augmented(pairs, ['size']))
  assert [p.input.shape for (p,) in changed] == [(16, 4), (16, 8)]
  with pytest.raises(config.ConfigError, match='basic, chain, repeat, size'):
    list(grids.augmented(pairs, ['zoom']))


def test_leave_out_asks_for_every_pair():
  a, b, c = (grids.Pair(GRID + i, GRID) for i in range(3))
  assert list(grids.leave_out((a, b, c), 1)) == [
    (b, c, a),
    (a, c, b),
    (a, b, c),
  ]
  two = list(grids.leave_out((a, b, c), 2))
  assert len(two) == 6 and all(len(pairs) == 2 for pairs in two)
  assert not list(grids.leave_out((a,), 2))


def test_a_permutation_keeps_the_question_and_maps_colours_alike():
  pairs = tuple(grids.Pair(np.array([[i]]), np.array([[i]])) for i in range(6))
  changed = grids.permuted(pairs, np.random.default_rng(0))
  assert all((p.input == p.output).all() for p in changed)
  assert len({int(p.input[0, 0]) for p in changed}) == 6
  again = grids.permuted(pairs, np.random.default_rng(0))
  assert [p.input.tolist() for p in again] == [
    p.input.tolist() for p in changed
  ]


def test_a_self_edit_is_read():
  got = arc.parse(written(['basic', 'repeat'], learning_rate=1e-4))
  assert got == arc.SelfEdit(('basic', 'repeat'), False, 2, 1e-4)
  assert arc.parse(written(strategy='train_using_all_tokens')).all_tokens


@pytest.mark.parametrize(
  'words',
  [
    'train well',
    '[]',
    '[' * 100_000,
    '{"training": {}}',
    written()[:-1],
    written() + ' Good luck!',
    written(strategy='train_on_everything'),
    written(strategy=['train_using_all_tokens']),
    written(learning_rate='fast'),
    written(learning_rate=0.0),
    written(learning_rate=float('inf')),
    written(learning_rate=float('nan')),
    written(learning_rate=True),
    written(num_train_epochs=2.0),
    written(num_train_epochs=0),
    written(num_train_epochs=True),
    written().replace('false', '0'),
    written(batch_size=2),
  ],
)
def test_a_malformed_self_edit_is_none(words):
  assert arc.parse(words) is None


def test_a_dream_becomes_rows_or_is_rejected_with_a_reason(task):
  context = task.experience(0).contexts[0]
  form = task.format
  edit = form.parse(context, dream(task, written(['basic'])))
  assert edit.tokens.shape == edit.weight.shape == (3 * 7, task.cfg.length)
  assert (edit.epochs, edit.learning_rate) == (2, 0.01)
  assert (edit.tokens[:, 0] == task.tokenizer.bos).all()
  assert form.parse(context, []) == contexts.Rejected('empty')
  broken = dream(task, written())[:-1]
  assert form.parse(context, broken) == contexts.Rejected('unreadable')
  every = dream(task, written(grids.AUGMENTATIONS, num_train_epochs=4))
  assert form.parse(context, every) == contexts.Rejected('too long')
  often = dream(task, written(num_train_epochs=8))
  assert len(form.parse(context, often).tokens) == 3


def test_rows_have_the_training_pairs_and_weights_on_outputs(task):
  context = task.experience(0).contexts[0]
  train_pairs, edit = (
    context.source.train_pairs,
    task.format.from_context(context),
  )
  assert len(edit.tokens) == len(train_pairs)
  assert (edit.epochs, edit.learning_rate) == (0, 0.0)
  for i, (row, weight) in enumerate(zip(edit.tokens, edit.weight)):
    wanted = [*train_pairs[:i], *train_pairs[i + 1 :], train_pairs[i]]
    for (before, after), pair in zip(pairs_of(task, row), wanted, strict=True):
      np.testing.assert_array_equal(before, pair.input)
      np.testing.assert_array_equal(after, pair.output)
    targets = task.tokenizer.decode(row[weight == 1].tolist())
    assert targets == ' '.join(
      f'{grids.text(p.output)} {synthetic.END}' for p in wanted
    )
  everything = task.format.parse(
    context, dream(task, written(strategy='train_using_all_tokens'))
  )
  np.testing.assert_array_equal(everything.tokens, edit.tokens)
  used = (edit.tokens != task.tokenizer.pad) & (np.arange(104) > 0)
  np.testing.assert_array_equal(everything.weight == 1, used)


def test_what_is_too_long_for_a_row_loses_its_first_pairs(task):
  context = task.experience(0).contexts[0]
  edit = task.format.parse(context, dream(task, written(['size'])))
  counts = [len(pairs_of(task, row)) for row in edit.tokens]
  # As it is, doubled, doubled in height and in width.
  assert counts == 3 * [3, 1, 2, 2]
  pair = context.source.train_pairs[0]
  np.testing.assert_array_equal(
    pairs_of(task, edit.tokens[1])[-1][1], grids.double(pair.output)
  )


def test_rows_are_few_enough_and_the_same_each_time():
  task = tasks.build(
    'arc_few_shot',
    SMALL
    | dict(max_rows=40, max_row_passes=80, permutations=1, leave_out=(1, 2)),
    seed=1,
  )
  context = task.experience(0).contexts[1]
  one, two = (
    task.format.parse(context, dream(task, written(['basic', 'repeat'])))
    for _ in range(2)
  )
  assert len(one.tokens) == 40
  np.testing.assert_array_equal(one.tokens, two.tokens)


def test_puzzles_are_seeded_and_rules_distinct(task):
  same = tasks.build('arc_few_shot', SMALL, seed=1)
  other = tasks.build('arc_few_shot', SMALL, seed=2)
  for episode in range(2):
    a, b, c = (t.experience(episode) for t in (task, same, other))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert a.tokens.shape == (16, task.cfg.length)
    assert not np.array_equal(a.tokens, c.tokens)
    assert [c.name for c in a.contexts] == [c.name for c in b.contexts]
  rules = [recolouring(c.source) for c in all_contexts(task)]
  assert len(set(rules)) == len(rules) == 2 * 3 + 2
  assert all(sorted(rule) == list(range(synthetic.COLOURS)) for rule in rules)
  assert all(a != b for rule in rules for a, b in enumerate(rule))


def all_contexts(task):
  """All contexts, those of the test last."""
  test = []

  def study(requests):
    test.extend(c for request in requests for c in request.contexts)
    return [[[[]] * len(r.questions)] * r.attempts for r in requests]

  task.evaluate(students.FakeStudent(study=study), task.episodes - 1)
  episodes = [task.experience(e).contexts for e in range(task.episodes)]
  return [c for group in episodes for c in group] + test


def recolouring(puzzle):
  """The rule of a generated puzzle."""
  colours = {}
  for pair in puzzle.train_pairs + puzzle.test_pairs:
    for old, new in zip(pair.input.flat, pair.output.flat):
      colours.setdefault(int(old), set()).add(int(new))
  return tuple(new for c in range(synthetic.COLOURS) for new in colours[c])


def test_the_evaluation_studies_after_the_last_night_only(task):
  first = task.evaluate(students.FakeStudent(lambda p, a: True), 0)
  assert first.by_episode == [1.0]
  assert first.metrics == {'trained': 1.0, 'base_accuracy': 1.0}

  known = {tuple(c.questions[0]) for c in task.experience(1).contexts}

  def study(requests):
    assert [r.attempts for r in requests] == [2, 2]
    right = requests[0].contexts[0].answers[0][:-1]
    return [[[right], [right[:-1]]], [[[]], [right]]]

  student = students.FakeStudent(lambda p, a: tuple(p) in known, study)
  last = task.evaluate(student, 1)
  assert last.by_episode == [0.0, 1.0]
  assert last.metrics == {
    'trained': 0.5,
    'base_accuracy': 0.0,
    'icl': 0.0,
    'success': 0.25,
    'solved': 0.5,
  }


def test_a_question_has_the_training_pairs_and_its_answer_is_graded(task):
  context = task.experience(0).contexts[0]
  prompt, answer = context.questions[0], context.answers[0]
  assert task.format.open_book(context, prompt) == prompt
  assert len(answer) == task.format.max_answer
  assert answer[-1] == task.format.stop
  pairs = context.source.train_pairs + context.source.test_pairs
  for (before, after), pair in zip(
    pairs_of(task, np.array([*prompt, *answer])), pairs, strict=True
  ):
    np.testing.assert_array_equal(before, pair.input)
    np.testing.assert_array_equal(after, pair.output)
  assert task.format.grade(context, [answer[:-1]]).tolist() == [1.0]
  assert task.format.grade(context, [answer[:-2]]).tolist() == [0.0]
  assert task.format.grade(context, [[]]).tolist() == [0.0]


def test_the_base_has_random_self_edits_most_of_which_parse():
  rng, tok = np.random.default_rng(0), synthetic.build_tokenizer()
  parsed = [arc.parse(' '.join(synthetic.self_edit(rng))) for _ in range(500)]
  assert 0.85 < np.mean([p is not None for p in parsed]) < 0.95
  rates = {p.learning_rate for p in parsed if p}
  assert rates == set(map(float, synthetic.LEARNING_RATES))
  rows = synthetic.pretraining_rows(rng, 8, 104)
  assert rows.shape == (8, 104) and (rows[:, 0] == tok.bos).all()
  assert [
    synthetic.REQUEST in tok.decode(r.tolist()).split() for r in rows
  ] == [
    True,
    *[False] * 3,
  ] * 2


@needs_data
def test_the_real_puzzles_are_seals():
  train, test = (arc_dataset.load(s, '') for s in ('train', 'test'))
  assert [p.name for p in train] == (
    '44f52bb0 4be741c5 5582e5ca 5614dbcf 5bd6f4ac 6150a2bd 67e8384a 6d0aefbc '
    '6e02f1e3 8be77c9e 8d5021e8 8e1813be'
  ).split()
  # The eight of SEAL's results file, then the two that are not in it.
  assert [p.name for p in test] == (
    '59341089 66e6c45b 68b67ca3 903d1b4a b1fc8b8e bc4146bd c7d4e6ad ce8d95cc '
    '358ba94e af24b4cc'
  ).split()
  counts = {
    p.name: (len(p.train_pairs), len(p.test_pairs)) for p in train + test
  }
  assert counts['44f52bb0'] == (6, 2) and counts['c7d4e6ad'] == (2, 1)
  pair = train[7].train_pairs[
    0
  ]  # 6d0aefbc sets a grid beside its mirror image.
  np.testing.assert_array_equal(
    pair.output, np.hstack([pair.input, np.fliplr(pair.input)])
  )


@needs_data
def test_the_real_task_is_the_papers():
  task = tasks.build('arc_few_shot', PAPER, seed=0)
  first, second = (task.experience(e).contexts for e in range(2))
  assert first == second and len(first) == 11
  test = [c for c in all_contexts(task) if c not in first]
  assert len(test) == 8
  context = first[2]
  dreamt = task.tokenizer.encode(written(['basic', 'chain']))
  edit = task.format.parse(context, dreamt)
  assert len(edit.tokens) == 3 * 13
  answer = context.answers[0][:-1]
  assert task.format.grade(context, [answer]).tolist() == [1.0]


@needs_data
def test_what_cannot_be_is_refused_with_a_way_out():
  with pytest.raises(config.ConfigError, match=r'row of \d+ .*raise task.len'):
    tasks.build('arc_few_shot', PAPER | dict(length=200), seed=0)
  with pytest.raises(config.ConfigError, match='task.train=13, but there are'):
    tasks.build('arc_few_shot', PAPER | dict(train=13), seed=0)
  with pytest.raises(config.ConfigError, match="task.test_ids='0' is unknown"):
    tasks.build('arc_few_shot', PAPER | dict(test_ids=('0',)), seed=0)


def test_more_puzzles_than_rules_are_refused():
  with pytest.raises(config.ConfigError, match='there are 265 rules'):
    tasks.build('arc_few_shot', dict(train=130), seed=0)


def test_a_bad_source_is_refused():
  with pytest.raises(config.ConfigError, match="task.source='imaginary'"):
    tasks.build('arc_few_shot', dict(source='imaginary'), seed=0)
  with pytest.raises(config.ConfigError, match='task.tokenizer'):
    tasks.build('arc_few_shot', dict(source='real'), seed=0)


@pytest.mark.parametrize('variant', ['', 'real', 'paper'])
def test_the_configs_settings_are_known(variant):
  c = config_arc.get_config(variant).to_dict()
  build_lib.model_config(c, absent=True)
  for name, cls in (
    ('lora', lora.LoraConfig),
    ('trial', dreaming_config.TrialConfig),
    ('dreaming', dreaming_config.DreamingConfig),
    ('wake', wake_lib.WakeConfig),
    ('sleep', consolidation_config.SeedingConfig),
  ):
    config.from_mapping(cls, c[name], name)
  settings = {k: v for k, v in c['task'].items() if k != 'name'}
  cfg = config.from_mapping(arc.ArcConfig, settings, 'task')
  assert not cfg.rows % c['wake']['batch']
  assert c['model']['levels'][1]['slots'] >= cfg.episodes
  dreaming = c['dreaming']
  if variant != 'real':
    num_kept = dreaming['keep'] + dreaming['keep_random']
    assert (dreaming['dreams'], num_kept) == (60, 15)


def test_a_trial_of_the_papers_setting_lowers():
  c = config_arc.get_config('paper').to_dict()
  cfg = build_lib.model_config(c, absent=True)
  lora_cfg = config.from_mapping(lora.LoraConfig, c['lora'], 'lora')
  key = jax.random.key(0)
  params = jax.eval_shape(lambda: transformer.init(cfg, key))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, 'bfloat16'), params
  )
  memory = jax.eval_shape(lambda: memory_init.init_memory(cfg))
  adapters = jax.eval_shape(
    lambda p: jax.vmap(lambda k: lora.init_adapter(cfg, lora_cfg, p, k))(
      key[None]
    ),
    params,
  )
  batch, length = c['trial']['batch'], c['task']['length']

  def shaped(dtype, *shape):
    return jax.ShapeDtypeStruct((1, *shape), dtype)

  lowered = trials.train_instances.lower(
    model_lib.Model(cfg, params, memory),
    adapters,
    (shaped('int32', 4, length), shaped('float32', 4, length)),
    (shaped('int32', 3, batch), shaped('float32', 3)),
  )
  trained, finite = lowered.out_info
  assert jax.tree.structure(trained) == jax.tree.structure(adapters)
  assert finite.shape == (1,)
