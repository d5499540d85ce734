"""The command line, as a user types it, and lives that are interrupted."""

import concurrent.futures
import importlib
import json
import pathlib
import re
import subprocess
import sys

from absl import flags
from absl.testing import flagsaver
import jax
import ml_collections
from ml_collections.config_flags import config_path
import numpy as np
import pytest

from experiments import command_line
from experiments import run  # noqa: F401 (defines the flags)
from experiments.configs import common
from experiments.configs import quickstart
from sleep_jax import config
from sleep_jax import learners
from sleep_jax.config import registry
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.harness import workers
from sleep_jax.metrics import continual
from sleep_jax.metrics import statistics
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import compilation

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {
  'task.episodes': 2,
  'task.rows': 16,
  'task.probes': 1,
  'sleep.steps': 6,
  'sleep.dreams': 32,
  'sleep.batch': 4,
  'sleep.rollout_every': 3,
  'sleep.max_kl_share': 9.0,
  'sleep.prefixes': 4,
  'workers': 1,
  'model.levels[0].sleep_every': 2,
}

_QUICKSTART = '--config=experiments/configs/quickstart.py'
ARMS = {'wake_only': common.WAKE_ONLY}


def command(workdir, *extra) -> subprocess.CompletedProcess:
  small = [f'--config.{k}={v}' for k, v in SMALL.items()]
  return subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.run',
      '--config=experiments/configs/quickstart.py',
      *small,
      f'--workdir={workdir}',
      *extra,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=500,
    check=False,
  )


def small_config(arms=('sleep',)) -> build_lib.Settings:
  c = quickstart.get_config()
  for key, value in SMALL.items():
    config_path.set_value(key, c, value)
  c.arms = {arm: ARMS.get(arm, {}) for arm in arms}
  return json.loads(c.to_json())


@pytest.fixture(name='finished', scope='module')
def _finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  return workdir, command(workdir)


def test_the_quickstart_leaves_all_that_it_promises(finished):
  workdir, done = finished
  assert done.returncode == 0, done.stderr
  for arm in ('icl', 'sft', 'wake_only', 'sleep'):
    assert f'| {arm} |' in done.stdout
    folder = workdir / 'lives' / f'{arm}_1'
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(l)['night'] for l in lines] == [0, 1]
    assert list(folder.glob('events.out.tfevents*'))
  summary = json.loads((workdir / 'lives.json').read_text())
  sleep = next(l for l in summary if l['learner'] == 'sleep')
  assert [len(row) for row in sleep['matrix']] == [1, 2]
  for phase in ('wake', 'rollout', 'teacher', 'update', 'reward', 'eval'):
    costs = sleep['costs'][phase]
    assert min(costs['tokens'], costs['flops'], costs['seconds']) > 0
  assert not (workdir / 'summary.json').exists()
  for name in ('recall.png', 'retention.png', 'cost.png'):
    assert (workdir / name).read_bytes().startswith(b'\x89PNG')


def test_a_finished_run_says_so_and_changes_nothing(finished):
  workdir, first = finished
  before = (workdir / 'lives.json').read_bytes()
  again = command(workdir)
  assert again.returncode == 0 and 'is finished' in again.stdout
  assert (workdir / 'lives.json').read_bytes() == before
  table = first.stdout.split('facts,')[1]
  assert table == again.stdout.split('facts,')[1]


def test_a_work_directory_of_another_config_is_refused(finished):
  workdir, _ = finished
  before = (workdir / 'lives.json').read_bytes()
  other = command(workdir, '--config.sleep.gamma=0.25')
  assert other.returncode != 0 and 'another config' in other.stderr
  assert (workdir / 'lives.json').read_bytes() == before


