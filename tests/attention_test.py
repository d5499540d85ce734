"""Every form of attention gives what the matrix of all scores gives."""

import functools

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from launch import programs
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import mesh_axes
from sleep_jax.models import positions as positions_lib
from sleep_jax.models.kernels import attention
from sleep_jax.models.kernels import blockwise
from sleep_jax.models.kernels import flash
from sleep_jax.runtime import sharding
from tests import conftest

ROWS, LENGTH, HEADS, KV_HEADS, SIZE = 2, 43, 4, 2, 8


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
  monkeypatch.setattr(blockwise, '_BLOCK', 8)


def default(length=LENGTH):
  return jnp.broadcast_to(jnp.arange(length), (ROWS, length))


def padded(length=LENGTH):
  lengths = jnp.asarray([length, length - 19])
  return positions_lib.left_padded_positions(lengths, length)


def cached(free=13):
  """Ten queries in the middle of a cache whose last columns are free."""
  keys = padded()[:, : LENGTH - free]
  pad = positions_lib.PAD_POSITION
  full = jnp.pad(keys, ((0, 0), (0, free)), constant_values=pad)
  return positions_lib.PositionMask(keys[:, -10:], full)


def masks():
  both = {'causal': default(), 'padded': padded()}
  rules = {
    name: positions_lib.PositionMask(rows, rows) for name, rows in both.items()
  }
  causal = rules['causal']
  return rules | {
    'window': causal.replace(window=7),
    'sinks': causal.replace(window=7, sinks=3),
    'padded window': rules['padded'].replace(window=7, sinks=3),
    'cache': cached(),
  }


MASKS = masks()


def arrays(mask, seed=0, heads=HEADS, size=SIZE):
  """Queries, keys and values for a mask."""
  rng = np.random.default_rng(seed)
  t, c = mask.queries.shape[1], mask.keys.shape[1]
  shapes = (
    (ROWS, t, heads, size),
    (ROWS, KV_HEADS, size, c),
    (ROWS, KV_HEADS, c, size),
  )
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def materialized(*args):
  *args, mask = args
  return attention.attend(*args, mask.dense())


def plain(q, k, v, mask):
  """The formula, whose gradient JAX derives."""
  groups = q.shape[2] // k.shape[1]
  k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
  scores = jnp.einsum('bthe,bhec->bhtc', q, k) * q.shape[-1] ** -0.5
  scores = jnp.where(mask.dense()[:, None], scores, -1e30)
  return jnp.einsum('bhtc,bhce->bthe', jax.nn.softmax(scores), v)


def sees(mask):
  """`[B, T, 1, 1]`: what other queries get means nothing."""
  return mask.dense().any(-1)[..., None, None]


def value_and_grads(attend, mask, args):
  weight = np.random.default_rng(1).normal(size=args[0].shape)
  weight = jnp.asarray(weight, jnp.float32) * sees(mask)

  def total(*args):
    y = attend(*args, mask) * sees(mask)
    return (y * weight).sum(), y

  grad = jax.grad(total, (0, 1, 2), has_aux=True)
  return jax.jit(grad)(*args)


def assert_equal(attend, mask, args):
  got = value_and_grads(attend, mask, args)
  want = value_and_grads(plain, mask, args)
  for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize('name', MASKS)
def test_the_gradient_of_the_whole_matrix_is_that_of_the_formula(name):
  assert_equal(materialized, MASKS[name], arrays(MASKS[name]))


@pytest.mark.parametrize('name', MASKS)
def test_blocks_give_the_values_and_gradients_of_the_whole_matrix(name):
  assert_equal(blockwise.attend, MASKS[name], arrays(MASKS[name]))


@pytest.mark.parametrize('name', MASKS)
def test_gradients_by_what_a_query_does_not_see_are_exactly_zero(name):
  mask = MASKS[name]
  q, k, v = arrays(mask)

  def outputs(k, v):
    return blockwise.attend(q, k, v, mask).sum((0, 2, 3))

  k_slope, v_slope = jax.jit(jax.jacrev(outputs, (0, 1)))(k, v)
  size = np.abs(k_slope).sum((2, 3)), np.abs(v_slope).sum((2, 4))
  for slope in size:  # [T, B, C]
    unseen = np.swapaxes(~np.asarray(mask.dense()), 0, 1)
    np.testing.assert_array_equal(slope[unseen], 0)
    assert slope.any()


