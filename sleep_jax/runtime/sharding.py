"""The sharding of every array: logical axes by leaf path, mesh axes by rule.

Model code does not refer to the mesh. `_LEAVES` gives the logical axes of a
leaf by its path, `RULES` the mesh axes of a logical axis, and the compiler
inserts the collectives. Within `use_mesh(sizes)`, `shard_params`, `shard_batch`
and `replicate` place arrays, in compiled code too; elsewhere they return their
argument.

Mesh axes: `data` splits a batch, `fsdp` a batch and the weights, `tensor` the
inner dimensions of a layer, `expert` the slots of a bank, `lives` independent
instances.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import math
import re
from typing import Any

import jax
from jax import core
from jax.experimental import multihost_utils
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.runtime import tree_paths

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
MESH_AXES = ('data', 'fsdp', 'tensor', 'expert', 'lives')
_AXIS_TYPES = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
Rules = Mapping[str | None, tuple[str, ...]]
Axes = tuple[str | None, ...]

# Logical to mesh axes. Axes that are not named here are replicated.
RULES: Rules = {
  'batch': ('data', 'fsdp'),
  'instances': ('lives', 'data', 'fsdp'),
  # Rows each of which has a gradient of all weights: `fsdp` splits those.
  'gradients': ('data',),
  'embed': ('fsdp',),
  'vocab': ('tensor',),
  'heads': ('tensor',),
  'mlp': ('tensor',),
  'slots': ('expert',),
}

# Regular expression of the end of a leaf's path, and the leaf's logical axes.
# The first match counts.
_LEAVES: tuple[tuple[str, Axes], ...] = (
  (r'recurrence\..*', ()),  # Of gdn and jet, whose projections are joined.
  (r'embed\.embedding', ('vocab', 'embed')),
  (r'head\.kernel', ('embed', 'vocab')),
  (r'\b[qkv]\.kernel', ('layers', 'embed', 'heads', None)),
  (r'\b[qkv]\.bias', ('layers', 'heads', None)),
  (r'\bo\.kernel', ('layers', 'heads', None, 'embed')),
  (r'\b(gate|up)', ('layers', 'embed', 'mlp')),
  (r'\bdown', ('layers', 'mlp', 'embed')),
  (r'pairs\..*\.[ab]', ('layers', None, None)),  # Of a LoRA.
  (r'experts\.a', ('layers', 'slots', 'embed', None)),
  (r'experts\.b', ('layers', 'slots', None, 'embed')),
  (r'experts\.router', ('layers', 'slots', 'embed')),
  (r'\ba', ('layers', 'embed', None)),  # Of one expert.
  (r'\bb', ('layers', None, 'embed')),
  (r'\brouter', ('layers', 'embed')),
)
_ONE_LAYER = re.compile(r'\bblock_\d+\.')


def mesh(
  sizes: Mapping[str, int], devices: Sequence[at.Device] | None = None
) -> jax.sharding.Mesh:
  """A mesh of all of `MESH_AXES`; those not in `sizes` have size 1.

  Raises:
    ConfigError: if an axis is unknown or has no size, or the sizes do not use
      all devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = _shape(sizes)
  if math.prod(shape) != len(devices):
    axes = ' x '.join(f'{k}={v}' for k, v in sizes.items() if v > 1) or '1'
    raise config.ConfigError(
      f'a mesh of {axes} needs {math.prod(shape)} devices, but there are '
      f'{len(devices)}; change its sizes.'
    )
  grid = np.asarray(devices).reshape(shape)
  return jax.sharding.Mesh(grid, MESH_AXES, axis_types=_AXIS_TYPES)


def _shape(sizes: Mapping[str, int]) -> tuple[int, ...]:
  """The size of each of `MESH_AXES`.

  Raises:
    ConfigError: if an axis is unknown, or has no size.
  """
  if unknown := sorted(set(sizes) - set(MESH_AXES)):
    raise config.ConfigError(
      f'mesh axis {unknown[0]!r} is unknown; known are {", ".join(MESH_AXES)}.'
    )
  for axis, size in sizes.items():
    if size < 1:
      raise config.ConfigError(f'mesh.{axis}={size} must be at least 1.')
  return tuple(sizes.get(axis, 1) for axis in MESH_AXES)


