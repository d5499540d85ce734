"""A Sleeper: strings in, strings out; and the examples of the pages."""

import dataclasses
import logging
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import sleep_jax
from sleep_jax import config
from sleep_jax import plan as plan_lib
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from tests import tiny_checkpoint

ROOT = pathlib.Path(__file__).parent.parent
FACTS = list(tiny_checkpoint.FACTS)
# With which a tiny model of random weights learns, and a night transfers.
PLAN = dict(
  window=64,
  passes=8,
  fast_learning_rate=1e-2,
  dreams=32,
  steps=60,
  expert_learning_rate=0.1,
  rank=16,
  slots=2,
)
FAILS = PLAN | dict(steps=1, expert_learning_rate=1e-6)


@pytest.fixture(name='base', scope='module')
def _base(tmp_path_factory):
  pytest.importorskip('tokenizers')
  return tiny_checkpoint.write(tmp_path_factory.mktemp('models') / 'tiny')


@dataclasses.dataclass
class Night:
  """A life after one day and one night, and what was measured on the way."""

  m: sleep_jax.Sleeper
  perplexity: list[float]
  day: sleep_jax.reports.DayReport
  report: sleep_jax.NightReport
  progress: list[tuple[str, float]]


@pytest.fixture(name='night', scope='module')
def _night(base):
  m, progress = sleep_jax.load(base, **PLAN), []
  m.on_progress = lambda phase, share: progress.append((phase, share))
  perplexity = [m.perplexity(FACTS)]
  day = m.wake(FACTS)
  perplexity.append(m.perplexity(FACTS))
  report = m.sleep()
  perplexity.append(m.perplexity(FACTS))
  return Night(m, perplexity, day, report, progress)


@pytest.fixture(name='saved', scope='module')
def _saved(night, tmp_path_factory):
  return night.m.save(tmp_path_factory.mktemp('lives') / 'slept')


def leaves(tree) -> list[np.ndarray]:
  """All leaves as arrays; a random key as what it consists of."""
  return [
    np.asarray(
      jax.random.key_data(x)
      if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
    )
    for x in jax.tree.leaves(tree)
  ]


def test_what_was_read_is_still_known_after_the_night(night):
  before, day, after = night.perplexity
  assert day < 0.5 * before
  # The fast weights are empty again, so that what is left has moved.
  deltas = night.m.life.memory.deltas()[0]
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(deltas))
  assert day < after < 0.8 * before


def test_a_night_tells_what_it_did(night):
  report = night.report
  assert report.transferred and report.night == night.m.nights == 1
  assert 0 < report.kl_last < 0.8 * report.kl_first
  assert report.metrics['1to2/kl_last'] == report.kl_last
  assert report.seconds > 0


def test_a_day_tells_what_it_read(night):
  day = night.day
  assert day.rows >= day.tokens / PLAN['window'] and day.split == 0
  assert day.loss_last < day.loss_first


@pytest.mark.parametrize('phase', ['wake', 'sleep'])
def test_progress_grows_to_the_end(night, phase):
  shares = [share for p, share in night.progress if p == phase]
  assert shares == sorted(shares) and len(set(shares)) > 3
  assert shares[-1] == pytest.approx(1.0, abs=0.15)


def test_a_saved_life_is_the_life(night, saved):
  loaded = sleep_jax.load(saved)
  assert loaded.settings == night.m.settings
  for x, y in zip(leaves(loaded.life), leaves(night.m.life), strict=True):
    np.testing.assert_array_equal(x, y)
  assert loaded.life.frames == night.m.life.frames
  assert loaded.ask('Who?', max_new=8) == night.m.ask('Who?', max_new=8)


def test_a_life_saved_in_the_evening_sleeps_as_it_would_have(base, tmp_path):
  m = sleep_jax.load(base, **FAILS)
  m.wake(FACTS)
  loaded = sleep_jax.load(m.save(tmp_path / 'evening'))
  reports = [x.sleep(allow_failure=True) for x in (m, loaded)]
  assert reports[0].metrics == reports[1].metrics
  for x, y in zip(leaves(loaded.life), leaves(m.life), strict=True):
    np.testing.assert_array_equal(x, y)


def test_saving_overwrites_nothing_and_copies_no_weights(base, saved):
  with pytest.raises(config.ConfigError, match='exists already'):
    sleep_jax.load(saved).save(saved)
  name = 'params.embed.embedding.npy'
  assert (saved / name).stat().st_ino == (base / name).stat().st_ino
  assert not list(saved.parent.glob('*.part'))


