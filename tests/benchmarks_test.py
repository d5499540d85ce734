"""The suite runs, at a size that says nothing about speed."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator
from benchmarks import jsd
from benchmarks import quick
from benchmarks import run
from benchmarks import scaling
from benchmarks import soak
from benchmarks import streaming
from benchmarks import timing
from sleep_jax.inference import sampling
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer

TINY = timing.Plan(threads=1, repeats=2, tiny=True)


def suite(out: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
  """The command, in a process of its own: it pins its threads."""
  command = [sys.executable, '-m', 'benchmarks.run', '--tiny', '--threads=1']
  return subprocess.run(
    [*command, '--repeats=2', f'--out={out}', *flags],
    capture_output=True,
    text=True,
    check=False,
  )


def entries(out: pathlib.Path) -> dict[str, dict]:
  return {e['bench']: e for e in json.loads(out.read_text())['entries']}


def test_the_command_writes_what_needs_no_torch(tmp_path):
  out = tmp_path / 'sub' / 'benchmarks.json'
  done = suite(out, '--only=levenshtein,accelerator,saves')
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == str(out)
  results = entries(out)
  assert results['accelerator']['skipped'].startswith('no accelerator')
  assert results['levenshtein']['seconds']['rapidfuzz']['n'] == 2
  assert results['levenshtein']['machine']['threads'] == 1
  saves = results['saves']['bytes']
  assert 0 < saves['sleep_jax'] < saves['with the base']
  # One bench alone replaces its own entry and keeps the other.
  assert suite(out, '--only=accelerator').returncode == 0
  assert entries(out)['levenshtein'] == results['levenshtein']
  names = sorted(p.name for p in out.parent.iterdir())
  assert names == ['benchmarks.json', 'benchmarks.md']


@pytest.mark.parametrize(
  'flag, message',
  [('--only=speed', 'choose among train'), ('--threads=4096', 'or fewer')],
)
def test_bad_flags_are_refused(tmp_path, flag, message):
  done = suite(tmp_path / 'out.json', '--only=accelerator', flag)
  assert done.returncode and message in done.stderr
  assert not (tmp_path / 'out.json').exists()


def test_a_missing_opponent_is_named(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(run.BENCHES, 'decode', ('no_such_library',))
  with pytest.raises(SystemExit):
    run.main(['--only=decode', f'--out={tmp_path / "out.json"}'])
  assert 'no_such_library' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
  'bench', ['train', 'decode', 'gkd', 'on_policy', 'jsd']
)
def test_benches_against_torch_agree_and_run(tmp_path, bench):
  for needed in run.BENCHES[bench]:
    pytest.importorskip(needed)
  out = tmp_path / 'benchmarks.json'
  done = suite(out, f'--only={bench}')
  assert done.returncode == 0, done.stderr
  entry = entries(out)[bench]
  assert entry['parity']
  assert 'sleep_jax' in entry['seconds']


@pytest.mark.slow
def test_cache_bytes_after_eviction_are_constant(tmp_path):
  out = tmp_path / 'benchmarks.json'
  done = suite(out, '--only=eviction')
  assert done.returncode == 0, done.stderr
  few, many = json.loads(out.read_text())['entries']
  bytes_of = [e['cache_bytes_per_row'] for e in (few, many)]
  assert len({b['sleep_jax'] for b in bytes_of}) == 1
  assert (
    bytes_of[0]['attention throughout'] < bytes_of[1]['attention throughout']
  )


def test_a_stream_is_measured_length_by_length():
  # Whole chunks, so that one program is compiled.
  lengths = [streaming.CHUNK, 2 * streaming.CHUNK]
  short, longer = streaming.measure('gdn', lengths)
  assert [short['tokens'], longer['tokens']] == lengths
  assert short['state_bytes'] == longer['state_bytes']
  assert 0 < longer['resident_mb'][0] <= longer['resident_mb'][1]


def test_two_checkouts_are_compared_by_phase():
  ours, theirs = dict(wake=1.0, update=2.0), dict(wake=2.0, update=2.0)
  table = quick.compare([(ours, theirs)] * 3 + [(theirs, theirs)])
  wake, update, both = table.splitlines()[2:]
  assert wake.startswith('| wake | 1250 | 1.68 (')
  assert update == '| update | 2000 | 1.00 (1.00 to 1.00) |'
  assert both.startswith('| all | 3250 | 1.24 (')


@pytest.mark.parametrize(
  'flag, message',
  [('--against=no_such', 'no_such'), ('--rounds=1', 'give at least 2')],
)
def test_what_cannot_be_compared_is_refused(flag, message, capsys, monkeypatch):
  monkeypatch.setattr(quick, 'live', lambda *_: {})
  with pytest.raises(SystemExit) as error:
    quick.main([flag])
  assert message in f'{error.value} {capsys.readouterr().err}'


@pytest.mark.slow
def test_the_life_that_is_compared_has_all_phases(tmp_path):
  seconds = quick.live(quick.ROOT, tmp_path)
  assert {'wake', 'rollout', 'update', 'eval'} <= set(seconds)
  assert all(x > 0 for x in seconds.values())


def test_sides_alternate():
  calls = []
  sides = {name: lambda name=name: calls.append(name) for name in 'ab'}
  seconds = timing.interleave(sides, timing.Plan(repeats=3))
  assert calls == list('ababbaab')  # The first pair is not counted.
  for spread in seconds.values():
    assert spread['n'] == 3
    assert spread['low'] <= spread['median'] <= spread['high']


def test_different_results_are_refused_before_timing():
  one = [np.ones(()), np.ones((2, 2)), np.ones((3, 2))]
  off = [one[0], one[1], one[2] * (1 + 1e-4)]
  assert max(jsd._parity(one, one).values()) == 0
  with pytest.raises(AssertionError, match='gradient of the matrix'):
    jsd._parity(off, one)


def test_accelerator_programs_lower():
  cfg = accelerator.model_config(TINY)
  lowered, (weights, _) = accelerator.train_step(cfg, 2, 8)
  assert 'bf16' in lowered.as_text()
  sampler = sampling.SamplerConfig(max_new=4, temperature=0.0)
  assert 'bf16' in accelerator.rollout(cfg, 2, 5, sampler).as_text()
  # All weights multiply but the norms'; the embedding does so as the head.
  norms = sum(
    x.size
    for path, x in jax.tree_util.tree_leaves_with_path(weights)
    if 'norm' in jax.tree_util.keystr(path)
  )
  assert accelerator.multiplying(cfg) == transformer.count(weights) - norms


@pytest.mark.slow
def test_decoding_casts_weights_to_the_compute_dtype():
  cfg = accelerator.model_config(TINY)
  params = transformer.init(cfg, jax.random.key(0))
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  sampler = sampling.SamplerConfig(max_new=4, temperature=0.0)
  prompts, lengths = jnp.ones((2, 5), jnp.int32), jnp.full((2,), 5)
  args = (prompts, lengths, jax.random.key(0), sampler)
  np.testing.assert_array_equal(
    sampling.generate(model_lib.Model(cfg, params), *args).tokens,
    sampling.generate(model_lib.Model(cfg, half), *args).tokens,
  )


@pytest.mark.parametrize(
  'name, value, told',
  [
    ('seconds_a_night', [1.0, 1.4], []),
    ('seconds_a_night', [1.0, 1.6], ['seconds_a_night']),
    ('bytes_written_a_night', [900.0, 1000.0], ['bytes_written_a_night']),
    ('bytes_of_checkpoints', [9e6, 1e7], ['bytes_of_checkpoints']),
    ('compilations_after', 1, ['programs']),
    ('file_descriptors', [6, 7], ['file descriptors']),
    ('rss_mb_per_1000_steps', 1.0, ['memory']),
  ],
)
def test_a_soak_tells_what_grows(name, value, told):
  flat = {
    'rss_mb_per_1000_steps': 0.9,
    'file_descriptors': [6, 6],
    'compilations_after': 0,
    'bytes_of_checkpoints': [1e7, 1e7],
    'bytes_written_a_night': [900.0, 950.0],
    'seconds_a_night': [1.0, 1.0],
  }
  assert not soak.grows(flat)
  assert soak.grows(flat | {name: value}) == told


@pytest.mark.slow
def test_thirty_nights_leave_nothing_behind(tmp_path):
  results = soak.soak(30 * 48, tmp_path)
  assert results['nights'] == 30 and results['compilations_after'] == 0
  before, after = results['file_descriptors']
  assert after <= before
  first, last = results['bytes_written_a_night']
  assert 0 < last < 1.2 * first


def test_scaling_gives_the_slope_between_the_largest_sizes():
  entries = [dict(size=s, seconds=1e-3 * s**2) for s in (1, 4, 16)]
  entries[0]['seconds'] = 9.0  # What does not depend on size.
  assert scaling.exponent(entries) == 2.0
  measured = scaling.measure('slots_in_use', (1, 2))
  small, large = measured['entries']
  assert large['bytes'] > small['bytes'] and large['seconds'] > 0