def axes_of(path: str) -> Axes:
  """Logical axes of the leaf at a dotted path; () if it is replicated."""
  for suffix, axes in _LEAVES:
    if re.search(f'(?:{suffix})$', path):
      # A hybrid's layers are not stacked.
      return axes[1:] if _ONE_LAYER.search(path) else axes
  return ()


def spec(axes: Axes, where: str, rules: Rules = RULES) -> jax.P:
  """The partition spec of an array with these logical axes.

  Raises:
    ConfigError: if two of them map to the same mesh axis.
  """
  used_by: dict[str, str | None] = {}
  out = []
  for name in axes:
    mesh_axes = rules.get(name, ())
    for axis in mesh_axes:
      if axis in used_by:
        raise config.ConfigError(
          f'{where}: both {used_by[axis]!r} and {name!r} lie on mesh axis '
          f'{axis!r}; give one of them another in the rules.'
        )
      used_by[axis] = name
    out.append(mesh_axes or None)
  return jax.P(*out)


def sharding(
  mesh: Mesh,
  axes: Axes,
  shape: tuple[int, ...],
  where: str,
  rules: Rules = RULES,
) -> jax.sharding.NamedSharding:
  """The sharding of an array of this shape on the mesh.

  Raises:
    ConfigError: if two axes map to one mesh axis, or a size is not divisible.
  """
  if len(axes) > len(shape):
    raise config.ConfigError(
      f'{where} has shape {list(shape)}, but axes {axes} by its name.'
    )
  partition = spec(axes, where, rules)
  for size, name in zip(shape, axes):
    mesh_axes = rules.get(name, ())
    devices = math.prod(mesh.shape[axis] for axis in mesh_axes)
    if size % devices:
      raise config.ConfigError(
        f'{where}: {name!r} has size {size}, which {devices} devices '
        f'({" x ".join(mesh_axes)}) do not divide; change the mesh.'
      )
  return jax.sharding.NamedSharding(mesh, partition)


