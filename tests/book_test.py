"""A pretrained base on a book: the stream, the evaluation, the base."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import stories
from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.data.datasets import gutenberg
from sleep_jax.harness import live as live_lib
from sleep_jax.models import memory_init
from sleep_jax.models import transformer
from sleep_jax.weights import llama2c
from sleep_jax.weights import load as load_lib
from tests import conftest
from tests import students
from tests import tokenizers_test

ASSETS = pathlib.Path(__file__).parent.parent / 'sleep_jax' / 'assets'
BIN = 'stories260k/stories260K.bin'

needs_data = pytest.mark.skipif(
  not os.environ.get('SLEEP_JAX_DATA'), reason='SLEEP_JAX_DATA is not set'
)


@pytest.fixture(name='small')
def _small(tmp_path) -> dict:
  """A book, stories and a byte tokenizer, as files."""
  words = [f'w{i}' for i in range(900)]
  (tmp_path / 'book.txt').write_text('\n\n'.join(words))
  (tmp_path / 'old.txt').write_text(
    '\n<|endoftext|>\n'.join(f'story {i} of old' for i in range(9))
  )
  (tmp_path / 'tok.bin').write_bytes(
    tokenizers_test.exported(tokenizers_test.tiny_pieces())
  )
  return dict(
    book=str(tmp_path / 'book.txt'),
    known=str(tmp_path / 'old.txt'),
    tokenizer=str(tmp_path / 'tok.bin'),
    rows=18,
    length=9,
    ahead=3,
    known_rows=4,
    read_probes=2,
  )


def texts(task, rows) -> list[str]:
  return [task.tokenizer.decode(row) for row in rows]


def evaluated(task, episode, logprob=0.0):
  """The scores, and the rows that they are of, without BOS."""
  student = students.FakeStudent(logprob=logprob)
  result = task.evaluate(student, episode)
  assert all(p == [task.tokenizer.bos] for p in student.prompts)
  return result, student.answers


def test_rows_are_read_in_order_and_held_out_ones_never(small):
  task = tasks.build('book', small, seed=1)
  text = '\n'.join(
    gutenberg.paragraphs(pathlib.Path(small['book']).read_text())
  )
  rows = [task.experience(e).tokens for e in range(3)]
  assert all(r.shape == (18, 9) and (r[:, 0] == 1).all() for r in rows)
  whole = np.concatenate(rows).tolist()
  offsets = [text.find(x) for x in texts(task, whole)]
  # The stream is the text itself, one row in ten left out.
  places = (np.array(offsets) - offsets[0]) / 8
  np.testing.assert_array_equal(places % 1, 0)
  want = [i for i in range(60) if i % 10 != 9]
  np.testing.assert_array_equal(places, want)
  _, rows = evaluated(task, 2)
  held_out = np.array([text.find(x) for x in texts(task, rows[:6])])
  np.testing.assert_array_equal(
    (held_out - offsets[0]) / 8, [i for i in range(60) if i % 10 == 9]
  )


def test_the_evaluation_has_no_rows_of_later_episodes(small):
  task = tasks.build('book', small, seed=1)
  later = {tuple(r[1:]) for r in task.experience(2).tokens.tolist()}
  result, rows = evaluated(task, 1)
  assert len(result.by_episode) == 2
  assert not later & {tuple(row) for row in rows}
  assert len(rows) == 2 * 2 + 2 * 2 + 3 + 4


def test_perplexity_is_per_token_and_accuracy_per_episode(small):
  task = tasks.build('book', small, seed=1)
  result, rows = evaluated(task, 2, logprob=-8 * np.log(5.0))
  for name in ('held_out_ppl', 'ahead_ppl', 'known_ppl', 'read_ppl'):
    assert result.metrics[name] == pytest.approx(5.0)
  want = np.arange(6).reshape(3, 2).mean(1) / len(rows)
  np.testing.assert_allclose(result.by_episode, want)


def test_where_a_life_begins_is_seeded(small):
  one, same, other = (tasks.build('book', small, s) for s in (1, 1, 2))
  np.testing.assert_array_equal(
    one.experience(0).tokens, same.experience(0).tokens
  )
  assert (one.experience(0).tokens != other.experience(0).tokens).any()


@pytest.mark.parametrize(
  'change, words',
  [
    (dict(rows=20), 'task.rows=20 is not a multiple of 9'),
    (
      dict(rows=1800),
      'book.txt has .* tokens, and 3 episodes of 1800 rows need',
    ),
    (dict(known_rows=10), 'old.txt has 9 documents of 8 tokens'),
    (dict(read_probes=19), 'task.read_probes=19 is more than task.rows=18'),
    (dict(book='none.txt'), "file 'none.txt' does not exist"),
  ],
)
def test_a_book_that_does_not_suffice_is_refused(small, change, words):
  with pytest.raises(config.ConfigError, match=words):
    tasks.build('book', small | change, seed=0)


def levels(*hidden: int) -> tuple[config.LevelConfig, ...]:
  *fast, slow = hidden
  return (
    *(config.LevelConfig(h, chunk=4, learning_rate=0.01) for h in fast),
    config.LevelConfig(slow, slots=2, rank=4),
  )


def test_a_base_gains_levels_and_says_the_same_bit_for_bit(tmp_path):
  plain = conftest.tiny(levels=(config.LevelConfig(24),))
  llama2c.write(tmp_path / 'b.bin', plain, conftest.weights(plain))
  tokens = jax.random.randint(jax.random.key(2), (3, 16), 0, 32)
  want = transformer.forward(
    plain, load_lib.load(str(tmp_path / 'b.bin'), plain), tokens
  ).logits
  cfg = conftest.replace(plain, levels=levels(16, 24, 24))
  params = load_lib.load(str(tmp_path / 'b.bin'), cfg)
  memory = memory_init.init_memory(cfg)

  @jax.jit
  @jax.grad
  def slope(deltas):
    out = transformer.forward(cfg, params, tokens, memory.with_deltas(deltas))
    return out.logits.std()

  got = transformer.forward(cfg, params, tokens, memory).logits
  np.testing.assert_array_equal(got, want)
  # A zero output must not stay one: its gradient is not zero.
  for level in slope(memory.deltas())[:-1]:
    assert jnp.abs(level['down']).max() > 0


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(dim=32), 'b.bin: .* trained with dim=16, but model.dim=32'),
    (dict(levels=levels(24, 8)), r'hidden width \[24\], but .* \[24, 8\]'),
  ],
)
def test_a_base_that_does_not_fit_is_refused(tmp_path, changes, words):
  plain = conftest.tiny(levels=(config.LevelConfig(24),))
  llama2c.write(tmp_path / 'b.bin', plain, conftest.weights(plain))
  with pytest.raises(config.ConfigError, match=words):
    load_lib.load(str(tmp_path / 'b.bin'), conftest.replace(plain, **changes))


def test_a_base_that_is_not_listed_is_refused():
  with pytest.raises(config.ConfigError, match="'none.bin' does not exist"):
    load_lib.load('none.bin', conftest.tiny())


@pytest.mark.slow
@needs_data
def test_the_real_base_lives_a_short_life(tmp_path):
  c = stories.get_config()
  c.task.update(episodes=1, rows=72, known_rows=16, ahead=8, read_probes=8)
  c.model.unroll = 1  # Compiles faster.
  c.model.levels[0].sleep_every = 35
  c.sleep.update(dreams=32, steps=4, batch=4, max_kl_share=9.0)
  c = json.loads(c.to_json())
  before = live_lib.live(c, 'frozen', 1, tmp_path / 'frozen', 0)['final']
  after = live_lib.live(c, 'sleep', 1, tmp_path / 'sleep', 0)
  # It was trained to 1.2968 nats a token on text of this kind.
  assert np.log(before['known_ppl']) == pytest.approx(1.2968, abs=0.1)
  assert before['held_out_ppl'] > 3 * before['known_ppl']
  assert after['costs']['update']['steps'] == 4
  record = json.loads((tmp_path / 'sleep' / 'metrics.jsonl').read_text())
  first, last = (record['scalars'][f'wake/loss_{x}'] for x in ('first', 'last'))
  assert last < first