@pytest.mark.parametrize(
  'extra, words',
  [
    ('--config.task.name=factz', "task.name='factz' is unknown"),
    ('--config.sleep.teachers=me', "sleep.teachers='me' is unknown"),
    ('--config.model.vocab=64', '167 pieces but model.vocab=64'),
    ('--config.model.dim=32', 'trained with dim=64, but model.dim=32'),
    ('--config.task.episodes=0', 'error: --config.task.episodes=0 must be'),
    ('--config.task.episodes=9', '9 nights need 9 slots'),
    ('--config.base=none.npz', "'none.npz' do not exist"),
  ],
)
def test_bad_settings_stop_before_any_life(tmp_path, extra, words):
  got = command(tmp_path / 'w', extra)
  assert got.returncode != 0 and words in got.stderr, got.stderr
  assert 'Traceback' not in got.stderr
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
  'argv, words',
  [
    ([], '--config is missing; give a file, or a name as in --config=quicks'),
    (['--config'], 'Missing value for flag --config'),
    (['--config='], 'there is no such file, nor such a name: arc, babilong'),
    (['--config=quikstart'], 'no such file; is --config=quickstart meant?'),
    (['--config', 'x/fcts.py'], 'no such file; is --config=facts meant?'),
    (['--config=experiments/configs'], 'there is no such file'),
    (['--config=README.md'], 'README.md: SyntaxError: '),
    (['--config=experiments/configs/common.py'], 'no function get_config'),
    (['--config=quickstart:hard'], 'this config has no variants'),
    (
      ['--config=class_incremental:bankin'],
      "variant='bankin' is unknown; choose one of banking, clinc",
    ),
    ([_QUICKSTART, '--config.sleep.stepz=3'], 'is --config.sleep.steps meant?'),
    ([_QUICKSTART, '--config.slep.steps=3'], 'is --config.sleep.steps meant?'),
    (
      [_QUICKSTART, '--config.model.levels[9].chunk=3'],
      'is --config.model.levels[1].chunk meant?',
    ),
    ([_QUICKSTART, '--config.=3'], 'it has no setting for --config..'),
    (
      [_QUICKSTART, '--config.sleep.steps=abc'],
      'flag --config.sleep.steps=abc',
    ),
    ([_QUICKSTART, '--config.arms=sleep'], 'flag --config.arms=sleep: '),
    (['--config.sleep.steps=3', _QUICKSTART], 'before a value for --config'),
    ([_QUICKSTART, 'sleep.steps=3'], "'sleep.steps=3' is no flag"),
    ([_QUICKSTART, '--workdri=x'], "'workdri'. Did you mean: workdir"),
  ],
)
def test_a_wrong_command_ends_with_one_line(monkeypatch, argv, words):
  with pytest.raises(SystemExit) as e:
    parsed(monkeypatch, *argv)
  assert re.fullmatch(f'error: .*{re.escape(words)}.*', str(e.value))


def parsed(monkeypatch, *argv: str) -> ml_collections.ConfigDict:
  """The config of a command line of `experiments.run`."""
  monkeypatch.setattr(sys, 'argv', ['run', *argv])
  with flagsaver.flagsaver():
    command_line.parse(sys.argv)
    return flags.FLAGS.config


def test_a_file_has_not_the_function_of_an_earlier_one(monkeypatch):
  parsed(monkeypatch, _QUICKSTART)
  with pytest.raises(SystemExit, match='no function get_config'):
    parsed(monkeypatch, '--config=experiments/configs/common.py')


@pytest.mark.parametrize('variant', ['', ':hard'])
def test_a_config_may_be_given_by_its_name(monkeypatch, tmp_path, variant):
  monkeypatch.chdir(tmp_path)
  by_name = parsed(monkeypatch, f'--config=facts{variant}')
  file = ROOT / 'experiments/configs/facts.py'
  assert by_name == parsed(monkeypatch, f'--config={file}{variant}')
  assert by_name.name == f'facts{variant.replace(":", "_")}'


