"""How much memory and time does a night take? By formula, in a second.

  python -m launch.night --tokens=60000 \\
      --config=experiments/configs/backbones.py:clinc-llama3_2_3b

Memory is that of weights, fast state and experts, which are exact, and of what
a step holds beside them, which `launch.aot` has from the compiler. Seconds are
those below which the device cannot do it, whatever the program: compute at its
peak, or one reading of the model for every step after another. A real program
takes longer.
"""

import dataclasses
import json
from typing import Any

from absl import app
from absl import flags
import jax
from ml_collections import config_flags

from launch import hardware
from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.harness import build
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.models import flops
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import checkpoint


@dataclasses.dataclass(frozen=True)
class Device:
  """Peak rates of one device, as its maker publishes them."""

  flops: float  # bfloat16 operations a second, without sparsity.
  bandwidth: float  # Bytes a second.
  memory: float  # Bytes.


DEVICES = {
  'rtx4090': Device(165e12, 1008e9, 24e9),
  'a100': Device(312e12, 2039e9, 80e9),
  'h100': Device(989e12, 3350e9, 80e9),
  'h200': Device(989e12, 4800e9, 141e9),
} | {
  name: Device(chip.flops, chip.bandwidth, chip.hbm)
  for name, chip in hardware.CHIPS.items()
}


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of a day and night.

  flops: of all of it.
  passes: how often the model is read, one time after another.
  """

  name: str
  flops: float
  passes: float

  def seconds(self, device: Device, num: int, model_bytes: float) -> float:
    """The least time on `num` devices that share the model."""
    compute = self.flops / device.flops
    memory = self.passes * model_bytes / device.bandwidth
    return max(compute, memory) / num


def _bytes(tree: at.Tree, dtype: str = '') -> int:
  return sum(
    x.size * jax.numpy.dtype(dtype or x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Bytes of a life, on all devices together.

  weights: in the type of the computation, as converted.
  memory: fast changes, gradients, optimizer states, experts.
  previous: fast changes as they were in the morning.
  saved: a checkpoint, uncompressed, of a life that leaves the backbone alone;
    without the dreamer's adapter and archived dreams.
  """

  weights: int
  memory: int
  previous: int
  saved: int

  @property
  def peak(self) -> int:
    """While a day is read: the memory before a row and after it."""
    return self.weights + 2 * self.memory + self.previous

  @property
  def read(self) -> int:
    """What a forward pass reads."""
    return self.weights + self.previous


def sizes(cfg: config.ModelConfig) -> Sizes:
  """Bytes of a life of this model with all its experts; none is allocated."""

  def last() -> life_lib.Life:
    key = jax.random.PRNGKey(0)
    life = life_lib.init_life(model_lib.init(cfg, key), key)
    return life.with_memory(life.memory.with_all_slots(cfg))

  life = jax.eval_shape(last)
  return Sizes(
    weights=_bytes(life.model.params, cfg.dtype),
    memory=_bytes(life.memory),
    previous=_bytes(life.memory.deltas()),
    saved=checkpoint.saved_bytes(life, base='named'),
  )


