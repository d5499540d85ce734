"""Every learner behind the one protocol, on a day of facts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import learners
from sleep_jax import tasks
from sleep_jax.data import padding
from sleep_jax.inference import sampling
from sleep_jax.inference import scoring
from sleep_jax.learners import base as learner_lib
from sleep_jax.learners import ewc
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import transformer
from sleep_jax.training import fisher as fisher_lib
from tests import conftest

TASK = tasks.build(
  'facts', dict(episodes=2, entities=1, rows=16, length=16, context=1), 0
)


def setup(**finetune) -> learner_lib.Setup:
  cfg = conftest.tiny(
    vocab=168,
    max_len=32,
    levels=(
      config.LevelConfig(16, chunk=16, sleep_every=4, learning_rate=0.01),
      config.LevelConfig(16, slots=2, rank=4, top_k=2),
    ),
  )
  return learner_lib.Setup(
    model=cfg,
    params=conftest.weights(cfg),
    tokenizer=TASK.tokenizer,
    wake=wake_lib.WakeConfig(batch=4),
    sleep=consolidation_config.SeedingConfig(
      dreams=16,
      dream_length=16,
      steps=4,
      batch=4,
      prefixes=4,
      group=2,
      rollout_groups=2,
      continuation=4,
      rollout_every=2,
      max_kl_share=9.0,
    ),
    finetune=finetune.FinetuneConfig(batch=4, fisher_rows=4, **finetune),
    costs=costs_lib.CostTracker(cfg, 16),
  )


@pytest.mark.parametrize(
  'name', ['icl', 'sft', 'ewc', 'wake_only', 'sleep', 'joint']
)
def test_every_learner_lives_two_days(name):
  s = setup()
  base = jax.tree.map(np.array, s.params)
  learner = learners.build(name, s)
  life = learner.init(jax.random.PRNGKey(0))
  for night in range(2):
    life, woke = learner.wake(life, TASK.experience(night))
    life, slept = learner.sleep(life)
    assert all(np.isfinite(v) for v in (woke | slept).values())
  assert int(life.clock.nights) == 2 and int(life.clock.tokens) > 0
  exam = TASK.exam(lambda p, a: learner.respond(life, p, a), 1)
  assert len(exam.by_episode) == 2
  totals = s.costs.totals()
  assert totals['eval']['flops'] > 0
  assert (totals['update']['tokens'] > 0) == (name == 'sleep')
  for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(s.params)):
    np.testing.assert_array_equal(a, b)  # The base outlives every life.


def test_sleep_uses_a_slot_each_night_and_wake_only_none():
  for name, want in (('sleep', [2, 2]), ('wake_only', [0, 0])):
    learner = learners.build(name, setup())
    life = learner.init(jax.random.PRNGKey(0))
    for night in range(2):
      life, _ = learner.wake(life, TASK.experience(night))
      life, _ = learner.sleep(life)
    assert life.memory.levels[1].bank.status.tolist() == want


def test_an_unknown_learner_lists_the_known():
  with pytest.raises(
    config.ConfigError, match='ewc, frozen, icl, joint, recurrence, '
  ):
    learners.build('hope', setup())


def test_scores_equal_greedy_decoding_and_the_chain_rule():
  s = setup()
  memory = conftest.random_memory(s.model)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(2, 168, n).tolist() for n in (3, 7, 4, 12)]
  tokens, lengths = padding.left_pad(prompts, 0)
  said = sampling.generate(
    s.model,
    s.params,
    memory,
    tokens,
    lengths,
    jax.random.key(0),
    sampling.SamplerConfig(max_new=3, temperature=0.0),
  ).tokens.tolist()
  wrong = [[*a[:-1], (a[-1] + 1) % 168] for a in said]
  right = scoring.score(s, s.params, memory, prompts, said)
  assert right.exact.all() and (right.token_accuracy == 1.0).all()
  missed = scoring.score(s, s.params, memory, prompts, wrong)
  assert not missed.exact.any()
  np.testing.assert_allclose(missed.token_accuracy, 2 / 3, rtol=1e-6)
  for p, a, got in zip(prompts, said, right.answer_logprob):
    logits = transformer.forward(
      s.model, s.params, jnp.array([p + a]), memory
    ).logits[0]
    logp = jax.nn.log_softmax(logits)[len(p) - 1 : -1]
    want = sum(float(logp[i, t]) for i, t in enumerate(a))
    assert got == pytest.approx(want, abs=1e-4)


def test_icl_reads_the_end_of_the_stream():
  learner = learners.build('icl', setup())
  life = learner.init(jax.random.PRNGKey(0))
  life, _ = learner.wake(life, TASK.experience(0))
  life, _ = learner.wake(life, TASK.experience(1))
  rows = TASK.experience(1).tokens
  want = rows[rows != TASK.tokenizer.bos][-16:]  # Half of max_len.
  np.testing.assert_array_equal(life.notes['context'], want)


def test_ewc_pulls_back_what_matters():
  params = {'a': jnp.array([1.0, 1.0])}
  notes = {
    'anchor': {'a': jnp.array([0.0, 0.0])},
    'fisher': {'a': jnp.array([3.0, 0.0])},
    'lambda': jnp.float32(2.0),
  }
  assert float(ewc.ewc_penalty(params, notes)) == 3.0
  grad = jax.grad(ewc.ewc_penalty)(params, notes)
  np.testing.assert_allclose(grad['a'], [6.0, 0.0])


def test_a_strong_ewc_moves_less_than_sft():
  def moved(name, **finetune):
    s = setup(**finetune)
    learner = learners.build(name, s)
    life = learner.init(jax.random.PRNGKey(0))
    life, _ = learner.wake(life, TASK.experience(0))
    return sum(
      float(((a - b) ** 2).sum())
      for a, b in zip(jax.tree.leaves(life.params), jax.tree.leaves(s.params))
    )

  assert moved('ewc', ewc_lambda=1e5) < 0.5 * moved('sft')


def test_the_fisher_is_the_mean_of_squared_row_gradients():
  s = setup()
  x = TASK.experience(0)
  tokens, weight = jnp.array(x.tokens[:3]), jnp.array(x.weight[:3])
  got = fisher_lib.diagonal_fisher(s.model, s.params, tokens, weight)

  def row_loss(params, i):
    logits = transformer.forward(s.model, params, tokens[i : i + 1]).logits
    logp = jax.nn.log_softmax(logits[0, :-1])
    picked = jnp.take_along_axis(logp, tokens[i, 1:, None], axis=1)
    return -picked.mean()

  rows = [jax.grad(row_loss)(s.params, i) for i in range(3)]
  want = jax.tree.map(lambda *g: sum(x * x for x in g) / 3, *rows)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-8)


def test_joint_reads_the_past_again():
  learner = learners.build('joint', setup())
  life = learner.init(jax.random.PRNGKey(0))
  for night in range(2):
    life, _ = learner.wake(life, TASK.experience(night))
  assert life.notes['tokens'].shape == (32, 16)


def test_the_base_must_fit_the_tokenizer():
  from sleep_jax.data import tokenizers  # pylint: disable=g-import-not-at-top

  with pytest.raises(config.ConfigError, match='167 pieces but model.vocab=9'):
    tokenizers.check_fits(TASK.tokenizer, 9)


def test_setups_are_values():
  s = setup()
  assert (
    dataclasses.replace(s, wake=wake_lib.WakeConfig(batch=2)).wake.batch == 2
  )
