"""Window tasks: each solved by an independent method."""

import itertools

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import windows
from sleep_jax.tasks.algorithmic import rule110
from tests import students

# Neighbourhoods 111, 110, ..., 000.
TABLE = dict(zip(itertools.product((1, 0), repeat=3), (0, 1, 1, 0, 1, 1, 1, 0)))
SETTINGS = {
  'rule110': dict(width=7, strings=3, steps=5),
  'recall': dict(windows=3, pairs=9, rewritten=2, keys=9, values=4, queries=5),
  'depo': dict(nodes=9, vocab=5, hops=6, queries=4, window=10, windows=4),
  'symbolic': dict(max_ops=4, statements=12, modulus=5, window=20, windows=4),
}
NAMES = sorted(SETTINGS)


def made(name, rows=64, seed=0, for_eval=False, **changes):
  task = tasks.build(name, SETTINGS[name] | changes, 0)
  rng = np.random.default_rng(seed)
  return task, task.batch(rng, rows, for_eval=for_eval)


def automaton(cells, steps):
  for _ in range(steps):
    n = len(cells)
    cells = [
      TABLE[cells[i - 1], cells[i], cells[(i + 1) % n]] for i in range(n)
    ]
  return cells


def context_of(batch, row):
  tokens, present = batch.context[row].ravel(), batch.token_mask[row].ravel()
  return tokens[present].tolist()


def edges_and_questions(task, batch, row):
  """The edges of a row, and its questions with the answers of the targets."""
  cfg = task.cfg
  first_name = 3 + cfg.hops

  def words(tokens):
    split = [[]]
    for token in tokens:
      split[-1].append(token)
      if token >= first_name + cfg.vocab:  # An end of a word.
        split.append([])
    assert split.pop() == []
    return [tuple(word) for word in split]

  bos, *context = context_of(batch, row)
  assert bos == 1
  flat = words(context)
  edges = dict(zip(flat[::2], flat[1::2]))
  assert len(edges) == len(flat) // 2
  asked = batch.inputs[row][batch.input_mask[row]].tolist()
  questions, place = [], 0
  while place < len(asked):
    mark = asked.index(2, place)
    end = mark + 1
    while end < len(asked) and asked[end] >= first_name:
      end += 1
    (start,) = words(asked[place + 1 : mark])
    (answer,) = words(batch.targets[row, mark : end - 1].tolist())
    questions.append((asked[place] - 2, start, answer))
    place = end
  return edges, questions


def program(task, batch, row):
  """A row's question, if it is in the context, and `{name: expression}`."""
  plus, number = 4, 7
  lines, line = [], []
  for token in context_of(batch, row):
    if token == 3:
      lines.append(line)
      line = []
    else:
      line.append(token)
  assert not line
  question = lines.pop(0) if lines[0][0] == 1 else None
  spelled = {}
  for name, is_, *parts in lines:
    assert is_ == 2 and name not in spelled
    words = []
    for i, part in enumerate(parts):
      if i == 1:
        words.append('+-*'[part - plus])
      elif part < number + task.cfg.modulus:
        words.append(part - number)
        assert part >= number
      else:
        words.append(f'x{part}')
        assert part in {line[0] for line in lines}
    spelled[name] = words
  return question, {f'x{name}': words for name, words in spelled.items()}


def solve(lines, name, modulus):
  """A variable's value, and the names that it needs, itself among them."""
  needed = {name}
  values = []
  for word in lines[name][::2]:
    value = word
    if isinstance(word, str):
      value, more = solve(lines, word, modulus)
      needed |= more
    values.append(value)
  if len(values) == 1:
    return values[0], needed
  a, b = values
  return {'+': a + b, '-': a - b, '*': a * b}[lines[name][1]] % modulus, needed