@pytest.mark.slow
def test_second_derivatives_are_those_of_the_whole_matrix():
  mask = MASKS['padded']
  args = arrays(mask)

  def curvature(attend):
    def slope(q, k, v):
      y = lambda *x: (attend(*x, mask) * sees(mask)) ** 2
      return sum(
        jnp.sum(g**2)
        for g in jax.grad(lambda *x: y(*x).sum(), (0, 1, 2))(q, k, v)
      )

    return jax.jit(jax.grad(slope, (0, 1, 2)))(*args)

  for x, y in zip(
    curvature(blockwise.attend), curvature(materialized), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('positions', ['shared', 'per row'])
def test_a_batch_under_vmap_is_each_alone(positions):
  mask = MASKS['padded']
  args = [jnp.stack(x) for x in zip(arrays(mask, 2), arrays(mask, 3))]
  masks = jax.tree.map(lambda x: jnp.stack([x, x]), mask)
  axis = None if positions == 'shared' else 0
  grads = jax.jit(
    jax.vmap(
      jax.grad(lambda *x: (blockwise.attend(*x) ** 2).sum(), (0, 1, 2)),
      in_axes=(0, 0, 0, axis),
    )
  )(*args, mask if axis is None else masks)
  for i, seed in enumerate((2, 3)):
    alone = jax.grad(
      lambda *x: (blockwise.attend(*x, mask) ** 2).sum(), (0, 1, 2)
    )
    for x, y in zip(grads, alone(*arrays(mask, seed)), strict=True):
      np.testing.assert_allclose(x[i], y, atol=1e-5)


@pytest.mark.parametrize('name', ['causal', 'padded', 'window'])
def test_splash_attention_gives_the_same(name):
  mask = MASKS[name]

  def splash(*args):
    return flash.splash(*args, first=0, interpret=True)

  assert_equal(splash, mask, arrays(mask))


def test_splash_attention_reads_a_window_behind_the_queries():
  """Keys of the last window, then those of this one."""
  keys = positions_lib.PAD_POSITION + jnp.maximum(default() - 10, 0)
  keys = jnp.where(keys >= 0, keys, positions_lib.PAD_POSITION)
  mask = positions_lib.PositionMask(keys[:, 22:], keys, window=22)

  def splash(*args):
    return flash.splash(*args, first=22, interpret=True)

  assert_equal(splash, mask, arrays(mask))


@pytest.mark.parametrize('name', ['causal', 'padded', 'window'])
def test_what_cudnn_is_given_means_the_same(name):
  """Its arguments, read by the other implementation of the same function."""
  mask = MASKS[name]

  def cudnn(*args):
    return flash.cudnn(*args, implementation='xla')

  assert_equal(cudnn, mask, arrays(mask))


def test_cudnn_is_asked_only_for_what_it_has():
  mask = MASKS['causal']
  full = arrays(mask)
  half = [x.astype(jnp.bfloat16) for x in full]
  assert flash.cudnn_takes(*half, mask)
  assert not flash.cudnn_takes(*full, mask)
  assert not flash.cudnn_takes(*half, MASKS['sinks'])
  some = [x.astype(jnp.bfloat16) for x in arrays(MASKS['cache'])]
  assert not flash.cudnn_takes(*some, MASKS['cache'])


def test_kernels_split_rows_and_heads_as_the_sharding_rules_do():
  assert mesh_axes.ROWS == sharding.RULES['batch']
  assert mesh_axes.INNER == sharding.RULES['heads'] == sharding.RULES['vocab']


def test_half_precision_rounds_as_the_whole_matrix_does():
  mask = MASKS['padded']
  args = [x.astype(jnp.bfloat16) for x in arrays(mask)]
  got, want = blockwise.attend(*args, mask), materialized(*args, mask)
  assert got.dtype == want.dtype == jnp.bfloat16
  error = jnp.abs(got - want) * sees(mask)
  assert error.max() < 0.02


def test_a_model_reads_long_rows_as_it_reads_short_ones(monkeypatch):
  """In one pass, and in two with a cache."""
  model = conftest.build_model(conftest.tiny())
  tokens = jax.random.randint(jax.random.key(0), (2, 21), 0, model.cfg.vocab)
  positions = positions_lib.left_padded_positions(jnp.asarray([21, 9]), 21)

  def logits():
    return model.forward(tokens, positions=positions).logits

  def in_two_parts():
    parts, cache = [], cache_lib.init_cache(model.cfg, 2, 24)
    for part in (slice(0, 13), slice(13, 21)):
      out = model.forward(
        tokens[:, part], positions=positions[:, part], cache=cache
      )
      parts.append(out.logits)
      cache = out.cache
    return jnp.concatenate(parts, axis=1)

  want = jax.jit(logits)()
  monkeypatch.setattr(attention, 'MATERIALIZED', 0)
  real = np.asarray(positions) >= 0
  for got in (jax.jit(lambda: logits())(), jax.jit(in_two_parts)()):
    np.testing.assert_allclose(got[real], want[real], atol=1e-4)


def test_on_a_tpu_the_kernel_has_shorter_rows_but_none_from_a_cache(
  monkeypatch,
):
  assert attention.materializes(1024, 1024)
  monkeypatch.setattr(attention, '_platform', lambda: 'tpu')
  assert not attention.materializes(1024, 1024)
  assert attention.materializes(1024, 1024, cached=True)
  assert attention.materializes(1, 65_536)


def arrays_of(jaxpr):
  """Shapes of what a program computes, inner programs included."""
  for eqn in jaxpr.eqns:
    yield from (v.aval for v in eqn.outvars)
    for inner in core.jaxprs_in_params(eqn.params):
      yield from arrays_of(inner)


@pytest.mark.parametrize('remat', [False, True])
def test_a_scan_over_layers_keeps_nothing_of_all_pairs(remat):
  """Masks depend on no layer: a scan would compute them once, and keep them."""
  length = 512
  positions = jnp.arange(length)[None]
  mask = positions_lib.PositionMask(positions, positions)

  def layer(x, _):
    heads = x.reshape(1, length, HEADS, SIZE)
    k = heads.transpose(0, 2, 3, 1)
    y = blockwise.attend(heads, k, k.swapaxes(2, 3), mask)
    return x + y.reshape(x.shape), None

  def total(x):
    body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    return jax.lax.scan(body, x, None, length=2)[0].sum()

  x = jnp.zeros((1, length, HEADS * SIZE))
  program = jax.make_jaxpr(jax.grad(total))(x)
  sizes = [aval.size for aval in arrays_of(program.jaxpr)]
  assert max(sizes) < length**2


def layer_bytes(length, gradient):
  """Temporary bytes of a layer's attention in the shape of Llama 3.2 1B."""
  shapes = (1, length, 32, 64), (1, 8, 64, length), (1, 8, length, 64)
  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]

  def attend(*args):
    positions = jnp.arange(length)[None]
    mask = attention.mask(positions_lib.PositionMask(positions, positions))
    return attention.attend(*args, mask)

  fn = attend
  if gradient:
    fn = jax.grad(lambda *args: (attend(*args) ** 2).sum(), (0, 1, 2))
  stats = jax.jit(fn).lower(*args).compile().memory_analysis()
  return stats.temp_size_in_bytes


