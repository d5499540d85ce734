"""The learner `sleep` on a hybrid that reads its day by passes over windows."""

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
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import block as block_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import layer_stack
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models.mixers import base as mixers_base
from sleep_jax.tasks import facts
from tests import conftest

TASK = facts.FactsConfig(
  episodes=2, entities=1, base_entities=2, rows=3, length=16, probes=1
)
SECTIONS = dict(
  wake=dict(reads='windows'),
  sleep=dict(
    dreams=16,
    dream_length=16,
    steps=4,
    batch=4,
    alpha=1.0,
    lam=0.0,
    max_kl_share=1e9,
  ),
  recurrence=dict(passes=2),
)


def setup(**changes) -> learner_lib.Setup:
  """A hybrid of two layers; `changes` are fields of its config."""
  words = facts.build_tokenizer()
  settings = dict(
    vocab=words.vocab,
    dim=16,
    layers=2,
    heads=2,
    max_len=64,
    levels=(config.LevelConfig(16, slots=2, rank=4, top_k=2),),
    mixers=('attention', 'gdn'),
    recurrent=config.RecurrentConfig(heads=1, key=8, value=8),
  )
  cfg = config.ModelConfig(**(settings | changes))
  return learner_lib.Setup(
    model=conftest.build_model(cfg),
    tokenizer=words,
    costs=costs_lib.CostTracker(cfg, 16),
  )


def build(
  s: learner_lib.Setup, *, consolidate: bool, **recurrence
) -> learner_lib.Learner:
  """`recurrence`, or with `consolidate` `recurrence_seeding`."""
  sections = SECTIONS | {
    'sleep': SECTIONS['sleep'] | {'consolidate': consolidate},
    'recurrence': SECTIONS['recurrence'] | recurrence,
  }
  return learners.build('sleep', sections, s)


@pytest.fixture(name='day')
def _day():
  return facts.Facts(TASK, 1).experience(0)


def states(life) -> np.ndarray:
  return np.concatenate([np.ravel(s) for s in life.memory.states])


def test_a_day_is_read_window_by_window(day):
  s = setup()
  learner = build(s, consolidate=False)
  initial = learner.init(jax.random.PRNGKey(0))
  awake, _ = learner.wake(initial, day)
  after, _ = learner.sleep(awake)
  assert not states(initial).any()
  assert states(awake).any()
  # By hand: two passes over each row, from the states that the last one left.
  cfg, params = s.model.cfg, s.model.params
  positions = jnp.arange(16)[None]
  inputs = mixers_base.MixerInputs(
    layers_lib.rope_cos_sin(positions, 8, cfg.rope_theta),
    positions[..., None] >= positions[:, None],
    None,
    jnp.ones((1, 16), bool),
  )
  carried = ()
  for row in day.tokens:
    x = params['embed']['embedding'][row[None]]
    for _ in range(2):
      caches = cache_lib.init_layer_caches(cfg, 1, carried)
      x, caches, _ = layer_stack.LayerStack(cfg).apply(
        {'params': params['blocks']},
        x,
        block_lib.LayerInputs(None, caches, None),
        inputs,
      )
      carried = cache_lib.recurrent_states(cfg, caches)
  np.testing.assert_allclose(after.memory.states[0], carried[0][0], atol=1e-5)
  # The last of the three windows was not yet read before the night.
  assert np.abs(states(awake) - states(after)).max() > 1e-4
  assert not after.learner_state['window'].size
  assert int(after.clock.nights) == 1


def test_a_day_without_a_night_loses_no_window(day):
  learner = build(setup(), consolidate=False)
  halves = [
    dataclasses.replace(day, tokens=day.tokens[i], weight=day.weight[i])
    for i in (slice(2), slice(2, 3))
  ]
  life = learner.init(jax.random.PRNGKey(0))
  for half in halves:
    life, _ = learner.wake(life, half)
  whole, _ = learner.wake(learner.init(jax.random.PRNGKey(0)), day)
  np.testing.assert_allclose(states(life), states(whole), atol=1e-6)
  np.testing.assert_array_equal(
    life.learner_state['window'], whole.learner_state['window']
  )


@pytest.mark.slow
def test_answers_are_those_of_the_states(day):
  learner = build(setup(), consolidate=False)
  initial = learner.init(jax.random.PRNGKey(0))
  after, _ = learner.sleep(learner.wake(initial, day)[0])
  prompt, answer = day.tokens[0][:4].tolist(), day.tokens[0][4:5].tolist()
  logprob_before = learner.respond(initial, [prompt], [answer]).answer_logprob
  logprob_after = learner.respond(after, [prompt], [answer]).answer_logprob
  assert np.abs(logprob_before - logprob_after).max() > 1e-3
  logits = after.model.forward(jnp.array([prompt])).logits
  want = jax.nn.log_softmax(logits[0, -1])[answer[0]]
  np.testing.assert_allclose(logprob_after, [want], atol=1e-5)


def test_seeding_moves_the_states_into_one_expert(day):
  learner = build(setup(), consolidate=True)
  life = learner.init(jax.random.PRNGKey(0))
  awake, _ = learner.wake(life, day)
  after, metrics = learner.sleep(awake)
  assert metrics['0to1/transferred'] == 1
  assert metrics['0to1/kl_first'] > 0
  assert not states(after).any()
  bank = after.memory.levels[0].bank
  assert bank.status.tolist() == [memory_lib.ACTIVE]
  assert jnp.abs(bank.experts.b[:, 0]).max() > 0
  # The previous model of the next day has the expert, and no states.
  next_day, _ = learner.wake(after, day)
  assert states(next_day).any()
  previous = next_day.previous_memory()
  assert not any(s.any() for s in previous.states)
  assert previous.levels[0].bank.status[0] == memory_lib.ACTIVE


@pytest.fixture(name='base', scope='module')
def _base(tmp_path_factory):
  """A hybrid base by the recipe, with too few steps to be of use."""
  folder = tmp_path_factory.mktemp('base')
  out = folder / 'base.npz'
  subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.run',
      '--config=experiments/configs/base_facts_hybrid.py',
      f'--workdir={folder / "run"}',
      f'--config.export={out}',
      '--config.training.steps=20',
      '--config.training.batch=2',
      '--config.task.episodes=1',
      '--config.task.eval_rows=4',
      '--config.task.windows=2',
      '--config.task.eval_rows=32',
    ],
    cwd=pathlib.Path(__file__).parents[1],
    check=True,
    timeout=300,
  )
  return out


# Of `golden_test`, too, the night of `recurrence_seeding_brief` is a part.
@pytest.mark.slow
@pytest.mark.parametrize('arm', ['recurrence', 'recurrence_seeding_brief'])
def test_a_pretrained_hybrid_runs_the_experiment(base, tmp_path, arm):
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
  'consolidate,model,recurrence,message',
  [
    (False, dict(mixers=()), {}, 'no recurrent layer'),
    (False, {}, dict(eviction='sliding'), 'recurrence.eviction'),
    (
      True,
      dict(levels=(config.LevelConfig(16),)),
      {},
      'no level has slots',
    ),
  ],
)
def test_settings_that_cannot_work_are_refused(
  consolidate, model, recurrence, message
):
  with pytest.raises(config.ConfigError, match=message):
    build(setup(**model), consolidate=consolidate, **recurrence)
