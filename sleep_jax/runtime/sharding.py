"""Which axis of which array lies on which axis of the mesh; all of it is here.

Model code knows no mesh. A leaf is known by its path; `_LEAVES` names its axes,
`RULES` gives each name its mesh axes, and the compiler does the rest. Under
`over(sizes)`, `lay`, `split` and `whole` place arrays, in compiled code too;
elsewhere they return what they are given.

Mesh axes: `data` splits a batch, `fsdp` a batch and the weights, `tensor` what
is inside a layer, `expert` the slots of a bank, `lives` independent instances.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import math
import re
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.runtime import tree_paths

MESH_AXES = ('data', 'fsdp', 'tensor', 'expert', 'lives')
Rules = Mapping[str | None, tuple[str, ...]]
Axes = tuple[str | None, ...]

# Logical to mesh axes. What is not named here lies whole on every device.
RULES: Rules = {
  'batch': ('data', 'fsdp'),
  'instances': ('lives', 'data', 'fsdp'),
  'embed': ('fsdp',),
  'vocab': ('tensor',),
  'heads': ('tensor',),
  'mlp': ('tensor',),
  'slots': ('expert',),
}

# The end of a leaf's path, and its logical axes. The first that fits counts.
_LEAVES: tuple[tuple[str, Axes], ...] = (
  (r'embed\.embedding', ('vocab', 'embed')),
  (r'head\.kernel', ('embed', 'vocab')),
  (r'\b[qkv]\.kernel', ('layers', 'embed', 'heads', None)),
  (r'\b[qkv]\.bias', ('layers', 'heads', None)),
  (r'\bo\.kernel', ('layers', 'heads', None, 'embed')),
  (r'\b(gate|up)', ('layers', 'embed', 'mlp')),
  (r'\bdown', ('layers', 'mlp', 'embed')),
  (r'pairs\..*\.[ab]', ('layers', None, None)),  # Of a LoRA: small.
  (r'experts\.a', ('layers', 'slots', 'embed', None)),
  (r'experts\.b', ('layers', 'slots', None, 'embed')),
  (r'experts\.router', ('layers', 'slots', 'embed')),
  (r'\ba', ('layers', 'embed', None)),  # Of one expert.
  (r'\bb', ('layers', None, 'embed')),
  (r'\brouter', ('layers', 'embed')),
)


def mesh(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """A mesh of all of `MESH_AXES`; those not in `sizes` have size 1.

  Raises:
    ConfigError: if an axis is unknown or has no size, or the sizes do not use
      all devices.
  """
  devices = jax.devices() if devices is None else devices
  if unknown := sorted(set(sizes) - set(MESH_AXES)):
    raise config.ConfigError(
      f'mesh axis {unknown[0]!r} is unknown; known are {", ".join(MESH_AXES)}.'
    )
  for axis, size in sizes.items():
    if size < 1:
      raise config.ConfigError(f'mesh.{axis}={size} must be at least 1.')
  shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
  if math.prod(shape) != len(devices):
    asked = ' x '.join(f'{k}={v}' for k, v in sizes.items() if v > 1) or '1'
    raise config.ConfigError(
      f'a mesh of {asked} needs {math.prod(shape)} devices, but there are '
      f'{len(devices)}; change its sizes.'
    )
  kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  grid = np.asarray(devices).reshape(shape)
  return jax.sharding.Mesh(grid, MESH_AXES, axis_types=kinds)


def axes_of(path: str) -> Axes:
  """Logical axes of the leaf at a dotted path; () if it is never split."""
  for ending, axes in _LEAVES:
    if re.search(f'(?:{ending})$', path):
      return axes
  return ()


def spec(axes: Axes, where: str, rules: Rules = RULES) -> jax.P:
  """The partition of an array with these logical axes.

  Raises:
    ConfigError: if two of them want the same mesh axis.
  """
  taken: dict[str, str] = {}
  out = []
  for name in axes:
    wanted = rules.get(name, ())
    for axis in wanted:
      if axis in taken:
        raise config.ConfigError(
          f'{where}: both {taken[axis]!r} and {name!r} lie on mesh axis '
          f'{axis!r}; give one of them another in the rules.'
        )
      taken[axis] = name
    out.append(wanted or None)
  return jax.P(*out)


def sharding(
  mesh: jax.sharding.Mesh,
  axes: Axes,
  shape: tuple[int, ...],
  where: str,
  rules: Rules = RULES,
) -> jax.sharding.NamedSharding:
  """How an array of this shape lies on the mesh.

  Raises:
    ConfigError: if axes collide, or do not divide.
  """
  if len(axes) > len(shape):
    raise config.ConfigError(
      f'{where} has shape {list(shape)}, but axes {axes} by its name.'
    )
  parts = spec(axes, where, rules)
  for size, name in zip(shape, axes):
    part = rules.get(name, ())
    over = math.prod(mesh.shape[axis] for axis in part)
    if size % over:
      raise config.ConfigError(
        f'{where}: {name!r} has size {size}, which {over} devices '
        f'({" x ".join(part)}) do not divide; change the mesh.'
      )
  return jax.sharding.NamedSharding(mesh, parts)


def shardings(
  mesh: jax.sharding.Mesh,
  tree: at.Tree,
  lead: Axes = (),
  rules: Rules = RULES,
) -> at.Tree:
  """How params, a memory, an expert, adapters or their optimizers lie.

  Args:
    mesh: of `mesh`.
    tree: arrays or their shapes; leaves are known by the end of their path.
    lead: axes that every leaf has before its own, such as `instances`.
    rules: from logical to mesh axes.

  Returns:
    A tree of `NamedSharding`, for `jax.device_put` or as `in_shardings`.
  """
  leaves = [
    sharding(mesh, lead + axes_of(path), leaf.shape, path, rules)
    for path, leaf in tree_paths.leaf_paths(tree).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def rows(
  mesh: jax.sharding.Mesh, tree: at.Tree, axis: str = 'batch'
) -> at.Tree:
  """How data lies whose leaves begin with rows: `batch` or `instances`."""
  return jax.tree.map(
    lambda x: sharding(mesh, (axis,) if x.shape else (), x.shape, axis), tree
  )


def is_distributed(sizes: Mapping[str, int]) -> bool:
  """Whether these sizes ask for a mesh; all of them 1 do not."""
  return any(size != 1 for size in sizes.values())


@contextlib.contextmanager
def use_mesh(sizes: Mapping[str, int]) -> Iterator[None]:
  """Within, everything lies on a mesh of these sizes, over all processes.

  Sizes that are all 1, or none, change nothing.

  Raises:
    ConfigError: if there can be no such mesh.
  """
  if not is_distributed(sizes):
    yield
    return
  with jax.set_mesh(mesh(sizes)):
    yield


def current() -> jax.sharding.AbstractMesh | None:
  """The mesh in force, if any; also while a program is traced."""
  found = jax.sharding.get_abstract_mesh()
  return None if found.empty else found


def shard_params(tree: at.Tree) -> at.Tree:
  """Weights, a memory or a whole life, by the table.

  Raises:
    ConfigError: if a leaf does not divide.
  """
  if (found := current()) is None:
    return tree
  parts = shardings(found, tree)
  return jax.tree.map(
    lambda x, s: jax.lax.with_sharding_constraint(x, s.spec), tree, parts
  )


def _spec_of_data(
  found: jax.sharding.AbstractMesh, axes: Axes, x: Any
) -> jax.P:
  def over_devices(name: str | None) -> int:
    return math.prod(found.shape[axis] for axis in RULES.get(name, ()))

  names = tuple(
    name if size % over_devices(name) == 0 else None
    for size, name in zip(np.shape(x), axes)
  )
  return spec(names, 'data')


def shard_batch(tree: at.Tree, *axes: str | None) -> at.Tree:
  """Data whose leaves begin with these logical axes.

  Settings are checked before any life (`check_rows`). An axis whose size no
  setting tells, such as the questions of an exam, lies whole if it must.
  """
  if (found := current()) is None:
    return tree
  return jax.tree.map(
    lambda x: jax.lax.with_sharding_constraint(
      x, _spec_of_data(found, axes, x)
    ),
    tree,
  )


def replicate(tree: at.Tree) -> at.Tree:
  """Data that every device has all of."""
  return shard_batch(tree)


def fetch(tree: at.Tree) -> at.Tree:
  """NumPy arrays, all of them in every process, wherever the leaves lie."""

  def one(x: Any) -> np.ndarray:
    if not isinstance(x, jax.Array) or (
      x.is_fully_addressable or x.is_fully_replicated
    ):
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(one, tree)


def num_shards(axis: str) -> int:
  """Over how many devices a logical axis is split."""
  if (found := current()) is None:
    return 1
  return math.prod(found.shape[name] for name in RULES[axis])


def check_rows(rows: Mapping[str, int]) -> None:
  """Refuses numbers of rows, by the name of their setting, that do not divide.

  Raises:
    ConfigError: with both numbers.
  """
  if (found := current()) is not None:
    for where, size in rows.items():
      sharding(found, ('batch',), (size,), where)


def check_leaves(tree: at.Tree) -> None:
  """Refuses weights, or their shapes, that do not divide.

  Raises:
    ConfigError: with both numbers.
  """
  if (found := current()) is not None:
    shardings(found, tree)
