"""Tokenizers against the libraries that own the formats, on real text."""

import gzip
import json
import os
import pathlib
import struct

import pytest
import sentencepiece

from sleep_jax import config
from sleep_jax.data import tokenizers
from sleep_jax.data.tokenizers import huggingface as huggingface_tokenizer
from sleep_jax.data.tokenizers import llama2c as llama2c_tokenizer
from sleep_jax.data.tokenizers import tokenizer as tokenizer_lib
from sleep_jax.learners import base as learner_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from tests import conftest

ASSETS = pathlib.Path(__file__).parent.parent / 'sleep_jax' / 'assets'
DATA = pathlib.Path(os.environ.get('SLEEP_JAX_DATA', '/nowhere'))
TOK512 = DATA / 'stories260k' / 'tok512.bin'
TEXTS = (
  'gutenberg/Emma_158.txt.gz',
  'tinystories/tinystories_10k.txt.gz',
)
HARD = 'naïve “quotes” \n\n\tTabs,  two  spaces , 北京 🙂 <s> <0x0A> end '

needs_data = pytest.mark.skipif(
  not TOK512.exists(), reason='SLEEP_JAX_DATA holds no stories260k'
)


def real_text(name: str) -> str:
  return gzip.decompress((DATA / name).read_bytes()).decode()[:60_000]


def exported(pieces: list[tuple[str, float]]) -> bytes:
  """A tokenizer.bin as llama2.c writes it."""
  raw = [(p.encode(), s) for p, s in pieces]
  out = struct.pack('<i', max(len(p) for p, _ in raw))
  return out + b''.join(struct.pack('<fi', s, len(p)) + p for p, s in raw)


def tiny_pieces(*more: str) -> list[tuple[str, float]]:
  names = ['<unk>', '\n<s>\n', '\n</s>\n']
  names += [f'<0x{i:02X}>' for i in range(256)] + [' ', *more]
  return [(name, -float(i)) for i, name in enumerate(names)]


@pytest.fixture(name='tok512')
def _tok512():
  return tokenizers.load(TOK512)


@needs_data
@pytest.mark.parametrize('name', TEXTS)
def test_decoding_gives_the_text_back(tok512, name):
  text = real_text(name)
  ids = tok512.encode(text)
  assert tok512.decode(ids) == text
  assert max(ids) < tok512.vocab == 512
  assert tok512.bos not in ids and tok512.pad not in ids


@needs_data
def test_any_text_survives(tok512):
  assert tok512.decode(tok512.encode(HARD)) == HARD
  assert tok512.encode('') == []
  assert tok512.decode([tok512.bos, *tok512.encode('Once')]) == 'Once'


@needs_data
def test_no_merge_is_left_over(tok512):
  pieces = llama2c_tokenizer._parse(TOK512.read_bytes(), 'tok512')
  texts = {piece for piece, _ in pieces[259:]}
  ids = tok512.encode(real_text(TEXTS[0])[:5000])
  shown = [pieces[i][0] for i in ids]
  assert not {a + b for a, b in zip(shown, shown[1:])} & texts
  assert any(b' the' == piece for piece in shown)


def test_merges_go_by_score_and_not_from_left_to_right():
  pieces = tiny_pieces('a', 'b', 'c', 'bc', 'ab', 'abcab')
  tok = llama2c_tokenizer.Llama2cTokenizer(exported(pieces), 'x.bin')
  ids = {piece: i for i, (piece, _) in enumerate(pieces)}
  assert tok.encode('ab') == [ids[' '], ids['ab']]
  assert tok.encode('abc') == [ids[' '], ids['a'], ids['bc']]
  # A piece that no chain of mergers reaches stays unused.
  assert tok.encode('abcab') == [ids[x] for x in (' ', 'a', 'bc', 'ab')]


@needs_data
def test_the_merges_are_those_of_sentencepiece():
  """Another vocabulary, exported to the format, against the library."""
  library = sentencepiece.SentencePieceProcessor(
    model_file=str(ASSETS / 'text.model')
  )
  pieces = [
    (library.id_to_piece(i).replace('▁', ' '), library.get_score(i))
    for i in range(library.vocab_size())
  ]
  tok = llama2c_tokenizer.Llama2cTokenizer(exported(pieces), 'text.bin')
  # The library tidies spaces, which the format cannot ask for.
  text = ' '.join(real_text(TEXTS[0]).split())
  assert tok.encode(text) == library.encode(text)
  assert tok.decode(tok.encode(text)) == library.decode(library.encode(text))


