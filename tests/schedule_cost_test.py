"""Costs of scheduled modules: the sums, and what libtpu itself estimates."""

import importlib.metadata
import importlib.util
import re

import pytest

from launch import estimate_check
from launch import hardware
from launch import hlo
from launch import schedule_cost

CHIP = hardware.CHIPS['v5e']
MEGA = 2**20

HEAD = """HloModule m, is_scheduled=true

FileNames
1 "/x/sleep_jax/models/layers.py"
2 "/x/jax/_src/numpy.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=15 end_line=15 column=2 end_column=9}
2 {file_name_id=2 function_name_id=1 line=99 end_line=99 column=2 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

"""

CYCLES = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'

LOOP = (
  HEAD
  + """%slice_fusion (p0: f32[8,1024,256], p1: s32[]) -> f32[1024,256] {
  %p0 = f32[8,1024,256]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,1024,256]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero)
  ROOT %out = f32[1024,256]{1,0} bitcast(%cut)
}

%body (arg: (s32[], f32[8,1024,256])) -> (s32[], f32[8,1024,256]) {
  %arg = (s32[], f32[8,1024,256]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %w = f32[8,1024,256]{2,1,0:T(8,128)} get-tuple-element(%arg), index=1
  %layer = f32[1024,256]{1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, \
calls=%slice_fusion, metadata={op_name="x" stack_frame_id=2}, CYCLES
  ROOT %next = (s32[], f32[8,1024,256]{2,1,0}) tuple(%i, %w)
}

%limit_fusion (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%condition (arg: (s32[], f32[8,1024,256])) -> pred[] {
  %arg = (s32[], f32[8,1024,256]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %go = pred[] fusion(%i, %limit), kind=kLoop, calls=%limit_fusion
}

ENTRY %main (w: f32[8,1024,256]) -> (s32[], f32[8,1024,256]) {
  %w = f32[8,1024,256]{2,1,0:T(8,128)} parameter(0)
  %start = s32[] constant(2)
  %begin = s32[] copy(%start)
  %carried = (s32[], f32[8,1024,256]{2,1,0}) tuple(%begin, %w)
  ROOT %loop = (s32[], f32[8,1024,256]{2,1,0}) while(%carried), \
condition=%condition, body=%body
}
""".replace('CYCLES', CYCLES.format(3000))
)


@pytest.mark.parametrize(
  'text, trips',
  [
    (LOOP.replace('LIMIT', '8'), 6),  # From 2 on.
    (
      LOOP.replace('LIMIT', '8').replace(
        'body=%body',
        'body=%body, backend_config={"known_trip_count":{"n":"5"}}',
      ),
      5,
    ),
  ],
)
def test_a_loop_counts_as_often_as_it_runs(text, trips):
  cost = schedule_cost.estimate(text, CHIP)
  key = 'sleep_jax/models/layers.py:15', 'fusion'
  assert cost.operations[key].runs == trips and not cost.unknown_loops
  assert cost.operations[key].seconds == pytest.approx(
    trips * 3000 / CHIP.clock
  )


def test_of_a_stack_only_the_slice_is_read_and_vmem_is_no_hbm():
  cost = schedule_cost.estimate(LOOP.replace('LIMIT', '8'), CHIP)
  layers = cost.operations['sleep_jax/models/layers.py:15', 'fusion']
  # One layer of eight, and the index; the output is in VMEM.
  assert layers.hbm == 6 * (MEGA + 4)


def test_a_loop_whose_length_is_not_told_is_counted_once_and_reported():
  text = LOOP.replace('constant(LIMIT)', 'custom-call()')
  cost = schedule_cost.estimate(text, CHIP)
  assert cost.unknown_loops == 1
  key = 'sleep_jax/models/layers.py:15', 'fusion'
  assert cost.operations[key].runs == 1


BRANCHES = (
  HEAD
  + """%often (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)S(1)} parameter(0)
  ROOT %x = f32[8]{0:T(128)S(1)} fusion(%a), kind=kLoop, FIRST
}

%seldom (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)S(1)} parameter(0)
  ROOT %x = f32[8]{0:T(128)S(1)} fusion(%a), kind=kLoop, SECOND
}

ENTRY %main (p: pred[], a: f32[8]) -> f32[8] {
  %p = pred[] parameter(0)
  %a = f32[8]{0:T(128)S(1)} parameter(1)
  ROOT %y = f32[8]{0:T(128)S(1)} conditional(%p, %a, %a), \
true_computation=%seldom, false_computation=%often, \
metadata={op_name="jit(f)/while/body/update/cond"}
}
""".replace('FIRST', CYCLES.format(100)).replace('SECOND', CYCLES.format(900))
)


@pytest.mark.parametrize(
  'shares, cycles',
  [({}, 900), ({'other': 0.5}, 900), ({'update': 0.25}, 300)],
)
def test_a_branch_counts_as_often_as_it_is_said_to_be_taken(shares, cycles):
  cost = schedule_cost.estimate(BRANCHES, CHIP, shares)
  assert cost.seconds == pytest.approx(cycles / CHIP.clock)


GATHER = (
  HEAD
  + """ENTRY %main (x: bf16[1024,1024], a: f32[8]) -> bf16[4096,1024] {
  %x = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %a = f32[8]{0} parameter(1)
  %begun = (bf16[1024,1024]{1,0}, bf16[4096,1024]{1,0}) \
all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %work = f32[8]{0:T(128)S(1)} fusion(%a), kind=kLoop, calls=%f, CYCLES
  ROOT %done = bf16[4096,1024]{1,0} all-gather-done(%begun)
}
"""
)


