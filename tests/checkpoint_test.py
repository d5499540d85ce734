"""Checkpoints: corrupt ones are skipped, foreign ones refused; NaN checks."""

import logging
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.harness import live as live_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import files
from sleep_jax.runtime import finite
from sleep_jax.runtime import sharding
from sleep_jax.runtime import termination
from tests import conftest
from tests import run_test

ROOT = run_test.ROOT


def life_of(value: float, learner_state=None) -> dict:
  return {
    'params': {
      'w': value + jax.random.normal(jax.random.key(0), (32, 32)),
      'b': jnp.full((3,), value, jnp.bfloat16),
    },
    'rng': jax.random.PRNGKey(3),
    'learner_state': np.zeros((0,)) if learner_state is None else learner_state,
  }


def snapshot(night: int, phase: str, life=None) -> checkpoint.Snapshot:
  life = life_of(night) if life is None else life
  return checkpoint.Snapshot(night, phase, life, {'x': 0.1})


@pytest.fixture(name='two')
def _two(tmp_path):
  """A folder with two checkpoints."""
  saved = checkpoint.Checkpoints(tmp_path / 'c', 'me')
  saved.save(snapshot(1, 'wake'))
  saved.save(snapshot(2, 'sleep', life_of(2, np.arange(5))))
  saved.close()
  return tmp_path / 'c'


def newest(folder, template=None, identity='me'):
  saved = checkpoint.Checkpoints(folder, identity)
  try:
    return saved.newest(life_of(0) if template is None else template)
  finally:
    saved.close()


def same(a, b) -> bool:
  return jax.tree.all(
    jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
  )


def test_a_life_is_restored_bit_for_bit(two):
  found = newest(two)
  assert (found.night, found.phase, found.notes) == (2, 'sleep', {'x': 0.1})
  assert same(found.life, life_of(2, np.arange(5)))
  # Uncommitted, as the leaves of a new life are.
  assert not found.life['params']['w'].committed


@pytest.mark.parametrize('small,arrays', [(0, 3), (100, 2), (2**20, 1)])
def test_large_leaves_are_not_packed(tmp_path, monkeypatch, small, arrays):
  monkeypatch.setattr(checkpoint, '_PACK_BELOW_BYTES', small)
  life = life_of(2) | {'more': {'b': jnp.arange(4.0, dtype=jnp.bfloat16)}}
  saved = checkpoint.Checkpoints(tmp_path, 'me')
  saved.save(snapshot(0, 'wake', life))
  saved.close()
  assert same(newest(tmp_path, life).life, life)
  leaves = {'w': np.zeros(30), 'b': np.ones(2), 'c': np.ones((2, 1))}
  written, packed = checkpoint._pack(leaves)
  assert len(written) == arrays
  assert same(checkpoint.unpack(written, packed), leaves)


def test_a_corrupt_checkpoint_is_skipped(two, caplog):
  intact = newest(two)
  corrupt = 0
  paths = sorted(p for p in (two / '5').rglob('*') if p.is_file())
  for path in paths:
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    for damaged in (data[:middle], None, flipped):
      path.unlink() if damaged is None else path.write_bytes(damaged)
      caplog.clear()
      with caplog.at_level(logging.ERROR, 'absl'):
        found = newest(two)
      if found.night == 2:
        assert same(found.life, intact.life) and found.notes == intact.notes
      else:
        corrupt += 1
        assert (found.night, found.phase) == (1, 'wake')
        assert same(found.life, life_of(1))
        assert '5 is corrupt and is skipped' in caplog.text
        (two / 'corrupt-5').rename(two / '5')
      path.write_bytes(data)
  assert corrupt >= 15
  assert newest(two).night == 2


def test_a_corrupt_step_can_be_saved_again(two):
  (two / '5' / 'life' / 'manifest.ocdbt').write_bytes(b'')
  saved = checkpoint.Checkpoints(two, 'me')
  assert saved.newest(life_of(0)).night == 1
  saved.save(snapshot(2, 'sleep'))
  saved.close()
  assert newest(two).night == 2


