"""Launchers: the scripts of every platform, compared with golden files.

After a change that is meant, write the goldens anew, and read their diff:

  python -m tests.launch_test
"""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import jsonschema
import psutil
import pytest
import yaml

from launch import background
from launch import cli
from launch import flags
from launch import hardware
from launch import job as job_lib
from launch import platforms
from launch import preflight
from sleep_jax import config
from tests import launch_schemas

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'launch'
_CLOUD = dict(
  project='my-project',
  zone='us-west4-a',
  bucket='gs://my-bucket',
  image='us-docker.pkg.dev/my-project/images/sleep-jax:tpu',
)
_TPU = dict(_CLOUD, accelerator='v5e:4x4', spot=True, mesh='fsdp=4,tensor=4')
_TWO_SLICES = dict(_TPU, cluster='pods', nodes=2, mesh='data=2,fsdp=4,tensor=4')
JOBS = {
  'local': dict(data_dir='/data'),
  'tpu_vm': _TPU,
  'gke': _TWO_SLICES,
  'xpk': _TWO_SLICES,
  'slurm': dict(
    accelerator='gpu:8',
    nodes=2,
    mesh='data=2,fsdp=2,tensor=4',
    partition='long',
    account='us',
    sbatch=('cpus-per-task=16',),
  ),
  'skypilot': _TPU,
}
CASES = list(itertools.product(JOBS, job_lib.VERBS))


@pytest.fixture(autouse=True)
def _tools_of_this_environment(monkeypatch):
  """`python` and `shellcheck` are those beside the running Python."""
  here = str(pathlib.Path(sys.executable).parent)
  monkeypatch.setenv('PATH', here, prepend=os.pathsep)


def job(platform: str, **changes) -> job_lib.Job:
  settings = dict(
    name='quickstart',
    config='experiments/configs/quickstart.py',
    # A value that a shell would split and expand, were it not quoted.
    overrides=("--config.name=it's *",),
  )
  return job_lib.Job(**(settings | JOBS[platform] | changes))


def golden(platform: str) -> str:
  """All verbs of a platform."""
  return '\n'.join(
    f'# === {verb}\n{cli.plan(platform, verb, job(platform))}'
    for verb in job_lib.VERBS
  )


def files(platform: str, verb: str) -> dict[str, str]:
  """The files that a plan writes."""
  steps = getattr(platforms.PLATFORMS[platform], verb)(job(platform))
  return {s.path: s.text for s in steps if isinstance(s, job_lib.File)}


@pytest.mark.parametrize('platform', JOBS)
def test_a_dry_run_prints_the_golden_script(platform):
  assert golden(platform) == (GOLDEN / f'{platform}.txt').read_text('utf-8')


