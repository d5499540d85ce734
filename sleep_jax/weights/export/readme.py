"""The README of an exported folder, for those who find it without the rest."""

import pathlib
from typing import Any

_CUSTOM = """\
The weights include what the model has learnt by reading. What its nights have
consolidated are low-rank experts beside the MLPs, which `modeling_sleep.py`
computes:

```python
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained(
  "{name}", trust_remote_code=True
)
tokenizer = transformers.AutoTokenizer.from_pretrained(
  "{name}", trust_remote_code=True
)
```

`memory.safetensors` is not needed for that. It holds what the model needs to
live on: `python -m sleep_jax.weights.convert {name} OUT` makes it a model that
can read and sleep again.
"""
_PLAIN = """\
A plain {architecture}; whatever serves the base serves this model:

```python
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = transformers.AutoTokenizer.from_pretrained("{name}")
```
"""


def write(
  folder: pathlib.Path, name: str, values: dict[str, Any], notes: list[str]
) -> None:
  """Writes README.md.

  Args:
    folder: of the checkpoint.
    name: what the folder will be called.
    values: its config.json.
    notes: further paragraphs, such as the loss that merging has cost.
  """
  architecture = values['architectures'][0]
  body = _CUSTOM if 'auto_map' in values else _PLAIN
  base = values.get('_name_or_path') or (
    f'{values["num_hidden_layers"]} layers of width {values["hidden_size"]}'
  )
  head = (
    '---\nlibrary_name: transformers\npipeline_tag: text-generation\n'
    'tags:\n- sleep_jax\n---\n\n'
    f'# {name}\n\n'
    f'A language model exported by sleep_jax. Base: {base}; the terms of the '
    'base apply to it.\n\n'
  )
  text = body.format(name=name, architecture=architecture)
  for note in notes:
    text += f'\n{note}\n'
  (folder / 'README.md').write_text(head + text, encoding='utf-8')