@pytest.mark.parametrize('jump', [-365, 365])
def test_a_clock_that_jumps_by_a_year_changes_nothing(two, monkeypatch, jump):
  """The newest checkpoint is that of the latest phase, whatever its date."""
  for name, unit in (('time', 1), ('time_ns', 10**9)):
    now = getattr(time, name)
    shift = jump * 86400 * unit
    monkeypatch.setattr(time, name, lambda now=now, by=shift: now() + by)
  saved = checkpoint.Checkpoints(two, 'me')
  saved.save(snapshot(3, 'wake', life_of(3)))
  saved.close()
  monkeypatch.undo()
  assert newest(two).night == 3
  kept = [p.name for p in two.iterdir() if p.name.isdigit()]
  assert sorted(kept) == ['5', '6']


def test_no_readable_checkpoint_is_an_error(two):
  for step in ('2', '5'):
    (two / step / 'meta' / 'metadata').unlink()
  with pytest.raises(config.ConfigError, match=r'none of .*\[2, 5\] can be'):
    newest(two)


def test_an_empty_folder_holds_no_life(tmp_path):
  assert newest(tmp_path / 'new') is None


@pytest.mark.parametrize(
  'template, identity, words',
  [
    (life_of(0), 'you', 'of another config'),
    (life_of(0) | {'extra': np.ones(2)}, 'me', 'missing, which this learner'),
    (
      {k: v for k, v in life_of(0).items() if k != 'rng'},
      'me',
      'which this learner does not have',
    ),
    (life_of(0) | {'rng': np.zeros(3)}, 'me', r'rng.* is uint32\[2\], and'),
  ],
)
def test_a_checkpoint_of_another_life_is_refused(
  two, template, identity, words
):
  with pytest.raises(config.ConfigError, match=words):
    newest(two, template, identity)


def test_a_checkpoint_of_another_version_is_refused(two, monkeypatch):
  monkeypatch.setattr(checkpoint, 'FORMAT', 99)
  with pytest.raises(config.ConfigError, match='has format 5, and this'):
    newest(two)


@pytest.mark.parametrize(
  'version, reader', [(1, '0.1'), (2, '0.1'), (3, '0.1'), (4, '0.2')]
)
def test_an_older_format_names_the_version_that_reads_it(
  tmp_path, monkeypatch, version, reader
):
  monkeypatch.setattr(checkpoint, 'FORMAT', version)
  saved = checkpoint.Checkpoints(tmp_path, 'me')
  saved.save(snapshot(0, 'wake'))
  saved.close()
  monkeypatch.undo()
  words = rf'format {version}, .* reads format 5. Use sleep_jax {reader}, or'
  with pytest.raises(config.ConfigError, match=words):
    newest(tmp_path)


@pytest.mark.parametrize('devices', [1, 2, 4])
def test_a_life_is_restored_on_another_number_of_devices(tmp_path, devices):
  def placed(n: int, value: float):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh(
      (n,), ('data',), axis_types=auto, devices=jax.devices()[:n]
    )
    spec = jax.sharding.NamedSharding(mesh, jax.P('data'))
    life = life_of(value)
    return life | {'params': {'w': jax.device_put(life['params']['w'], spec)}}

  saved = checkpoint.Checkpoints(tmp_path, 'me')
  saved.save(snapshot(0, 'wake', placed(8, 7.0)))
  saved.close()
  template = placed(devices, 0.0)
  found = newest(tmp_path, template).life
  assert same(found['params'], {'w': life_of(7.0)['params']['w']})
  if devices > 1:
    assert found['params']['w'].sharding == template['params']['w'].sharding