@pytest.mark.parametrize('for_eval', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_a_batch_has_one_shape_and_pads_what_is_not_there(name, for_eval):
  task, batch = made(name, rows=5, for_eval=for_eval)
  shape = (5, task.windows, task.window)
  assert batch.context.shape == batch.token_mask.shape == shape
  for field in ('inputs', 'input_mask', 'targets', 'weight', 'depth'):
    assert getattr(batch, field).shape == (5, task.prediction), field
  for field in ('context', 'inputs', 'targets', 'depth'):
    assert getattr(batch, field).dtype == np.int32, field
  assert batch.token_mask.dtype == batch.input_mask.dtype == bool
  assert batch.weight.dtype == np.float32
  assert max(batch.context.max(), batch.targets.max()) < task.tokenizer.vocab
  assert not batch.context[~batch.token_mask].any()
  assert not batch.inputs[~batch.input_mask].any()
  assert not batch.weight[~batch.input_mask].any()
  assert not batch.depth[batch.weight == 0].any()
  # The context ends where the prediction begins; that is padded at its end.
  assert (np.diff(batch.token_mask.reshape(5, -1).astype(int)) >= 0).all()
  assert (np.diff(batch.input_mask.astype(int)) <= 0).all()
  # What was asked for at one input is the next one.
  next_is_asked = batch.input_mask[:, 1:]
  assert (batch.inputs[:, 1:] == batch.targets[:, :-1])[next_is_asked].all()


@pytest.mark.parametrize('name', NAMES)
def test_a_batch_is_a_function_of_the_generator(name):
  _, a = made(name, seed=1)
  _, same = made(name, seed=1)
  _, other = made(name, seed=2)
  for field, value in vars(a).items():
    np.testing.assert_array_equal(value, getattr(same, field))
  assert (a.context != other.context).any()
  assert len(np.unique(a.context.reshape(64, -1), axis=0)) > 60


@pytest.mark.parametrize('name', NAMES)
def test_metrics_of_right_and_of_wrong_predictions(name):
  task, batch = made(name, for_eval=True)
  nll = np.where(batch.weight > 0, 2.0, 99.0)
  if name == 'depo':
    nll[batch.targets == 2] = 99.0  # ANS does not count.
  right = task.metrics(batch, batch.targets, nll)
  wrong = task.metrics(batch, batch.targets + 1, nll)
  assert set(right) == set(wrong) == set(task.chance_level())
  for metric, value in right.items():
    loss = metric.startswith('loss')
    assert value == (2 if loss else 1), metric
    assert wrong[metric] == (2 if loss else 0), metric


@pytest.mark.parametrize('steps', [1, 4, 9])
def test_rule110_follows_its_table(steps):
  task, batch = made('rule110', rows=20, steps=steps)
  assert task.tokenizer.vocab == 3 and set(np.unique(batch.context)) == {0, 1}
  for row, strings in enumerate(batch.context.tolist()):
    labels = [automaton(cells, steps)[0] for cells in strings]
    assert batch.targets[row].tolist() == labels
    assert batch.inputs[row].tolist() == [2, *labels[:-1]]
  assert (batch.depth == steps).all() and batch.weight.all()


def test_rule110_moves_to_the_left_around_the_ring():
  cells = np.array([0, 0, 0, 1, 0], bool)
  by_hand = [[0, 0, 1, 1, 0], [0, 1, 1, 1, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]
  for steps, want in enumerate(by_hand, 1):
    assert rule110.evolve(cells, steps).astype(int).tolist() == want


def test_rule110_of_no_steps_is_retrieval():
  _, batch = made('rule110', steps=0)
  np.testing.assert_array_equal(batch.targets, batch.context[:, :, 0])


def test_rule110_chance_level():
  chance = tasks.build('rule110', {}, 0).chance_level()
  assert chance['per_bit'] == pytest.approx(0.563, abs=0.004)
  assert chance['exact'] == pytest.approx(0.1006, abs=0.003)
  # All strings of a short ring, by the table.
  task = tasks.build('rule110', dict(width=6, strings=2, steps=3), 0)
  strings = itertools.product((0, 1), repeat=6)
  ones = np.mean([automaton(list(cells), 3)[0] for cells in strings])
  assert ones != 0.5
  assert task.chance_level()['per_bit'] == max(ones, 1 - ones)
  assert task.chance_level()['exact'] == max(ones, 1 - ones) ** 2


def test_rule110_metrics_count_rows_and_bits():
  task, batch = made('rule110', rows=4)
  argmax = batch.targets.copy()
  argmax[1, 2] ^= 1
  metrics = task.metrics(batch, argmax, np.zeros(argmax.shape))
  assert metrics['exact'] == 3 / 4 and metrics['per_bit'] == 11 / 12
  depth = f'exact_t{batch.depth[0, 0]}'
  assert metrics[depth] == metrics['exact']
  assert task.chance_level()[depth] == task.chance_level()['exact']


@pytest.mark.parametrize('rewritten', [0, 2])
def test_recall_asks_for_what_was_told_last(rewritten):
  task, batch = made('recall', rewritten=rewritten)
  first_value = 1 + task.cfg.keys
  again = 0
  for row in range(64):
    told, when, times = {}, {}, []
    for window, tokens in enumerate(batch.context[row].tolist()):
      for key, value in zip(tokens[::2], tokens[1::2]):
        assert 1 <= key < first_value <= value < first_value + task.cfg.values
        times.append(key)
        told[key], when[key] = value, 3 - window
    assert len(times) - len(told) == rewritten
    keys = batch.inputs[row, ::2].tolist()
    assert len(set(keys)) == task.cfg.queries
    assert batch.targets[row, ::2].tolist() == [told[key] for key in keys]
    assert batch.depth[row, ::2].tolist() == [when[key] for key in keys]
    again += sum(times.count(key) == 2 for key in keys)
  assert bool(again) == bool(rewritten)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(pairs=10), 'not a multiple'),
    (dict(rewritten=4), 'task.rewritten=4'),
    (dict(queries=8), 'task.queries=8'),
    (dict(values=1), 'task.values=1'),
  ],
)
def test_recall_refuses_contexts_that_cannot_be(changes, words):
  with pytest.raises(config.ConfigError, match=words):
    made('recall', **changes)