def shardings(
  mesh: Mesh,
  tree: at.Tree,
  lead: Axes = (),
  rules: Rules = RULES,
) -> at.Tree:
  """Shardings of params, a memory, an expert, adapters or optimizer states.

  Args:
    mesh: the mesh, or its shape alone.
    tree: arrays or their shapes; leaves are identified by the end of their
      path.
    lead: logical axes before those of every leaf, such as `instances`.
    rules: from logical to mesh axes.

  Returns:
    A tree of `NamedSharding`, for `jax.device_put` or as `in_shardings`.
  """
  leaves = [
    sharding(mesh, lead + axes_of(path), leaf.shape, path, rules)
    for path, leaf in tree_paths.leaf_paths(tree).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def rows(mesh: Mesh, tree: at.Tree, axis: str = 'batch') -> at.Tree:
  """Shardings of data with leading axis `axis`: `batch` or `instances`."""
  return jax.tree.map(
    lambda x: sharding(mesh, (axis,) if x.shape else (), x.shape, axis), tree
  )


def is_distributed(sizes: Mapping[str, int]) -> bool:
  """Whether any of these mesh axes is larger than 1."""
  return any(size != 1 for size in sizes.values())


@contextlib.contextmanager
def use_mesh(sizes: Mapping[str, int]) -> Iterator[None]:
  """Sets a mesh of these sizes, over the devices of all processes.

  If all sizes are 1, or none is given, no mesh is set.

  Raises:
    ConfigError: if the devices do not form such a mesh.
  """
  if not is_distributed(sizes):
    yield
    return
  with jax.set_mesh(mesh(sizes)):
    yield


@contextlib.contextmanager
def use_absent_mesh(sizes: Mapping[str, int]) -> Iterator[None]:
  """Sets a mesh of devices that are not here, for checks of shapes.

  Raises:
    ConfigError: if an axis is unknown, or has no size.
  """
  mesh = jax.sharding.AbstractMesh(_shape(sizes), MESH_AXES, _AXIS_TYPES)
  with jax.sharding.use_abstract_mesh(mesh):
    yield


def current() -> jax.sharding.AbstractMesh | None:
  """The mesh that is set, if any; also while a program is traced."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def init(make: Callable[..., Any], *args: Any) -> Any:
  """`make(*args)` of weights, a memory or optimizer states, made where it lies.

  On a mesh it is one program, of which each device computes its own part. It
  lies as `shard_params` has it, and no device ever holds more.

  Args:
    make: a function that JAX can trace.
    *args: arrays, or trees of such.

  Raises:
    ConfigError: if the size of a leaf is not divisible.
  """
  if (mesh := current()) is None:
    return make(*args)
  parts = shardings(mesh, jax.eval_shape(make, *args))
  specs = jax.tree.map(lambda s: s.spec, parts)
  return jax.jit(make, out_shardings=specs)(*args)


def shard_params(tree: at.Tree) -> at.Tree:
  """Shards weights, a memory or a whole life by the paths of its leaves.

  Of a NumPy array each device is given its own part, and reads no other: of
  weights that are mapped into memory, no more than that is read.

  Raises:
    ConfigError: if the size of a leaf is not divisible.
  """
  if (mesh := current()) is None:
    return tree

  def place(x: Any, s: jax.sharding.NamedSharding) -> Any:
    # The same buffers: weights that do not change are there once.
    if _lies_at(x, s):
      return x
    if isinstance(x, np.ndarray):
      here = jax.sharding.NamedSharding(jax.sharding.get_mesh(), s.spec)
      return jax.make_array_from_callback(x.shape, here, lambda i: x[i])
    return jax.lax.with_sharding_constraint(x, s.spec)

  return jax.tree.map(place, tree, shardings(mesh, tree))


def _lies_at(x: Any, s: jax.sharding.NamedSharding) -> bool:
  """Whether an array, not one that is traced, is sharded as `s` says."""
  if isinstance(x, core.Tracer) or not isinstance(x, jax.Array):
    return False
  own = x.sharding
  return (
    isinstance(own, jax.sharding.NamedSharding)
    and own.mesh.abstract_mesh == s.mesh
    and own.spec == s.spec
  )


def _batch_spec(mesh: Mesh, axes: Axes, x: Any) -> jax.P:
  def num_devices(name: str | None) -> int:
    return math.prod(mesh.shape[axis] for axis in RULES.get(name, ()))

  names = tuple(
    name if size % num_devices(name) == 0 else None
    for size, name in zip(np.shape(x), axes)
  )
  return spec(names, 'data')


def shard_batch(tree: at.Tree, *axes: str | None) -> at.Tree:
  """Shards data whose leaves begin with these logical axes.

  Sizes that come from the config are checked beforehand by `check_rows`. Any
  other axis, such as the questions of an evaluation, is replicated if its size
  is not divisible.
  """
  if (mesh := current()) is None:
    return tree
  return jax.tree.map(
    lambda x: jax.lax.with_sharding_constraint(x, _batch_spec(mesh, axes, x)),
    tree,
  )


def replicate(tree: at.Tree) -> at.Tree:
  """Places all of the data on every device."""
  return shard_batch(tree)


def fetch(tree: at.Tree) -> at.Tree:
  """The leaves as NumPy arrays, complete in every process."""

  def fetch_leaf(x: Any) -> np.ndarray:
    if not isinstance(x, jax.Array) or (
      x.is_fully_addressable or x.is_fully_replicated
    ):
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(fetch_leaf, tree)


def num_shards(axis: str) -> int:
  """Number of devices over which a logical axis is split."""
  if (mesh := current()) is None:
    return 1
  return math.prod(mesh.shape[name] for name in RULES[axis])


def check_rows(rows: Mapping[str, int]) -> None:
  """Checks that numbers of rows, by the name of their setting, are divisible.

  A single row is not split: every device has it, and a part of the weights.

  Raises:
    ConfigError: with the number of rows and of devices.
  """
  if (mesh := current()) is not None:
    for where, size in rows.items():
      if size > 1:
        sharding(mesh, ('batch',), (size,), where)


def check_leaves(tree: at.Tree) -> None:
  """Checks that weights, or their shapes, are divisible.

  Raises:
    ConfigError: with the size and the number of devices.
  """
  if (mesh := current()) is not None:
    shardings(mesh, tree)