@pytest.mark.parametrize(
  'message, flag',
  [
    ('task.rows=-1 must be', '--config.task.rows=-1 must be'),
    ('levels[0].x=[1] has', '--config.levels[0].x=[1] has'),
    # Of an arm, or of no setting at all.
    ('task.rows=-2 must be', 'task.rows=-2 must be'),
    ("arm='x' is unknown", "arm='x' is unknown"),
    ('no life has ended.', 'no life has ended.'),
  ],
)
def test_a_refused_setting_is_named_as_a_flag(message, flag):
  c = dict(task=dict(rows=-1), levels=[dict(x=[1])])
  assert command_line.with_flag(message, c) == flag


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('workers', 0, 'workers=0 must be at least 1'),
    ('workers', -1, 'workers=-1 must be at least 1'),
    ('seeds', 3, 'seeds=3 must be a sequence'),
    ('seeds', [], r'seeds=\[\] has no entry'),
    ('seeds', ['1'], r"seeds\[0\]='1' must be a whole number"),
    ('seeds', [2**32], r'seeds\[0\]=4294967296 must be at most 4294967295'),
    ('seeds', [1, 2, 1], r'seeds=\[1, 2, 1\] names one seed twice'),
    ('name', '../x', "'../x' names a folder"),
    ('name', '', "'' names a folder"),
    ('arms', {'a/b': dict(learner='sleep')}, "'a/b' names a folder"),
    ('profile', dict(steps='9:3'), "profile.steps='9:3' must be two step"),
    ('export', f'{__file__}/x.npz', 'is no folder that can be written'),
    ('sleep', dict(divergence='kl'), "sleep.divergence='kl' is unknown"),
    ('sleep', dict(optimizer='sgd'), "sleep.optimizer='sgd' is unknown"),
    ('arms', {}, 'arms={} has no entry'),
    ('arms', dict(sleep=3), r'arms\.sleep=3 must be a section'),
    (
      'arms',
      dict(sleep=dict(wake=3)),
      r'arms\.sleep\.wake=3 must be a section',
    ),
    ('model', dict(levels=[3]), r'model\.levels\[0\]=3 must be a section'),
  ],
)
def test_lives_that_nobody_can_run_are_refused(key, value, words):
  with pytest.raises(config.ConfigError, match=words):
    workers.check(small_config() | {key: value})


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(rows=10**12), 'task.rows=1000000000000 must be at most 2147483647'),
    (dict(rows=2**31 - 1, length=2**20), 'GiB of memory; lower one of them'),
    (dict(length=33), 'rows of 33 tokens do not hold a whole number of chunks'),
  ],
)
def test_a_day_that_nobody_can_read_is_refused(changes, words):
  c = small_config()
  c['task'] = c['task'] | changes
  with pytest.raises(config.ConfigError, match=words):
    workers.check(c)


def test_what_a_config_leaves_out_may_be_set(monkeypatch):
  """Of the model and the task, whose fields are known."""
  c = parsed(
    monkeypatch,
    _QUICKSTART,
    '--config.model.dtype=bfloat16',
    '--config.model.rope_theta=5e4',
    '--config.model.levels[1].clip=0.5',
  )
  assert (c.model.dtype, c.model.rope_theta) == ('bfloat16', 5e4)
  assert c.model.levels[1].clip == 0.5 and 'clip' not in c.task
  for flag, words in (
    ('dtype=float64', "model.dtype='float64' is unknown"),
    ('rope_theta=nan', 'model.rope_theta=nan must be a finite number'),
    ('norm_eps=-1', r'model.norm_eps=-1.0 must be at least 0'),
  ):
    c = parsed(monkeypatch, _QUICKSTART, f'--config.model.{flag}')
    with pytest.raises(config.ConfigError, match=words):
      build_lib.model_config(json.loads(c.to_json()), absent=True)


def test_a_flag_that_an_arm_outranks_is_told():
  c = dict(
    sleep=dict(steps=3),
    model=dict(levels=[]),
    arms=dict(a={}, b=dict(sleep=dict(steps=2)), c=dict(model=dict(levels=[]))),
  )
  argv = ['run', '--config.sleep.steps=4', '--config.model.levels[0].chunk=8']
  steps, levels = command_line.outranked(c, argv)
  assert '--config.sleep.steps does not reach' in steps and ': b; ' in steps
  assert '--config.arms.c.model.levels' in levels
  quiet = ['run', '--config.arms.b.sleep.steps=4', '--config.sleep.batch=2']
  assert not list(command_line.outranked(c, quiet))