@pytest.mark.parametrize('for_eval', [False, True])
def test_depo_answers_are_found_by_walking(for_eval):
  task, batch = made('depo', for_eval=for_eval)
  sizes, all_hops = set(), set()
  for row in range(64):
    edges, questions = edges_and_questions(task, batch, row)
    sizes.add(len(edges))
    assert len(questions) == min(len(edges), task.cfg.queries)
    assert len({u for _, u, _ in questions}) == len(questions)
    for hops, node, answer in questions:
      all_hops.add(hops)
      for _ in range(hops):
        node = edges[node]
      assert node == answer
  assert all_hops == ({1, 2, 4} if for_eval else set(range(1, 7)))
  assert sizes == ({9} if for_eval else set(range(3, 10)))


def test_depo_is_one_cycle_in_random_order():
  task, batch = made('depo', for_eval=True)
  in_order = 0
  for row in range(64):
    edges, _ = edges_and_questions(task, batch, row)
    node, visited = next(iter(edges)), set()
    while node not in visited:
      visited.add(node)
      node = edges[node]
    assert len(visited) == 9
    ends = list(edges.items())
    in_order += sum(v == u for (_, v), (u, _) in zip(ends, ends[1:]))
  # An edge is followed by its successor with probability 1 / 9.
  assert in_order / (64 * 8) == pytest.approx(1 / 9, abs=0.06)


def test_depo_targets_are_answers_and_the_token_before():
  task, batch = made('depo', rows=8)
  for row in range(8):
    _, questions = edges_and_questions(task, batch, row)
    targets = [
      pair
      for hops, _, answer in questions
      for pair in ((2, 0), *((token, hops) for token in answer))
    ]
    where = batch.weight[row] > 0
    got = zip(batch.targets[row][where], batch.depth[row][where])
    assert list(got) == targets


def test_depo_metrics_by_hops():
  task, batch = made('depo', for_eval=True)
  nll = np.where(batch.depth == 4, 3.0, 1.0)
  argmax = batch.targets.copy()
  # The last token of one answer of 2 hops is wrong, all else is right.
  row, place = np.argwhere(batch.depth == 2)[-1]
  argmax[row, place] += 1
  metrics = task.metrics(batch, argmax, nll)
  answers = [
    hops
    for row in range(64)
    for hops, *_ in edges_and_questions(task, batch, row)[1]
  ]
  assert (
    metrics['loss_k4'] == 3 and metrics['loss_k1'] == metrics['loss_k2'] == 1
  )
  assert metrics['exact_k2'] == pytest.approx(1 - 1 / answers.count(2))
  assert metrics['exact_k1'] == metrics['exact_k4'] == 1
  assert metrics['exact'] == pytest.approx(1 - 1 / len(answers))


