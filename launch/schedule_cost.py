"""What a compiled TPU program costs, as its compiler estimates it.

The TPU compiler writes `estimated_cycles` beside the fusions, convolutions,
copies and reductions of a scheduled module. They are summed along the schedule,
bodies of loops as often as they run. What the compiler estimates nothing for is
added by its bytes: collectives over the links of one axis of the torus, all
else over the bandwidth of HBM (a Pallas kernel by its own `cost_estimate`).
Asynchronous operations run beside the schedule until their `done`.

Nothing here was measured; `docs/tpu_estimates.md` names the blind spots.
"""

import collections
from collections.abc import Mapping
import dataclasses
import math
import re

from launch import hardware
from launch import hlo
from launch import kernel_cost

_COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# They name or group values, and move none.
_FREE = frozenset(
  (
    'parameter constant tuple get-tuple-element bitcast after-all iota domain '
    'opt-barrier partition-id replica-id add-dependency'
  ).split()
)
_SLICES = ('dynamic-slice', 'slice', 'gather')
_CONTROL = ('while', 'conditional', 'call')


@dataclasses.dataclass(frozen=True)
class Operation:
  """Operations of one kind at one source line, all their runs together.

  seconds: that the schedule spends in them or waits for them.
  hbm: bytes between HBM and the chip.
  runs: how often one of them runs.
  """

  seconds: float = 0.0
  hbm: float = 0.0
  runs: float = 0.0

  def plus(self, other: 'Operation', times: float = 1.0) -> 'Operation':
    """Both, the other so many times."""
    return Operation(
      self.seconds + times * other.seconds,
      self.hbm + times * other.hbm,
      self.runs + times * other.runs,
    )


@dataclasses.dataclass
class Cost:
  """What one device does, as estimated by the compiler.

  Attributes:
    seconds: along the schedule.
    assumed: part of them, of operations without an estimate: by their bytes.
    exposed: part of them, waiting for collectives.
    hbm: bytes between HBM and the chip.
    links: bytes that a device sends over its links.
    unknown_loops: loops whose length the module does not tell; counted once.
    operations: by source line and opcode.
  """

  seconds: float = 0.0
  assumed: float = 0.0
  exposed: float = 0.0
  hbm: float = 0.0
  links: float = 0.0
  unknown_loops: int = 0
  operations: dict[tuple[str, str], Operation] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(Operation)
  )

  def add(self, other: 'Cost', times: float = 1.0) -> None:
    """Adds another cost, so many times."""
    self.seconds += times * other.seconds
    self.assumed += times * other.assumed
    self.exposed += times * other.exposed
    self.hbm += times * other.hbm
    self.links += times * other.links
    self.unknown_loops += other.unknown_loops
    for key, operation in other.operations.items():
      self.operations[key] = self.operations[key].plus(operation, times)

  def most_expensive(
    self, count: int
  ) -> list[tuple[tuple[str, str], Operation]]:
    """Operations by their seconds, the most expensive first."""
    order = sorted(self.operations.items(), key=lambda x: -x[1].seconds)
    return order[:count]


def estimate(
  text: str, chip: hardware.Chip, shares: Mapping[str, float] | None = None
) -> Cost:
  """The cost of a scheduled module, on one device.

  Args:
    text: of the module.
    chip: its rates and clock.
    shares: how often, of all runs, a conditional takes its dearest branch, by
      the name of its scope (`jax.named_scope`); default always.
  """
  module = hlo.parse(text)
  return _Estimator(module, chip, shares or {}).of_computation(module.entry)


