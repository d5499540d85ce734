"""FLOPs of Pallas kernels that tell no cost of their own.

The compiler knows nothing of what such a kernel computes. Known here are those
of splash attention, by their names and the shapes of their operands.
"""

import math
import re

from launch import hlo

_PRODUCTS = {'fwd': 2, 'dkv': 4, 'dq': 3}  # Of a block of queries and keys.
_LANES = 128  # Of a matrix unit: a narrower head takes as long.


def flops(computation: hlo.Computation, instruction: hlo.Instruction) -> float:
  """What matrix units do in a kernel; 0 if it is not known.

  Every kernel is taken for a causal one. The softmax is not counted.
  """
  name = re.match(r'splash_mha_(fwd|dkv|dq)', instruction.name)
  if instruction.opcode != 'custom-call' or not name:
    return 0.0
  operands = [
    re.match(r'(\w+)\[([\d,]*)\]', x.shape)
    for x in map(computation.by_name.get, instruction.operands)
    if x is not None
  ]
  arrays = [(x[1], [int(n) for n in x[2].split(',')]) for x in operands if x]
  # Which blocks are seen, [1, queries, keys], is in bytes; [B, H, T, E] follow,
  # of a single row without B.
  blocks = next(dims for dtype, dims in arrays if dtype == 's8')
  queries, keys = [dims for dtype, dims in arrays if dtype != 's8'][:2]
  *heads, length, width = queries
  seen = (1 + 1 / max(blocks[1:])) / 2  # The diagonal blocks are whole.
  pairs = math.prod(heads) * length * keys[-2] * seen
  return 2.0 * _PRODUCTS[name[1]] * pairs * max(width, _LANES)
