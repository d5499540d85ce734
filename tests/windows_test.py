"""Puzzles that are read window by window: each solved in another way."""

import itertools

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import windows
from sleep_jax.tasks import algorithmic as algorithmic_tasks
from sleep_jax.tasks.algorithmic import rule110

# Neighbourhoods 111, 110, ..., 000.
TABLE = dict(zip(itertools.product((1, 0), repeat=3), (0, 1, 1, 0, 1, 1, 1, 0)))
SETTINGS = {
  'rule110': dict(width=7, strings=3, steps=5),
  'depo': dict(nodes=9, vocab=5, hops=6, queries=4, window=10, windows=4),
  'symbolic': dict(max_ops=4, statements=12, modulus=5, window=20, windows=4),
}
NAMES = sorted(SETTINGS)


def made(name, rows=64, seed=0, exam=False, **changes):
  puzzle = algorithmic_tasks.build(name, SETTINGS[name] | changes)
  return puzzle, puzzle.batch(np.random.default_rng(seed), rows, exam=exam)


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


def told(puzzle, batch, row, input_mask=None):
  """The edges of a row, and its questions and answers as the targets tell."""
  cfg = puzzle.cfg
  first_name = 3 + cfg.hops

  def words(tokens):
    found = [[]]
    for token in tokens:
      found[-1].append(token)
      if token >= first_name + cfg.vocab:  # An end of a word.
        found.append([])
    assert found.pop() == []
    return [tuple(word) for word in found]

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


def program(puzzle, batch, row):
  """A row's question, if it is told, and `{name: expression}`."""
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
      elif part < number + puzzle.cfg.modulus:
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


