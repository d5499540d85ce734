"""Divergences, rewards and policy gradients against independent oracles."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rapidfuzz.distance

from sleep_jax import config
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.objectives import divergences
from sleep_jax.objectives import losses
from sleep_jax.objectives import policy_gradient
from sleep_jax.objectives import rewards


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.fixture(name='pair')
def _pair():
  rng = np.random.default_rng(0)
  return rng.normal(size=(3, 5, 11)) * 2, rng.normal(size=(3, 5, 11)) * 2


def numpy_kl(p, q):
  return (p * np.log(p / q)).sum(-1)


def test_kl_divergences_match_numpy(pair):
  t, s = softmax(pair[0]), softmax(pair[1])
  np.testing.assert_allclose(
    divergences.forward_kl(*pair), numpy_kl(t, s), rtol=1e-4
  )
  np.testing.assert_allclose(
    divergences.reverse_kl(*pair), numpy_kl(s, t), rtol=1e-4
  )


@pytest.mark.parametrize('beta', [0.1, 0.5, 0.8])
def test_jsd_matches_numpy(pair, beta):
  t, s = softmax(pair[0]), softmax(pair[1])
  m = beta * t + (1 - beta) * s
  want = beta * numpy_kl(t, m) + (1 - beta) * numpy_kl(s, m)
  np.testing.assert_allclose(divergences.jsd(*pair, beta), want, rtol=1e-4)


def test_jsd_near_its_ends_is_refused():
  with pytest.raises(config.ConfigError, match='beta=0.001'):
    consolidation_config.SeedingConfig(divergence='jsd', beta=0.001)


def test_an_unknown_divergence_lists_the_options():
  with pytest.raises(config.ConfigError, match='forward_kl, jsd, reverse_kl'):
    divergences.divergence('kl', 0.5)


DIVERGENCES = [('forward_kl', 0.0), ('reverse_kl', 0.0), ('jsd', 0.3)]


def teacher_and_student(b=3, t=5, v=11, seed=0):
  """Hidden states and matrices of a teacher (width 6) and a student (4)."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.array(rng.normal(size=shape), jnp.float32)

  return (normal(b, t, 6), normal(v, 6)), (normal(b, t, 4), normal(v, 4))


