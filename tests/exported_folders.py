"""Loads exported folders in transformers, in a process of its own.

  python -m tests.exported_folders REQUEST

REQUEST is a JSON list of folders. In each, `request.npz` holds `tokens [B, T]`
and a `prompt [P]`; the answer, `answer.npz`, holds transformers' logits, its
greedy continuation of the prompt, and its tokens of the text. A new process and
an empty cache of remote code: nothing that this package has imported helps.
"""

import json
import pathlib
import sys

import numpy as np

TEXT = 'hello world'
MAX_NEW = 16


def answer(folder: pathlib.Path, request: pathlib.Path) -> None:
  """Writes `answer.npz` into `folder`."""
  import torch
  import transformers

  asked = np.load(request)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True
  ).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    folder, trust_remote_code=True
  )
  with torch.no_grad():
    logits = model(torch.tensor(asked['tokens'])).logits.float().numpy()
  said = model.generate(
    torch.tensor(asked['prompt'])[None],
    attention_mask=torch.ones(1, len(asked['prompt']), dtype=torch.long),
    max_new_tokens=MAX_NEW,
    do_sample=False,
    use_cache=True,
    eos_token_id=None,
    pad_token_id=0,
  )
  np.savez(
    request.with_name('answer.npz'),
    logits=logits,
    said=said[0, len(asked['prompt']) :].numpy(),
    text=np.array(tokenizer(TEXT, add_special_tokens=False)['input_ids']),
    eos=np.array(model.generation_config.eos_token_id or -1),
    kind=np.array(type(model).__name__),
  )


if __name__ == '__main__':
  for name in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    answer(pathlib.Path(name) / 'hf', pathlib.Path(name) / 'request.npz')
