"""A real GGUF file against transformers' own import of it.

`$SLEEP_JAX_GGUF` names the file: a Llama, Qwen2.5 or Qwen3 with a chat
template, such as the SmolLM2 of `weights/fetch.py`.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.data import tokenizers
from sleep_jax.inference import sampling
from sleep_jax.models import model as model_lib
from sleep_jax.weights import pretrained

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('gguf')

FILE = pathlib.Path(os.environ.get('SLEEP_JAX_GGUF', 'none'))
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not FILE.is_file(), reason='SLEEP_JAX_GGUF names no file'),
]
NEW = 24
CHAT = [
  {'role': 'user', 'content': 'Name three colours, then 12 * 3.'},
  {'role': 'assistant', 'content': 'Red, green, blue; 36.'},
  {'role': 'user', 'content': 'Thanks!\n  And in French?'},
]
STRINGS = (
  'The capital of France is',
  ' Once upon a time, there was a little robot who could not sleep.',
  "I'm sure they've gone; DON'T ask. She'd said we'll see 'em.",
  'On 2024-10-31 at 12:34:56 it cost $1,234,567.89 (or 3.14159%).',
  '  two  spaces,\ttabs\n\n\nand lines  \r\n   ',
  '\n',
  ' ',
  'naïve café, Ωμέγα, Привет мир, 数学は楽しい, 한국어, עברית, हिन्दी',
  '🙂🙃👩‍👩‍👧‍👦 🇫🇷',
  'def f(x):\n    if x == 10:\n        return {"a": [1, 2]}  # done\n',
  'https://example.org/a_b?c=d&e=%20f#g',
  'supercalifragilisticexpialidocious antidisestablishmentarianism',
  'ALLCAPS camelCase snake_case kebab-case',
  'a\u00a0b\u2009c\u200bd\ufeffe',
  '1234567890' * 4,
  '!!!???...---___***',
  '\\frac{1}{2} \\sum_{i=0}^{n} x_i^2 \u2264 \u221e',
  '<html><body class="x">&amp;</body></html>',
  '<|im_start|>user\nhi<|im_end|>\n<|endoftext|>',
  'x' * 200,
  '\x00\x01\x7f',
)

NUMERALS = 'a ½ of ² and ① is ٣٤ or Ⅳ, 一二, 7 % and x2y'


@pytest.fixture(name='ours', scope='module')
def _ours(tmp_path_factory):
  """Our import: the model and its tokenizer."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('SLEEP_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    found = pretrained.load(str(FILE))
  params = jax.tree.map(jnp.asarray, found.params)
  return model_lib.Model(found.cfg, params), found.tokenizer()


@pytest.fixture(name='theirs', scope='module')
def _theirs():
  """Theirs."""
  names = dict(gguf_file=FILE.name)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    FILE.parent, dtype=torch.float32, **names
  )
  return theirs.eval(), transformers.AutoTokenizer.from_pretrained(
    FILE.parent, **names
  )


def prompts(tok: tokenizers.Tokenizer) -> list[list[int]]:
  chat = tok.apply_chat_template(CHAT, add_generation_prompt=True)
  return [tok.encode(text) for text in (*STRINGS[:2], STRINGS[9], chat)]


def test_logits_agree(ours, theirs):
  """To 1e-5 of the largest logit, which is float32's rounding over the layers.

  Of SmolLM2's logits, up to 40, ours differ from theirs by 1.6e-4 at most. From
  theirs in float64 ours differ by 1.8e-4, and theirs in float32 by 0.9e-4; most
  at the first token, whose activations are by far the largest.
  """
  model, tok = ours
  for tokens in prompts(tok):
    got = np.asarray(model.forward(jnp.asarray([tokens])).logits[0])
    with torch.no_grad():
      want = theirs[0](torch.tensor([tokens])).logits[0].numpy()
    off, largest = np.abs(got - want).max(), np.abs(want).max()
    print(f'{len(tokens)} tokens: off by {off:.1e} of {largest:.1f}')
    assert off < 1e-5 * largest


def test_greedy_output_is_token_identical(ours, theirs):
  model, tok = ours
  rows = prompts(tok)
  got = sampling.complete(
    model,
    rows,
    jax.random.key(0),
    sampling.SamplerConfig(NEW, temperature=0.0, stop=tok.stop, pad=tok.pad),
  )
  for prompt, row in zip(rows, got, strict=True):
    out = theirs[0].generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      max_new_tokens=NEW,
      do_sample=False,
      eos_token_id=tok.stop,
      pad_token_id=tok.pad,
    )
    assert row == out[0, len(prompt) :].tolist()


def test_token_ids_agree(ours, theirs):
  tok = ours[1]
  for text in STRINGS:
    want = theirs[1](text, add_special_tokens=False)['input_ids']
    assert tok.encode(text) == want, text


def test_every_numeral_is_a_word_in_smollm(ours, theirs):
  """Theirs splits as GPT-2 whatever `tokenizer.ggml.pre` is: here by our rule.

  It is llama.cpp's: whatever Unicode counts as a number, sign by sign.
  """
  library = pytest.importorskip('tokenizers')
  if ours[0].cfg.vocab != 49_152:
    pytest.skip('the file is no SmolLM')
  pre = library.pre_tokenizers
  rule = pre.Sequence(
    [
      pre.Split(library.Regex(r'\p{N}'), 'isolated'),
      pre.ByteLevel(add_prefix_space=False),
    ]
  )
  backend = library.Tokenizer.from_str(theirs[1].backend_tokenizer.to_str())
  backend.pre_tokenizer = rule
  for text in (NUMERALS, *STRINGS):
    want = backend.encode(text, add_special_tokens=False).ids
    assert ours[1].encode(text) == want, text


def test_the_chat_template_gives_the_same_tokens(ours, theirs):
  tok = ours[1]
  for messages in (CHAT[:1], CHAT, [{'role': 'system', 'content': 'Be.'}]):
    for head in (True, False):
      text = tok.apply_chat_template(messages, add_generation_prompt=head)
      want = theirs[1].apply_chat_template(
        messages, add_generation_prompt=head, tokenize=False
      )
      assert text == want
      ids = theirs[1](want, add_special_tokens=False)['input_ids']
      assert tok.encode(text) == ids


def test_text_is_more_likely_than_its_words_in_disorder(ours):
  model, tok = ours
  words = STRINGS[1].split()
  shuffled = np.random.default_rng(0).permutation(words)
  nats = []
  for text in (words, shuffled):
    tokens = jnp.asarray([tok.encode(' '.join(text))])
    logp = jax.nn.log_softmax(model.forward(tokens).logits[:, :-1])
    nats.append(-jnp.take_along_axis(logp, tokens[:, 1:, None], -1).mean())
  assert nats[0] < 4 < nats[1] - 2
