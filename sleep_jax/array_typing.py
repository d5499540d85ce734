"""Array types and the one-letter dimension glossary.

A name in an annotation, or a suffix such as `x_BxTxD`, always means:

  B  rows of a batch            T  tokens in a row          V  vocabulary
  D  model width                F  hidden width of an MLP   L  layers
  H  query heads                K  key/value heads          E  width of a head
  S  expert slots of a level    R  rank of an expert        C  cache capacity
  N  rows of a data set         P  tokens of a prompt       M  new tokens
"""

from typing import Any

import jax
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

Tree = Any  # A pytree; the docstring states its structure.
Metrics = dict[str, float]  # Values by name.
Params = dict[str, Any]  # The backbone's weights, nested as Flax has them.
Key = jax.Array  # A typed or raw JAX random key.

Scalar = Float[jax.Array, '']
Tokens = Int[jax.Array, 'B T']
Mask = Bool[jax.Array, 'B T'] | Float[jax.Array, 'B T']
Hidden = Float[jax.Array, 'B T D']
Logits = Float[jax.Array, 'B T V']

__all__ = [
  'Bool',
  'Float',
  'Hidden',
  'Int',
  'Key',
  'Logits',
  'Mask',
  'Metrics',
  'Params',
  'Scalar',
  'Tokens',
  'Tree',
]