@pytest.mark.parametrize('platform, verb', CASES)
def test_shellcheck_finds_nothing(platform, verb):
  scripts = [cli.plan(platform, verb, job(platform))]
  scripts += [
    text
    for path, text in files(platform, verb).items()
    if path.endswith(('.sh', '.sbatch'))
  ]
  for script in scripts:
    done = subprocess.run(
      ['shellcheck', '--shell=bash', '-'],
      input=script,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stdout


def test_yaml_matches_the_documented_schemas():
  seen = set()
  for platform, verb in CASES:
    for path, text in files(platform, verb).items():
      if not path.endswith('.yaml'):
        continue
      for document in yaml.safe_load_all(text):
        kind = document.get('kind', 'SkyPilot')
        schema = launch_schemas.KINDS.get(kind, launch_schemas.SKYPILOT)
        jsonschema.validate(document, schema)
        seen.add(kind)
  assert seen == {*launch_schemas.KINDS, 'SkyPilot'}


@pytest.mark.parametrize('where', ['spec', 'pod'])
def test_the_schema_refuses_a_misspelt_field(where):
  (text,) = files('gke', 'run').values()
  document = yaml.safe_load(text)
  jobs = document['spec']['replicatedJobs'][0]['template']['spec']
  {'spec': document['spec'], 'pod': jobs['template']['spec']}[where][
    'maxRestart'
  ] = 1
  with pytest.raises(jsonschema.ValidationError, match='maxRestart'):
    jsonschema.validate(document, launch_schemas.KINDS['JobSet'])


def test_a_jobset_has_a_pod_for_every_host():
  (text,) = files('gke', 'run').values()
  replicated = yaml.safe_load(text)['spec']['replicatedJobs'][0]
  pods = replicated['template']['spec']['parallelism']
  (container,) = replicated['template']['spec']['template']['spec'][
    'containers'
  ]
  chips = container['resources']['limits']['google.com/tpu']
  assert (replicated['replicas'], pods, chips) == (2, 4, 4)


@pytest.mark.parametrize('platform', JOBS)
def test_an_override_reaches_the_experiment_unchanged(platform):
  """Whatever a platform quotes, Python sees one argument."""
  script = cli.plan(platform, 'run', job(platform))
  for text in files(platform, 'run').values():
    script += text
  if platform == 'xpk':  # The whole command is one option's value.
    script = '\n'.join(shlex.split(script))
  quoted = (
    "'--config.name=it'\"'\"'s *'",  # By shlex.
    "--config.name=it's *",  # A YAML list.
  )
  assert any(form in script for form in quoted)


@pytest.mark.parametrize(
  'platform, changes, words',
  [
    ('slurm', dict(nodes=1, mesh='fsdp=8'), None),
    ('slurm', dict(nodes=2, mesh='fsdp=16'), '--coordinator=auto'),
    ('gke', dict(nodes=1, accelerator='v5e:2x2', mesh='fsdp=4'), None),
    (
      'gke',
      dict(nodes=1, accelerator='v5e:4x4', mesh='data=16'),
      '--coordinator=auto',
    ),
    (
      'skypilot',
      dict(nodes=2, accelerator='gpu:8', gpu_type='H100', mesh='fsdp=16'),
      '--process_id="$SKYPILOT_NODE_RANK"',
    ),
  ],
)
def test_processes_join_where_there_are_several(platform, changes, words):
  script = cli.plan(platform, 'run', job(platform, **changes))
  if words:
    assert words in script
  assert ('--coordinator' in script) == bool(words)


@pytest.mark.parametrize(
  'name, gcloud, hosts, machine',
  [
    ('v4:2x2x2', 'v4-16', 2, 'ct4p-hightpu-4t'),
    ('v5e:1x1', 'v5litepod-1', 1, 'ct5lp-hightpu-1t'),
    ('v5e:4x4', 'v5litepod-16', 4, 'ct5lp-hightpu-4t'),
    ('v5p:2x2x1', 'v5p-8', 1, 'ct5p-hightpu-4t'),
    ('v6e:4x8', 'v6e-32', 8, 'ct6e-standard-4t'),
  ],
)
def test_a_slice_has_the_names_google_gives_it(name, gcloud, hosts, machine):
  found = hardware.parse(name)
  assert (found.gcloud, found.hosts, found.machine) == (gcloud, hosts, machine)


@pytest.mark.parametrize(
  'platform, changes, words',
  [
    ('tpu_vm', dict(image=''), 'needs --image'),
    ('tpu_vm', dict(bucket=''), 'needs --bucket'),
    ('gke', dict(accelerator='gpu:8', mesh=''), 'this platform has tpu'),
    ('xpk', dict(cluster=''), 'needs --cluster'),
    (
      'slurm',
      dict(accelerator='v5e:4x4', mesh=''),
      'this platform has cpu or gpu',
    ),
    ('local', dict(bucket='gs://my-bucket'), 'mounts no bucket'),
    ('local', dict(name='Quick_Start'), "--name='Quick_Start'"),
    ('local', dict(nodes=0), '--nodes=0'),
    ('local', dict(nodes=2), 'is one machine'),
    ('local', dict(overrides=('--spott',)), "'--spott' is not a flag"),
    ('local', dict(workdir='gs://b/x'), 'mounted by --bucket'),
    ('local', dict(accelerator='v5e:3x3'), "accelerator='v5e:3x3'"),
    ('local', dict(accelerator='v5e:2x2x2'), "accelerator='v5e:2x2x2'"),
    (
      'slurm',
      dict(mesh='fsdp=8'),
      '--mesh=fsdp=8 has 8 devices, but 2 x gpu:8',
    ),
    ('slurm', dict(mesh=''), '--mesh=1 has 1 devices, but 2 x gpu:8 has 16'),
    ('slurm', dict(mesh='rows=16'), "--mesh='rows=16': write axis=size"),
    ('slurm', dict(sbatch=('nodes=4',)), 'the launcher sets nodes (--nodes)'),
    ('slurm', dict(sbatch=('-N 4',)), "--sbatch='-N 4' must be KEY=VAL"),
    ('slurm', dict(hours=-1), '--hours=-1 must be at least 1'),
    ('slurm', dict(grace=-5), '--grace=-5 must be at least 10'),
    ('slurm', dict(restarts=-1), '--restarts=-1 must be at least 0'),
    ('slurm', dict(partition='a b'), "--partition='a b' must be"),
    ('slurm', dict(overrides=('--config.mesh.fsdp=2',)), 'sets the mesh'),
    ('local', dict(overrides=('--config.workers',)), 'is not a flag'),
    ('gke', dict(gpu_type='H100'), '--gpu-type=H100 goes with'),
    ('gke', dict(bucket='gs://My_Bucket'), 'such as gs://my-bucket'),
    ('gke', dict(zone='us-west4'), 'a zone such as us-west4-a'),
    ('xpk', dict(bucket_gb=0), '--bucket-gb=0 must be at least 1'),
    ('tpu_vm', dict(jobs=2), '--jobs=2: this platform has no queue'),
    ('local', dict(jobs=2, share=1), '--jobs=2 is the number of lives at a'),
    (
      'local',
      dict(jobs=2, accelerator='gpu:1'),
      '--jobs=2 is the number of lives at a time on this platform, of CPUs',
    ),
    ('slurm', dict(jobs=2, share=3), '--share=3 must be one of the jobs'),
    ('slurm', dict(jobs=0), '--jobs=0 must be at least 1'),
    (
      'xpk',
      dict(accelerator='v5e:2x2', mesh='fsdp=8'),
      'slices of 8 chips or more',
    ),
    (
      'skypilot',
      dict(accelerator='gpu:8', mesh='fsdp=8'),
      'needs --gpu-type',
    ),
  ],
)
def test_an_invalid_job_is_refused(platform, changes, words):
  with pytest.raises(config.ConfigError, match=re.escape(words)):
    cli.plan(platform, 'run', job(platform, **changes))


@pytest.mark.parametrize('verb', ['create', 'delete'])
def test_machines_are_those_of_all_jobs(verb):
  with pytest.raises(config.ConfigError, match='--share=1 goes with run'):
    cli.plan('gke', verb, job('gke', jobs=2, share=1))


def test_a_sweep_has_machines_for_all_of_its_jobs():
  """Two jobs of two slices, of which each has 16 chips."""
  sweep = job('gke', jobs=2)
  script = cli.plan('gke', 'create', sweep)
  assert script.count('node-pools create') == 4
  assert cli.plan('gke', 'delete', sweep).count('node-pools delete') == 4
  _, queue, _ = platforms.PLATFORMS['gke'].queues(sweep)
  (flavor,) = queue['spec']['resourceGroups'][0]['flavors']
  assert flavor['resources'][0]['nominalQuota'] == '64'
  assert '--num-slices=4' in cli.plan('xpk', 'create', job('xpk', jobs=2))


@pytest.mark.parametrize('platform', ['slurm', 'gke', 'xpk', 'skypilot'])
def test_one_job_of_a_sweep_is_resumed_alone(platform):
  script = cli.plan(platform, 'resume', job(platform, jobs=3, share=2))
  assert '--share=2/3' in script and 'quickstart-2' in script
  assert 'quickstart-1' not in script and 'quickstart-3' not in script


@pytest.mark.parametrize(
  'flags, words',
  [
    (('--seeds=1,2', '--jobs=3'), '--jobs=3 share 2 lives'),
    (('--grid=sleep.stepz=1',), "no setting 'stepz'"),
    (('--grid=steps',), 'write SECTION.NAME=VALUE'),
    (('--arms=nap',), "arm='nap' is unknown"),
    (('--seeds=one',), "seeds[0]='one' must be"),
  ],
)
def test_a_sweep_that_cannot_be_is_refused(capsys, flags, words):
  small = '--config=tests/small_life.py:wake_only'
  assert cli.main(['run', '--platform=slurm', small, *flags]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert words in line


_TEXTS = [
  field.name
  for field in dataclasses.fields(job_lib.Job)
  if field.type in (str, tuple[str, ...])
]


@pytest.mark.parametrize('end', ['\n', '\r', '\0', '\x1b', '\x7f', '\u2028'])
@pytest.mark.parametrize('name', _TEXTS)
def test_a_control_character_is_refused_in_every_flag(name, end):
  """A line break in a flag would begin a line of a script."""
  valid = getattr(job('slurm'), name) or 'x'
  if isinstance(valid, tuple):
    value = (valid[0] + end + 'true',)
  else:
    value = valid + end + 'true'
  with pytest.raises(config.ConfigError, match='control character'):
    job('slurm', **{name: value})


def test_a_file_that_holds_the_delimiter_is_written_whole(tmp_path):
  text = 'a\nEND_OF_FILE\ntouch harmed\nEND_OF_FILE_\n$(touch harmed)'
  script = job_lib.script([job_lib.File('out/file', text)])
  subprocess.run(['bash', '-c', script], cwd=tmp_path, check=True)
  assert (tmp_path / 'out' / 'file').read_text() == f'{text}\n'
  assert not (tmp_path / 'harmed').exists()


def test_a_shipped_config_has_a_name(tmp_path, monkeypatch, capsys):
  """In any folder; the machine that runs it finds it by its name too."""
  monkeypatch.chdir(tmp_path)
  argv = ['--platform=local', 'run', '--config=facts:hard', '--dry-run']
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  assert '--config=facts:hard ' in out and '/facts-hard' in out


def test_a_missing_config_is_refused(capsys):
  argv = ['--platform=local', 'run', '--config=no/such.py', '--dry-run']
  assert cli.main(argv) == 2
  assert "there is no file 'no/such.py'" in capsys.readouterr().err


def test_a_dry_run_touches_nothing(tmp_path, capsys):
  folder = tmp_path / 'run'
  argv = ['--platform=local', 'run', '--dry-run', f'--workdir={folder}']
  assert cli.main([*argv, '--config=experiments/configs/quickstart.py']) == 0
  out = capsys.readouterr().out
  assert out.startswith('#!/usr/bin/env bash') and str(folder) in out
  assert not folder.exists()


_LOCAL = ('--platform=local', '--config=tests/small_life.py:wake_only')


def wait_for(condition, what: str) -> None:
  for _ in range(3000):
    if condition():
      return
    time.sleep(0.1)
  raise AssertionError(what)


def test_the_printed_script_is_the_one_that_runs(tmp_path):
  """Runs `local`: the run it starts refuses the folder of another config."""
  folder = tmp_path / 'a run'
  folder.mkdir()
  (folder / 'config.json').write_text('{"name": "other"}')
  assert cli.main(['run', *_LOCAL, f'--workdir={folder}']) == 0
  log = folder / 'log'
  wait_for(lambda: 'rror' in log.read_text(), 'the run said nothing')
  assert 'holds a run of another config' in log.read_text()
  # The file that names its process goes with it.
  wait_for(lambda: not (folder / 'pid').exists(), 'pid is left')


def test_a_setting_that_cannot_work_is_refused_before_anything_is_started(
  tmp_path, capsys
):
  folder = tmp_path / 'run'
  argv = [*_LOCAL, f'--workdir={folder}', '--config.task.name=factz']
  assert cli.main(['run', *argv]) == 2
  assert "task.name='factz' is unknown" in capsys.readouterr().err
  assert not folder.exists()


_SLEEP = ('sleep', '600')


def test_a_background_command_is_ended_once_and_its_file_goes(tmp_path, capfd):
  assert background.start(tmp_path, _SLEEP) == 0
  pid = json.loads((tmp_path / 'pid').read_text())['pid']
  assert psutil.Process(pid).cmdline() == [*_SLEEP]
  assert background.start(tmp_path, _SLEEP) == 1  # It runs already.
  assert f'process {pid} runs already' in capfd.readouterr().err
  assert background.stop(tmp_path) == 0
  wait_for(lambda: not (tmp_path / 'pid').exists(), 'pid is left')
  assert not psutil.pid_exists(pid)
  assert background.stop(tmp_path) == 1
  assert 'nothing runs' in capfd.readouterr().err


@pytest.mark.parametrize('started', [0.0, None, 'of this process, less a day'])
def test_a_stale_file_neither_ends_a_stranger_nor_bars_a_start(
  tmp_path, started
):
  """The number of a process that has ended may be another's by now."""
  with subprocess.Popen(_SLEEP) as stranger:
    try:
      record: dict[str, object] = {'pid': stranger.pid, 'started': started}
      if isinstance(started, str):
        own = psutil.Process(stranger.pid).create_time()
        record['started'] = own - 86400
      (tmp_path / 'pid').write_text(json.dumps(record))
      assert background.stop(tmp_path) == 1
      assert stranger.poll() is None and not (tmp_path / 'pid').exists()
      (tmp_path / 'pid').write_text(f'{stranger.pid}\n')  # Of version 0.2.
      assert background.start(tmp_path, ('true',)) == 0
      assert stranger.poll() is None
    finally:
      stranger.kill()


def test_every_flag_has_a_source_and_only_its_accelerator_gets_it():
  assert all(f.source.startswith('https://') and f.why for f in flags.FLAGS)
  v5e, v6e = (flags.environment('tpu', g) for g in ('v5e', 'v6e'))
  vmem = '--xla_tpu_scoped_vmem_limit_kib'
  assert vmem in v6e['LIBTPU_INIT_ARGS'] and vmem not in v5e['LIBTPU_INIT_ARGS']
  assert 'LIBTPU_INIT_ARGS' not in flags.environment('gpu')
  assert '--xla_gpu_deterministic_ops=true' in (
    flags.environment('gpu')['XLA_FLAGS'].split()
  )


def test_a_ready_machine_passes(tmp_path, capsys):
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'file').write_text('x')
  status = preflight.main(
    [
      f'--workdir={tmp_path / "run"}',
      f'--data-dir={tmp_path / "data"}',
      '--memory-gib=0.1',
      '--disk-gib=0.01',
    ]
  )
  assert status == 0, capsys.readouterr().out
  assert not (tmp_path / 'run').exists()  # Nothing remains.


@pytest.mark.parametrize(
  'flag, words',
  [
    ('--accelerator=v5e:4x4', 'devices: JAX runs on cpu, but tpu'),
    ('--memory-gib=1e9', 'memory: '),
    ('--disk-gib=1e9', 'workdir: '),
    ('--mesh=fsdp=64', 'mesh: --mesh=fsdp=64 has 64 devices, but 1 such'),
    ('--data-dir=/no/such', "data: data folder '/no/such' does not exist"),
    ('--workdir=/dev/null/run', 'workdir: /dev/null/run cannot be written'),
  ],
)
def test_a_machine_that_is_not_ready_fails_the_check(
  tmp_path, capsys, flag, words
):
  status = preflight.main([f'--workdir={tmp_path / "run"}', flag])
  assert status == 1
  assert f'FAIL  {words}' in capsys.readouterr().out


if __name__ == '__main__':
  GOLDEN.mkdir(parents=True, exist_ok=True)
  for name in JOBS:
    (GOLDEN / f'{name}.txt').write_text(golden(name), encoding='utf-8')
  sys.exit()
