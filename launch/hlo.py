"""Reads the text of a scheduled HLO module, as `Compiled.as_text` gives it.

Only what a cost estimate needs is kept: computations, the instructions of each
in schedule order, their shapes, operands and attributes, and the source line
that each comes from. The grammar is XLA's `HloModule::ToString`.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

_BITS = dict(pred=8, token=0, opaque=0, bf16=16, c64=64, c128=128)
_LEAF = re.compile(r'\b([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?')
_COMPUTATION = re.compile(r'(ENTRY )?%(\S+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%(\S+) = (.*)$')
_COMMENT = re.compile(r'/\*.*?\*/')
# Of a Pallas kernel: the one attribute with line breaks.
_KERNEL_METADATA = re.compile(r'kernel_metadata=\{\n[^\n]*\n\}')
_NAME = re.compile(r'%([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Leaf:
  """An array of a shape: its size, and whether it lies in HBM."""

  size: int  # Bytes, without the padding of tiles.
  in_hbm: bool


@functools.cache
def leaves(shape: str) -> tuple[Leaf, ...]:
  """The arrays of a shape, those of tuples in order."""
  out = []
  for dtype, dims, layout in _LEAF.findall(shape):
    digits = re.search(r'\d+', dtype)
    bits = _BITS[dtype] if dtype in _BITS else int(digits[0] if digits else 0)
    sizes = [int(d) for d in re.findall(r'\d+', dims)]
    # A layout without memory space S(n) is of HBM.
    out.append(Leaf(math.prod(sizes) * bits // 8, 'S(' not in layout))
  return tuple(out)


def hbm_bytes(shape: str) -> int:
  """Bytes of those arrays of a shape that lie in HBM."""
  return sum(leaf.size for leaf in leaves(shape) if leaf.in_hbm)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  operands: names of instructions of the same computation.
  attributes: the text after the operands.
  literal: the text between the parentheses, as that of a constant.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  literal: str
  is_root: bool

  def called(self, *keys: str) -> list[str]:
    """Names of the computations in these attributes."""
    out = []
    for key in keys:
      match = re.search(
        rf'\b{key}=(\{{[^}}]*\}}|%\S+?)(?:,|$| )', self.attributes
      )
      if match:
        out += _NAME.findall(match[1])
    return out

  def number(self, key: str) -> int | None:
    """A number of the backend's config, such as `estimated_cycles`."""
    match = re.search(rf'"{key}":(?:\{{"n":)?"?(\d+)', self.attributes)
    return int(match[1]) if match else None

  def index(self) -> int | None:
    """The place of a `get-tuple-element` in its tuple."""
    match = re.search(r'\bindex=(\d+)', self.attributes)
    return int(match[1]) if match else None


class Computation:
  """Instructions in the order of the schedule."""

  def __init__(self, instructions: list[Instruction]):
    self.instructions = instructions
    self.by_name = {x.name: x for x in instructions}
    self.parameters = {
      int(x.literal): x.name for x in instructions if x.opcode == 'parameter'
    }
    self.users: dict[str, list[Instruction]] = {}
    for instruction in instructions:
      for operand in instruction.operands:
        self.users.setdefault(operand, []).append(instruction)

  @property
  def root(self) -> Instruction:
    """What the computation returns."""
    return next(x for x in self.instructions if x.is_root)


@dataclasses.dataclass(frozen=True)
class Module:
  """A module.

  computations: by name.
  entry: name of the first one.
  lines: source line of each stack frame, `file:line`.
  devices: for which it is partitioned.
  """

  computations: dict[str, Computation]
  entry: str
  lines: dict[int, str]
  devices: int

  def source(self, instruction: Instruction) -> str:
    """The source line of an instruction; '' if it has none."""
    frame = re.search(r'stack_frame_id=(\d+)', instruction.attributes)
    return self.lines.get(int(frame[1]), '') if frame else ''


def parse(text: str, package: str = 'sleep_jax/') -> Module:
  """A module from its text.

  Args:
    text: of a scheduled module.
    package: source lines are of the innermost frame whose path has this part,
      or of the innermost frame if none has.
  """
  computations, entry, name = {}, '', ''
  instructions: list[Instruction] = []
  lines = _KERNEL_METADATA.sub('', text).splitlines()
  for line in lines:
    if start := _COMPUTATION.match(line):
      name, instructions = start[2], []
      entry = name if start[1] else entry
    elif line == '}' and name:
      computations[name] = Computation(instructions)
      name = ''
    elif name and (match := _INSTRUCTION.match(line)):
      body = _COMMENT.sub('', match[3])
      instructions.append(_instruction(match[2], body, bool(match[1])))
  devices = re.search(r'num_partitions=(\d+)', lines[0] if lines else '')
  return Module(
    computations,
    entry,
    _source_lines(lines, package),
    int(devices[1]) if devices else 1,
  )


def _instruction(name: str, body: str, is_root: bool) -> Instruction:
  end = _closing(body, 0) + 1 if body.startswith('(') else body.index(' ')
  shape, rest = body[:end], body[end:].lstrip()
  start = rest.index('(')
  close = _closing(rest, start)
  literal = rest[start + 1 : close]
  return Instruction(
    name,
    shape,
    rest[:start],
    tuple(_NAME.findall(literal)),
    rest[close + 1 :],
    literal,
    is_root,
  )


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` is closed."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  return len(text)


def _table(lines: list[str], title: str) -> Iterator[tuple[int, str]]:
  """Rows of a table in the module's head."""
  if title not in lines:
    return
  for line in lines[lines.index(title) + 1 :]:
    number, _, row = line.partition(' ')
    if not number.isdigit():
      return
    yield int(number), row


def _source_lines(lines: list[str], package: str) -> dict[int, str]:
  files = {i: row.strip('"') for i, row in _table(lines, 'FileNames')}
  places = {}
  for i, row in _table(lines, 'FileLocations'):
    fields = dict(re.findall(r'(\w+)=(\d+)', row))
    file = files.get(int(fields['file_name_id']), '')
    places[i] = f'{file}:{fields["line"]}'
  frames = {
    i: {k: int(v) for k, v in re.findall(r'(\w+)=(\d+)', row)}
    for i, row in _table(lines, 'StackFrames')
  }

  def line_of(frame: int) -> str:
    innermost = at = frame
    while at in frames:
      place = places.get(frames[at]['file_location_id'], '')
      if package in place:
        return package + place.split(package)[-1]
      # Printed as one more than it is; frame 0 is nobody's.
      at = frames[at].get('parent_frame_id', 1) - 1
    place = places.get(frames[innermost]['file_location_id'], '')
    return place.split('site-packages/')[-1]

  return {i: line_of(i) for i in frames}