class _Estimator:
  """Costs of a module's computations, each computed once."""

  def __init__(
    self, module: hlo.Module, chip: hardware.Chip, shares: Mapping[str, float]
  ):
    self.module, self.chip, self.shares = module, chip, shares
    self.bandwidth = chip.bandwidth / chip.devices
    self._costs: dict[str, Cost] = {}

  def of_computation(self, name: str) -> Cost:
    """Along the schedule of one computation."""
    if name not in self._costs:
      self._costs[name] = self._along(self.module.computations[name])
    return self._costs[name]

  def _along(self, computation: hlo.Computation) -> Cost:
    cost, ends = Cost(), {}
    free = collections.defaultdict(float)  # When links and DMA are free again.
    for instruction in computation.instructions:
      opcode = instruction.opcode
      if opcode in _FREE:
        continue
      if opcode in _CONTROL:
        self._add_control(cost, computation, instruction)
        continue
      if opcode.endswith(('-done', '-update')):
        started = next((x for x in instruction.operands if x in ends), None)
        if started is None:
          continue
        end, is_collective = ends[started]
        if opcode.endswith('-update'):
          ends[instruction.name] = ends[started]
          continue
        wait = max(0.0, end - cost.seconds)
        self._spend(cost, instruction, wait, hbm=0.0)
        cost.exposed += wait if is_collective else 0.0
        continue
      seconds, hbm, sent, assumed = self._of(computation, instruction)
      cost.links += sent
      if opcode.endswith('-start'):
        engine = 'links' if sent else 'dma'
        end = max(cost.seconds, free[engine]) + seconds
        free[engine] = end
        ends[instruction.name] = end, bool(sent)
        self._spend(cost, instruction, 0.0, hbm)
        continue
      self._spend(cost, instruction, seconds, hbm)
      cost.assumed += seconds if assumed else 0.0
      cost.exposed += seconds if sent else 0.0
    return cost

  def _spend(
    self, cost: Cost, instruction: hlo.Instruction, seconds: float, hbm: float
  ) -> None:
    cost.seconds += seconds
    cost.hbm += hbm
    if seconds or hbm:
      kind = re.sub(r'-(start|done|update)$', '', instruction.opcode)
      key = self.module.source(instruction), kind
      cost.operations[key] = cost.operations[key].plus(
        Operation(seconds, hbm, 1.0)
      )

  def _add_control(
    self,
    cost: Cost,
    computation: hlo.Computation,
    instruction: hlo.Instruction,
  ) -> None:
    if instruction.opcode == 'while':
      trips = instruction.number('known_trip_count')
      if trips is None:
        trips = _Loop(self.module, computation, instruction).trips()
      cost.unknown_loops += trips is None
      for part in instruction.called('body', 'condition'):
        cost.add(self.of_computation(part), 1 if trips is None else trips)
    elif instruction.opcode == 'call':
      for part in instruction.called('to_apply'):
        cost.add(self.of_computation(part))
    else:
      branches = instruction.called(
        'branch_computations', 'true_computation', 'false_computation'
      )
      costs = [self.of_computation(name) for name in branches]
      costs.sort(key=lambda x: x.seconds)
      share = self._share(instruction)
      cost.add(costs[-1], share)
      if share < 1.0:
        cost.add(costs[0], 1.0 - share)

  def _share(self, instruction: hlo.Instruction) -> float:
    """How often a conditional takes the dearest of its branches."""
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    scopes = name[1].split('/') if name else ()
    return next((self.shares[x] for x in scopes if x in self.shares), 1.0)

  def _of(
    self, computation: hlo.Computation, instruction: hlo.Instruction
  ) -> tuple[float, float, float, bool]:
    """Seconds, bytes of HBM, bytes sent, and whether nothing was estimated."""
    opcode = instruction.opcode.removesuffix('-start')
    if opcode == 'async':
      return self._of_async(instruction)
    if opcode in _COLLECTIVES:
      size = _moved(computation, instruction)
      sent = _sent(opcode, size, self._group(instruction))
      hbm = _traffic(self.module, computation, instruction)
      rate = self.chip.ici / 2 / self.chip.axes / self.chip.devices
      if opcode == 'collective-permute':  # One neighbour: one link of two.
        rate /= 2
      return sent / rate, hbm, sent, False
    if instruction.opcode == 'copy-start':
      hbm = _copied(instruction)
      return hbm / self.bandwidth, hbm, 0.0, False
    hbm = _traffic(self.module, computation, instruction)
    cycles = instruction.number('estimated_cycles')
    if cycles:
      return cycles / self.chip.clock, hbm, 0.0, False
    flops = instruction.number('flops')
    flops = flops or kernel_cost.flops(computation, instruction)
    claimed = instruction.number('bytes_accessed') or hbm
    seconds = max(flops / self.chip.flops, claimed / self.bandwidth)
    return seconds, hbm, 0.0, True

  def _group(self, instruction: hlo.Instruction) -> int:
    """Devices of one group of a collective; no groups are one of all."""
    text = instruction.attributes
    if axes := re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', text):
      sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
      # A part of an axis has its own size: 'axis_0':(2)4.
      parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2])
      return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if iota := re.search(r'replica_groups=\[\d+,(\d+)\]', text):
      return int(iota[1])
    if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
      return len(listed[1].split(','))
    return self.module.devices

  def _of_async(
    self, instruction: hlo.Instruction
  ) -> tuple[float, float, float, bool]:
    """Of what an `async-start` wraps."""
    wrapped = self.of_computation(instruction.called('calls')[0])
    return wrapped.seconds, wrapped.hbm, wrapped.links, False


def _moved(computation: hlo.Computation, instruction: hlo.Instruction) -> int:
  """Bytes of a collective's operands, on one device."""
  names = [n for n in instruction.operands if n in computation.by_name]
  return sum(
    leaf.size
    for name in names
    for leaf in hlo.leaves(computation.by_name[name].shape)
  )


def _sent(opcode: str, size: int, group: int) -> float:
  """Bytes that a device sends for its `size` operand bytes, on a ring.

  See the cost of collectives in https://jax-ml.github.io/scaling-book/sharding.
  """
  return {
    'all-gather': size * (group - 1),
    'reduce-scatter': size * (group - 1) / group,
    'all-reduce': 2 * size * (group - 1) / group,
    'all-to-all': size * group / 4,
    'ragged-all-to-all': size * group / 4,
    'collective-permute': size,
    'collective-broadcast': size,
  }[opcode]


def _copied(instruction: hlo.Instruction) -> float:
  """Bytes of HBM that a `copy-start` reads and writes."""
  to, source = hlo.leaves(instruction.shape)[:2]
  return to.size * (to.in_hbm + source.in_hbm)