def phases(
  c: dict[str, Any], cfg: config.ModelConfig, tokens: int, dream_rows: int
) -> list[Phase]:
  """What a day of so many tokens, and its night, compute.

  Args:
    c: the config.
    cfg: its model.
    tokens: of the day.
    dream_rows: rows of what a dream about a context stands for.
  """
  wake = config.from_mapping(wake_lib.WakeConfig, c['wake'], 'wake')
  seeding = config.from_mapping(
    consolidation_config.SeedingConfig, c['sleep'], 'sleep'
  )
  length, row = seeding.dream_length, wake.window or c['task'].get('length', 64)
  forward = flops.forward_flops(cfg, length / 2)
  chunk = min((l.chunk for l in cfg.levels if l.chunk), default=row)
  transfers = sum(bool(level.sleep_every) for level in cfg.levels)
  teachers = 2 if seeding.teachers == 'current+previous' else 1
  size = seeding.dreams * length
  rounds = seeding.steps / seeding.rollout_every if seeding.uses_rollouts else 0
  rollouts = rounds * seeding.prefixes * seeding.group * length
  batch = seeding.batch
  if seeding.uses_rollouts:
    batch += seeding.rollout_groups * seeding.group
  out = [
    Phase(
      'wake',
      tokens * flops.wake_flops(cfg, row / 2),
      3 * tokens / (chunk * wake.batch),
    ),
    Phase('dreams', transfers * size * forward, transfers * teachers * length),
    Phase('teachers', transfers * teachers * size * forward, 0),
    Phase(
      'rollouts',
      transfers * rollouts * forward * 6,  # Sampled once, scored by teachers.
      transfers * rounds * seeding.continuation,
    ),
    Phase(
      'seeding',
      transfers
      * seeding.steps
      * batch
      * length
      * flops.partial_train_flops(cfg, length / 2),
      3 * transfers * seeding.steps,
    ),
  ]
  if 'dreaming' in c and c['task'].get('name') != 'class_incremental':
    out.append(_trials(c, cfg, dream_rows))
  return out


def _trials(
  c: dict[str, Any], cfg: config.ModelConfig, dream_rows: int
) -> Phase:
  """The trials of the dreams about every context of a day."""
  dreaming = config.from_mapping(
    dreaming_config.DreamingConfig, c['dreaming'], 'dreaming'
  )
  trial = config.from_mapping(dreaming_config.TrialConfig, c['trial'], 'trial')
  tried = c['task'].get('train', 1) * (dreaming.keep + dreaming.keep_random)
  fits = tried * trial.repeats * trial.epochs
  row = min(c['task'].get('length', 512), 512)
  return Phase(
    'trials',
    fits * dream_rows * row * flops.partial_train_flops(cfg, row / 2),
    3 * fits * -(-dream_rows // trial.batch) / trial.max_parallel,
  )


def table(
  c: dict[str, Any], tokens: int, dream_rows: int, names: list[str]
) -> list[str]:
  """Lines in Markdown: memory, devices that hold it, and minutes."""
  cfg = build.model_config(c, absent=True)
  life, parts = sizes(cfg), phases(c, cfg, tokens, dream_rows)
  gb = {
    field.name: getattr(life, field.name) / 1e9
    for field in dataclasses.fields(life)
  }
  lines = [
    f'{c["name"]}: a day of {tokens:,} tokens; '
    + ', '.join(f'{k} {v:.1f} GB' for k, v in gb.items())
    + f'; at most {life.peak / 1e9:.1f} GB beside activations.',
    '',
    f'| device | devices | {" | ".join(p.name for p in parts)} | minutes |',
    '|---' * (len(parts) + 3) + '|',
  ]
  for name in names:
    device = config.lookup(name, DEVICES, '--devices')
    # A tenth is left to activations, logits and the cache of rollouts.
    num = 1
    while life.peak > 0.9 * num * device.memory:
      num *= 2
    minutes = [p.seconds(device, num, life.read) / 60 for p in parts]
    cells = [f'{m:.1f}' for m in (*minutes, sum(minutes))]
    lines.append(f'| {name} | {num} | {" | ".join(cells)} |')
  return lines


def main(_: list[str]) -> None:
  values = flags.FLAGS
  jax.config.update('jax_platforms', 'cpu')
  c = json.loads(values.config.to_json())
  for line in table(c, values.tokens, values.dream_rows, values.devices):
    print(line)


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config')
  flags.DEFINE_integer('tokens', 50_000, 'Of a day.', lower_bound=1)
  flags.DEFINE_integer('dream_rows', 8, 'Rows of a dream about a context.')
  flags.DEFINE_list('devices', ['rtx4090', 'a100', 'h100', 'v5p'], 'Which.')
  app.run(main)
