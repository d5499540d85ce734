"""Sleep by recurrence: mixers, the hybrid, and Algorithm 1."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import windows
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import halting
from sleep_jax.lifecycle.recurrence import passes as passes_lib
from sleep_jax.lifecycle.recurrence import training as training_lib
from sleep_jax.models import block as block_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import layer_stack
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.models.mixers import base as mixers_base
from sleep_jax.models.mixers import deltanet
from sleep_jax.training import optimizers
from tests import conftest

SMALL = config.RecurrentConfig(heads=2, key=4, value=8, chunk=8)


def hybrid(**changes) -> config.ModelConfig:
  settings = dict(
    vocab=16,
    dim=16,
    layers=2,
    heads=2,
    levels=(config.LevelConfig(hidden=16),),
    mixers=('attention', 'gdn'),
    recurrent=SMALL,
  )
  return config.ModelConfig(**(settings | changes))


# Both have the passes in common; what a jet has of its own is tested besides.
@pytest.fixture(
  name='model', params=['gdn', pytest.param('jet', marks=pytest.mark.slow)]
)
def _model(request):
  return conftest.build_model(hybrid(mixers=('attention', request.param)))


def random_windows(
  rows=3, num_windows=3, length=6, num_inputs=4, seed=0, padded=()
) -> windows.WindowBatch:
  """Random windows; of `padded` (row, window) pairs the start is padding."""
  rng = np.random.default_rng(seed)
  token_mask = np.ones((rows, num_windows, length), bool)
  for row, window in padded:
    token_mask[row, window, : length // 2] = False
  targets = rng.integers(0, 16, (rows, num_inputs), np.int32)
  return windows.WindowBatch(
    context=rng.integers(0, 16, (rows, num_windows, length), np.int32),
    token_mask=token_mask,
    inputs=np.roll(targets, 1, axis=1),
    input_mask=np.ones((rows, num_inputs), bool),
    targets=targets,
    weight=np.ones((rows, num_inputs), np.float32),
    depth=np.ones((rows, num_inputs), np.int32),
  )


def nll_of(logits, batch):
  """Minus the log-probability of each target, `[B, P]`."""
  logp = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]


def token_inputs(rows=3, length=19, seed=0):
  r, keys = SMALL, iter(jax.random.split(jax.random.key(seed), 6))

  def draw(*shape):
    return jax.random.normal(next(keys), shape)

  shape = (rows, length, r.heads)
  q, k = (deltanet.l2_normalize(draw(*shape, r.key)) for _ in range(2))
  v, rate = draw(*shape, r.value), draw(*shape)
  beta = jax.nn.sigmoid(draw(*shape))
  s = draw(rows, r.heads, r.key, r.value)
  return q, k, v, -jnp.exp(rate - 1), beta, s


def delta_rule(q, k, v, log_alpha, beta, s):
  """The rule as printed, in NumPy and float64, with S [V, K]."""
  q, k, v, log_alpha, beta, s = (
    np.asarray(x, np.float64) for x in (q, k, v, log_alpha, beta, s)
  )
  s, out = s.swapaxes(-1, -2).copy(), np.zeros(v.shape)
  for b, t, h in np.ndindex(*beta.shape):
    key, step = k[b, t, h], beta[b, t, h]
    forget = np.eye(len(key)) - step * np.outer(key, key)
    s[b, h] = np.exp(log_alpha[b, t, h]) * s[b, h] @ forget
    s[b, h] += step * np.outer(v[b, t, h], key)
    out[b, t, h] = s[b, h] @ q[b, t, h]
  return out, s.swapaxes(-1, -2)


@pytest.mark.parametrize('chunk', [1, 5, 8, 16, 64])
def test_chunked_and_recurrent_equal_the_printed_rule(chunk):
  inputs = token_inputs()
  printed = delta_rule(*inputs)
  recurrent = deltanet.scan_tokens(*inputs)
  chunked = deltanet.scan_chunks(*inputs, chunk)
  for want, *computed in zip(printed, recurrent, chunked):
    for x in computed:
      np.testing.assert_allclose(x, want, atol=1e-5)


def test_gradients_of_chunked_and_recurrent_agree():
  inputs = token_inputs()
  # A direction, because the sum of squares hides the sign.
  weight = jax.random.normal(jax.random.key(9), inputs[2].shape)

  def grad_of(scan):
    def value(*x):
      out, s = scan(*x)
      return (out * weight).sum() + (s**2).sum()

    return jax.grad(value, argnums=range(6))(*inputs)

  chunked = grad_of(lambda *x: deltanet.scan_chunks(*x, 8))
  for a, b in zip(grad_of(deltanet.scan_tokens), chunked, strict=True):
    np.testing.assert_allclose(a, b, atol=3e-5)


def test_the_chunked_solve_is_accurate_for_equal_keys():
  # The worst case for sums of powers: all keys alike, nothing decays.
  q, k, v, log_alpha, beta, s = token_inputs(length=64)
  k = jnp.broadcast_to(k[:, :1], k.shape)
  inputs = (q, k, v, 0 * log_alpha, jnp.ones_like(beta), s)
  for want, chunked in zip(
    delta_rule(*inputs), deltanet.scan_chunks(*inputs, 64), strict=True
  ):
    np.testing.assert_allclose(chunked, want, atol=1e-5)


def mixer_inputs(token_mask) -> mixers_base.MixerInputs:
  """What a recurrent mixer reads of them: which tokens are no padding."""
  return mixers_base.MixerInputs(None, None, None, token_mask)


@pytest.mark.parametrize(
  'mixer',
  ['gdn', pytest.param('jet', marks=pytest.mark.slow), 'titans', 'hope'],
)
def test_padding_leaves_the_state_unchanged(mixer):
  # The default stands for a mixer's own settings.
  recurrent = SMALL if mixer in ('gdn', 'jet') else config.RecurrentConfig()
  cfg = hybrid(mixers=(mixer,), layers=1, recurrent=recurrent)
  cls = mixers_base.find(mixer)
  layer, state = cls.module(cfg, None), cls.init_state(cfg, 2, 0)
  x = jax.random.normal(jax.random.key(0), (2, 6, 16))
  state = state.replace(s=jax.random.normal(jax.random.key(1), state.s.shape))
  token_mask = jnp.ones((2, 6), bool)
  params = layer.init(jax.random.key(2), x, mixer_inputs(token_mask), state)
  no_tokens = mixer_inputs(jnp.zeros((2, 6), bool))
  _, unchanged = layer.apply(params, x, no_tokens, state)
  np.testing.assert_allclose(unchanged.s, state.s, atol=1e-6)
  # Left padding is as if it were not there, whatever its tokens are.
  wide = jnp.concatenate([99 * x[:, :3], x], axis=1)
  wide_mask = jnp.concatenate([jnp.zeros((2, 3), bool), token_mask], axis=1)
  y, new_state = layer.apply(params, x, mixer_inputs(token_mask), state)
  y_wide, state_wide = layer.apply(params, wide, mixer_inputs(wide_mask), state)
  np.testing.assert_allclose(y_wide[:, 3:], y, atol=1e-5)
  np.testing.assert_allclose(state_wide.s, new_state.s, atol=1e-5)


def test_the_state_is_float32_under_bfloat16():
  cfg = hybrid(dtype='bfloat16')
  out = transformer.forward(cfg, conftest.weights(cfg), jnp.ones((2, 5), int))
  assert out.hidden.dtype == jnp.bfloat16
  assert {s.dtype for s in out.states} == {jnp.dtype('float32')}


def test_jets_initial_kernels_are_static_and_have_a_gradient():
  cfg = hybrid(mixers=('jet',), layers=1)
  params = transformer.init(cfg, jax.random.key(0))
  tokens = jnp.arange(6)[None]

  def loss(params):
    return (transformer.forward(cfg, params, tokens).logits ** 2).sum()

  layer = params['blocks']['block_0']['recurrence']
  assert not layer['kernel_out']['kernel'].any()
  grads = jax.grad(loss)(params)['blocks']['block_0']['recurrence']
  assert jnp.abs(grads['kernel_out']['kernel']).max() > 0


def with_states(model, value=0.1):
  """The model with a memory whose recurrent states are all `value`."""
  memory = memory_init.init_memory(model.cfg)
  states = tuple(s + value for s in memory.states)
  return model.with_memory(memory.replace(states=states))


def test_cached_decode_is_the_full_forward(model):
  model = with_states(model)
  tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 16)
  full = model.forward(tokens)
  cache = cache_lib.init_cache(model.cfg, 2, 9, model.memory)
  parts, end = [], 0
  for size in (4, 1, 1, 3):
    out = model.forward(tokens[:, end : end + size], cache=cache)
    cache, end = out.cache, end + size
    parts.append(out.logits)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), full.logits, atol=1e-5)


@pytest.mark.slow
def test_greedy_samples_are_the_argmax_of_the_forward_pass(model):
  model = with_states(model)
  prompts = [[3, 1, 4, 1, 5], [2, 7]]
  sampler = sampling.SamplerConfig(max_new=4, temperature=0.0)
  completions = sampling.complete(model, prompts, jax.random.key(0), sampler)
  for prompt, completion in zip(prompts, completions, strict=True):
    logits = model.forward(jnp.array([prompt + completion])).logits[0]
    greedy = logits[len(prompt) - 1 : -1].argmax(-1)
    assert greedy.tolist() == completion


@jax.jit
def plain_hybrid(model, batch):
  """Logits without sleep: window by window, states handed on."""
  states = ()
  numbers = jnp.arange(batch.context.shape[2])
  for j in range(batch.context.shape[1]):
    states = transformer.forward(
      model.cfg,
      model.params,
      batch.context[:, j],
      memory_lib.of_states(model.cfg, states),
      positions=jnp.where(batch.token_mask[:, j], numbers, -1),
    ).states
  return transformer.forward(
    model.cfg,
    model.params,
    batch.inputs,
    memory_lib.of_states(model.cfg, states),
  ).logits


def evaluate(model, batch, **settings):
  """`training.evaluate`, compiled, under these settings of recurrence."""
  cfg = recurrence_config.RecurrenceConfig(**settings)
  return jax.jit(training_lib.evaluate, static_argnums=0)(cfg, model, batch)


def test_one_pass_is_the_plain_hybrid(model):
  batch = random_windows(padded=[(0, 0), (2, 1)])
  want = nll_of(plain_hybrid(model, batch), batch)
  nll = evaluate(model, batch).nll
  # Two programs, which some processors round differently.
  np.testing.assert_allclose(nll, want, rtol=5e-6)
  # And so are its controls, which differ in later passes alone.
  for control in ('carry_features', 'carry_states'):
    same = evaluate(model, batch, **{control: False})
    np.testing.assert_array_equal(same.nll, nll)


def test_one_pass_is_one_sequence_under_block_diagonal_attention():
  cfg = hybrid(mixers=('gdn',), recurrent=dataclasses.replace(SMALL, conv=1))
  model = conftest.build_model(cfg)
  batch = random_windows()
  whole = np.concatenate([batch.context.reshape(3, -1), batch.inputs], axis=1)
  want = nll_of(model.forward(whole).logits[:, -4:], batch)
  np.testing.assert_allclose(evaluate(model, batch).nll, want, atol=1e-5)


def by_hand(model, batch, passes, loop=None):
  """Algorithm 1, with Python loops over windows, passes and blocks."""
  cfg = model.cfg
  first, end = loop or (0, cfg.layers)
  stack = layer_stack.LayerStack(cfg)
  rows, num_windows, length = batch.context.shape
  states = ()
  positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
  inputs = mixers_base.MixerInputs(
    layers_lib.rope_cos_sin(positions, cfg.resolved_head_dim, cfg.rope_theta),
    positions[..., None] >= positions[:, None],
    None,
    jnp.ones((rows, length), bool),
  )
  for window in range(num_windows):
    x = model.params['embed']['embedding'][batch.context[:, window]]
    order = [
      *range(first),
      *[*range(first, end)] * passes,
      *range(end, cfg.layers),
    ]
    for i in order:
      caches = cache_lib.init_layer_caches(cfg, rows, states)
      x, caches, _ = stack.apply(
        {'params': model.params['blocks']},
        x,
        block_lib.LayerInputs(None, caches, None),
        inputs,
        range(i, i + 1),
      )
      states = cache_lib.recurrent_states(cfg, caches)
  return transformer.forward(
    cfg, model.params, batch.inputs, memory_lib.of_states(cfg, states)
  ).logits


@pytest.mark.parametrize(
  'passes,loop',
  [pytest.param(3, None, marks=pytest.mark.slow), (2, (1, 2))],
)
def test_passes_are_algorithm_1(model, passes, loop):
  batch = random_windows()
  want = nll_of(by_hand(model, batch, passes, loop), batch)
  predictions = evaluate(model, batch, passes=passes, loop=loop or (0, 0))
  np.testing.assert_allclose(predictions.nll, want, atol=1e-5)


@pytest.mark.slow
def test_every_setting_of_the_passes_makes_a_difference(model):
  batch = random_windows()
  settings = [
    {},
    dict(passes=2),
    dict(passes=3),
    dict(passes=3, carry_features=False),
    dict(passes=3, carry_states=False),
    dict(passes=3, loop=(1, 2)),
    dict(passes=3, eviction='sliding'),
  ]
  nll = [np.asarray(evaluate(model, batch, **s).nll) for s in settings]
  for i, a in enumerate(nll):
    assert all(np.abs(a - b).max() > 1e-4 for b in nll[:i])


TWO_PASSES = recurrence_config.RecurrenceConfig(passes=2)


def read(model, context, token_mask, cfg=TWO_PASSES):
  """What the last window of the context leaves."""
  rows, _, length = context.shape
  state = passes_lib.init_window_state(cfg, model, rows, length)
  return passes_lib.read(cfg, model, state, context, token_mask)[0]


def predict(model, state, batch, cfg=TWO_PASSES):
  """Logits in the prediction window, from what the context has left."""
  return passes_lib.predict(
    cfg, model, state, batch.inputs, batch.input_mask, 0
  )


def test_nothing_but_the_states_outlives_a_window(model):
  batch, other = random_windows(), random_windows(seed=1)
  without_context = model.forward(batch.inputs).logits
  logits = []
  for context in (batch.context, other.context):
    state = read(model, context, batch.token_mask)
    zeros = state.replace(states=jax.tree.map(jnp.zeros_like, state.states))
    logits += [predict(model, s, batch) for s in (state, zeros)]
  first, first_from_zeros, second, second_from_zeros = logits
  assert jnp.abs(first - second).max() > 1e-3
  np.testing.assert_array_equal(first_from_zeros, second_from_zeros)
  np.testing.assert_allclose(first_from_zeros, without_context, atol=1e-5)


def test_gradients_reach_a_window_through_the_states_alone(model):
  batch = random_windows()

  def grad_of(stop_gradient):
    def loss(table):
      # `table` embeds the windows; the prediction has the model's own.
      params = model.params | {'embed': {'embedding': table}}
      reader = model.replace(params=params)
      state = read(reader, batch.context, batch.token_mask)
      if stop_gradient:
        state = jax.lax.stop_gradient(state)
      return (predict(model, state, batch) ** 2).mean()

    return jnp.abs(jax.grad(loss)(model.params['embed']['embedding'])).max()

  assert grad_of(stop_gradient=False) > 1e-6
  assert grad_of(stop_gradient=True) == 0


@pytest.mark.slow
def test_rematerialised_windows_have_the_same_gradient(model):
  batch = random_windows()

  def grads(remat):
    def loss(params):
      return training_lib.evaluate(
        dataclasses.replace(TWO_PASSES, remat=remat),
        model.replace(params=params),
        batch,
      ).loss

    return jax.jit(jax.grad(loss))(model.params)

  for a, b in zip(
    jax.tree.leaves(grads(True)), jax.tree.leaves(grads(False)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_sliding_eviction_with_one_pass_is_a_sliding_window():
  # With attention alone nothing but the band of the last L tokens is attended.
  cfg = hybrid(mixers=('attention', 'attention'))
  model = conftest.build_model(cfg)
  batch = random_windows(num_windows=3, length=6, num_inputs=4)
  whole = np.concatenate([batch.context.reshape(3, -1), batch.inputs], axis=1)
  number = jnp.arange(whole.shape[1])
  distance = number[:, None] - number
  mask = (distance >= 0) & (distance < 6)
  inputs = mixers_base.MixerInputs(
    layers_lib.rope_cos_sin(
      jnp.broadcast_to(number, whole.shape),
      cfg.resolved_head_dim,
      cfg.rope_theta,
    ),
    jnp.broadcast_to(mask, (3, *mask.shape)),
    None,
    jnp.ones(whole.shape, bool),
  )
  embedding = model.params['embed']['embedding']
  x, *_ = layer_stack.LayerStack(cfg).apply(
    {'params': model.params['blocks']},
    embedding[whole],
    block_lib.LayerInputs(None, (None, None), None),
    inputs,
  )
  norm = layers_lib.RMSNorm(cfg.norm_eps)
  hidden = norm.apply({'params': model.params['norm']}, x)
  want = nll_of((hidden @ embedding.T)[:, -4:], batch)
  nll = evaluate(model, batch, eviction='sliding').nll
  np.testing.assert_allclose(nll, want, atol=1e-5)


@pytest.mark.parametrize('loop', [(0, 1), (1, 2), (1, 3)])
def test_one_pass_does_not_depend_on_what_is_looped(loop):
  # Under sliding eviction every layer must keep the keys it computed.
  model, batch = conftest.build_model(hybrid(layers=4)), random_windows()
  want = evaluate(model, batch, eviction='sliding')
  looped = evaluate(model, batch, eviction='sliding', loop=loop)
  np.testing.assert_allclose(looped.nll, want.nll, atol=1e-5)


def test_a_memory_per_row_is_refused_for_hybrids(model):
  model = model.with_memory(memory_init.init_memory(model.cfg))
  with pytest.raises(config.ConfigError, match='generate_per_row'):
    sampling.generate_per_row(
      model,
      jnp.ones((1, 2), int),
      jnp.array([2]),
      jax.random.split(jax.random.key(0), 1),
      sampling.SamplerConfig(max_new=1),
    )


def test_a_halting_rule_mixes_states_in_training_and_decides_afterwards(model):
  batch = random_windows()
  cfg = recurrence_config.RecurrenceConfig(passes=3, halting=True)
  rule = halting.init_halting(model.cfg)

  def with_rule(rule) -> model_lib.Model:
    return model.replace(params=model.params | {'halt': rule})

  for bias, passes in ((-20.0, 3), (20.0, 1)):
    biased = with_rule(rule | {'bias': jnp.array(bias)})
    predictions = training_lib.evaluate_batch(cfg, biased, batch)
    want = evaluate(model, batch, passes=passes)
    assert predictions.passes.tolist() == [passes] * 3
    np.testing.assert_allclose(predictions.nll, want.nll, atol=1e-5)
  mixed = training_lib.evaluate(cfg, with_rule(rule), batch)
  assert ((mixed.passes > 1) & (mixed.passes < 3)).all()


def test_muon_trains_the_matrices_and_adam_the_rest():
  cfg = hybrid(mixers=('attention', 'jet'))
  rules = optimizers.muon_dimensions(transformer.init(cfg, jax.random.key(0)))
  flat = jax.tree_util.tree_flatten_with_path(
    rules, is_leaf=lambda x: x is None or hasattr(x, 'reduction_axis')
  )[0]
  muon = {
    '.'.join(k.key for k in path) for path, rule in flat if rule is not None
  }
  block = {name.split('.', 2)[2] for name in muon}
  assert all(name.startswith('blocks.') for name in muon)
  assert block == {
    *(f'attention.{m}.kernel' for m in 'qkvo'),
    *(f'recurrence.{m}.kernel' for m in 'qkvgo'),
    *(f'level_1.{m}' for m in ('gate', 'up', 'down')),
  }


def test_muon_sees_each_layer_of_a_stack_as_a_matrix():
  cfg = conftest.tiny()
  params = transformer.init(cfg, jax.random.key(0))
  rules = optimizers.muon_dimensions(params)['blocks']
  attention = {
    name: (rule['kernel'].reduction_axis, rule['kernel'].output_axis)
    for name, rule in rules['attention'].items()
  }
  assert attention == dict.fromkeys('qkv', (1, (2, 3))) | {'o': ((1, 2), 3)}
  gate = rules['level_1']['gate']
  assert (gate.reduction_axis, gate.output_axis) == (1, 2)
  assert rules['level_1_norm']['scale'] is None
  optimizer = optimizers.muon_adamw(1e-2, 1e-3, 0.0)
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  up = np.asarray(updates['blocks']['level_1']['up'])
  # Of a matrix of ones, orthogonalised, in every layer: its one direction.
  np.testing.assert_allclose(up, np.broadcast_to(up[:1, :1, :1], up.shape))
  assert (up < 0).all()