@pytest.mark.parametrize('name, beta', DIVERGENCES)
@pytest.mark.parametrize('chunk', [1, 4, 15, 100])
def test_chunks_change_neither_value_nor_gradient(name, beta, chunk):
  teacher, student = teacher_and_student()
  measure = divergences.divergence(name, beta)
  weight = jnp.arange(15.0).reshape(3, 5) / 105  # A mean, as in training.

  def whole(student):
    logits = [(h @ w.T) / 0.7 for h, w in (teacher, student)]
    return (measure(*logits) * weight).sum()

  def parts(student):
    each = divergences.from_hidden(
      measure, teacher, student, temperature=0.7, chunk=chunk
    )
    return (each * weight).sum()

  chex.assert_trees_all_close(
    jax.value_and_grad(whole)(student),
    jax.jit(jax.value_and_grad(parts))(student),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize('beta', [0.1, 0.5, 0.8])
def test_chunked_jsd_matches_numpy_in_double(beta):
  teacher, student = teacher_and_student()
  t, s = (
    softmax(np.asarray(h, float) @ np.asarray(w, float).T)
    for h, w in (teacher, student)
  )
  m = beta * t + (1 - beta) * s
  want = beta * numpy_kl(t, m) + (1 - beta) * numpy_kl(s, m)
  got = divergences.from_hidden(
    divergences.divergence('jsd', beta), teacher, student, chunk=4
  )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name, beta', DIVERGENCES)
def test_top_k_bounds_the_divergence_from_below(name, beta):
  (h, w), student = teacher_and_student()
  measure = divergences.divergence(name, beta)

  def loss(student, teacher):
    return divergences.from_hidden(measure, teacher, student, chunk=4).sum()

  graded = jax.jit(jax.value_and_grad(loss))
  whole, grads = graded(student, (h, w))
  values = []
  for k in (1, 3, 6, 10):
    teacher = divergences.top_k(h @ w.T, k)
    np.testing.assert_allclose(jnp.exp(teacher.logprobs).sum(-1), 1, rtol=1e-5)
    value, lumped = graded(student, teacher)
    values.append(float(value))
  assert 0 < values[0] < values[1] < values[2] < values[3]
  # With all tokens but one, lumping changes nothing.
  np.testing.assert_allclose(values[3], whole, rtol=1e-5)
  chex.assert_trees_all_close(lumped, grads, rtol=1e-4, atol=1e-5)


def test_what_flows_from_top_k_is_as_without_chunks():
  """Though it is computed with the value, and not by a backward pass."""
  (h, w), student = teacher_and_student()
  teacher = divergences.top_k(h @ w.T, 4)
  weight = jnp.arange(15.0).reshape(3, 5) / 105

  def whole(student):
    lumped = divergences.lump(student[0] @ student[1].T, teacher.tokens)
    each = divergences.forward_kl(teacher.logprobs, lumped)
    return (each * weight).sum()

  def parts(student):
    each = divergences.from_hidden(
      divergences.forward_kl, teacher, student, chunk=6
    )
    return (each * weight).sum()

  chex.assert_trees_all_close(
    jax.value_and_grad(whole)(student),
    jax.jit(jax.value_and_grad(parts))(student),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize('k', [0, 11])
def test_an_invalid_top_k_is_refused(k):
  with pytest.raises(config.ConfigError, match=f'top_k={k} .* in 1..10'):
    divergences.top_k(jnp.zeros((2, 11)), k)


def test_chunks_need_little_memory_at_a_large_vocabulary():
  """By XLA's account of the compiled gradient; nothing is run."""
  v, d, shape = 151_936, 32, (4, 128)
  f32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  speaker = (f32(*shape, d), f32(v, d))

  def temporaries(chunk):
    def loss(student, teacher):
      return divergences.from_hidden(
        divergences.divergence('jsd', 0.5), teacher, student, chunk=chunk
      ).mean()

    step = jax.jit(jax.grad(loss)).lower(speaker, speaker).compile()
    return step.memory_analysis().temp_size_in_bytes

  assert temporaries(chunk=32) < temporaries(chunk=512) / 4


@pytest.mark.parametrize(
  'm, n', [(12, 9), (1, 1), (32, 40), (70, 33), (300, 64)]
)
def test_levenshtein_matches_rapidfuzz(m, n):
  rng = np.random.default_rng(1)
  a, b = rng.integers(0, 4, (200, m)), rng.integers(0, 4, (200, n))
  la, lb = rng.integers(0, m + 1, 200), rng.integers(0, n + 1, 200)
  la[:4], lb[:4] = (0, m, 0, m), (0, 0, n, n)  # The corners of the table.
  got = jax.jit(rewards.levenshtein)(*map(jnp.array, (a, la, b, lb)))
  want = [
    rapidfuzz.distance.Levenshtein.distance(x[:i].tolist(), y[:j].tolist())
    for x, i, y, j in zip(a, la, b, lb)
  ]
  np.testing.assert_array_equal(got, want)


def test_absolute_reward_is_equation_4():
  guess = jnp.array([[1, 2, 3, 4], [1, 2, 9, 9], [9, 9, 9, 9], [1, 2, 3, 0]])
  dream = jnp.array([[1, 2, 3, 4]] * 4)
  got = rewards.absolute(
    guess, jnp.array([4, 4, 4, 3]), dream, jnp.array([4] * 4), z0=0.5
  )
  # Equal; z = 2 of 4, still at z_0; z = 4, beyond it; one token short.
  np.testing.assert_allclose(got, [1.0, 0.5, 0.0, 0.75])


def test_exact_reward_needs_equal_lengths_too():
  guess = jnp.array([[1, 2, 0], [1, 2, 3], [1, 5, 0]])
  dream = jnp.array([[1, 2, 7]] * 3)
  got = rewards.exact(guess, jnp.array([2, 3, 2]), dream, jnp.array([2, 2, 2]))
  np.testing.assert_array_equal(got, [1.0, 0.0, 0.0])


def test_pooled_similarity_ignores_padding():
  h = jnp.array(np.random.default_rng(0).normal(size=(1, 5, 8)))
  other = h.at[:, 3:].set(100.0)
  same = rewards.pooled_similarity(h, jnp.array([3]), other, jnp.array([3]))
  np.testing.assert_allclose(same, 1.0, rtol=1e-5)
  differs = rewards.pooled_similarity(h, jnp.array([5]), other, jnp.array([5]))
  assert float(differs[0]) < 0.9


def test_imitation_reward_is_equation_3():
  assert rewards.imitation(1.0, 0.5, gamma=0.25) == 0.25 * 1 + 0.75 * 0.5


def test_group_advantages_are_relative_to_the_group():
  r = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
  a = np.asarray(policy_gradient.group_advantages(r))
  np.testing.assert_allclose(a.sum(1), 0.0, atol=1e-5)
  assert a[0, 0] > 1 and (a[0, 1:] < 0).all()
  np.testing.assert_array_equal(a[1], 0.0)  # Nothing to learn from a tie.


def test_policy_gradient_raises_rewarded_tokens():
  logp = jnp.zeros((2, 3))
  advantage = jnp.array([1.0, -1.0])

  def loss(x):
    return policy_gradient.clipped_loss(x, logp, advantage, jnp.ones_like(x))

  g = jax.grad(loss)(logp)
  assert (g[0] < 0).all() and (g[1] > 0).all()


def test_policy_gradient_stops_at_the_clip():
  old = jnp.zeros((1, 2))

  def slope(x):
    return jax.grad(
      lambda l: policy_gradient.clipped_loss(
        l, old, jnp.array([1.0]), jnp.ones_like(l), clip=0.2
      )
    )(jnp.full((1, 2), x))

  np.testing.assert_array_equal(slope(jnp.log(1.3)), 0.0)
  assert (slope(jnp.log(1.1)) < 0).all()


def test_next_token_loss_matches_numpy():
  rng = np.random.default_rng(0)
  logits, tokens = rng.normal(size=(2, 4, 6)), rng.integers(0, 6, (2, 4))
  mask = np.array([[1, 1, 0, 1], [1, 0.5, 1, 0]])
  p = softmax(logits)
  total = sum(
    -mask[b, i] * np.log(p[b, i - 1, tokens[b, i]])
    for b in range(2)
    for i in range(1, 4)
  )
  np.testing.assert_allclose(
    losses.next_token_loss(
      jnp.array(logits), jnp.array(tokens), jnp.array(mask)
    ),
    total / mask[:, 1:].sum(),
    rtol=1e-5,
  )