def of_gather(cycles):
  text = GATHER.replace('CYCLES', CYCLES.format(cycles))
  text = text.replace(', calls=%f,', ',')
  return schedule_cost.estimate(text, CHIP)


def test_a_collective_takes_its_bytes_over_the_links_of_one_axis():
  cost = of_gather(cycles=1)
  assert cost.links == 3 * 2 * MEGA  # Three other devices of four.
  seconds = cost.links / (CHIP.ici / 2 / 2)  # One direction, one axis of two.
  assert cost.seconds == pytest.approx(seconds)
  assert cost.exposed == pytest.approx(cost.seconds, rel=1e-3)


def test_what_runs_beside_a_collective_hides_it():
  alone = of_gather(cycles=1).seconds
  hidden = of_gather(cycles=int(2 * alone * CHIP.clock))
  assert hidden.exposed == 0
  assert hidden.seconds == pytest.approx(2 * alone, rel=1e-3)


@pytest.mark.parametrize(
  'opcode, groups, sent',
  [
    ('all-reduce', '{{0,1,2,3},{4,5,6,7}}', 2 * 3 / 4),
    ('reduce-scatter', '[2,4]<=[8]', 3 / 4),
    ('reduce-scatter', "mesh['a'=2,'b'=4] {'b'}", 3 / 4),
    ('all-gather', "mesh['a'=8,'b'=4] {'a':(4)2,'b'}", 7),
    ('all-to-all', '[1,8]<=[8]', 2),
    ('collective-permute', '', 1),
  ],
)
def test_bytes_sent_are_those_of_a_ring(opcode, groups, sent):
  text = HEAD + (
    'ENTRY %main (x: f32[1024,256]) -> f32[1024,256] {\n'
    '  %x = f32[1024,256]{1,0} parameter(0)\n'
    f'  ROOT %y = f32[1024,256]{{1,0}} {opcode}(%x), replica_groups={groups}\n'
    '}\n'
  )
  cost = schedule_cost.estimate(text, CHIP)
  assert cost.links == sent * MEGA and cost.exposed == cost.seconds


def test_an_operation_without_an_estimate_counts_by_its_bytes():
  text = HEAD + (
    'ENTRY %main (x: f32[1024,256]) -> f32[1024,256] {\n'
    '  %x = f32[1024,256]{1,0} parameter(0)\n'
    '  ROOT %y = f32[1024,256]{1,0} sort(%x), dimensions={1}\n'
    '}\n'
  )
  cost = schedule_cost.estimate(text, CHIP)
  assert cost.seconds == cost.assumed == 2 * MEGA / CHIP.bandwidth


KERNEL = (
  HEAD
  + """ENTRY %main (q: bf16[2,4,1024,64]) -> bf16[2,4,1024,64] {
  %blocks = s8[1,2,2]{2,1,0:S(1)} parameter(0)
  %q = bf16[2,4,1024,64]{3,2,1,0:S(1)} parameter(1)
  %k = bf16[2,2,1024,64]{3,2,1,0:S(1)} parameter(2)
  ROOT %splash_mha_NAME.1 = bf16[2,4,1024,64]{3,2,1,0:S(1)} \
custom-call(%blocks, %q, %k), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="x" stack_frame_id=1}
}
"""
)


@pytest.mark.parametrize('rows', [1, 2])
@pytest.mark.parametrize('name, products', [('fwd', 2), ('dkv', 4), ('dq', 3)])
def test_a_kernel_of_attention_counts_by_its_products(name, products, rows):
  text = KERNEL.replace('NAME', name)
  if rows == 1:  # The compiler leaves the axis out.
    text = re.sub(r'\[2,(\d),1024,64\]{3,2,1,0', r'[\1,1024,64]{2,1,0', text)
  cost = schedule_cost.estimate(text, CHIP)
  pairs = rows * 4 * 1024**2 * 3 / 4  # Three blocks of four.
  flops = products * 2 * pairs * 128  # Heads of 64 take as long as of 128.
  assert cost.seconds == cost.assumed == pytest.approx(flops / CHIP.flops)
  assert list(cost.operations) == [
    ('sleep_jax/models/layers.py:15', 'custom-call')
  ]


@pytest.mark.parametrize(
  'shape, size',
  [
    ('bf16[8,128]{1,0:T(8,128)(2,1)}', 2048),
    ('bf16[8,128]{1,0:T(8,128)(2,1)S(1)}', 0),
    ('(f32[4]{0}, pred[]{:T(512)}, u32[]{:S(2)}, s4[10]{0:E(4)})', 22),
    ('f8e4m3fn[16]{0}', 16),
  ],
)
def test_bytes_in_hbm_of_a_shape(shape, size):
  assert hlo.hbm_bytes(shape) == size


def _skipped() -> str:
  if importlib.util.find_spec('libtpu') is None:
    return 'libtpu is not installed'
  version = importlib.metadata.version('libtpu')
  if version != estimate_check.VERSION:
    return (
      f'libtpu is {version}; cycles were recorded by {estimate_check.VERSION}'
    )
  return ''


@pytest.mark.skipif(bool(_skipped()), reason=_skipped() or 'installed')
@pytest.mark.parametrize(
  'case',
  [
    # A large product compiles for many seconds.
    pytest.param(c, marks=pytest.mark.slow if c.flops > 1e12 / 4 else ())
    for c in estimate_check.CASES
  ],
  ids=lambda c: f'{c.name} {c.generation}',
)
def test_libtpu_estimates_what_it_did(case):
  cost = case.estimate()
  cycles = cost.seconds * case.chip.clock
  assert cycles == pytest.approx(case.cycles, rel=0.05)
  assert cost.seconds >= case.bound() and not cost.unknown_loops
  if case.measured:
    assert cost.seconds == pytest.approx(case.measured, rel=0.15)