def test_a_full_disk_is_one_clear_line(night, tmp_path, monkeypatch):
  usage = type('Usage', (), {'free': 1000})
  monkeypatch.setattr('shutil.disk_usage', lambda path: usage)
  with pytest.raises(config.ConfigError, match='0 MB free'):
    night.m.save(tmp_path / 'slept')
  assert not list(tmp_path.iterdir())


def test_a_night_that_fails_is_raised_and_changes_nothing(base):
  m = sleep_jax.load(base, **FAILS)
  m.wake(FACTS)
  evening = m.life
  with pytest.raises(sleep_jax.NotTransferred, match='night 1') as e:
    m.sleep()
  assert m.life is evening
  assert e.value.report.kl_last > 0.8 * e.value.report.kl_first
  assert not m.sleep(allow_failure=True).transferred
  assert m.nights == 1


def test_a_night_without_a_day_is_refused(base, saved):
  for m in (sleep_jax.load(base), sleep_jax.load(saved)):
    with pytest.raises(config.ConfigError, match='nothing was read'):
      m.sleep()


def test_a_life_without_a_free_slot_is_told_before_it_reads(saved):
  m = sleep_jax.load(saved)
  bank = m.life.memory.bank(1)
  m.life = m.life.with_memory(
    m.life.memory.with_level(1, bank=bank.grown(2).set_status(1, 2))
  )
  with pytest.raises(config.ConfigError, match='all 2 slots.*slots=4'):
    m.wake(FACTS)


def test_a_life_may_be_loaded_with_more_slots(night, saved):
  m = sleep_jax.load(saved, slots=5)
  assert m.life.model.cfg.levels[1].slots == 5
  assert m.perplexity(FACTS) == pytest.approx(night.perplexity[2], rel=1e-5)
  with pytest.raises(config.ConfigError, match='more, not fewer'):
    sleep_jax.load(saved, slots=1)
  with pytest.raises(config.ConfigError, match='rank=4: this life has rank=16'):
    sleep_jax.load(saved, rank=4)
  assert sleep_jax.load(saved, steps=7).learner.cfg.sleep.steps == 7


@pytest.mark.slow
def test_dreams_are_drawn_again_by_their_seed(night):
  dreams = night.m.dream(3)
  assert len(dreams) == 3
  assert night.m.dream(3) == dreams != night.m.dream(3, seed=1)
  assert len(night.m.dream(2, about='Orvane')) == 2
  with pytest.raises(config.ConfigError, match='n=0'):
    night.m.dream(0)


def test_an_answer_that_contains_the_right_words_is_right(night, monkeypatch):
  says = iter(['It was Ada Brennick, in 1882.', 'In 1883.'])
  monkeypatch.setattr(
    sleep_jax.api.speech.Speaker,
    'complete',
    lambda self, prompts, **_: [next(says) for _ in prompts],
  )
  quiz = night.m.quiz(tiny_checkpoint.QUIZ)
  assert quiz.right == [True, False] and quiz.accuracy == 0.5


def test_perplexity_is_that_of_the_logits(night):
  m = night.m
  (document,) = m.encode(FACTS[0])
  ids = [*document.begin, *(i for unit in document.units for i in unit)]
  logits = m.life.model.forward(np.array([ids])).logits[0, :-1]
  logp = jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
  logp = logp[len(document.begin) - 1 :]
  assert m.perplexity(FACTS[0]) == pytest.approx(
    float(np.exp(-logp.mean())), rel=1e-4
  )


def test_a_batch_of_questions_is_answered_like_each_alone(night):
  questions = ['Who?', 'Who built the lighthouse of Orvane, and when?', 'When?']
  alone = [night.m.ask(q, max_new=8) for q in questions]
  quiz = night.m.quiz(
    [{'question': q, 'answer': 'x'} for q in questions], max_new=8
  )
  assert quiz.answers == alone


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(night, caplog):
  turns = [
    {'role': role, 'content': 'word ' * 60}
    for role in ('user', 'assistant') * 4
  ]
  last = [{'role': 'user', 'content': 'Who?'}]
  with caplog.at_level(logging.WARNING, 'absl'):
    assert night.m.chat(last, max_new=8) is not None
    assert not caplog.text
    assert night.m.chat(turns + last, max_new=8) is not None
  assert 'of 9 turns are left out' in caplog.text


def test_an_expert_of_your_own_settings(base):
  seeding = consolidation_config.SeedingConfig(steps=3)
  m = sleep_jax.load(base, seeding=seeding, passes=7)
  assert m.learner.cfg.sleep == seeding and m.plan.passes == 7


def test_a_model_that_does_not_exist_is_named():
  with pytest.raises(config.ConfigError, match="'nothing/of/the/kind'"):
    sleep_jax.load('nothing/of/the/kind')


