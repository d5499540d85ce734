"""Environment variables of a run, by kind of accelerator, with sources.

Every platform exports `environment(kind)` before Python starts; XLA reads these
variables once, when JAX is first imported.
"""

from collections import defaultdict
import dataclasses

_JAX = 'https://docs.jax.dev/en/latest'
_MAXTEXT = (
  'https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/'
  'xla_flags_library.py'
)
_LEVANTER = 'https://github.com/stanford-crfm/levanter/blob/main/docs/Performance-Guide.md'


@dataclasses.dataclass(frozen=True)
class Flag:
  """A variable, or one option of a variable that holds several.

  Attributes:
    kind: kind of accelerator: all, cpu, gpu or tpu.
    variable: name of the environment variable.
    value: its value, or one option of it.
    why: the reason to set it.
    source: URL of its documentation.
    only: TPU generations that it applies to; () = all.
  """

  kind: str
  variable: str
  value: str
  why: str
  source: str
  only: tuple[str, ...] = ()


FLAGS = (
  Flag(
    'all',
    'PYTHONUNBUFFERED',
    '1',
    'Output reaches the log before a run is killed.',
    'https://docs.python.org/3/using/cmdline.html#envvar-PYTHONUNBUFFERED',
  ),
  Flag(
    'all',
    'TF_CPP_MIN_LOG_LEVEL',
    '1',
    'XLA prints no notices between the progress bars.',
    f'{_JAX}/config_options.html',
  ),
  Flag(
    'gpu',
    'XLA_FLAGS',
    '--xla_gpu_enable_latency_hiding_scheduler=true',
    'Collectives overlap with computation.',
    f'{_JAX}/gpu_performance_tips.html',
  ),
  Flag(
    'gpu',
    'XLA_FLAGS',
    '--xla_gpu_deterministic_ops=true',
    'A resumed life gives the same bits as an uninterrupted one.',
    'https://openxla.org/xla/determinism',
  ),
  Flag(
    'gpu',
    'XLA_PYTHON_CLIENT_MEM_FRACTION',
    '0.9',
    'JAX takes 0.75 of the memory by default.',
    f'{_JAX}/gpu_memory_allocation.html',
  ),
  Flag(
    'tpu',
    'JAX_PLATFORMS',
    'tpu,cpu',
    'A TPU that cannot be reached is an error, not a slow CPU run.',
    f'{_JAX}/config_options.html',
  ),
  Flag(
    'tpu',
    'LIBTPU_INIT_ARGS',
    '--xla_tpu_scoped_vmem_limit_kib=98304',
    'Larger fusions of dense layers; v6e needs it most.',
    _LEVANTER,
    only=('v6e',),
  ),
  *(
    Flag('tpu', 'LIBTPU_INIT_ARGS', value, 'fsdp overlaps.', _MAXTEXT)
    for value in (
      '--xla_tpu_enable_async_collective_fusion=true',
      '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
      '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
      '--xla_tpu_overlap_compute_collective_tc=true',
      '--xla_enable_async_all_gather=true',
    )
  ),
)


def environment(kind: str, generation: str = '') -> dict[str, str]:
  """The variables of one kind of accelerator, options joined by spaces."""
  out = defaultdict(list)
  for flag in FLAGS:
    fits = not flag.only or generation in flag.only
    if flag.kind in ('all', kind) and fits:
      out[flag.variable].append(flag.value)
  return {name: ' '.join(values) for name, values in out.items()}