@pytest.mark.parametrize('cut', [5, 100, 3000])
def test_a_truncated_tokenizer_is_refused_by_name(tmp_path, cut):
  whole = exported(tiny_pieces('a'))
  (tmp_path / 'x.bin').write_bytes(whole[:cut])
  with pytest.raises(config.ConfigError, match='x.bin'):
    tokenizers.load(tmp_path / 'x.bin')


def test_integers_are_written_as_numbers():
  tok = tokenizers.IntegerTokenizer(vocab=5, bos=1)
  assert tok.decode([4, 0]) == '4 0' and tok.encode('4 0') == [4, 0]
  tokenizers.check_fits(tok, 5)
  with pytest.raises(config.ConfigError, match='5 pieces but model.vocab=4'):
    tokenizers.check_fits(tok, 4)


def test_unknown_kinds_of_tokenizer_are_refused(tmp_path):
  for name in ('none.bin', 'x.txt', 'none.model'):
    with pytest.raises(config.ConfigError, match=name):
      tokenizers.load(tmp_path / name)
  (tmp_path / 'bad.model').write_bytes(b'no model')
  with pytest.raises(config.ConfigError, match='bad.model'):
    tokenizers.load(tmp_path / 'bad.model')
  with pytest.raises(config.ConfigError, match='tokenizer.json'):
    tokenizers.load(tmp_path)


def test_sentencepiece_is_the_library_with_its_special_tokens():
  tok = tokenizers.load(ASSETS / 'text.model')
  text = 'It was the best of times, it was the worst of times.'
  assert tok.decode(tok.encode(text)) == text
  assert (tok.pad, tok.bos, tok.stop) == (0, 1, 2)


def test_bos_is_a_mark_where_the_tokenizer_puts_it_before_a_text(folder):
  """As the library does; `<|im_start|>` is a token of the chat format."""
  library = pytest.importorskip('tokenizers')
  assert tokenizer_lib.prepends_bos(tokenizers.load(ASSETS / 'text.model'))
  write_config(folder, bos_token='<|im_start|>')
  tok = tokenizers.load(folder)
  assert tok.bos == 1 and not tokenizer_lib.prepends_bos(tok)
  write_config(folder)  # As Qwen: no BOS, documents begin with padding.
  assert not tokenizer_lib.prepends_bos(tokenizers.load(folder))
  model = library.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  model.post_processor = library.processors.TemplateProcessing(
    single='<|im_start|> $A', special_tokens=[('<|im_start|>', 1)]
  )
  model.save(str(folder / 'tokenizer.json'))
  write_config(folder, bos_token='<|im_start|>')
  tok = tokenizers.load(folder)
  assert tokenizer_lib.prepends_bos(tok) and 1 not in tok.encode('a')


@needs_data
def test_ids_beyond_the_vocabulary_are_decoded(tok512, folder):
  words = tokenizers.WordTokenizer(['one', '.'], '.')
  assert words.decode([2, 9, 3]) == 'one <unk> .'
  for tok in (
    tokenizers.load(ASSETS / 'text.model'),
    tok512,
    tokenizers.load(folder),
  ):
    text = tok.decode([*tok.encode('one'), tok.vocab + 7])
    assert text.startswith('one')


CHATML = (
  '{% for message in messages %}\n'
  "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
  '{{ eos_token }}\n'
  '  {% endfor %}\n'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(name='folder')
def _folder(tmp_path):
  """A byte-level BPE checkpoint folder, trained by the library."""
  library = pytest.importorskip('tokenizers')
  model = library.Tokenizer(library.models.BPE())
  model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator([__doc__, str(conftest.__doc__), HARD] * 9, trainer)
  model.save(str(tmp_path / 'tokenizer.json'))
  write_config(tmp_path)
  return tmp_path


def write_config(folder: pathlib.Path, **changes) -> None:
  settings = dict(
    eos_token={'__type': 'AddedToken', 'content': '<|im_end|>'},
    pad_token='<|endoftext|>',
    bos_token=None,
    chat_template=CHATML,
  )
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings | changes))