def test_unknown_arms_and_sections_are_refused():
  c = small_config()
  with pytest.raises(config.ConfigError, match="arm='x'"):
    build_lib.arm_config(c, 'x')
  c['arms'] = {'a': dict(learner='sleep', sleeep=dict(steps=1))}
  with pytest.raises(config.ConfigError, match="no section 'sleeep'"):
    build_lib.arm_config(c, 'a')


@pytest.mark.parametrize(
  'arm, phase',
  [
    pytest.param('ewc', 'sleep', marks=pytest.mark.slow),
    ('icl', 'sleep'),
    pytest.param('sleep', 'wake', marks=pytest.mark.slow),
    pytest.param('joint', 'wake', marks=pytest.mark.slow),
  ],
)
def test_an_interrupted_life_ends_as_if_it_never_was(
  tmp_path, monkeypatch, arm, phase
):
  c = small_config([arm])
  whole = live_lib.live(c, arm, 1, tmp_path / 'whole', 0)

  save = checkpoint.Checkpoints.save

  def dies(self, snapshot):
    if (snapshot.night, snapshot.phase) == (1, phase):
      raise KeyboardInterrupt  # After the phase, before it is saved.
    save(self, snapshot)

  with monkeypatch.context() as m:
    m.setattr(checkpoint.Checkpoints, 'save', dies)
    with pytest.raises(KeyboardInterrupt):
      live_lib.live(c, arm, 1, tmp_path / 'cut', 0)
  resumed = live_lib.live(c, arm, 1, tmp_path / 'cut', 0)
  assert resumed['matrix'] == whole['matrix']
  assert resumed['final'] == whole['final']
  for name, costs in whole['costs'].items():
    assert resumed['costs'][name]['flops'] == costs['flops']
  lines = [
    (tmp_path / w / 'metrics.jsonl').read_text().splitlines()
    for w in ('whole', 'cut')
  ]
  assert len(lines[0]) == len(lines[1]) == 2
  a, b = (json.loads(l[1])['scalars'] for l in lines)
  assert a == b


# The variants of every config; '' is the one without a name.
VARIANTS = {
  'arc': ('', 'real', 'paper'),
  'babilong': ('qa1', 'qa2', 'qa3', 'qa4', 'qa5', 'train'),
  'backbones': (
    '',
    'clinc',
    'banking',
    'squad',
    'arc',
    'llama3_2_3b',
    'clinc-llama3_8b_instruct',
    'arc-qwen2_5_7b',
    'squad-smollm2',
    'qwen3_8b',
  ),
  'base_arc': ('',),
  'base_bulletins': ('',),
  'base_chains': ('',),
  'base_facts': ('', 'words'),
  'base_facts_hybrid': ('',),
  'base_text': ('',),
  'base_translation': ('',),
  'both_sleeps': ('',),
  'bulletins': ('',),
  'class_incremental': (
    *('clinc', 'banking', 'dbpedia'),
    *('clinc_tune', 'clinc_late', 'clinc_reference'),
  ),
  'depo': ('', 'paper'),
  'facts': (
    *('', 'capacity', 'cost', 'hard'),
    *('hard_ablations', 'hard_levels', 'hard_tune', 'hundred'),
  ),
  'formal_languages': (
    *('parity', 'aa_star', 'abab_star'),
    *('a_n_b_n', 'a_n_b_n_c_n', 'shuffle_2'),
  ),
  'meta_wake': ('',),
  'niah': ('multikey_1', 'multikey_2', 'multikey_3'),
  'quickstart': ('',),
  'mathematics': ('gsm8k', 'short', 'paper'),
  'reasoning': ('', 'quick', 'tune', 'ablations', 'many_nights'),
  'recall': ('', 'rewritten'),
  'rule110': ('', 'controls', 'eviction', 'gentle', 'paper'),
  'smollm2': ('', 'short', 'tune', 'clinc', 'squad', 'placement'),
  'squad': ('small', 'paper'),
  'stories': ('',),
  'symbolic': ('', 'paper'),
  'translation': ('', 'reversed', 'tune'),
}


