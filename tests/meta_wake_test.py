"""meta_wake: the weights that reading begins with are trained through it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.learners import meta_wake
from sleep_jax.lifecycle import wake
from sleep_jax.models import memory_init
from tests import conftest
from tests import learners_test

TASK = learners_test.TASK
CHUNK = 4


def build(second_order=True, **level):
  fast = config.LevelConfig(16, chunk=CHUNK, optimizer='sgd', learning_rate=0.5)
  fast = dataclasses.replace(fast, **level)
  cfg = conftest.tiny(vocab=168, max_len=32, levels=(fast,))
  setup = learners_test.setup(model=conftest.build_model(cfg))
  own = {'learner_config': dict(second_order=second_order)}
  sections = learners_test.SECTIONS | own
  learner = learners_test.learners.build('meta_wake', sections, setup)
  assert isinstance(learner, meta_wake.MetaWake)
  return learner, setup


def loss_of(model, tokens, weight, second_order=True):
  losses = meta_wake._losses(model, tokens, weight, second_order)
  targets = meta_wake._targets(weight, losses.shape[1])
  return (losses * targets).sum() / targets.sum()


def test_the_gradient_goes_through_the_updates():
  """Along a random direction it is the difference quotient; first order not."""
  _, setup = build()
  day = TASK.experience(0)
  assert isinstance(day, experience_lib.Experience)
  tokens, weight = jnp.asarray(day.tokens[:2]), jnp.asarray(day.weight[:2])
  leaves, tree = jax.tree.flatten(setup.model.params)
  keys = jax.random.split(jax.random.key(4), len(leaves))
  noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
  along = jax.tree.unflatten(tree, noise)

  @jax.jit
  def at(step):
    moved = jax.tree.map(lambda w, d: w + step * d, setup.model.params, along)
    return loss_of(setup.model.replace(params=moved), tokens, weight)

  def slope(second_order):
    def loss(params):
      model = setup.model.replace(params=params)
      return loss_of(model, tokens, weight, second_order)

    grads = jax.jit(jax.grad(loss))(setup.model.params)
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, along)))

  with jax.default_matmul_precision('highest'):
    want = (at(2e-3) - at(-2e-3)) / 4e-3
    ours, first = slope(True), slope(False)
  np.testing.assert_allclose(ours, want, rtol=2e-2)
  assert abs(first - want) > 5 * abs(ours - want)


def test_a_row_is_read_with_updates_of_its_own():
  """As Eq. 2 reads it, from the same weights for every row."""
  learner, setup = build()
  life = learner.init(jax.random.PRNGKey(0))
  prompts, answers = [[1, 5], [1, 7]], [[9, 4, 4, 2, 8, 8], [3, 3]]
  got = learner.respond(life, prompts, answers)
  model = setup.model.with_memory(memory_init.init_memory(setup.model.cfg))
  for i, (prompt, answer) in enumerate(zip(prompts, answers)):
    row = np.zeros((1, 8), np.int32)
    row[0, : len(prompt + answer)] = prompt + answer
    weight = (np.arange(8) >= 2) & (np.arange(8) < len(prompt + answer))
    _, losses = wake.read_rows(
      model,
      jnp.zeros((), jnp.int32),
      jnp.asarray(row),
      jnp.asarray(weight[None], jnp.float32),
      defer_due_update=False,
    )
    targets = np.add.reduceat(np.append(weight[1:], 0), [0, CHUNK])
    want = -(np.asarray(losses) * targets).sum()
    np.testing.assert_allclose(got.answer_logprob[i], want, rtol=1e-4)
  frozen = learners_test.build('frozen', setup)
  plain = frozen.respond(frozen.init(jax.random.PRNGKey(0)), prompts, answers)
  np.testing.assert_array_equal(got.exact, plain.exact)
  assert got.answer_logprob[0] != pytest.approx(plain.answer_logprob[0])


@pytest.mark.parametrize('second_order', [True, False])
def test_it_learns(second_order):
  learner, _ = build(second_order)
  life = learner.init(jax.random.PRNGKey(0))
  losses = []
  for _ in range(3):
    life, metrics = learner.wake(life, TASK.experience(0))
    life, _ = learner.sleep(life)
    losses.append(metrics['loss'])
  assert losses[2] < losses[1] < losses[0]


def test_both_orders_learn_other_weights_at_their_own_cost():
  ends, costs = [], []
  for second_order in (True, False):
    learner, setup = build(second_order)
    life = learner.init(jax.random.PRNGKey(0))
    life, _ = learner.wake(life, TASK.experience(0))
    ends.append(jax.tree.leaves(life.model.params))
    costs.append(setup.costs.totals()['wake'])
  assert any(np.abs(a - b).max() > 1e-5 for a, b in zip(*ends))
  assert costs[0]['tokens'] == costs[1]['tokens'] > 0
  assert costs[0]['flops'] > 1.3 * costs[1]['flops']


@pytest.mark.parametrize(
  'level, message',
  [
    (dict(optimizer='adam'), r'levels\[0\].optimizer=adam: its updates'),
    (dict(chunk=0), 'set finetune.target=all and a chunk'),
  ],
)
def test_reading_must_have_a_gradient(level, message):
  with pytest.raises(config.ConfigError, match=message):
    build(**level)


def test_an_adapter_is_refused():
  learner, _ = build()
  section = dataclasses.replace(learner.cfg.finetune, target='lora')
  cfg = dataclasses.replace(learner.cfg, finetune=section)
  with pytest.raises(config.ConfigError, match='finetune.target=all'):
    meta_wake.MetaWake(cfg, learner.setup).check()