def test_a_life_with_a_memory_is_restored(tmp_path, cfg):
  model = conftest.build_model(cfg)
  life = life_lib.init_life(model, jax.random.PRNGKey(0))
  changed = life.with_memory(conftest.random_memory(cfg))
  saved = checkpoint.Checkpoints(tmp_path, 'me')
  saved.save(snapshot(0, 'wake', changed))
  saved.close()
  assert same(newest(tmp_path, life).life, changed)


def base_life(value: float) -> dict:
  """A life by its leaves; its weights are those that a base has."""
  params = {'w': value + jax.random.normal(jax.random.key(0), (600, 600))}
  memory = {'a': jnp.full(3, 1.0 * value)}
  return {'model': {'params': params, 'memory': memory}}


def test_a_base_that_never_changes_is_named_and_not_saved(tmp_path):
  life = base_life(2)
  digest = checkpoint.weights_digest(life['model']['params'])
  for folder, base in ('whole', ''), ('changed', digest):
    saved = checkpoint.Checkpoints(tmp_path / folder, 'me', base)
    saved.save(snapshot(0, 'wake', life))
    saved.close()
  sizes = [
    sum(p.stat().st_size for p in (tmp_path / f).rglob('*') if p.is_file())
    for f in ('whole', 'changed')
  ]
  assert sizes[0] > 1_000_000 > 20 * sizes[1]
  # What is said of a save by shape is what lies on the disk, compressed.
  assert 0.8 < sizes[0] / checkpoint.saved_bytes(life) < 1.2
  assert checkpoint.saved_bytes(life, digest) == 12
  # All but the base comes from the disk; the base is the template's own.
  template = base_life(2)
  template['model']['memory'] = {'a': jnp.zeros(3)}
  saved = checkpoint.Checkpoints(tmp_path / 'changed', 'me', digest)
  restored = saved.newest(template).life
  saved.close()
  assert same(restored, life)
  assert restored['model']['params']['w'] is template['model']['params']['w']


def test_a_life_of_another_base_is_refused(tmp_path):
  digests = [
    checkpoint.weights_digest(base_life(x)['model']['params']) for x in (1, 2)
  ]
  assert len(set(digests)) == 2
  checkpoint.save_life(tmp_path / 'one', base_life(1), digests[0], by='me')
  life, notes = checkpoint.load_life(tmp_path / 'one', base_life(1), digests[0])
  assert same(life, base_life(1)) and notes == {'by': 'me'}
  for base in (digests[1], ''):
    with pytest.raises(config.ConfigError, match='bring back the weights'):
      checkpoint.load_life(tmp_path / 'one', base_life(1), base)
  with pytest.raises(config.ConfigError, match='no life was saved'):
    checkpoint.load_life(tmp_path / 'none', base_life(1), digests[0])


def test_the_digest_of_weights_is_the_same_on_any_mesh(monkeypatch):
  def build():
    return {'level_1': {'gate': jnp.arange(64.0).reshape(2, 4, 8)}}

  params = build()
  digest = checkpoint.weights_digest(params)
  with sharding.use_mesh({'fsdp': 4, 'tensor': 2}):
    placed = sharding.shard_params(build())
    assert len(jax.tree.leaves(placed)[0].sharding.device_set) == 8
    assert checkpoint.weights_digest(placed) == digest
    # As of a mesh of several processes: a block at a time, of every kind.
    monkeypatch.setattr(checkpoint, '_is_addressable', lambda _: False)
    for size in (1, 32 * 4 * 4, 2**20):
      monkeypatch.setattr(checkpoint, '_BLOCK_BYTES', size)
      assert checkpoint.weights_digest(placed) == digest
  other = jax.tree.map(lambda x: x.at[0, 0, 0].set(1e-9), params)
  assert checkpoint.weights_digest(other) != digest


