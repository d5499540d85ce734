"""Sleep by recurrence as a learner, alone and with knowledge seeding."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import both_sleeps
from sleep_jax import config
from sleep_jax import learners
from sleep_jax.harness import live as live_lib
from sleep_jax.learners import base as learner_lib
from sleep_jax.learners import finetune
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import block as block_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import layer_stack
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.models.mixers import base as mixers_base
from sleep_jax.tasks import facts
from tests import conftest

TASK = facts.FactsConfig(
  episodes=2, entities=1, base_entities=2, rows=3, length=16, probes=1
)


def setup(**changes) -> learner_lib.Setup:
  words = facts.build_tokenizer()
  cfg = config.ModelConfig(
    vocab=words.vocab,
    dim=16,
    layers=2,
    heads=2,
    max_len=64,
    levels=(config.LevelConfig(16, slots=2, rank=4, top_k=2),),
    mixers=('attention', 'gdn'),
    recurrent=config.RecurrentConfig(heads=1, key=8, value=8),
  )
  cfg = dataclasses.replace(cfg, **changes.pop('model', {}))
  settings = dict(
      model=cfg,
      params=conftest.weights(cfg),
      tokenizer=words,
      wake=wake_lib.WakeConfig(),
      sleep=consolidation_config.SeedingConfig(
        dreams=16, dream_length=16, steps=4, batch=4, alpha=1.0, lam=0.0,
        max_kl_share=1e9,
      ),
      finetune=finetune.FinetuneConfig(),
      costs=costs_lib.CostTracker(cfg, 16),
      recurrence=recurrence_config.RecurrenceConfig(passes=2),
    )  # fmt: skip
  return learner_lib.Setup(**(settings | changes))


@pytest.fixture(name='day')
def _day():
  return facts.Facts(TASK, 1).experience(0)


def states(life) -> np.ndarray:
  return np.concatenate([np.ravel(s) for s in life.memory.states])


def test_a_day_is_slept_on_window_by_window(day):
  s = setup()
  who = learners.build('recurrence', s)
  born = who.init(jax.random.PRNGKey(0))
  read, _ = who.wake(born, day)
  rested, _ = who.sleep(read)
  assert not states(born).any()
  assert states(read).any()
  # By hand: two passes over each row, from the states that the last one left.
  caches = cache_lib.init_layer_caches(s.model, 1)
  at = jnp.arange(16)[None]
  inputs = mixers_base.MixerInputs(
    rope=layers_lib.rope_cos_sin(at, 8, s.model.rope_theta),
    mask=at[..., None] >= at[:, None],
    cache_index=None,
    token_mask=jnp.ones((1, 16), bool),
  )
  for row in day.tokens:
    x = s.params['embed']['embedding'][row[None]]
    for _ in range(2):
      x, caches, _ = layer_stack.LayerStack(s.model).apply(
        {'params': s.params['blocks']},
        x,
        block_lib.LayerInputs(None, caches, None),
        inputs,
      )
      states_after = cache_lib.recurrent_states(s.model, caches)
      caches = cache_lib.init_layer_caches(s.model, 1, states_after)
  np.testing.assert_allclose(
    rested.memory.states[0], states_after[0][0], atol=1e-5
  )
  # The last of the three windows was still to come before the night.
  assert np.abs(states(read) - states(rested)).max() > 1e-4
  assert not rested.notes['window'].size
  assert int(rested.clock.nights) == 1


def test_a_day_without_a_night_loses_no_window(day):
  who = learners.build('recurrence', setup())
  halves = [
    dataclasses.replace(day, tokens=day.tokens[i], weight=day.weight[i])
    for i in (slice(2), slice(2, 3))
  ]
  life = who.init(jax.random.PRNGKey(0))
  for half in halves:
    life, _ = who.wake(life, half)
  whole, _ = who.wake(who.init(jax.random.PRNGKey(0)), day)
  np.testing.assert_allclose(states(life), states(whole), atol=1e-6)
  np.testing.assert_array_equal(life.notes['window'], whole.notes['window'])


def test_answers_are_those_of_the_states(day):
  s = setup()
  who = learners.build('recurrence', s)
  born = who.init(jax.random.PRNGKey(0))
  rested, _ = who.sleep(who.wake(born, day)[0])
  prompt, answer = day.tokens[0][:4].tolist(), day.tokens[0][4:5].tolist()
  before = who.respond(born, [prompt], [answer]).answer_logprob
  after = who.respond(rested, [prompt], [answer]).answer_logprob
  assert np.abs(before - after).max() > 1e-3
  logits = transformer.forward(
    s.model, s.params, jnp.array([prompt]), rested.memory
  ).logits
  want = jax.nn.log_softmax(logits[0, -1])[answer[0]]
  np.testing.assert_allclose(after, [want], atol=1e-5)


def test_seeding_empties_the_states_into_one_expert(day):
  who = learners.build('recurrence_seeding', setup())
  life = who.init(jax.random.PRNGKey(0))
  read, _ = who.wake(life, day)
  rested, metrics = who.sleep(read)
  assert metrics['0to1/transferred'] == 1
  assert metrics['0to1/kl_first'] > 0
  assert not states(rested).any()
  bank = rested.memory.levels[0].bank
  assert bank.status.tolist() == [memory_lib.ACTIVE, memory_lib.LOCKED]
  assert jnp.abs(bank.experts.b[:, 0]).max() > 0
  assert not bank.experts.b[:, 1].any()
  # The old self of the next day has the expert, and no states.
  again, _ = who.wake(rested, day)
  assert states(again).any()
  old = again.previous_memory()
  assert not any(s.any() for s in old.states)
  assert old.levels[0].bank.status[0] == memory_lib.ACTIVE


@pytest.fixture(name='base', scope='module')
def _base(tmp_path_factory):
  """A hybrid base by the recipe, too short to be of use."""
  out = tmp_path_factory.mktemp('base') / 'base.npz'
  subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.pretrain',
      '--config=experiments/configs/base_facts_hybrid.py',
      f'--config.out={out}',
      '--config.training.steps=20',
      '--config.training.exams=1',
      '--config.training.batch=2',
      '--config.windows=2',
    ],
    cwd=pathlib.Path(__file__).parents[1],
    check=True,
    timeout=300,
  )
  return out


@pytest.mark.parametrize('arm', ['recurrence', 'recurrence_seeding_brief'])
def test_a_pretrained_hybrid_lives_the_experiment(base, tmp_path, arm):
  c = both_sleeps.get_config()
  c.base = str(base)
  c.task.update(episodes=1, rows=16, base_entities=2)
  c.sleep.update(
    dreams=16, batch=4, prefixes=4, rollout_every=4, max_kl_share=1e9
  )
  c.arms.recurrence_seeding_brief.sleep.steps = 4
  c = json.loads(c.to_json())
  costs = live_lib.live(c, arm, 1, tmp_path / arm, 0)['costs']
  assert costs['wake']['tokens'] == 2 * 16 * 32  # Two passes.
  assert costs['update']['steps'] == (0 if arm == 'recurrence' else 4)


@pytest.mark.parametrize(
  'name,changes,names',
  [
    ('recurrence', dict(model=dict(mixers=())), 'no recurrent layer'),
    (
      'recurrence',
      dict(recurrence=recurrence_config.RecurrenceConfig(eviction='sliding')),
      'recurrence.eviction',
    ),
    (
      'recurrence_seeding',
      dict(model=dict(levels=(config.LevelConfig(16),))),
      'no level has slots',
    ),
  ],
)
def test_what_cannot_be_is_refused(name, changes, names):
  with pytest.raises(config.ConfigError, match=names):
    learners.build(name, setup(**changes)).init(jax.random.PRNGKey(0))
