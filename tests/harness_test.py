"""The loop and its report, on a task and a learner that live in this file.

Both are named `module:Class` in the config, and nothing else knows them.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.harness import report as report_lib
from sleep_jax.harness import workers
from sleep_jax.learners import base as learner_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.metrics import observation
from sleep_jax.metrics import records as records_lib
from sleep_jax.runtime import checkpoint
from sleep_jax.tasks import base as task_lib
from sleep_jax.weights import npz


@dataclasses.dataclass(frozen=True)
class EchoConfig:
  """Settings of `Echo`."""

  episodes: int = 2
  rows: int = 4
  length: int = 6
  scored: bool = True  # Whether episodes have a score of their own.


class Echo(task_lib.Task):
  """Rows of one token per episode; the answer to a prompt is that token."""

  name = 'echo'
  Config = EchoConfig
  columns = ('accuracy', 'absent')
  headline = ('accuracy',)

  def __init__(self, cfg: EchoConfig, seed: int):
    self.cfg, self.seed, self.episodes = cfg, seed, cfg.episodes
    self.tokenizer = tokenizers.IntegerTokenizer(8, bos=1)

  def experience(self, episode: int) -> experience_lib.LazyExperience:
    def draw(rng, rows):
      tokens = np.full((rows, self.cfg.length), 2 + episode, np.int32)
      return tokens, np.ones(tokens.shape, np.float32)

    return experience_lib.LazyExperience(self.cfg.rows, draw, (self.seed,))

  def chance_level(self) -> dict[str, float]:
    return {'accuracy': 0.125}

  def evaluate(self, student, episode) -> experience_lib.EvalResult:
    answers = [[2 + e] for e in range(episode + 1)]
    exact = student.respond([[1]] * len(answers), answers).exact
    by_episode = [float(x) for x in exact] if self.cfg.scored else []
    metrics = {'accuracy': float(exact.mean()), 'accuracy_k1': 1.0}
    return experience_lib.EvalResult(by_episode, metrics)


@dataclasses.dataclass(frozen=True)
class ParrotConfig:
  """Settings of `Parrot`; its own ones stand in `learner_config`."""

  forgets: bool = False


class Parrot(learner_lib.Learner):
  """Repeats the token that it read last; or, if it forgets, none."""

  name = 'parrot'
  Config = ParrotConfig

  def init(self, rng) -> life_lib.Life:
    return super().init(rng).replace(learner_state=jnp.zeros((), jnp.int32))

  def wake(self, life, experience):
    with self.setup.costs.phase('wake') as cost:
      for tokens, _ in experience.blocks(2):
        cost.add_training(tokens.size, steps=1)
        observation.steps({'loss': np.array([1.0])})
    clock = life.clock.replace(tokens=life.clock.tokens + tokens.shape[1])
    heard = jnp.int32(0 if self.cfg.forgets else tokens[-1, -1])
    life = life.replace(learner_state=heard, clock=clock)
    return life, {'loss': 1.0}

  def sleep(self, life):
    # More than are kept.
    observation.dreams(
      'heard', [[int(life.learner_state), i] for i in range(9)]
    )
    return super().sleep(life)

  def respond(self, life, prompts, answers) -> experience_lib.Response:
    del prompts
    exact = np.array([a == [int(life.learner_state)] for a in answers])
    return experience_lib.Response(exact, np.zeros(len(exact)), exact * 1.0)


def settings(**changes) -> build_lib.Settings:
  """An experiment of the two, with fresh weights."""
  c = {
    'name': 'echo',
    'seeds': [1, 2],
    'workers': 1,
    'reference': 'parrot',
    'learner': f'{__name__}:Parrot',
    'arms': {'parrot': {}, 'forgetful': {'learner_config': {'forgets': True}}},
    'task': {'name': f'{__name__}:Echo'},
    'base': '',
    'model': {
      'vocab': 8,
      'dim': 8,
      'layers': 1,
      'heads': 2,
      'levels': [{'hidden': 8}],
    },
  }
  return c | changes


def test_a_task_and_a_learner_from_outside_are_run_and_reported(tmp_path):
  table = workers.run(settings(), tmp_path)
  assert table.startswith('echo, 2 nights, 2 seed(s)')
  assert '| learner | accuracy | backward_transfer |' in table
  assert '| (chance) | 0.125 |  |' in table
  assert '| parrot | 0.500 ± 0.000 | -1.000 ± 0.000 |' in table
  assert '| forgetful | +0.500 ± 0.000 |' in table
  written = ('table.md', 'lives.json', 'report.html')
  for name in (*written, 'recall.png', 'retention.png', 'cost.png'):
    assert (tmp_path / name).stat().st_size
  assert not (tmp_path / 'curves.png').exists()
  lives = json.loads((tmp_path / 'lives.json').read_text())
  assert {life['task'] for life in lives} == {'echo'}
  assert lives[0]['headline'] == ['accuracy']
  assert lives[0]['matrix'] == [[1.0], [0.0, 1.0]]
  assert (lives[0]['steps'], lives[0]['tokens']) == (4, 48)
  again = report_lib.report_workdir(tmp_path, tmp_path / 'again')
  assert again == table


def test_without_scores_of_episodes_curves_over_training_are_drawn(tmp_path):
  c = settings()
  c['task']['scored'] = False
  table = workers.run(c, tmp_path)
  assert '| learner | accuracy |\n' in table
  assert 'Training, mean over seeds:' in table
  # 8 tokens x 8 + attention 4 x 64 + MLP 3 x 64 + 3 norms; tied embeddings.
  assert '| parrot | 536 | 4 | 0.00M |' in table
  assert (tmp_path / 'curves.png').stat().st_size
  assert not (tmp_path / 'recall.png').exists()
  curve = json.loads((tmp_path / 'lives.json').read_text())[0]['curve']
  assert [p['steps'] for p in curve] == [2, 4]
  assert [p['accuracy'] for p in curve] == [1.0, 0.5]


def test_a_resumed_life_repeats_no_phase_and_no_cost(tmp_path, monkeypatch):
  c = settings()
  whole = live_lib.live(c, 'parrot', 1, tmp_path / 'whole', 0)
  with monkeypatch.context() as m:
    dies_at(m, 1, 'sleep')
    with pytest.raises(KeyboardInterrupt):
      live_lib.live(c, 'parrot', 1, tmp_path / 'cut', 0)
  resumed = live_lib.live(c, 'parrot', 1, tmp_path / 'cut', 0)
  for key in ('final', 'matrix', 'steps', 'tokens', 'flops', 'identity'):
    assert resumed[key] == whole[key]


def dies_at(monkeypatch, night, phase):
  """Ends a life before the checkpoint of this phase is saved."""
  save = checkpoint.Checkpoints.save

  def dies(self, snapshot):
    if (snapshot.night, snapshot.phase) == (night, phase):
      raise KeyboardInterrupt
    save(self, snapshot)

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', dies)


def without_times(records):
  return [
    {k: v for k, v in r.items() if k not in ('seconds', 'goodput', 'costs')}
    for r in records
  ]


def records_of(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(name='three_nights', scope='module')
def _three_nights(tmp_path_factory):
  folder = tmp_path_factory.mktemp('three')
  c = settings(task={'name': f'{__name__}:Echo', 'episodes': 3})
  live_lib.live(c, 'parrot', 1, folder, 0)
  return c, folder


@pytest.mark.parametrize('moment', [(1, 'wake'), (2, 'sleep')])
def test_a_night_whose_checkpoint_was_lost_is_cut_from_the_records(
  moment, three_nights, tmp_path, monkeypatch
):
  c, whole = three_nights
  with monkeypatch.context() as m:
    dies_at(m, *moment)
    with pytest.raises(KeyboardInterrupt):
      live_lib.live(c, 'parrot', 1, tmp_path, 0)
  # A kill in the middle of a line.
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"night": 7')
  with (tmp_path / 'steps.jsonl').open('a') as f:
    f.write('{"step": 9')
  live_lib.live(c, 'parrot', 1, tmp_path, 0)
  cut = records_of(tmp_path)
  assert without_times(cut) == without_times(records_of(whole))
  assert [r['night'] for r in cut] == [0, 1, 2]
  steps = [(folder / 'steps.jsonl').read_text() for folder in (whole, tmp_path)]
  assert steps[0] == steps[1] and steps[0].count('\n') == 6


def test_some_dreams_of_each_night_are_kept_as_text(three_nights):
  first, second, _ = (r['dreams'] for r in records_of(three_nights[1]))
  assert [d['text'] for d in first] == ['2 0', '2 3', '2 5', '2 8']
  assert {(d['kind'], d['phase']) for d in second} == {('heard', 'sleep')}
  assert second[0]['text'] == '3 0'


def test_what_a_night_saves_does_not_grow_with_the_nights(
  tmp_path, monkeypatch
):
  sizes, save = [], checkpoint.Checkpoints.save

  def measures(self, snapshot):
    sizes.append(len(json.dumps(snapshot.notes)))
    save(self, snapshot)

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', measures)
  c = settings()
  c['task']['episodes'] = 6  # As many as the vocabulary has tokens for.
  live_lib.live(c, 'parrot', 1, tmp_path, 0)
  assert len(sizes) == 12 and max(sizes) - sizes[1] < 60


def test_records_are_those_of_the_mark(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  records = records_lib.Records(path, None)
  records.append({'night': 0, 'x': 0.1})
  mark = records.mark()
  records.append({'night': 1})
  lost = path.read_bytes()
  again = records_lib.Records(path, mark)
  assert list(again) == [{'night': 0, 'x': 0.1}] and again.num_before == 2
  again.append({'night': 1})
  assert path.read_bytes() == lost and again.mark() == records.mark()
  # A process that writes nothing reads the same.
  assert list(records_lib.Records(path, mark, quiet=True)) == list(again)[:1]
  assert path.read_bytes() == lost
  for text in (lost.replace(b'0.1', b'0.2'), lost[:5], b''):
    path.write_bytes(text)
    with pytest.raises(config.ConfigError, match='is not what it was'):
      records_lib.Records(path, mark)
    assert path.read_bytes() == text


def test_records_in_a_checkpoint_are_read_as_well(tmp_path):
  """Checkpoints had them before there was a mark."""
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"night": 0}\n{"night": 1}\n')
  records = records_lib.Records(path, [{'night': 0}])
  records.append({'night': 1, 'seconds': 2.0})
  again = records_lib.Records(path, records.mark())
  assert list(again) == [{'night': 0}, {'night': 1, 'seconds': 2.0}]


def test_a_summary_of_another_config_is_refused(tmp_path):
  live_lib.live(settings(), 'parrot', 1, tmp_path, 0)
  c = settings()
  c['task']['rows'] = 6
  with pytest.raises(config.ConfigError, match='another config or version'):
    live_lib.live(c, 'parrot', 1, tmp_path, 0)


def test_the_weights_of_a_life_are_exported(tmp_path):
  path = tmp_path / 'bases/echo.npz'
  c = settings(export=str(path), seeds=[3], arms={'parrot': {}})
  workers.run(c, tmp_path / 'run')
  cfg, params = npz.read(path)
  assert cfg.dim == 8
  task, learner, _ = build_lib.build(build_lib.arm_config(c, 'parrot'), 3)
  assert task.row_length == 6
  want = learner.init(jax.random.PRNGKey(3)).model.params
  jax.tree.map(np.testing.assert_array_equal, params, dict(want))
  # Exported again where it is missing, though the life has ended.
  path.unlink()
  workers.run(c, tmp_path / 'run')
  assert path.exists()


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'export': 'x.npz'}, '2 arms and 2 seeds'),
    (
      {'export': 'x', 'seeds': [1], 'arms': {'parrot': {}}},
      "export='x' must be the path of an .npz file",
    ),
    ({'learner': 'tests.nowhere:Parrot'}, 'cannot be imported'),
    ({'learner': 'parrot'}, "learner='parrot' is unknown"),
    ({'task': {'name': f'{__name__}:Ecco'}}, 'cannot be imported'),
    ({'task': {'rows': 4}}, 'task.name is missing'),
    ({'arms': {'parrot': {'learner_config': {'x': 1}}}}, "'x'"),
    ({'base': 'none.npz'}, "'none.npz' do not exist"),
  ],
)
def test_settings_that_cannot_work_are_refused(changes, words, tmp_path):
  with pytest.raises(config.ConfigError, match=words):
    workers.run(settings(**changes), tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize('section', ['task', 'arms', 'seeds', 'reference'])
def test_a_config_that_lacks_a_section_is_refused(section, tmp_path):
  c = settings()
  del c[section]
  with pytest.raises(config.ConfigError, match=f'no {section!r}'):
    workers.run(c, tmp_path)


def test_work_of_version_0_1_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps({'wake': {'lanes': 8}}))
  with pytest.raises(config.ConfigError, match='sleep_jax 0.1'):
    workers.claim_workdir(tmp_path, settings())


def test_a_report_without_lives_is_refused(tmp_path: pathlib.Path):
  with pytest.raises(config.ConfigError, match='does not exist'):
    report_lib.report_workdir(tmp_path, tmp_path)
  workers.claim_workdir(tmp_path, settings())
  with pytest.raises(config.ConfigError, match='no life has ended'):
    report_lib.report_workdir(tmp_path, tmp_path)
