"""What launchers render is accepted by those who read it.

The runner is this project's own. Of others' tools, those that are not installed
are left out: xpk and skypilot (each in an environment of its own, for their
requirements differ from ours), and sbatch of Slurm.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from launch import cli
from launch import doctor
from launch import job as job_lib
from launch import mesh
from launch import platforms
from launch import preflight
from sleep_jax import config
from tests import launch_test
from tests import launch_tools

_CONFIG = 'tests/small_life.py:wake_only'
_TPUS = ('v4:2x2x2', 'v5e:1x1', 'v5e:4x4', 'v5p:2x2x1', 'v6e:2x4')
_GPUS = ('cpu', 'gpu:1', 'gpu:8')
_ACCELERATORS = {
  'local': _GPUS,
  'slurm': _GPUS,
  'skypilot': _GPUS + _TPUS,
  'tpu_vm': _TPUS,
  'gke': _TPUS,
  'xpk': _TPUS,
}
# All others: one, and two.
_NODES: dict[str, tuple[int, ...]] = {'local': (1,)}
_SWEEP = dict(grid=('wake.batch=16,32',), seeds='1,2')
_ONE_JOB = ('local', 'tpu_vm')  # All others: two, which share a sweep.


@functools.cache
def _mesh(nodes: int, devices: int) -> str:
  needed = mesh.demand(mesh.load_config(_CONFIG, ()))
  return mesh.text_of(mesh.choose(needed, nodes, devices))


def jobs(platform: str) -> list[job_lib.Job]:
  """Jobs of a platform on every accelerator that it has, and a sweep."""
  out = []
  machines: itertools.product[tuple[str, int]] = itertools.product(
    _ACCELERATORS[platform], _NODES.get(platform, (1, 2))
  )
  for accelerator, nodes in machines:
    changes: dict[str, Any] = dict(accelerator=accelerator, nodes=nodes)
    changes |= dict(config=_CONFIG, mesh='', spot=nodes == 2)
    if accelerator.startswith('gpu'):
      changes |= dict(gpu_type='H100')
    job = launch_test.job(platform, **changes)
    job = dataclasses.replace(job, mesh=_mesh(nodes, job.devices))
    try:
      cli.plan(platform, 'run', job)
    except config.ConfigError:  # The platform does not have it, and says so.
      assert (platform, accelerator) == ('xpk', 'v5e:1x1')
      continue
    out.append(job)
  count = 1 if platform in _ONE_JOB else 2
  return [*out, dataclasses.replace(out[0], **_SWEEP, jobs=count)]


@pytest.fixture(name='calls', scope='module')
def _calls(tmp_path_factory):
  """By platform, verb and job: what its script did, and the YAML it wrote."""
  found, by_script = {}, {}
  for platform in platforms.PLATFORMS:
    folder = tmp_path_factory.mktemp(platform)
    for verb, job in itertools.product(job_lib.VERBS, jobs(platform)):
      script = cli.plan(platform, verb, job)
      if script not in by_script:
        by_script[script] = _execute(script, folder)
      found[platform, verb, job] = by_script[script]
  return found


def _execute(
  script: str, folder: pathlib.Path
) -> tuple[launch_tools.Calls, list[Any], dict[str, str], pathlib.Path]:
  shutil.rmtree(folder / 'runs', ignore_errors=True)
  calls = launch_tools.run(script, folder)
  assert calls.status == 0, (script, calls.errors)
  files = {
    str(path.relative_to(folder)): path.read_text()
    for path in folder.glob('runs/launch/*/*')
  }
  texts = [text for name, text in files.items() if name.endswith('.yaml')]
  documents = [d for text in texts for d in yaml.safe_load_all(text)]
  return calls, documents, files, folder


def _runs(platform, calls, documents, files, folder) -> list[tuple[str, ...]]:
  """What the runner is given, by whichever way the platform starts it."""
  del files
  if platform == 'gke':
    return launch_tools.container_runs(documents)
  if platform == 'skypilot':
    return [
      run for task in documents for run in launch_tools.node_runs(task, folder)
    ]
  return calls.runs()


def test_the_runner_accepts_every_command(calls):
  """Each run and resume starts every job once, and it builds every arm."""
  commands = set()
  for (platform, verb, job), done in calls.items():
    runs = _runs(platform, *done)
    expected = len(job.shares()) if verb in ('run', 'resume') else 0
    assert len(runs) == expected, (platform, verb, job)
    for argv in runs:
      assert argv[0] == f'experiments.{"sweep" if job.grid else "run"}'
      sizes = [a for a in argv if a.startswith('--config.mesh')]
      product = math.prod(int(a.rpartition('=')[2]) for a in sizes)
      assert product == job.devices, (platform, job, argv)
      assert "--config.name=it's *" in argv
      assert any('--coordinator' in a for a in argv) == (job.processes > 1)
      # Where it lies does not matter to the checks.
      commands.add(tuple(a for a in argv if not a.startswith('--workdir')))
  for argv, (status, line) in launch_tools.dry_starts(sorted(commands)).items():
    count = '2 arms x 2 seeds' if 'experiments.sweep' in argv else '1 arms'
    assert status == 0 and line.startswith(f'ready: {count}'), (argv, line)


def test_the_jobs_of_a_sweep_share_all_lives_of_one_work_directory(calls):
  for (platform, verb, job), done in calls.items():
    if verb != 'run' or job.jobs == 1:
      continue
    runs = _runs(platform, *done)
    found = [
      {a for a in argv if a.startswith(('--share', '--workdir'))}
      for argv in runs
    ]
    assert found == [
      {f'--share={i}/2', f'--workdir={job.folder}'} for i in (1, 2)
    ]


def test_a_job_of_several_gpus_gives_each_process_all_of_its_machine(calls):
  """JAX restricts a task of Slurm to one GPU, unless it is told which."""
  for (platform, verb, job), (_, documents, files, _) in calls.items():
    if verb != 'run' or platform not in ('slurm', 'skypilot'):
      continue
    if platform == 'slurm':
      script = files[f'{job.shares()[0].files}/job.sbatch']
      given = re.search(r'export JAX_LOCAL_DEVICE_IDS=(.*)', script)
      ids = given[1] if given else ''
    else:
      ids = documents[0]['envs'].get('JAX_LOCAL_DEVICE_IDS', '')
    several = job.machine.kind == 'gpu' and job.nodes > 1
    expected = range(job.machine.count) if several else ()
    assert ids == ','.join(map(str, expected))


def test_slurm_writes_its_output_into_a_folder_that_is_there(tmp_path):
  job = launch_test.job('slurm')
  done = launch_tools.run(cli.plan('slurm', 'run', job), tmp_path)
  assert done.of('sbatch') and (tmp_path / job.folder).is_dir()
  text = (tmp_path / job.files / 'job.sbatch').read_text()
  assert f'#SBATCH --output={job.folder}/log\n' in text


@pytest.mark.parametrize(
  'code, restarts, again',
  [
    (0, 0, False),
    (1, 0, False),  # An error of the config, or of the run.
    (143, 0, True),
    (134, 9, True),
    (143, 10, False),
  ],
)
def test_slurm_starts_a_run_again_if_it_was_stopped_and_not_for_ever(
  tmp_path, code, restarts, again
):
  launch_tools.run('true', tmp_path)
  srun = tmp_path / 'tools' / 'srun'
  srun.write_text(f'{srun.read_text()}\nexit {code}')
  job = launch_test.job('slurm')
  script = platforms.PLATFORMS['slurm'].batch(job)
  environment = dict(SLURM_JOB_ID='7', SLURM_RESTART_COUNT=str(restarts))
  done = launch_tools.run(script, tmp_path, **environment)
  assert done.status == code
  assert (done.of('scontrol') == [['scontrol', 'requeue', '7']]) == again


def _tool(name: str) -> str:
  """The path of an installed tool."""
  path = shutil.which(name)
  if path is None:
    pytest.skip(f'{name} is not installed')
  return path


_PARSE_XPK = """
import argparse, json, sys
from xpk.parser import core
parser = argparse.ArgumentParser()
core.set_parser(parser)
for argv in json.load(sys.stdin):
  print(argv, file=sys.stderr)
  args = parser.parse_args(argv)
  if argv[:2] == ['storage', 'attach']:  # Its parser lets it be left out.
    assert args.manifest or args.size, 'storage attach needs --size'