@pytest.mark.parametrize('eval', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_a_batch_has_one_shape_and_pads_what_is_not_there(name, exam):
  puzzle, batch = made(name, rows=5, exam=exam)
  shape = (5, puzzle.windows, puzzle.window)
  assert batch.context.shape == batch.token_mask.shape == shape
  for field in ('inputs', 'asked', 'targets', 'weight', 'depth'):
    assert getattr(batch, field).shape == (5, puzzle.prediction), field
  for field in ('context', 'inputs', 'targets', 'depth'):
    assert getattr(batch, field).dtype == np.int32, field
  assert batch.token_mask.dtype == batch.input_mask.dtype == bool
  assert batch.weight.dtype == np.float32
  assert max(batch.context.max(), batch.targets.max()) < puzzle.vocab
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
def test_marks_of_one_who_knows_and_of_one_who_is_always_wrong(name):
  puzzle, batch = made(name, exam=True)
  nll = np.where(batch.weight > 0, 2.0, 99.0)
  if name == 'depo':
    nll[batch.targets == 2] = 99.0  # ANS does not count.
  knows = puzzle.metrics(batch, batch.targets, nll)
  wrong = puzzle.metrics(batch, batch.targets + 1, nll)
  assert set(knows) == set(wrong) == set(puzzle.chance_level())
  for mark, value in knows.items():
    loss = mark.startswith('loss')
    assert value == (2 if loss else 1), mark
    assert wrong[mark] == (2 if loss else 0), mark


@pytest.mark.parametrize('steps', [1, 4, 9])
def test_rule110_does_what_its_table_says(steps):
  puzzle, batch = made('rule110', rows=20, steps=steps)
  assert puzzle.vocab == 3 and set(np.unique(batch.context)) == {0, 1}
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


def test_rule110_chances():
  chances = algorithmic_tasks.build('rule110', {}).chance_level()
  assert chances['per_bit'] == pytest.approx(0.563, abs=0.004)
  assert chances['exact'] == pytest.approx(0.1006, abs=0.003)
  # All strings of a short ring, by the table.
  puzzle = algorithmic_tasks.build('rule110', dict(width=6, strings=2, steps=3))
  strings = itertools.product((0, 1), repeat=6)
  ones = np.mean([automaton(list(cells), 3)[0] for cells in strings])
  assert ones != 0.5
  assert puzzle.chance_level()['per_bit'] == max(ones, 1 - ones)
  assert puzzle.chance_level()['exact'] == max(ones, 1 - ones) ** 2


def test_rule110_marks_count_rows_and_bits():
  puzzle, batch = made('rule110', rows=4)
  chosen = batch.targets.copy()
  chosen[1, 2] ^= 1
  marks = puzzle.metrics(batch, chosen, np.zeros(chosen.shape))
  assert marks['exact'] == 3 / 4 and marks['per_bit'] == 11 / 12
  depth = f'exact_t{batch.depth[0, 0]}'
  assert marks[depth] == marks['exact']
  assert puzzle.chance_level()[depth] == puzzle.chance_level()['exact']


@pytest.mark.parametrize('eval', [False, True])
def test_depo_answers_are_found_by_walking(exam):
  puzzle, batch = made('depo', exam=exam)
  sizes, all_hops = set(), set()
  for row in range(64):
    edges, questions = told(puzzle, batch, row)
    sizes.add(len(edges))
    assert len(questions) == min(len(edges), puzzle.cfg.queries)
    assert len({u for _, u, _ in questions}) == len(questions)
    for hops, node, answer in questions:
      all_hops.add(hops)
      for _ in range(hops):
        node = edges[node]
      assert node == answer
  assert all_hops == ({1, 2, 4} if exam else set(range(1, 7)))
  assert sizes == ({9} if exam else set(range(3, 10)))


def test_depo_is_one_cycle_in_random_order():
  puzzle, batch = made('depo', exam=True)
  in_order = 0
  for row in range(64):
    edges, _ = told(puzzle, batch, row)
    node, seen = next(iter(edges)), set()
    while node not in seen:
      seen.add(node)
      node = edges[node]
    assert len(seen) == 9
    ends = list(edges.items())
    in_order += sum(v == u for (_, v), (u, _) in zip(ends, ends[1:]))
  # An edge is followed by its successor with probability 1 / 9.
  assert in_order / (64 * 8) == pytest.approx(1 / 9, abs=0.06)


def test_depo_asks_for_answers_and_their_mark():
  puzzle, batch = made('depo', rows=8)
  for row in range(8):
    _, questions = told(puzzle, batch, row)
    wanted = [
      pair
      for hops, _, answer in questions
      for pair in ((2, 0), *((token, hops) for token in answer))
    ]
    where = batch.weight[row] > 0
    got = zip(batch.targets[row][where], batch.depth[row][where])
    assert list(got) == wanted


def test_depo_marks_by_hops():
  puzzle, batch = made('depo', exam=True)
  nll = np.where(batch.depth == 4, 3.0, 1.0)
  chosen = batch.targets.copy()
  # The last token of one answer of 2 hops is wrong, all else is right.
  row, place = np.argwhere(batch.depth == 2)[-1]
  chosen[row, place] += 1
  marks = puzzle.metrics(batch, chosen, nll)
  answers = [
    hops for row in range(64) for hops, *_ in told(puzzle, batch, row)[1]
  ]
  assert marks['loss_k4'] == 3 and marks['loss_k1'] == marks['loss_k2'] == 1
  assert marks['exact_k2'] == pytest.approx(1 - 1 / answers.count(2))
  assert marks['exact_k1'] == marks['exact_k4'] == 1
  assert marks['exact'] == pytest.approx(1 - 1 / len(answers))


def test_depo_has_the_sizes_of_the_paper():
  puzzle = algorithmic_tasks.build('depo', {})
  assert (puzzle.windows, puzzle.window, puzzle.prediction) == (4, 75, 60)
  batch = puzzle.batch(np.random.default_rng(0), 128, exam=True)
  lengths = batch.token_mask.sum((1, 2))
  assert 210 < lengths.min() and lengths.max() < 270
  batch = puzzle.batch(np.random.default_rng(0), 4000)
  questions = ((batch.targets == 2) & (batch.weight > 0)).sum(1)
  # Cycles of 3 to 9 nodes have that share of the weight 1 / (n + sqrt(75)).
  assert (questions < 10).mean() == pytest.approx(0.24, abs=0.03)


def test_depo_names_are_distinct_up_to_the_last_one():
  puzzle, batch = made('depo', exam=True, nodes=12, vocab=3, window=13)
  for row in range(64):
    edges, _ = told(puzzle, batch, row)
    assert len(edges) == 12  # 3 names of one token, 9 of two.
    assert sorted(map(len, edges)) == [1] * 3 + [2] * 9


def test_depo_bos_is_what_falls_off_a_full_context():
  _, batch = made('depo', exam=True, nodes=10, word_min=2)
  assert batch.token_mask.all() and (batch.context >= 9).all()


def test_depo_chance_is_an_even_guess():
  chances = algorithmic_tasks.build('depo', {}).chance_level()
  # 150 words make contexts of about 240 tokens.
  assert chances['loss_k4'] == pytest.approx(np.log(75) * 150 / 240, rel=0.02)
  assert chances['exact_k16'] == 1 / 75


@pytest.mark.parametrize('eval', [False, True])
@pytest.mark.parametrize('question_first', [True, False])
def test_symbolic_answers_need_as_many_operations(question_first, exam):
  puzzle, batch = made('symbolic', exam=exam, question_first=question_first)
  seen, dependent, own = set(), 0, 0
  for row in range(64):
    question, lines = program(puzzle, batch, row)
    ask, name, is_ = batch.inputs[row]
    assert (ask, is_) == (1, 2)
    assert question == ([1, name] if question_first else None)
    assert len(lines) == 12
    value, needed = solve(lines, f'x{name}', 5)
    assert batch.targets[row].tolist() == [name, 2, 7 + value]
    ops = sum(len(lines[n]) == 3 for n in needed)
    assert batch.depth[row].tolist() == [0, 0, ops]
    assert batch.weight[row].tolist() == [0, 0, 1]
    seen.add(ops)
    for other in set(lines) - needed:
      below = solve(lines, other, 5)[1]
      dependent += bool(below & needed)
      own += not below & needed and len(below) > 1
  assert seen == ({2, 4} if exam else {1, 2, 3, 4})
  assert dependent > 64 and own > 32


def test_symbolic_chance_is_even_for_every_depth():
  puzzle, batch = made('symbolic', rows=8000, exam=True)
  answers, ops = batch.targets[:, 2] - 7, batch.depth[:, 2]
  for op in (2, 4):
    share = np.bincount(answers[ops == op], minlength=5) / (ops == op).sum()
    np.testing.assert_allclose(share, 0.2, atol=0.03)
    assert puzzle.chance_level()[f'exact_op{op}'] == 0.2


def test_symbolic_order_and_names_tell_nothing():
  puzzle, batch = made('symbolic', rows=400, exam=True)
  place, names = [], []
  for row in range(400):
    _, lines = program(puzzle, batch, row)
    place.append(list(lines).index(f'x{batch.inputs[row, 1]}'))
    names.append(batch.inputs[row, 1] - 12)
  for found in (place, names):
    assert set(found) == set(range(12))
    assert np.mean(found) == pytest.approx(5.5, abs=0.7)
  assert abs(np.corrcoef(place, names)[0, 1]) < 0.2


def test_symbolic_marks_by_operations():
  puzzle, batch = made('symbolic', exam=True)
  chosen = np.where(batch.depth == 4, 0, batch.targets)
  nll = np.where(batch.weight > 0, 0.5, 9.0)
  marks = puzzle.metrics(batch, chosen, nll)
  twos = (batch.depth[:, -1] == 2).mean()
  assert marks == dict(exact=twos, loss=0.5, exact_op2=1.0, exact_op4=0.0)
  rows = np.flatnonzero(batch.depth[:, -1] == 2)
  only = windows.WindowBatch(**{k: v[rows] for k, v in vars(batch).items()})
  assert 'exact_op4' not in puzzle.metrics(only, chosen[rows], nll[rows])


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
    ('rule30', {}, 'choose one of depo, rule110, symbolic'),
    ('rule110', dict(step=3), 'unknown setting .step.'),
    ('rule110', dict(steps=-1), 'puzzle.steps=-1 must be at least 0'),
    ('depo', dict(nodes=2), 'puzzle.nodes=2 must be at least 3'),
    ('depo', dict(word_min=3), 'puzzle.word_max=2 must be at least 3'),
    ('depo', dict(nodes=76), '304 tokens.* hold 300'),
    ('depo', dict(vocab=2), '75 nodes.* makes only 6'),
    ('symbolic', dict(modulus=2), 'puzzle.modulus=2 must be at least 3'),
    ('symbolic', dict(max_ops=12), 'statements=24.* can need 25'),
    ('symbolic', dict(window=30), '147 tokens.* hold 90'),
  ],
)
def test_what_cannot_work_is_named(name, settings, message):
  with pytest.raises(config.ConfigError, match=message):
    algorithmic_tasks.build(name, settings)
