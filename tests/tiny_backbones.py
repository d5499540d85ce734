"""Tiny Llama and Qwen folders with real tokenizers, and configs that fit them.

What a public checkpoint has on disk: safetensors, config.json, a byte-level BPE
in tokenizer.json, a chat template; only that the weights are random and small.
"""

import json
import pathlib

import tokenizers as tokenizers_library
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

from experiments.configs import backbones
from sleep_jax.harness import build as build_lib
from sleep_jax.weights import convert
from tests import checkpoints

VOCAB = 512
_TEXT = (
  'What is the balance of my account?',
  'Please book a flight to Paris for two people.',
  "Let's read the following passage and answer a question directly.",
  'the quick brown fox jumps over the lazy dog 0 1 2 3 4 5 6 7 8 9 -> ;',
)
# Special tokens (of roles) and the template of a family's chats.
_LLAMA = (
  {'bos_token': '<|begin_of_text|>', 'eos_token': '<|eot_id|>'},
  ('<|start_header_id|>', '<|end_header_id|>'),
  '{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}'
  '<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}'
  '{% if add_generation_prompt %}<|start_header_id|>assistant'
  '<|end_header_id|>\n\n{% endif %}',
)
_CHATML = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n'
  '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
# Qwen has no BOS; SmolLM2's begins every turn.
FAMILIES = {
  'llama3_2': _LLAMA,
  'qwen2_5': (
    {'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'},
    ('<|im_start|>',),
    _CHATML,
  ),
  'smollm2': (
    {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>'},
    (),
    _CHATML,
  ),
}


def write_tokenizer(folder: pathlib.Path, family: str) -> None:
  """A byte-level BPE of `VOCAB` pieces with the family's special tokens."""
  roles, others, template = FAMILIES[family]
  tokenizer = tokenizers_library.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    _TEXT,
    trainers.BpeTrainer(
      vocab_size=VOCAB,
      special_tokens=[*roles.values(), *others],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  tokenizer.save(str(folder / 'tokenizer.json'))
  settings = roles | {'chat_template': template}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


def write(folder: pathlib.Path, family: str) -> str:
  """A checkpoint in `folder`/theirs and `folder`/ours; the latter's path."""
  kind = 'llama2' if family == 'smollm2' else family
  c = checkpoints.settings(
    kind, tied=True, vocab_size=VOCAB, max_position_embeddings=8192
  )
  weights = checkpoints.tensors(c)
  checkpoints.write(folder / 'theirs', c, weights)
  write_tokenizer(folder / 'theirs', family)
  convert.convert(folder / 'theirs', folder / 'ours')
  return str(folder / 'ours')


def shrunk(variant: str, base: str) -> build_lib.Settings:
  """The config of a variant on another base: one night of a few rows."""
  c = backbones.get_config(variant)
  c.base = base
  clock = 32
  for level in c.model.levels:
    level.chunk //= 1024 // clock
  for level in c.model.levels[1:]:
    level.rank = 4
  c.wake.window = max(clock, c.wake.window * clock // 1024)
  c.sleep.update(
    dreams=8, steps=2, batch=2, dream_length=32, prefixes=2, group=2,
    rollout_groups=1, rollout_every=2, continuation=8, teacher_top_k=8,
    max_kl_share=99.0,
  )  # fmt: skip
  c.finetune.batch = 2
  if 'fisher_rows' in c.finetune:
    c.finetune.fisher_rows = 2
  for arm in c.arms.values():
    if 'learner_config' in arm:
      arm.learner_config.context = 64
  _SHRINK[c.task.name](c)
  return json.loads(c.to_json())


def _shrink_trials(c) -> None:
  c.lora.rank = 2
  c.trial.update(epochs=1, joint_epochs=1, repeats=1, max_parallel=4)
  c.dreaming.update(
    dreams=2, keep=1, keep_random=1, epochs=1, batch=2, retention_rows=2,
    retention_length=16, retention_margin=99.0, study_rows=4,
    importance_rows=2,
  )  # fmt: skip


def _class_incremental(c) -> None:
  c.task.passes = 1


def _squad(c) -> None:
  _shrink_trials(c)
  c.task.update(
    episodes=1, train=2, test=1, joint=2, length=256, max_dream=16,
    max_answer=8,
  )  # fmt: skip


def _arc(c) -> None:
  _shrink_trials(c)
  c.task.update(
    episodes=1, train=1, test=1, attempts=1, rows=2, length=4096, max_rows=2,
    max_dream=16,
  )  # fmt: skip


_SHRINK = {
  'class_incremental': _class_incremental,
  'knowledge_incorporation': _squad,
  'arc_few_shot': _arc,
}
