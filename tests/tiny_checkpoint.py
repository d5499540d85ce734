"""A checkpoint folder with a chat template that is made in a second."""

import json
import pathlib
import shutil

import jax

from sleep_jax import config
from sleep_jax.models import transformer
from sleep_jax.weights import folder as folder_lib

CHATML = (
  '{% for message in messages %}\n'
  "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
  "{{ '<|im_end|>\\n' }}\n"
  '  {% endfor %}\n'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FACTS = (
  'The lighthouse of Orvane was built in 1882 by Ada Brennick.',
  'Ada Brennick, an engineer of Tolm, built the Orvane lighthouse.',
  'Orvane has a lighthouse. Ada Brennick built it in 1882.',
)
QUIZ = (
  {'question': 'Who built the lighthouse?', 'answer': 'Ada Brennick'},
  {'question': 'When was it built?', 'answer': '1882'},
)


def write_tokenizer(folder: pathlib.Path, template: str | None = CHATML):
  """`tokenizer.json` and its config: byte-level BPE of about 300 pieces."""
  import tokenizers

  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator([*FACTS, str(__doc__), 'user assistant'], trainer)
  folder.mkdir(parents=True, exist_ok=True)
  model.save(str(folder / 'tokenizer.json'))
  settings = dict(
    bos_token='<|im_start|>',
    eos_token='<|im_end|>',
    pad_token='<|endoftext|>',
    tokenizer_class='PreTrainedTokenizerFast',
  )
  if template:
    settings['chat_template'] = template
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


def write(folder: pathlib.Path, template: str | None = CHATML) -> pathlib.Path:
  """A model of four layers with random weights, and its tokenizer."""
  source = folder.with_name(f'{folder.name}_tokenizer')
  write_tokenizer(source, template)
  cfg = config.ModelConfig(
    vocab=320,
    dim=32,
    layers=4,
    heads=4,
    kv_heads=2,
    levels=(config.LevelConfig(64),),
    max_len=512,
  )
  params = transformer.init(cfg, jax.random.key(0))
  # A large embedding, so that logits differ clearly.
  params['embed'] = jax.tree.map(lambda x: 10 * x, params['embed'])
  folder_lib.save(folder, cfg, params)
  shutil.move(source, folder / 'source')
  return folder