@pytest.mark.parametrize('sizes', [[3], [30] * 9, [40] * 300, [90_000], [1]])
@pytest.mark.parametrize('layers', [2, 4, 30])
def test_a_plan_fits_any_amount_of_text(sizes, layers):
  cfg = config.ModelConfig(
    vocab=49_152,
    dim=64,
    layers=layers,
    heads=4,
    levels=(config.LevelConfig(128),),
  )
  plan = plan_lib.plan(cfg, sizes, chat_tokens=40)
  model = plan.model_config(cfg)
  # The fast level is at the output, and what is below it has the experts.
  assert model.layers_of(0).stop == layers
  assert model.layers_of(1).stop == model.layers_of(0).start
  assert plan.slots > plan.nights
  assert plan.window >= 64  # A chat's frame of 40 tokens, and some words.
  rows = max(1, -(-sum(sizes) // (plan.window * plan.nights)))
  updates = plan.passes * -(-rows // plan.batch)
  assert updates >= 12
  # Every piece of a long text has a head, so that there are more rows.
  assert updates - 2 <= plan.sleep_every <= 2 * updates
  seeding = plan.seeding(cfg.vocab, 40)
  assert seeding.teacher_top_k and seeding.chat_dreams
  assert seeding.archive == seeding.dreams
  assert seeding.steps * seeding.batch >= 3 * seeding.dreams
  assert seeding.batch * plan.window <= 512 or seeding.batch == 2
  assert str(plan.passes) in str(plan)


def test_more_text_has_more_nights():
  cfg = config.ModelConfig(
    vocab=512, dim=64, layers=4, heads=4, levels=(config.LevelConfig(128),)
  )
  nights = [plan_lib.plan(cfg, [n]).nights for n in (100, 20_000, 10**6)]
  assert nights[0] == 1 < nights[1] < nights[2] == 8
  assert plan_lib.plan(cfg, [10**6], nights=2).slots == 8


@pytest.mark.parametrize(
  'given, message',
  [
    (dict(pases=3), "unknown setting 'pases'; known are batch, chunk"),
    (dict(passes='3'), "passes='3' must be a whole number"),
    (dict(passes=2.5), 'passes=2.5 must be a whole number'),
    (dict(fast_learning_rate=True), 'must be a number'),
    (dict(passes=0), 'passes=0 must be positive'),
    (dict(window=48, chunk=32), 'window=48 is not a multiple of chunk=32'),
    (dict(dreams=33), 'dreams=33 must be even'),
    (dict(fast_layers=9), 'fast_layers=9.*more than the 4 layers'),
  ],
)
def test_a_plan_that_cannot_be_is_refused(base, given, message):
  with pytest.raises(config.ConfigError, match=message):
    sleep_jax.load(base, **given)


@pytest.mark.parametrize(
  'section, message',
  [
    (dict(seeding=dict(steps=0)), 'seeding.steps=0 must be at least 1'),
    (dict(seeding=dict(lam=1.5)), 'seeding.lam=1.5 must be at most 1'),
    (dict(wake=dict(batch=0)), 'wake.batch=0 must be at least 1'),
  ],
)
def test_sections_made_by_hand_have_the_bounds_of_a_config(
  base, section, message
):
  kinds = dict(
    seeding=consolidation_config.SeedingConfig, wake=wake_lib.WakeConfig
  )
  given = {name: kinds[name](**values) for name, values in section.items()}
  with pytest.raises(config.ConfigError, match=message):
    sleep_jax.load(base, **given)


def test_importing_the_package_is_cheap():
  code = (
    'import sys, sleep_jax, sleep_jax.cli; '
    'print([m for m in ("jax", "numpy") if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == '[]'


def code_blocks(page: str) -> list[str]:
  """Python examples of a page that use `sleep_jax.load`."""
  text = (ROOT / page).read_text(encoding='utf-8')
  blocks = re.findall(r'^```python\n(.*?)^```', text, re.M | re.S)
  return [b for b in blocks if 'sleep_jax.load' in b]


@pytest.mark.parametrize('page', ['README.md', 'docs/api.md'])
def test_the_examples_of_the_pages_run(page, base, tmp_path, monkeypatch):
  """In order, each page in one interpreter, on a tiny model."""
  blocks = code_blocks(page)
  assert blocks
  load = sleep_jax.load

  def tiny(name, **settings):
    if name == 'smollm2':
      return load(base, **(PLAN | settings))
    return load(name, **settings)

  monkeypatch.setattr(sleep_jax, 'load', tiny)
  monkeypatch.chdir(tmp_path)
  variables: dict[str, object] = {}
  for block in blocks:
    exec(compile(block, page, 'exec'), variables)
  assert os.path.isdir('slept')
