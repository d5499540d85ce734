"""Array types and the one-letter dimension glossary.

A name in an annotation, or a suffix such as `x_BxTxD`, always means:

  B  rows of a batch            T  tokens in a row          V  vocabulary
  D  model width                F  hidden width of an MLP   L  layers
  H  query heads                K  key/value heads          E  width of a head
  S  expert slots of a level    R  rank of an expert        C  cache capacity
  N  rows of a data set         P  tokens of a prompt       M  new tokens
"""

from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
import numpy as np

Array = jax.Array | np.ndarray  # For functions that accept either.
# A field of a pytree dataclass. Transformations put other values than arrays
# there, such as shapes and shardings, so it is not checked at run time.
if TYPE_CHECKING:
  Leaf = jax.Array
  HostLeaf = np.ndarray  # Where the dataclass is built from NumPy's arrays.
else:
  Leaf = HostLeaf = Any
Tree = Any  # A pytree; the docstring states its structure.
Metrics = dict[str, float]  # Values by name.
Params = dict[str, Any]  # The backbone's weights, nested as Flax has them.
Key = jax.Array  # A typed or raw JAX random key.
Device = Any  # A jax.Device, which is not a type to static checkers.

Scalar = Float[jax.Array, '']
Tokens = Int[Array, 'B T']
Mask = Bool[Array, 'B T'] | Float[Array, 'B T']
Hidden = Float[Array, 'B T D']
Logits = Float[Array, 'B T V']

__all__ = [
  'Array',
  'Bool',
  'Device',
  'Float',
  'Hidden',
  'HostLeaf',
  'Int',
  'Key',
  'Leaf',
  'Logits',
  'Mask',
  'Metrics',
  'Params',
  'Scalar',
  'Tokens',
  'Tree',
]