"""


def test_the_parser_of_xpk_reads_every_command(calls):
  python = pathlib.Path(_tool('xpk')).parent / 'python'
  argvs = {
    tuple(argv[1:])
    for (platform, *_), (done, *_) in calls.items()
    if platform == 'xpk'
    for argv in done.of('xpk')
  }
  unsized = ('storage', 'attach', 'b', '--cluster=c', '--type=gcsfuse')
  misspelt = ('workload', 'list', '--cluster=c', '--zome=us-west4-a')
  for lines, good in (
    ([*argvs], True),
    ([unsized], False),
    ([misspelt], False),
  ):
    done = subprocess.run(
      [python, '-c', _PARSE_XPK],
      input=json.dumps(lines),
      capture_output=True,
      text=True,
      check=False,
    )
    assert (done.returncode == 0) == good, done.stderr[-1000:]
  assert len(argvs) > 10


@pytest.mark.slow
def test_xpk_accepts_every_command(calls, tmp_path):
  """And makes of it the slices, pods and restarts that the job means."""
  xpk, seen = _tool('xpk'), set()
  for (platform, _, job), (done, *_) in calls.items():
    for argv in done.of('xpk') if platform == 'xpk' else ():
      if (what := tuple(argv)) in seen:
        continue
      seen.add(what)
      manifest = tmp_path / 'manifest.yaml'
      more = [f'--output-manifest-file={manifest}'] * (
        argv[1:3] == ['workload', 'create']
      )
      if argv[1] == 'storage':  # Talks to the cluster, also in a dry run.
        continue
      ran = subprocess.run(
        [xpk, *argv[1:], '--dry-run', '--skip-validation', *more],
        env=os.environ | dict(HOME=str(tmp_path)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
      )
      assert ran.returncode == 0, (argv, ran.stdout[-500:], ran.stderr[-500:])
      if more:
        _check_manifest(yaml.safe_load(manifest.read_text()), job)
  assert len(seen) > 10


def _check_manifest(jobset: dict, job: job_lib.Job) -> None:
  spec = jobset['spec']
  (replicated,) = spec['replicatedJobs']
  template = replicated['template']['spec']
  (container,) = template['template']['spec']['containers']
  chips = container['resources']['limits']['google.com/tpu']
  assert replicated['replicas'] == job.nodes
  assert template['parallelism'] * chips == job.machine.count
  assert spec['failurePolicy']['maxRestarts'] == job.restarts
  (rule,) = template['podFailurePolicy']['rules']
  assert rule['action'] == 'FailJob'
  again = rule['onExitCodes']['values']
  assert {*job_lib.RESTARTED} <= {*again} and not {1, 2} & {*again}
  assert rule['onExitCodes']['operator'] == 'NotIn'


@pytest.mark.slow
def test_gcloud_parses_every_command(tmp_path):
  """Of one job a platform: gcloud reads its arguments, and finds no account."""
  gcloud, seen = _tool('gcloud'), set()
  for platform in ('gke', 'tpu_vm', 'xpk'):
    job, module = launch_test.job(platform), platforms.PLATFORMS[platform]
    seen |= {probe.argv for probe in module.probes(job).values()}
    for verb in job_lib.VERBS:
      script = cli.plan(platform, verb, job)
      seen |= {*map(tuple, launch_tools.run(script, tmp_path).of('gcloud'))}
  offline = dict(
    CLOUDSDK_CONFIG=str(tmp_path), CLOUDSDK_CORE_CHECK_GCE_METADATA='false'
  )
  bad = ('gcloud', 'compute', 'tpus', 'queued-resources', 'list', '--zome=x')
  for argv in [*sorted(seen), bad]:
    done = subprocess.run(
      [gcloud, *argv[1:]],
      env=os.environ | offline | dict(CLOUDSDK_CORE_DISABLE_PROMPTS='1'),
      capture_output=True,
      text=True,
      check=False,
    )
    parsed = 'active account' in done.stderr
    assert parsed == (argv != bad), (argv, done.stderr)


@pytest.mark.slow
def test_skypilot_accepts_every_task_and_command(calls, tmp_path):
  sky = _tool('sky')
  seen, tasks = {}, []
  for (platform, *_), (done, documents, *_) in calls.items():
    if platform == 'skypilot':
      tasks += documents
      for argv in done.of('sky'):
        argv = [a if a[0] != 'r' else '/dev/null' for a in argv[1:]]
        seen[tuple(argv)] = argv
  code = """