@pytest.mark.parametrize('gradient', [False, True])
@pytest.mark.slow
def test_memory_of_a_layer_grows_with_the_length(monkeypatch, gradient):
  monkeypatch.setattr(blockwise, '_BLOCK', 512)
  short, long = (layer_bytes(length, gradient) for length in (8192, 131_072))
  assert long < 16.5 * short
  assert long < 131_072**2  # A byte for each score of one head.


@pytest.mark.slow
def test_splash_attention_compiles_for_a_tpu_that_is_not_there():
  pytest.importorskip('libtpu')
  mesh = sharding.mesh(
    {'fsdp': 2, 'tensor': 2}, programs.absent_devices('v5p:2x2x1')
  )
  by_heads = jax.NamedSharding(mesh, jax.P('fsdp', 'tensor'))
  by_rows = jax.NamedSharding(mesh, jax.P('fsdp', None, 'tensor'))
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  args = (
    shape((4, 2048, 32, 64), sharding=by_rows),
    shape((4, 8, 64, 2048), sharding=by_heads),
    shape((4, 8, 2048, 64), sharding=by_heads),
  )

  def total(*args):
    positions = jnp.broadcast_to(jnp.arange(2048), (4, 2048))
    mask = attention.mask(positions_lib.PositionMask(positions, positions))
    return attention.attend(*args, mask).astype(jnp.float32).sum()

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    program = jax.jit(jax.grad(total, (0, 1, 2))).lower(*args).compile()
  text = program.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  assert 'all-gather' not in text  # Each device has its rows and heads.
