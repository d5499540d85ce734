"""FLOPs of Pallas kernels that tell no cost of their own.

The compiler knows nothing of what such a kernel computes. Known here are those
of splash attention, by their names and the shapes of their operands.
"""

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
  shapes = [
    [int(n) for n in re.findall(r'\d+', x.shape.split('[')[1].split(']')[0])]
    for x in map(computation.by_name.get, instruction.operands)
    if x is not None and '[' in x.shape
  ]
  blocks = next(x for x in shapes if len(x) == 3)  # [1, queries, keys].
  queries, keys = [x for x in shapes if len(x) == 4][:2]  # [B, H, T, E] each.
  rows, heads, length, width = queries
  seen = (1 + 1 / max(blocks[1:])) / 2  # The diagonal blocks are whole.
  pairs = rows * heads * length * keys[2] * seen
  return 2.0 * _PRODUCTS[name[1]] * pairs * max(width, _LANES)