def test_a_full_disk_is_an_error_and_the_previous_checkpoint_is_intact(two):
  saved = checkpoint.Checkpoints(two, 'me')
  big = np.random.default_rng(0).random((300, 300))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
  try:
    with pytest.raises(checkpoint.SaveError, match='cannot save: .*[Tt]oo'):
      saved.save(snapshot(3, 'wake', life_of(3, big)))
      saved.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert newest(two).night == 2


def test_a_folder_is_locked_by_one_process(tmp_path, monkeypatch):
  monkeypatch.setattr(files, '_LOCK_TIMEOUT', 0.2)
  with files.lock_dir(tmp_path):
    with pytest.raises(config.ConfigError, match='another process is using'):
      with files.lock_dir(tmp_path):
        pass
  with files.lock_dir(tmp_path):
    pass


def test_a_work_directory_that_cannot_be_written_is_an_error():
  done = run_test.command('/proc/no/place')
  assert done.returncode == 1 and 'error: ' in done.stderr
  assert '/proc/no' in done.stderr and 'Traceback' not in done.stderr


def test_a_life_without_its_checkpoints_does_not_start_again(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"night": 0}\n')
  with pytest.raises(config.ConfigError, match='tells of nights'):
    live_lib.live(run_test.small_config(), 'sleep', 1, tmp_path, 0)


@pytest.mark.parametrize(
  'arm, section, where, left',
  [
    ('sleep', 'sleep', 'night 0: sleep, seeding of level 2, step [0-9]', 0),
    ('sft', 'finetune', 'night 0: wake, step [0-9]+: .* leaf is ', None),
  ],
)
def test_a_nan_names_phase_step_and_leaf(tmp_path, arm, section, where, left):
  c = run_test.small_config([arm])
  c['sleep'].update(
    alpha=1.0, lam=0.0
  )  # No rollouts, which take long to compile.
  c[section]['learning_rate'] = 1e38
  with pytest.raises(finite.NotFinite, match=where):
    live_lib.live(c, arm, 1, tmp_path, 0)
  steps = [p.name for p in (tmp_path / 'checkpoints').iterdir()]
  assert steps == ([] if left is None else [str(left)])


def test_the_first_bad_step_and_leaf_are_named():
  tree = {'a': jnp.ones(2), 'b': {'c': jnp.array([0.0, jnp.inf])}}
  with pytest.raises(finite.NotFinite, match=r"step 12: .*leaf is \['b'\]\['c"):
    finite.check_finite(
      'nap', np.array([1.0, 2.0, np.nan]), tree, first_step=10
    )
  with pytest.raises(finite.NotFinite, match='all weights are finite'):
    finite.check_finite('nap', np.array([np.inf]), {'a': jnp.ones(2)})
  with pytest.raises(finite.NotFinite, match='step 1: .*leaf is'):
    finite.check_finite('nap', np.ones(2), tree)
  finite.check_finite('nap', np.ones(2), {'a': jnp.ones(2), 'n': jnp.arange(3)})


@pytest.mark.parametrize(
  'workers', [1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_sigterm_ends_a_quickstart_within_ten_seconds(tmp_path, workers):
  started = subprocess.Popen(
    [
      sys.executable,
      '-m',
      'experiments.run',
      '--config=experiments/configs/quickstart.py',
      f'--config.workers={workers}',
      f'--workdir={tmp_path / "w"}',
    ],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  end = time.monotonic() + 300
  while not list(tmp_path.glob('w/lives/sft_1/checkpoints/[0-9]')):
    assert started.poll() is None and time.monotonic() < end
    time.sleep(0.1)
  started.send_signal(signal.SIGTERM)
  sent = time.monotonic()
  _, stderr = started.communicate(timeout=60)
  assert time.monotonic() - sent < 10
  assert started.returncode == termination.EXIT_CODE
  assert 'The same command resumes' in stderr and 'Traceback' not in stderr
  with files.lock_dir(tmp_path / 'w' / 'lives' / 'sft_1'):  # No worker is left.
    pass
