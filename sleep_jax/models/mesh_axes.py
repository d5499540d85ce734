"""The mesh axes that a model's own arrays are split over.

Weights and data are placed by `runtime.sharding`; here is what the few parts
of a model need to know that size or split their work themselves.
"""

import math

import jax

ROWS = ('data', 'fsdp')  # Rows of a batch.
INNER = ('tensor',)  # Heads, and the vocabulary.


def that_split(size: int, names: tuple[str, ...]) -> tuple[str, ...]:
  """Of the mesh that is set, the axes `names` if they divide `size`."""
  mesh = jax.sharding.get_abstract_mesh()
  present = tuple(name for name in names if name in mesh.shape)
  return () if size % math.prod(mesh.shape[n] for n in present) else present


def shards(size: int, names: tuple[str, ...]) -> int:
  """In how many parts the axes `names` split `size`."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[name] for name in that_split(size, names))


def divides(rows: int) -> bool:
  """Whether the mesh that is set splits so many rows evenly, if at all."""
  mesh = jax.sharding.get_abstract_mesh()
  return rows % math.prod(mesh.shape.get(name, 1) for name in ROWS) == 0