def test_a_tokenizer_json_is_what_its_library_makes_of_it(folder):
  library = pytest.importorskip('tokenizers')
  direct = library.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tok = tokenizers.load(folder)
  for text in (HARD, 'Tokenizers against the libraries', ''):
    assert tok.encode(text) == direct.encode(text).ids
  plain = HARD.replace('<s>', '')
  assert tok.decode(tok.encode(plain)) == plain
  assert tok.vocab == direct.get_vocab_size()
  ids = [direct.token_to_id(t) for t in ('<|endoftext|>', '<|im_end|>')]
  assert [tok.pad, tok.stop] == ids
  assert tok.bos == tok.pad  # Qwen's way: no BOS of its own.
  assert tokenizers.load(folder / 'tokenizer.json').vocab == tok.vocab


TALK = [
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': 'Why <sleep> & "dream"?'},
]
RENDERED = (
  '<|im_start|>system\nBe brief.<|im_end|>\n'
  '<|im_start|>user\nWhy <sleep> & "dream"?<|im_end|>\n'
)


def test_a_chat_template_by_hand(folder):
  pytest.importorskip('jinja2')
  tok = tokenizers.load(folder)
  assert tok.apply_chat_template(TALK) == RENDERED
  prompt = tok.apply_chat_template(TALK, add_generation_prompt=True)
  assert prompt == RENDERED + '<|im_start|>assistant\n'
  ids = tok.encode(prompt)
  assert ids.count(tok.stop) == 2  # Special tokens, not their spelling.
  # A file beside it comes first, and may look at JSON unescaped.
  (folder / 'chat_template.jinja').write_text(
    "{{ bos_token }}{{ messages | tojson }}{{ tools[0]['x'] }}"
  )
  talk = [{'role': 'user', 'content': '<é>'}]
  assert (
    tokenizers.load(folder).apply_chat_template(talk, tools=[{'x': 1}])
    == '[{"role": "user", "content": "<é>"}]1'
  )


@pytest.mark.parametrize(
  'template, words',
  [
    ("{{ raise_exception('No system role.') }}", 'No system role'),
    ('{% for %}', 'refuses these messages'),
    ("{{ ''.__class__.__mro__ }}", 'unsafe'),
    (None, 'has no chat template'),
  ],
)
def test_a_template_that_cannot_be_followed_says_so(folder, template, words):
  pytest.importorskip('jinja2')
  write_config(folder, chat_template=template)
  with pytest.raises(config.ConfigError, match=words):
    tokenizers.load(folder).apply_chat_template(TALK)


def test_a_tokenizer_without_an_end_or_broken_is_refused(folder):
  write_config(folder, eos_token='</s>')
  with pytest.raises(config.ConfigError, match='names no eos_token'):
    tokenizers.load(folder)
  (folder / 'tokenizer_config.json').write_text('{')
  with pytest.raises(config.ConfigError, match='cannot be read: Expecting'):
    tokenizers.load(folder)
  file = folder / 'tokenizer.json'
  file.write_bytes(file.read_bytes()[:500])
  with pytest.raises(config.ConfigError, match='is no tokenizer.json'):
    tokenizers.load(folder)


def test_a_missing_library_names_the_extra():
  with pytest.raises(config.ConfigError, match=r'sleep_jax\[hf\]'):
    huggingface_tokenizer._library('no_such_library')


def test_a_setup_refuses_a_tokenizer_that_does_not_fit():
  tok, cfg = tokenizers.load(ASSETS / 'text.model'), conftest.tiny()
  with pytest.raises(config.ConfigError, match='1024 pieces but model.vocab=3'):
    learner_lib.Setup(
      model_lib.Model(cfg, {}, memory_init.init_memory(cfg)),
      tok,
      costs_lib.CostTracker(cfg, 16),
    )


@needs_data
def test_a_tokenizer_must_fit_the_vocabulary(tok512):
  tokenizers.check_fits(tok512, 512)
  with pytest.raises(config.ConfigError, match='512 pieces but model.vocab=5'):
    tokenizers.check_fits(tok512, 511)