def test_depo_has_the_sizes_of_the_paper():
  task = tasks.build('depo', {}, 0)
  assert (task.windows, task.window, task.prediction) == (4, 75, 60)
  batch = task.batch(np.random.default_rng(0), 128, for_eval=True)
  lengths = batch.token_mask.sum((1, 2))
  assert 210 < lengths.min() and lengths.max() < 270
  batch = task.batch(np.random.default_rng(0), 4000)
  questions = ((batch.targets == 2) & (batch.weight > 0)).sum(1)
  # Cycles of 3 to 9 nodes have that share of the weight 1 / (n + sqrt(75)).
  assert (questions < 10).mean() == pytest.approx(0.24, abs=0.03)


def test_depo_names_are_distinct_up_to_the_last_one():
  task, batch = made('depo', for_eval=True, nodes=12, vocab=3, window=13)
  for row in range(64):
    edges, _ = edges_and_questions(task, batch, row)
    assert len(edges) == 12  # 3 names of one token, 9 of two.
    assert sorted(map(len, edges)) == [1] * 3 + [2] * 9


def test_depo_bos_is_what_falls_off_a_full_context():
  _, batch = made('depo', for_eval=True, nodes=10, word_min=2)
  assert batch.token_mask.all() and (batch.context >= 9).all()


def test_depo_chance_is_an_even_guess():
  chance = tasks.build('depo', {}, 0).chance_level()
  # 150 words make contexts of about 240 tokens.
  assert chance['loss_k4'] == pytest.approx(np.log(75) * 150 / 240, rel=0.02)
  assert chance['exact_k16'] == 1 / 75


@pytest.mark.parametrize('for_eval', [False, True])
@pytest.mark.parametrize('question_first', [True, False])
def test_symbolic_answers_need_as_many_operations(question_first, for_eval):
  task, batch = made(
    'symbolic', for_eval=for_eval, question_first=question_first
  )
  all_ops, dependent, separate = set(), 0, 0
  for row in range(64):
    question, lines = program(task, batch, row)
    ask, name, is_ = batch.inputs[row]
    assert (ask, is_) == (1, 2)
    assert question == ([1, name] if question_first else None)
    assert len(lines) == 12
    value, needed = solve(lines, f'x{name}', 5)
    assert batch.targets[row].tolist() == [name, 2, 7 + value]
    ops = sum(len(lines[n]) == 3 for n in needed)
    assert batch.depth[row].tolist() == [0, 0, ops]
    assert batch.weight[row].tolist() == [0, 0, 1]
    all_ops.add(ops)
    for other in set(lines) - needed:
      below = solve(lines, other, 5)[1]
      dependent += bool(below & needed)
      separate += not below & needed and len(below) > 1
  assert all_ops == ({2, 4} if for_eval else {1, 2, 3, 4})
  assert dependent > 64 and separate > 32


def test_symbolic_chance_is_even_for_every_depth():
  task, batch = made('symbolic', rows=8000, for_eval=True)
  answers, ops = batch.targets[:, 2] - 7, batch.depth[:, 2]
  for op in (2, 4):
    share = np.bincount(answers[ops == op], minlength=5) / (ops == op).sum()
    np.testing.assert_allclose(share, 0.2, atol=0.03)
    assert task.chance_level()[f'exact_op{op}'] == 0.2


def test_symbolic_order_and_names_are_independent():
  task, batch = made('symbolic', rows=400, for_eval=True)
  place, names = [], []
  for row in range(400):
    _, lines = program(task, batch, row)
    place.append(list(lines).index(f'x{batch.inputs[row, 1]}'))
    names.append(batch.inputs[row, 1] - 12)
  for values in (place, names):
    assert set(values) == set(range(12))
    assert np.mean(values) == pytest.approx(5.5, abs=0.7)
  assert abs(np.corrcoef(place, names)[0, 1]) < 0.2


def test_symbolic_metrics_by_operations():
  task, batch = made('symbolic', for_eval=True)
  argmax = np.where(batch.depth == 4, 0, batch.targets)
  nll = np.where(batch.weight > 0, 0.5, 9.0)
  metrics = task.metrics(batch, argmax, nll)
  twos = (batch.depth[:, -1] == 2).mean()
  assert metrics == dict(exact=twos, loss=0.5, exact_op2=1.0, exact_op4=0.0)
  rows = np.flatnonzero(batch.depth[:, -1] == 2)
  only = windows.WindowBatch(**{k: v[rows] for k, v in vars(batch).items()})
  assert 'exact_op4' not in task.metrics(only, argmax[rows], nll[rows])