import json, sys, click, jsonschema
from sky.client.cli import command
from sky.utils import schemas
tasks, argvs = json.load(sys.stdin)
for task in tasks:
  jsonschema.validate(task, schemas.get_task_schema())
  jsonschema.validate(task['resources'], schemas.get_resources_schema())
for argv in argvs:
  cmd, parent = command.cli, None
  while True:
    parent = cmd.make_context('sky', list(argv), parent=parent)
    if not hasattr(cmd, 'resolve_command'):
      break
    left = [*parent.protected_args, *parent.args]
    _, cmd, argv = cmd.resolve_command(parent, left)
"""
  done = subprocess.run(
    [pathlib.Path(sky).parent / 'python', '-c', code],
    input=json.dumps([tasks, [*seen.values()]]),
    env=os.environ | dict(HOME=str(tmp_path)),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert len(seen) >= 4 and tasks


@pytest.mark.slow
def test_sbatch_parses_every_script(tmp_path):
  """Without a cluster it stops after its options: no controller answers."""
  sbatch, seen = _tool('sbatch'), set()
  conf = tmp_path / 'slurm.conf'
  conf.write_text('ClusterName=none\nSlurmctldHost=none(127.0.0.1)\n')
  with conf.open('a') as file:
    file.write('SlurmctldPort=9\nAuthType=auth/none\nCredType=cred/none\n')
    file.write('MessageTimeout=2\nGresTypes=gpu\nNodeName=n1\n')
  for job in jobs('slurm'):
    job = dataclasses.replace(
      job, sbatch=('cpus-per-task=16', 'exclusive', 'mem=64G'), workdir="a 'b%"
    )
    seen.add(platforms.PLATFORMS['slurm'].batch(job.shares()[0]))
  script = tmp_path / 'job.sbatch'
  for text in [*seen, '#!/bin/bash\n#SBATCH --nodez=2\n']:
    script.write_text(text)
    done = subprocess.run(
      [sbatch, '--test-only', script],
      env=os.environ | dict(SLURM_CONF=str(conf)),
      capture_output=True,
      text=True,
      check=False,
    )
    parsed = 'Unable to contact slurm controller' in done.stderr
    assert parsed == (text in seen), done.stderr


def test_kubernetes_models_hold_every_field_of_a_jobset(calls):
  """Models that are generated from the API drop fields that it has not."""
  name = 'kubeflow_trainer_api.models.jobset_v1alpha2_job_set'
  models = pytest.importorskip(name)
  count = 0
  for (platform, verb, _), (_, documents, *_) in calls.items():
    for document in documents if platform == 'gke' and verb == 'run' else ():
      model = models.JobsetV1alpha2JobSet.from_dict(document)
      _assert_holds(json.loads(model.to_json()), document)
      count += 1
  assert count


def _assert_holds(got: Any, want: Any) -> None:
  """Whether all of `want` is in `got`, which has defaults beside it."""
  if isinstance(want, dict):
    for key, value in want.items():
      assert key in got, key
      _assert_holds(got[key], value)
  elif isinstance(want, list):
    assert len(got) == len(want)
    for a, b in zip(got, want):
      _assert_holds(a, b)
  else:
    assert got == want


def _documented() -> list[str]:
  """Every command of the launcher in docs/launch.md and its own help."""
  text = (launch_tools.ROOT / 'docs' / 'launch.md').read_text()
  text += f'```bash\n{(cli.__doc__ or "").replace("  python", "python")}```'
  lines = re.sub(r' *\\\n *', ' ', text).splitlines()
  return [l.strip() for l in lines if l.strip().startswith('python -m launch.')]


@pytest.mark.parametrize('line', [l for l in _documented() if '.cli' in l])
def test_every_documented_command_works(line, capsys):
  argv = shlex.split(line)[3:]
  assert cli.main([*argv, '--dry-run']) == 0, capsys.readouterr().err
  out, err = capsys.readouterr()
  assert out.startswith('#!/usr/bin/env bash')
  assert 'mesh' in err or {'logs', 'delete'} & {*argv}


@pytest.mark.parametrize(
  'line', [l for l in _documented() if '.doctor' in l or '.preflight' in l]
)
def test_every_documented_check_has_its_flags(line):
  tool, *argv = shlex.split(line)[2:]
  if tool == 'launch.preflight':
    assert 'mesh' in preflight.checks(preflight.parser().parse_args(argv))
  else:
    args, overrides = doctor.parser().parse_known_args(argv)
    assert len(doctor.checks(args.platform, cli.job_of(args, overrides))) > 5