def _traffic(
  module: hlo.Module,
  computation: hlo.Computation,
  instruction: hlo.Instruction,
) -> float:
  """Bytes of HBM that an instruction reads and writes; slices as slices."""
  called = instruction.called('calls')
  inner = module.computations[called[0]] if called else None
  if instruction.opcode == 'dynamic-update-slice':
    update = computation.by_name[instruction.operands[1]]
    return 2.0 * hlo.hbm_bytes(update.shape)
  if instruction.opcode in _SLICES:
    return 2.0 * hlo.hbm_bytes(instruction.shape)
  total = float(hlo.hbm_bytes(instruction.shape))
  if inner is not None:
    total = min(total, _written(module, inner))
  for i, name in enumerate(instruction.operands):
    operand = computation.by_name.get(name)
    if operand is None or not (size := hlo.hbm_bytes(operand.shape)):
      continue
    if inner is not None and i in inner.parameters:
      size = min(size, _read(module, inner, inner.parameters[i], size))
    total += size
  return total


def _read(
  module: hlo.Module, inner: hlo.Computation, name: str, size: float
) -> float:
  """Bytes of a fusion's parameter that are read, `size` if all."""
  if name == inner.root.name:  # Whoever called this fusion reads it.
    return size
  total = 0.0
  for user in inner.users.get(name, ()):
    place = user.operands.index(name)
    if user.opcode in _SLICES and not place:
      total += sum(leaf.size for leaf in hlo.leaves(user.shape))
    elif user.opcode == 'dynamic-update-slice' and not place:
      continue  # Written in place.
    elif user.opcode == 'bitcast':
      total += _read(module, inner, user.name, size)
    elif user.opcode == 'fusion':
      called = module.computations[user.called('calls')[0]]
      total += _read(module, called, called.parameters[place], size)
    else:
      return size
  return min(total, size)


def _written(module: hlo.Module, inner: hlo.Computation) -> float:
  """Bytes that a fusion writes: of an update in place those of the update."""
  root = inner.root
  parts = [root]
  if root.opcode == 'tuple':
    parts = [inner.by_name[name] for name in root.operands]
  total = 0.0
  for part in parts:
    while part.opcode == 'bitcast' and part.operands[0] in inner.by_name:
      part = inner.by_name[part.operands[0]]
    if part.opcode == 'dynamic-update-slice':
      update = inner.by_name[part.operands[1]]
      total += sum(leaf.size for leaf in hlo.leaves(update.shape))
    elif part.opcode == 'fusion':
      total += _written(module, module.computations[part.called('calls')[0]])
    else:
      total += sum(leaf.size for leaf in hlo.leaves(part.shape))
  return total


class _Loop:
  """How often a loop runs whose backend config does not tell it.

  The condition compares a counter, which grows by one, with a limit.
  """

  def __init__(
    self,
    module: hlo.Module,
    computation: hlo.Computation,
    instruction: hlo.Instruction,
  ):
    self.module, self.outer = module, computation
    self.carried = computation.by_name[instruction.operands[0]]
    self.condition = module.computations[instruction.called('condition')[0]]

  def trips(self) -> int | None:
    """The runs, or None if the module does not tell; of several limits, one.

    A loop that may end early, as a rollout does, counts with its full length.
    """
    known = []
    for limit, count in self._compared(self.condition, {}):
      if limit is not None and count is not None and limit > count:
        known.append(limit - count)
    return min(known) if known else None

  def _compared(
    self,
    computation: hlo.Computation,
    values: Mapping[int, int | None],
  ) -> list[tuple[int | None, int | None]]:
    """Of each comparison the limit, and the counter's first value."""
    out = []
    for instruction in computation.instructions:
      numbers = [
        self._value(computation, name, values) for name in instruction.operands
      ]
      if instruction.opcode == 'fusion':
        called = self.module.computations[instruction.called('calls')[0]]
        out += self._compared(called, dict(enumerate(numbers)))
      elif instruction.opcode == 'compare':
        direction = re.search(r'direction=(\w\w)', instruction.attributes)
        a, b = numbers
        if direction and direction[1] == 'LT':
          out.append((b, a))
        elif direction and direction[1] == 'GT':
          out.append((a, b))
    return out

  def _value(
    self,
    computation: hlo.Computation,
    name: str,
    values: Mapping[int, int | None],
  ) -> int | None:
    """A constant, or what the loop is given in a place of its tuple."""
    instruction = computation.by_name.get(name)
    if instruction is None:
      return None
    if instruction.opcode == 'constant':
      return int(instruction.literal) if _is_int(instruction.literal) else None
    if instruction.opcode == 'parameter':
      return values.get(int(instruction.literal))
    if instruction.opcode in ('copy', 'bitcast', 'convert'):
      return self._value(computation, instruction.operands[0], values)
    if instruction.opcode != 'get-tuple-element':
      return None
    if computation is not self.condition or self.carried.opcode != 'tuple':
      return None
    index = instruction.index()
    if index is None:
      return None
    return self._value(self.outer, self.carried.operands[index], {})


def _is_int(text: str) -> bool:
  return bool(re.fullmatch(r'-?\d+', text))
