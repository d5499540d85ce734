"""The form `custom`: a Hugging Face folder with the code that runs it.

`model*.safetensors` is all that computes: the weights with the fast change
added, and the experts in use, layer by layer. `memory.safetensors` is what a
life needs beside it to go on: the memory, and the changed weights as they were.
"""

import pathlib
import shutil
from typing import Any

import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import assets
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.weights import architectures
from sleep_jax.weights import expert_bank
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import huggingface
from sleep_jax.weights.export import companions
from sleep_jax.weights.export import plain_form
from sleep_jax.weights.export import readme

_CODE = assets.folder() / 'export'
_EXPERT = ('a', 'b', 'router', 'bias')


def write(
  model: model_lib.Model, out: pathlib.Path, source: pathlib.Path | None
) -> str:
  """Writes the folder `out`; see `export.custom`."""
  model = model.merged()
  cfg, memory = model.cfg, model.memory
  plain_form.check(cfg, out)
  layout = slots(cfg)
  changed = expert_bank.with_fast_change(cfg, model.params, memory)
  tensors = huggingface.lazy_tensors(changed, layout)
  base = huggingface.lazy_tensors(model.params, layout)
  base = {
    name: tensor.make()
    for name, tensor in base.items()
    if _differs(model.params, changed, layout[name])
  }
  with folder_lib.atomic_dir(out) as part:
    values, warning = companions.add(part, cfg, source, cfg.dtype)
    values = architectures.custom(values, _levels(cfg, memory))
    companions.write_config(part, values)
    readme.write(part, out.name, values, [warning] if warning else [])
    for file in _CODE.glob('*.py'):
      shutil.copyfile(file, part / file.name)
    huggingface.save(part, tensors | _expert_tensors(cfg, memory))
    expert_bank.save(part / expert_bank.FILE, cfg, memory, base)
  why = expert_bank.why_not_plain(cfg, model.params, memory)
  line = (
    f'{out}: weights, experts in use, and code that transformers runs '
    f'(trust_remote_code=True){", because " + why if why else ""}. Converted '
    'back, it can live on.'
  )
  return f'{line}\n{warning}' if warning else line


def read_layout(
  cfg: config.ModelConfig, bank: expert_bank.SavedBank
) -> huggingface.Layout:
  """How the folder's tensors become the weights before the fast change."""
  experts = _expert_tensors(cfg, bank.memory)
  return huggingface.Layout(slots(cfg), experts.keys(), bank.base)


def slots(cfg: config.ModelConfig) -> dict[str, huggingface.TensorSlot]:
  """Every tensor of the backbone with all its levels, by name.

  Where blocks have one level the names are those of the plain checkpoint.
  """
  plain, num = huggingface.tensor_slots(cfg), len(cfg.levels_per_block)
  if num == 1:
    return plain
  out = {}
  for name, slot in plain.items():
    name = name.replace('.mlp.', f'.mlp.levels.{num - 1}.')
    norm = f'mlp.norms.{num - 1}'
    out[name.replace('post_attention_layernorm', norm)] = slot
  for i in range(cfg.layers):
    for j, level in enumerate(cfg.levels[:-1]):
      d, f = cfg.dim, level.hidden
      prefix, ours = f'model.layers.{i}.mlp', f'blocks.level_{j + 1}'
      out[f'{prefix}.norms.{j}.weight'] = huggingface.tensor_slot(
        f'{ours}_norm.scale', i, (d,), False
      )
      for key, shape in {'gate': (d, f), 'up': (d, f), 'down': (f, d)}.items():
        out[f'{prefix}.levels.{j}.{key}_proj.weight'] = huggingface.tensor_slot(
          f'{ours}.{key}', i, shape, True
        )
  return out


def _differs(
  params: at.Params, changed: at.Params, slot: huggingface.TensorSlot
) -> bool:
  """Whether a tensor is not what it was, in value or type."""
  before: Any = params
  after: Any = changed
  for name in slot.name.split('.'):
    before, after = before[name], after[name]
  if after is before:
    return False
  if slot.layer is None or before.dtype != after.dtype:
    return True
  return after.changes_layer(slot.layer)


def _used(memory: memory_lib.Memory | None, level: int) -> list[int]:
  """The slots of a level that may change a logit."""
  bank = memory.levels[level].bank if memory else None
  return expert_bank.used_slots(bank) if bank else []


def _levels(
  cfg: config.ModelConfig, memory: memory_lib.Memory | None
) -> list[dict[str, Any]]:
  """`sleep_levels` of config.json."""
  out = []
  for i, level in enumerate(cfg.levels):
    used = _used(memory, i)
    status = memory.bank(i).status if memory and used else []
    out.append(
      {
        'layers': list(cfg.layers_of(i)),
        'hidden': level.hidden,
        'slots': len(used),
        'rank': level.rank,
        'top_k': level.top_k,
        'status': [int(status[s]) for s in used],
      }
    )
  return out


def _expert_tensors(
  cfg: config.ModelConfig, memory: memory_lib.Memory | None
) -> dict[str, huggingface.LazyTensor]:
  """The experts in use, by the names that `modeling_sleep.py` gives them."""
  out: dict[str, huggingface.LazyTensor] = {}
  for i in range(len(cfg.levels)):
    used = _used(memory, i)
    if not used or memory is None:
      continue
    chain = '' if len(cfg.levels_per_block) == 1 else f'levels.{i}.'
    for key in _EXPERT:
      stack = np.asarray(getattr(memory.bank(i).experts, key))[:, used]
      for row, layer in enumerate(cfg.layers_of(i)):
        name = f'model.layers.{layer}.mlp.{chain}experts.{key}'
        tensor = np.ascontiguousarray(stack[row])
        out[name] = huggingface.LazyTensor(
          tensor.nbytes, lambda tensor=tensor: tensor
        )
  return out