def load(name: str, variant: str = '') -> build_lib.Settings:
  module = importlib.import_module(f'experiments.configs.{name}')
  c = module.get_config(variant) if variant else module.get_config()
  return json.loads(c.to_json())


def test_all_configs_are_listed():
  files = (ROOT / 'experiments/configs').glob('*.py')
  assert {f.stem for f in files} - {'__init__', 'common'} == set(VARIANTS)


@pytest.mark.parametrize('name', VARIANTS)
def test_every_arm_has_known_sections_and_settings(name):
  for variant in VARIANTS[name]:
    c = load(name, variant)
    assert c['arms'] and c['seeds']
    for arm in c['arms']:
      s = build_lib.arm_config(c, arm)
      build_lib.model_config(s, absent=True)
      task = dict(s['task'])
      _, cfg = registry.find(task.pop('name'), 'sleep_jax.tasks', 'task.name')
      config.from_mapping(cfg, task, 'task')
      _, cfg = registry.find(s['learner'], 'sleep_jax.learners', 'learner')
      learners.config_of(cfg, s)


def test_what_a_backbone_lacks_is_named(tmp_path):
  c = load('backbones', 'llama3_2_1b')
  with pytest.raises(config.ConfigError, match='bases/llama3_2_1b'):
    workers.run(c, tmp_path / 'w')


def test_forgetting_and_backward_transfer_by_hand():
  matrix = [[1.0], [0.5, 0.8], [0.25, 0.9, 1.0]]
  got = continual.backward_transfer(matrix)
  assert got['backward_transfer'] == pytest.approx((-0.75 + 0.1) / 2)
  assert got['forgetting'] == pytest.approx((0.75 + 0.0) / 2)


def test_intervals_are_paired_t_intervals():
  mean, half = statistics.interval([1.0, 2.0, 3.0])
  assert mean == 2.0
  assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
  assert np.isnan(statistics.interval([1.0])[1])


def test_programs_are_dropped_before_memory_maps_run_out(tmp_path):
  def proc(maps, limit):
    (tmp_path / 'self').mkdir(exist_ok=True)
    (tmp_path / 'sys/vm').mkdir(parents=True, exist_ok=True)
    (tmp_path / 'self/maps').write_text('a map\n' * maps)
    (tmp_path / 'sys/vm/max_map_count').write_text(f'{limit}\n')
    return tmp_path

  double = jax.jit(lambda x: 2 * x)
  double(1.0)
  assert not compilation.drop_programs_near_limit(proc(30, 100))
  assert double._cache_size() == 1
  assert compilation.drop_programs_near_limit(proc(60, 100))
  assert double._cache_size() == 0
  assert not compilation.drop_programs_near_limit(tmp_path / 'not_linux')


def test_of_two_configs_at_once_one_has_the_folder(tmp_path):
  """Whichever is first; those of the same config all have it."""

  def claim(number):
    try:
      workers.claim_workdir(tmp_path / 'w', {'a': number % 2})
    except config.ConfigError:
      return None
    return number % 2

  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    claimed = list(pool.map(claim, range(32)))
  assert claimed.count(None) == 16 and len(set(claimed)) == 2
  assert not list(tmp_path.rglob('*.part'))


def test_workers_claim_their_directory_once(tmp_path):
  workers.claim_workdir(tmp_path / 'w', {'a': (1,), 'workers': 1})
  workers.claim_workdir(tmp_path / 'w', {'a': (1,), 'workers': 2})
  with pytest.raises(config.ConfigError, match='another config'):
    workers.claim_workdir(tmp_path / 'w', {'a': (2,)})
