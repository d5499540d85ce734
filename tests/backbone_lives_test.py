"""The configs of public backbones run: whole, on a tiny folder of the family.

The same `get_config`, the same formats on disk, the same tasks on real data;
only the sizes are smaller.
"""

import collections
import json

import numpy as np
import pytest

from sleep_jax import tasks
from sleep_jax.data.datasets import class_incremental as class_incremental_data
from sleep_jax.harness import live as live_lib
from sleep_jax.harness import report as report_lib
from tests import tasks_test
from tests import tiny_backbones


@pytest.fixture(name='bases', scope='module')
def _bases(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bases')
  return {
    family: tiny_backbones.write(folder / family, family)
    for family in tiny_backbones.FAMILIES
  }


def shorten(monkeypatch, per_class: int = 1):
  """One episode of a class-incremental stream, of so many examples a class."""
  read, build = class_incremental_data.examples, tasks.build

  def few(*args):
    seen = collections.Counter()
    rows = []
    for text, label in read(*args):
      seen[label] += 1
      if seen[label] <= per_class:
        rows.append((text, label))
    return rows

  def build_one_episode(*args):
    task = build(*args)
    task.episodes = 1
    return task

  monkeypatch.setattr(class_incremental_data, 'examples', few)
  monkeypatch.setattr(tasks, 'build', build_one_episode)


@tasks_test.needs_data
@pytest.mark.parametrize(
  'variant, family, arms',
  [
    pytest.param(
      'clinc-llama3_2_3b', 'llama3_2', 'icl sft', marks=pytest.mark.slow
    ),
    pytest.param(
      'clinc-llama3_2_3b', 'llama3_2', 'sleep', marks=pytest.mark.slow
    ),
    pytest.param(
      'banking-llama3_8b', 'llama3_2', 'ewc joint', marks=pytest.mark.slow
    ),
    pytest.param(
      'clinc-llama3_8b_instruct', 'llama3_2', 'sleep', marks=pytest.mark.slow
    ),
    ('clinc-smollm2', 'smollm2', 'icl'),
    pytest.param(
      'squad-qwen2_5_7b', 'qwen2_5', 'sleep', marks=pytest.mark.slow
    ),
    pytest.param(
      'squad-llama3_2_1b', 'llama3_2', 'ttt seal', marks=pytest.mark.slow
    ),
    pytest.param(
      'squad-qwen2_5_7b_instruct', 'qwen2_5', 'icl', marks=pytest.mark.slow
    ),
    pytest.param(
      'arc-llama3_2_1b', 'llama3_2', 'sleep', marks=pytest.mark.slow
    ),
  ],
)
def test_a_config_of_a_backbone_runs(
  variant, family, arms, bases, tmp_path, monkeypatch
):
  c = tiny_backbones.shrunk(variant, bases[family])
  c['arms'] = {arm: c['arms'][arm] for arm in arms.split()}
  c['reference'] = arms.split()[-1]
  shorten(monkeypatch)
  summaries = [
    live_lib.live(c, arm, 1, tmp_path / 'lives' / f'{arm}_1', 0)
    for arm in c['arms']
  ]
  for summary in summaries:
    assert all(np.isfinite(x) for x in summary['final'].values())
    records = tmp_path / 'lives' / f'{summary["learner"]}_1' / 'metrics.jsonl'
    scalars = json.loads(records.read_text().splitlines()[-1])['scalars']
    if summary['learner'] == 'sleep':
      assert scalars['sleep/transfers'] >= 1.0
      assert scalars['wake/loss'] > 0
  table = report_lib.write_report(summaries, c['reference'], tmp_path)
  assert all(f'| {arm} |' in table for arm in c['arms'])