def guess(batch, passes):
  """Random predictions, by the batch and the passes."""
  rng = np.random.default_rng(int(batch.context.sum()) + (passes or 0))
  shape = batch.targets.shape
  return experience_lib.WindowPredictions(
    argmax=np.where(rng.random(shape) < 0.7, batch.targets, 0),
    nll=rng.random(shape),
    passes=np.full(len(shape), float(passes or 3), np.float32),
    loss=0.0,
  )


@pytest.mark.parametrize('name', NAMES)
def test_an_evaluation_is_the_mean_over_the_same_batches(name):
  task, _ = made(name, eval_rows=8, eval_passes=(1, 2), episodes=3)
  student = students.FakeStudent(predict=guess)
  first, second, last = (task.evaluate(student, e) for e in range(3))
  assert first == second and first.by_episode == []

  def expected(stream, batches, passes=None):
    rng = np.random.default_rng([0, stream])
    by_batch = []
    for _ in range(batches):
      batch = task.batch(rng, 8, for_eval=True)
      got = guess(batch, passes)
      by_batch.append(task.metrics(batch, got.argmax, got.nll))
    names = {name for metrics in by_batch for name in metrics}
    return {
      name: np.mean([m[name] for m in by_batch if name in m]) for name in names
    } | {'passes': passes or 3}

  assert first.metrics == expected(3, 1)
  want = expected(4, 4)
  for n in (1, 2):
    want |= {f'{name}@{n}': value for name, value in expected(4, 4, n).items()}
  assert last.metrics == want
  assert set(task.columns) <= set(last.metrics)
  assert set(task.headline) <= set(first.metrics)


@pytest.mark.parametrize('name', NAMES)
def test_a_stream_is_a_function_of_seed_and_episode(name):
  task = tasks.build(name, SETTINGS[name], 5)

  def first(episode):
    batches = task.experience(episode).batches(4)
    return [next(batches).context for _ in range(2)]

  np.testing.assert_array_equal(first(1), first(1))
  assert np.not_equal(first(0), first(1)).any()
  rng = np.random.default_rng([5, 1, 1])
  for got in first(1):
    np.testing.assert_array_equal(got, task.batch(rng, 4).context)


def test_packing_keeps_the_order():
  tokens = np.array([[5, 6, 7, 8]])
  keep = np.array([[True, False, True, True]])
  for length, at_end, want in [
    (5, True, [0, 0, 5, 7, 8]),
    (5, False, [5, 7, 8, 0, 0]),
    (2, True, [7, 8]),
    (2, False, [5, 7]),
  ]:
    got, kept = windows.pack(tokens, keep, length, at_end=at_end)
    assert got.tolist() == [want]
    assert kept.tolist() == [[token > 0 for token in want]]


@pytest.mark.parametrize(
  'name, settings, message',
  [
    ('rule30', {}, 'depo, facts, .*rule110, symbolic'),
    ('rule110', dict(step=3), 'unknown setting .step.'),
    ('rule110', dict(steps=-1), 'task.steps=-1 must be at least 0'),
    ('rule110', dict(eval_rows=0), 'task.eval_rows=0 must be at least 1'),
    ('rule110', dict(eval_passes=(2, 0)), r'eval_passes=\(2, 0\) must be'),
    ('depo', dict(nodes=2), 'task.nodes=2 must be at least 3'),
    ('depo', dict(word_min=3), 'task.word_max=2 must be at least 3'),
    ('depo', dict(nodes=76), '304 tokens.* hold 300'),
    ('depo', dict(vocab=2), '75 nodes.* makes only 6'),
    ('symbolic', dict(modulus=2), 'task.modulus=2 must be at least 3'),
    ('symbolic', dict(max_ops=12), 'statements=24.* can need 25'),
    ('symbolic', dict(window=30), '147 tokens.* hold 90'),
  ],
)
def test_what_cannot_work_is_named(name, settings, message):
  with pytest.raises(config.ConfigError, match=message):
    tasks.build(name, settings, 0)
