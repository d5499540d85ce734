"""Training through windows in the loop: rule110, depo, symbolic."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import depo as depo_config
from experiments.configs import rule110 as rule110_config
from experiments.configs import symbolic as symbolic_config
from sleep_jax import config
from sleep_jax import learners
from sleep_jax import tasks
from sleep_jax.config import registry
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.harness import report as report_lib
from sleep_jax.harness import workers
from sleep_jax.lifecycle.recurrence import training as training_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.runtime import checkpoint


def small_rule110(variant='', steps=0, episodes=2, **training):
  c = rule110_config.get_config(variant)
  c.task.update(width=4, strings=2, steps=steps, eval_rows=32)
  c.task.episodes = episodes
  c.model.update(dim=16)
  c.model.recurrent.update(heads=1, key=8, value=8)
  c.training.update(dict(steps=20, batch=16) | training)
  c.seeds = (1,)
  return json.loads(c.to_json())


_ARMS = [
  (variant, arm)
  for variant in ('', 'controls', 'eviction')
  for arm in rule110_config.get_config(variant).arms
  if not arm.endswith(('_t5', '_t6')) or not arm.startswith('passes')
]


@pytest.mark.slow
def test_a_training_of_eight_devices_ends_on_one(tmp_path, monkeypatch):
  """As one that was on one throughout, up to rounding."""
  c, arm = small_rule110(), 'passes_2_t4'
  whole = live_lib.live(c, arm, 1, tmp_path / 'whole', 0)
  save = checkpoint.Checkpoints.save

  def dies(self, snapshot):
    embedding = snapshot.life.model.params['embed']['embedding']
    assert len(embedding.sharding.device_set) == 8
    if snapshot.night == 1:
      raise KeyboardInterrupt
    save(self, snapshot)

  with monkeypatch.context() as m:
    m.setattr(checkpoint.Checkpoints, 'save', dies)
    with pytest.raises(KeyboardInterrupt):
      mesh = c | {'mesh': {'data': 4, 'fsdp': 2}}
      live_lib.live(mesh, arm, 1, tmp_path / 'cut', 0)
  resumed = live_lib.live(c, arm, 1, tmp_path / 'cut', 0)
  for name, value in whole['final'].items():
    np.testing.assert_allclose(resumed['final'][name], value, atol=0.05)
  losses = [
    json.loads((tmp_path / x / 'metrics.jsonl').read_text().splitlines()[0])
    for x in ('whole', 'cut')
  ]
  np.testing.assert_allclose(*(r['scalars']['wake/loss'] for r in losses), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('variant,arm', _ARMS)
def test_every_arm_of_rule110_is_trained(variant, arm, tmp_path):
  c = small_rule110(variant)
  if 'training' in c['arms'][arm]:
    c['arms'][arm]['training'].pop('steps', None)
  life = live_lib.live(c, arm, 1, tmp_path, 0)
  assert np.isfinite(list(life['final'].values())).all()
  assert life['flops'] > 0 and life['steps'] == 20
  assert life['tokens'] == 20 * 16 * (2 * 4 + 2)
  assert life['costs']['eval']['flops'] > 0
  shares = life['goodput']
  assert abs(sum(shares.values()) - 1) < 1e-6
  again = live_lib.live(c, arm, 1, tmp_path, 0)
  assert again == json.loads(json.dumps(life))
  text = report_lib.write_report([life], c['reference'], tmp_path)
  assert arm in text and '(chance)' in text
  assert (tmp_path / 'curves.png').stat().st_size
  assert list(tmp_path.glob('events.out.tfevents*'))


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_end(tmp_path, monkeypatch):
  c = small_rule110()
  whole = live_lib.live(c, 'passes_2_t4', 1, tmp_path / 'whole', 0)
  save = checkpoint.Checkpoints.save

  def dies(self, snapshot):
    if snapshot.night == 1:
      raise KeyboardInterrupt
    save(self, snapshot)

  with monkeypatch.context() as m:
    m.setattr(checkpoint.Checkpoints, 'save', dies)
    with pytest.raises(KeyboardInterrupt):
      live_lib.live(c, 'passes_2_t4', 1, tmp_path / 'cut', 0)
  again = live_lib.live(c, 'passes_2_t4', 1, tmp_path / 'cut', 0)
  for key in ('final', 'steps', 'tokens', 'flops'):
    assert again[key] == whole[key]


@pytest.mark.slow
def test_retrieval_is_solved(tmp_path):
  # t = 0: the first bit itself. Chance is one half a bit.
  c = small_rule110(steps=0, episodes=1)
  c['training'].update(steps=200, batch=64)
  c['arms'] = {'retrieval': {}}
  life = live_lib.live(c, 'retrieval', 1, tmp_path, 0)
  assert life['final']['per_bit'] == 1.0


class Plan:
  """An arm as shapes: what `build` makes of it, but for its weights."""

  def __init__(self, c, arm):
    c = build_lib.arm_config(c, arm)
    settings = dict(c['task'])
    self.task = tasks.build(settings.pop('name'), settings, 1)
    cfg = config.ModelConfig.from_mapping(c['model'])
    _, learner = registry.find(c['learner'], 'sleep_jax.learners', 'learner')
    sections = learners.config_of(learner, c)
    self.recurrence, self.training = sections.recurrence, sections.training
    training_lib.check(cfg, self.recurrence)
    self.model = jax.eval_shape(
      lambda: model_lib.Model(cfg, transformer.init(cfg, jax.random.key(0)))
    )
    self.batch = self.task.batch(np.random.default_rng(0), 2)

  def flops(self) -> float:
    forward = training_lib.forward_flops(
      self.model.cfg, self.recurrence, self.batch
    )
    return 3.0 * self.training.steps * self.training.batch * forward


@pytest.mark.parametrize(
  'recipe', [rule110_config, depo_config, symbolic_config]
)
def test_every_arm_is_possible(recipe):
  for variant in (
    '',
    'paper',
    *(['controls', 'eviction', 'gentle'] * (recipe is rule110_config)),
  ):
    c = json.loads(recipe.get_config(variant).to_json())
    assert any(arm.startswith(c['reference']) for arm in c['arms'])
    for arm in c['arms']:
      plan = Plan(c, arm)
      assert plan.flops() > 0
      assert plan.training.steps % plan.task.episodes == 0
      assert plan.task.tokenizer.vocab <= plan.model.cfg.vocab


@pytest.mark.parametrize(
  'recipe,ending,controls',
  [(rule110_config, '_t6', ('long', 'deep')), (depo_config, '', ('long',))],
)
def test_controls_have_the_flops_of_four_passes(recipe, ending, controls):
  c = json.loads(recipe.get_config().to_json())
  passes_4 = Plan(c, 'passes_4' + ending).flops()
  # A prediction window has one pass, whatever N is.
  for control in controls:
    assert 1.0 <= Plan(c, control + ending).flops() / passes_4 < 1.4


@pytest.mark.parametrize(
  'section,change,names',
  [
    ('recurrence', dict(passes=0), 'recurrence.passes=0'),
    ('recurrence', dict(loop=(3, 9)), 'recurrence.loop'),
    ('recurrence', dict(eviction='soft'), 'recurrence.eviction'),
    ('model', dict(mixers=('attention',)), 'no recurrent layer'),
    ('model', dict(mixers=('mamba',)), "model.mixers='mamba'"),
    ('model', dict(layers=3), 'model.layers=3'),
    ('model', dict(vocab=2), 'model.vocab=2'),
    ('training', dict(steps=21), 'training.steps=21 is not a multiple'),
    ('task', dict(width=0), 'task.width=0'),
    ('task', dict(cells=1), "'cells'"),
    ('task', dict(name='facts', steps=0), "task: unknown setting '"),
  ],
)
def test_bad_settings_are_named(section, change, names, tmp_path):
  c = small_rule110()
  c['arms'] = {'passes_1': {}}
  c[section] = c[section] | change
  with pytest.raises(config.ConfigError, match=names):
    workers.run(c, tmp_path / 'w')


@pytest.mark.slow
@pytest.mark.parametrize(
  'recipe',
  [
    rule110_config,
    depo_config,
    pytest.param(symbolic_config, marks=pytest.mark.slow),
  ],
)
def test_the_papers_sizes_lower(recipe):
  c = json.loads(recipe.get_config('paper').to_json())
  arm = list(c['arms'])[-1]
  assert c['arms'][arm]['recurrence']['passes'] >= 4
  plan = Plan(c, arm)
  optimizer = training_lib.optimizer(plan.training)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (1, plan.training.batch, *x.shape[1:]), jnp.asarray(x).dtype
    ),
    plan.batch,
  )
  opt_state = jax.eval_shape(optimizer.init, plan.model.params)
  lowered = training_lib.train_steps.lower(
    plan.recurrence, plan.training, plan.model, opt_state, batch
  )
  assert 'while' in lowered.as_text()
