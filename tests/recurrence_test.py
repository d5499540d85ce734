"""Sleep by recurrence: mixers, the hybrid, Algorithm 1, and its training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import puzzles
from experiments.configs import depo as depo_config
from experiments.configs import rule110 as rule110_config
from experiments.configs import symbolic as symbolic_config
from sleep_jax import config
from sleep_jax.data import windows
from sleep_jax.harness import build as build_lib
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.lifecycle.recurrence import halting
from sleep_jax.lifecycle.recurrence import passes as passes_lib
from sleep_jax.lifecycle.recurrence import training as recurrent_training
from sleep_jax.models import block as block_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import layer_stack
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import memory as memory_lib
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


@pytest.fixture(name='model', params=['gdn', 'jet'])
def _model(request):
  cfg = hybrid(mixers=('attention', request.param))
  return cfg, conftest.weights(cfg)


def strings(
  rows=3, j=3, length=6, input_mask=4, seed=0, hidden=()
) -> windows.WindowBatch:
  """Random windows; of `hidden` (row, window) pairs the start is padding."""
  rng = np.random.default_rng(seed)
  present = np.ones((rows, j, length), bool)
  for row, window in hidden:
    present[row, window, : length // 2] = False
  targets = rng.integers(0, 16, (rows, asked), np.int32)
  return windows.WindowBatch(
    context=rng.integers(0, 16, (rows, j, length), np.int32),
    token_mask=present,
    inputs=np.roll(targets, 1, axis=1),
    input_mask=np.ones((rows, asked), bool),
    targets=targets,
    weight=np.ones((rows, asked), np.float32),
    depth=np.ones((rows, asked), np.int32),
  )


def token_inputs(rows=3, length=19, seed=0):
  r, keys = SMALL, iter(jax.random.split(jax.random.key(seed), 6))

  def draw(*shape):
    return jax.random.normal(next(keys), shape)

  at = (rows, length, r.heads)
  q, k = (deltanet.l2_normalize(draw(*at, r.key)) for _ in range(2))
  v, rate, beta = draw(*at, r.value), draw(*at), jax.nn.sigmoid(draw(*at))
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
def test_chunked_is_recurrent_is_the_printed_rule(chunk):
  inputs = token_inputs()
  printed = delta_rule(*inputs)
  recurrent = deltanet.scan_tokens(*inputs)
  chunked = deltanet.scan_chunks(*inputs, chunk)
  for want, *got in zip(printed, recurrent, chunked):
    for x in got:
      np.testing.assert_allclose(x, want, atol=1e-5)


def test_gradients_of_chunked_and_recurrent_agree():
  inputs = token_inputs()
  # A direction, because the sum of squares hides the sign.
  weight = jax.random.normal(jax.random.key(9), inputs[2].shape)

  def slope(scan):
    def value(*x):
      out, s = scan(*x)
      return (out * weight).sum() + (s**2).sum()

    return jax.grad(value, argnums=range(6))(*inputs)

  chunked = slope(lambda *x: deltanet.scan_chunks(*x, 8))
  for a, b in zip(slope(deltanet.scan_tokens), chunked, strict=True):
    np.testing.assert_allclose(a, b, atol=3e-5)


def test_equal_keys_do_not_lose_the_solve():
  # The worst case for sums of powers: all keys alike, nothing decays.
  q, k, v, log_alpha, beta, s = token_inputs(length=64)
  k = jnp.broadcast_to(k[:, :1], k.shape)
  inputs = (q, k, v, 0 * log_alpha, jnp.ones_like(beta), s)
  for want, got in zip(
    delta_rule(*inputs), deltanet.scan_chunks(*inputs, 64), strict=True
  ):
    np.testing.assert_allclose(got, want, atol=1e-5)


def masked(token_mask) -> mixers_base.MixerInputs:
  """What a recurrent mixer reads of the inputs that layers share."""
  return mixers_base.MixerInputs(
    rope=None, mask=None, cache_index=None, token_mask=token_mask
  )


@pytest.mark.parametrize('mixer', ['gdn', 'jet'])
def test_padding_leaves_the_state_untouched(mixer):
  cfg = hybrid(mixers=(mixer,), layers=1)
  (mixer,) = mixers_base.of_layers(cfg)
  layer = mixer.module(cfg, None)
  x = jax.random.normal(jax.random.key(0), (2, 6, 16))
  state = mixer.init_state(cfg, 2, 6)
  state = state.replace(s=jax.random.normal(jax.random.key(1), state.s.shape))
  present = jnp.ones((2, 6), bool)
  params = layer.init(jax.random.key(2), x, masked(present), state)
  _, none = layer.apply(params, x, masked(jnp.zeros((2, 6), bool)), state)
  assert (none.s == state.s).all()
  # Left padding is as if it were not there, whatever stands in it.
  wide = jnp.concatenate([99 * x[:, :3], x], axis=1)
  there = jnp.concatenate([jnp.zeros((2, 3), bool), present], axis=1)
  y, s = layer.apply(params, x, masked(present), state)
  y_wide, s_wide = layer.apply(params, wide, masked(there), state)
  np.testing.assert_allclose(y_wide[:, 3:], y, atol=1e-5)
  np.testing.assert_allclose(s_wide.s, s.s, atol=1e-5)


def test_the_state_is_float32_under_bfloat16():
  cfg = hybrid(dtype='bfloat16')
  out = transformer.forward(cfg, conftest.weights(cfg), jnp.ones((2, 5), int))
  assert out.hidden.dtype == jnp.bfloat16
  assert {s.dtype for s in out.states} == {jnp.dtype('float32')}


def test_jets_kernels_begin_static_and_can_learn():
  cfg = hybrid(mixers=('jet',), layers=1)
  params = transformer.init(cfg, jax.random.key(0))
  tokens = jnp.arange(6)[None]

  def loss(params):
    return (transformer.forward(cfg, params, tokens).logits ** 2).sum()

  layer = params['blocks']['block_0']['recurrence']
  assert not layer['kernel_out']['kernel'].any()
  slope = jax.grad(loss)(params)['blocks']['block_0']['recurrence']
  assert jnp.abs(slope['kernel_out']['kernel']).max() > 0


def test_cached_decode_is_the_full_forward(model):
  cfg, params = model
  tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 16)
  memory = memory_lib.init_memory(cfg)
  memory = memory.replace(states=tuple(s + 0.1 for s in memory.states))
  full = transformer.forward(cfg, params, tokens, memory)
  cache, parts, at = cache_lib.init_cache(cfg, 2, 9, memory), [], 0
  for size in (4, 1, 1, 3):
    out = transformer.forward(
      cfg, params, tokens[:, at : at + size], memory, cache=cache
    )
    cache, at = out.cache, at + size
    parts.append(out.logits)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), full.logits, atol=1e-5)


def test_rollouts_say_what_the_forward_pass_finds_likeliest(model):
  cfg, params = model
  memory = memory_lib.init_memory(cfg)
  memory = memory.replace(states=tuple(s + 0.1 for s in memory.states))
  prompts = [[3, 1, 4, 1, 5], [2, 7]]
  how = sampling.SamplerConfig(max_new=4, temperature=0.0)
  said = sampling.complete(cfg, params, memory, prompts, jax.random.key(0), how)
  for prompt, answer in zip(prompts, said, strict=True):
    whole = jnp.array([prompt + answer])
    logits = transformer.forward(cfg, params, whole, memory).logits[0]
    greedy = logits[len(prompt) - 1 : -1].argmax(-1)
    assert greedy.tolist() == answer


def plain(cfg, params, batch):
  """The hybrid without sleep: window by window, states handed on."""
  states = ()
  for j in range(batch.context.shape[1]):
    at = jnp.where(
      batch.token_mask[:, j], jnp.arange(batch.context.shape[2]), -1
    )
    states = transformer.forward(
      cfg, params, batch.context[:, j], positions=at, states=states
    ).states
  return transformer.forward(cfg, params, batch.inputs, states=states)


def verdict(cfg, params, batch, **how):
  how = recurrence_config.RecurrenceConfig(**how)
  return jax.jit(recurrent_training.evaluate, static_argnums=(0, 1))(
    cfg, how, params, batch
  )


def test_one_pass_is_the_plain_hybrid_to_the_bit(model):
  cfg, params = model
  batch = strings(hidden=[(0, 0), (2, 1)])
  logp = jax.nn.log_softmax(
    jax.jit(plain, static_argnums=0)(cfg, params, batch).logits
  )
  want = -jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
  got = verdict(cfg, params, batch).nll
  np.testing.assert_array_equal(got, want)
  # And so are its controls, which differ in later passes alone.
  for control in ('carry_features', 'carry_states'):
    same = verdict(cfg, params, batch, **{control: False})
    np.testing.assert_array_equal(same.nll, got)


def test_one_pass_is_one_sequence_under_block_diagonal_attention():
  cfg = hybrid(mixers=('gdn',), recurrent=dataclasses.replace(SMALL, conv=1))
  params = conftest.weights(cfg)
  batch = strings()
  whole = np.concatenate([batch.context.reshape(3, -1), batch.inputs], axis=1)
  out = transformer.forward(cfg, params, whole)
  logp = jax.nn.log_softmax(out.logits[:, -4:])
  want = -jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(verdict(cfg, params, batch).nll, want, atol=1e-5)


def by_hand(cfg, params, batch, n, loop=None):
  """Algorithm 1, with Python loops over windows, passes and blocks."""
  first, end = loop or (0, cfg.layers)
  stack = layer_stack.LayerStack(cfg)
  rows, j, length = batch.context.shape
  states = cache_lib.recurrent_states(
    cfg, cache_lib.init_layer_caches(cfg, rows)
  )
  at = jnp.broadcast_to(jnp.arange(length), (rows, length))
  inputs = mixers_base.MixerInputs(
    rope=layers_lib.rope_cos_sin(at, cfg.resolved_head_dim, cfg.rope_theta),
    mask=at[..., None] >= at[:, None],
    cache_index=None,
    token_mask=jnp.ones((rows, length), bool),
  )
  for window in range(j):
    x = params['embed']['embedding'][batch.context[:, window]]
    order = [*range(first), *[*range(first, end)] * n, *range(end, cfg.layers)]
    for i in order:
      caches = cache_lib.init_layer_caches(cfg, rows, states)
      x, caches, _ = stack.apply(
        {'params': params['blocks']},
        x,
        block_lib.LayerInputs(None, caches, None),
        inputs,
        range(i, i + 1),
      )
      states = cache_lib.recurrent_states(cfg, caches)
  return transformer.forward(cfg, params, batch.inputs, states=states).logits


@pytest.mark.parametrize('n,loop', [(3, None), (2, (1, 2))])
def test_passes_are_algorithm_1(model, n, loop):
  cfg, params = model
  batch = strings()
  logp = jax.nn.log_softmax(by_hand(cfg, params, batch, n, loop))
  want = -jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
  got = verdict(cfg, params, batch, passes=n, loop=loop or (0, 0))
  np.testing.assert_allclose(got.nll, want, atol=1e-5)


def test_each_way_of_looping_is_another(model):
  cfg, params = model
  batch = strings()
  ways = [
    {},
    dict(passes=2),
    dict(passes=3),
    dict(passes=3, carry_features=False),
    dict(passes=3, carry_states=False),
    dict(passes=3, loop=(1, 2)),
    dict(passes=3, eviction='sliding'),
  ]
  told = [np.asarray(verdict(cfg, params, batch, **way).nll) for way in ways]
  for i, a in enumerate(told):
    assert all(np.abs(a - b).max() > 1e-4 for b in told[:i])


def test_nothing_leaks_but_the_states(model):
  cfg, params = model
  batch, other = strings(), strings(seed=1)
  fresh = transformer.forward(cfg, params, batch.inputs).logits
  how = recurrence_config.RecurrenceConfig(passes=2)
  kept = passes_lib.init_window_state(cfg, how, 3, 6)
  logits = []
  for context in (batch.context, other.context):
    read, _ = passes_lib.read(
      cfg, how, params, None, kept, context, batch.token_mask
    )
    emptied = read.replace(states=jax.tree.map(jnp.zeros_like, read.states))
    for left in (read, emptied):
      logits.append(
        passes_lib.predict(
          cfg, how, params, None, left, batch.inputs, batch.input_mask, 0
        )
      )
  one, one_emptied, two, two_emptied = logits
  assert jnp.abs(one - two).max() > 1e-3
  np.testing.assert_array_equal(one_emptied, two_emptied)
  np.testing.assert_allclose(one_emptied, fresh, atol=1e-5)


def test_gradients_reach_a_window_through_the_states_alone(model):
  cfg, params = model
  batch = strings()
  how = recurrence_config.RecurrenceConfig(passes=2)

  def slope(cut):
    def loss(table):
      # The windows are embedded by `table`, the question by the model's own.
      mine = params | {'embed': {'embedding': table}}
      kept = passes_lib.init_window_state(cfg, how, 3, 6)
      kept, _ = passes_lib.read(
        cfg, how, mine, None, kept, batch.context, batch.token_mask
      )
      if cut:
        kept = jax.lax.stop_gradient(kept)
      logits = passes_lib.predict(
        cfg, how, params, None, kept, batch.inputs, batch.input_mask, 0
      )
      return (logits**2).mean()

    return jnp.abs(jax.grad(loss)(params['embed']['embedding'])).max()

  assert slope(cut=False) > 1e-6
  assert slope(cut=True) == 0


def test_rematerialised_windows_have_the_same_gradient(model):
  cfg, params = model
  batch = strings()

  def slope(remat):
    how = recurrence_config.RecurrenceConfig(passes=2, remat=remat)
    return jax.jit(
      jax.grad(lambda p: recurrent_training.evaluate(cfg, how, p, batch).loss)
    )(params)

  for a, b in zip(
    jax.tree.leaves(slope(True)), jax.tree.leaves(slope(False)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_sliding_eviction_with_one_pass_is_a_sliding_window():
  # With attention alone nothing but the band of the last L tokens is seen.
  cfg = hybrid(mixers=('attention', 'attention'), layers=1 * 2)
  params = conftest.weights(cfg)
  batch = strings(j=3, length=6, input_mask=4)
  whole = np.concatenate([batch.context.reshape(3, -1), batch.inputs], axis=1)
  at = jnp.arange(whole.shape[1])
  seen = (at[:, None] >= at) & (at[:, None] - at < 6)
  seen = jnp.broadcast_to(seen, (3, *seen.shape))
  rope = layers_lib.rope_cos_sin(
    jnp.broadcast_to(at, whole.shape), cfg.resolved_head_dim, cfg.rope_theta
  )
  x, *_ = layer_stack.LayerStack(cfg).apply(
    {'params': params['blocks']},
    params['embed']['embedding'][whole],
    block_lib.LayerInputs(None, (None, None), None),
    mixers_base.MixerInputs(rope, seen, None, jnp.ones(whole.shape, bool)),
  )
  hidden = layers_lib.RMSNorm(cfg.norm_eps).apply({'params': params['norm']}, x)
  logp = jax.nn.log_softmax(hidden @ params['embed']['embedding'].T)[:, -4:]
  want = -jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
  got = verdict(cfg, params, batch, eviction='sliding').nll
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('loop', [(0, 1), (1, 2), (1, 3)])
def test_one_pass_is_the_same_whatever_is_looped(loop):
  # Under sliding eviction every layer must keep the keys it computed.
  cfg = hybrid(layers=4)
  params, batch = conftest.weights(cfg), strings()
  want = verdict(cfg, params, batch, eviction='sliding')
  got = verdict(cfg, params, batch, eviction='sliding', loop=loop)
  np.testing.assert_allclose(got.nll, want.nll, atol=1e-5)


def test_a_memory_per_row_is_refused_for_hybrids(model):
  cfg, params = model
  with pytest.raises(config.ConfigError, match='generate_each'):
    sampling.generate_per_row(
          cfg, params, memory_lib.init_memory(cfg), jnp.ones((1, 2), int),
          jnp.array([2]), jax.random.split(jax.random.key(0), 1),
          sampling.SamplerConfig(max_new=1),
        )  # fmt: skip


def test_a_stopping_rule_mixes_states_and_then_decides(model):
  cfg, params = model
  batch = strings()
  how = recurrence_config.RecurrenceConfig(passes=3, halting=True)
  for bias, passes in ((-20.0, 3), (20.0, 1)):
    halt = halting.init_halting(cfg) | {'bias': jnp.array(bias)}
    got = recurrent_training.evaluate_batch(
      cfg, how, params | {'halt': halt}, batch
    )
    want = verdict(cfg, params, batch, passes=passes)
    assert got.passes.tolist() == [passes] * 3
    np.testing.assert_allclose(got.nll, want.nll, atol=1e-5)
  soft = recurrent_training.evaluate(
    cfg, how, params | {'halt': halting.init_halting(cfg)}, batch
  )
  assert ((soft.passes > 1) & (soft.passes < 3)).all()


def test_muon_has_the_matrices_and_adam_the_rest():
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


def small_rule110(variant='', steps=0, **training):
  c = rule110_config.get_config(variant)
  c.puzzle.update(width=4, strings=2, steps=steps)
  c.model.update(dim=16)
  c.model.recurrent.update(heads=1, key=8, value=8)
  c.training.update(
    dict(steps=20, batch=16, num_evals=2, eval_rows=32) | training
  )
  c.seeds = (1,)
  return json.loads(c.to_json())


_ARMS = [
  # Each compiles programs of its own, for half a minute.
  pytest.param(variant, arm, marks=() if arm == 'halting' else pytest.mark.slow)
  for variant in ('', 'controls', 'eviction')
  for arm in rule110_config.get_config(variant).arms
  if arm not in ('passes_1_t5', 'passes_2_t5', 'passes_4_t5')
  and arm not in ('passes_1_t6', 'passes_2_t6', 'passes_4_t6')
]


@pytest.mark.parametrize('variant,arm', _ARMS)
def test_every_arm_of_rule110_is_trained(variant, arm, tmp_path):
  c = small_rule110(variant)
  if 'training' in c['arms'][arm]:
    c['arms'][arm]['training'].pop('steps', None)
  life = puzzles.live(c, arm, 1, tmp_path, 0)
  assert np.isfinite(list(life['final'].values())).all()
  assert life['flops'] > 0
  again = puzzles.live(c, arm, 1, tmp_path, 0)
  assert again == json.loads(json.dumps(life))
  text = puzzles.tell([life], c, tmp_path)
  assert arm in text
  assert (tmp_path / 'curves.png').stat().st_size


def test_an_interrupted_training_goes_on_to_the_same_end(tmp_path, monkeypatch):
  c = small_rule110()
  whole = puzzles.live(c, 'passes_2_t4', 1, tmp_path / 'whole', 0)
  real, calls = puzzles._until_exam, []

  def dies(*args):
    calls.append(1)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return real(*args)

  monkeypatch.setattr(puzzles, '_until_exam', dies)
  with pytest.raises(KeyboardInterrupt):
    puzzles.live(c, 'passes_2_t4', 1, tmp_path / 'cut', 0)
  again = puzzles.live(c, 'passes_2_t4', 1, tmp_path / 'cut', 0)
  assert len(calls) == 3  # The first part is not trained again.
  assert again['final'] == whole['final']


def test_retrieval_is_solved(tmp_path):
  # t = 0: the first bit itself. Chance is one half a bit.
  c = small_rule110(steps=0)
  c['training'].update(steps=200, batch=64, num_evals=1)
  c['arms'] = {'retrieval': {}}
  life = puzzles.live(c, 'retrieval', 1, tmp_path, 0)
  assert life['final']['per_bit'] == 1.0


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
      plan = puzzles.build(build_lib.arm_config(c, arm), 1)
      assert puzzles.train_flops(plan) > 0


@pytest.mark.parametrize(
  'recipe,ending,controls',
  [(rule110_config, '_t6', ('long', 'deep')), (depo_config, '', ('long',))],
)
def test_controls_have_the_flops_of_four_passes(recipe, ending, controls):
  c = json.loads(recipe.get_config().to_json())

  def spent(arm):
    plan = puzzles.build(build_lib.arm_config(c, arm + ending), 1)
    return plan.training.steps * puzzles.train_flops(plan)

  # A prediction window is passed over once, whatever N is.
  for control in controls:
    assert 1.0 <= spent(control) / spent('passes_4') < 1.4


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
    ('training', dict(num_evals=3), 'training.exams=3'),
    ('puzzle', dict(width=0), 'puzzle.width=0'),
    ('puzzle', dict(cells=1), "'cells'"),
  ],
)
def test_bad_settings_are_named(section, change, names):
  c = small_rule110()
  c[section] = c[section] | change
  with pytest.raises(config.ConfigError, match=names):
    puzzles.build(build_lib.arm_config(c, 'passes_1_t4'), 1)


@pytest.mark.parametrize(
  'recipe', [rule110_config, depo_config, symbolic_config]
)
def test_the_papers_sizes_lower(recipe):
  c = json.loads(recipe.get_config('paper').to_json())
  arm = list(c['arms'])[-1]
  assert c['arms'][arm]['recurrence']['passes'] >= 4
  plan = puzzles.build(build_lib.arm_config(c, arm), 1)
  params = jax.eval_shape(
    lambda key: recurrent_training.init(plan.model, plan.recurrence, key),
    jax.random.key(0),
  )
  optimizer = optimizers.muon_adamw(plan.training)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (1, plan.training.batch, *x.shape[1:]), x.dtype
    ),
    plan.puzzle.batch(np.random.default_rng(0), 2),
  )
  lowered = recurrent_training.train_steps.lower(
      plan.model, plan.recurrence, plan.training, params,
      jax.eval_shape(optimizer.init, params), batch,
    )  # fmt: skip
  assert 'while' in lowered.as_text()
