"""A person's documents: what is read, what is refused, and how it is packed."""

import json
import re

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import chat
from sleep_jax.data import documents as documents_lib
from sleep_jax.data import tokenizers
from tests import tiny_checkpoint

TEXT = 'One sentence. Another one! Is this\nthe third?\n\nA new paragraph.'
SYSTEM = [{'role': 'system', 'content': 'Be brief.'}]
TURNS = [
  {'role': 'user', 'content': 'Who?'},
  {'role': 'assistant', 'content': 'Ada.'},
]


@pytest.fixture(name='tok', scope='module')
def _tok(tmp_path_factory):
  pytest.importorskip('tokenizers')
  folder = tmp_path_factory.mktemp('tok')
  tiny_checkpoint.write_tokenizer(folder)
  return tokenizers.load(folder)


@pytest.fixture(name='plain', scope='module')
def _plain(tmp_path_factory):
  pytest.importorskip('tokenizers')
  folder = tmp_path_factory.mktemp('plain')
  tiny_checkpoint.write_tokenizer(folder, template=None)
  return tokenizers.load(folder)


def write(tmp_path, name, content):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def encode(texts, tok):
  return documents_lib.encode(documents_lib.of(texts), tok)


def ids_of(document) -> list[int]:
  return [i for unit in document.units for i in unit]


def test_every_kind_of_file_is_read(tmp_path):
  rows = [
    {'text': 'A line.'},
    {'question': 'Who?', 'answer': 'Ada.'},
    {'messages': [*SYSTEM, *TURNS], 'id': 7},
  ]
  lines = '\n\n'.join(map(json.dumps, rows)) + '\n'
  documents = documents_lib.read(
    [
      write(tmp_path, 'a.txt', b'\xef\xbb\xbfna\xc3\xafve'),
      write(tmp_path, 'b.md', '# Title\nText.'),
      write(tmp_path, 'c.jsonl', lines),
    ]
  )
  assert [d.text for d in documents] == [
    'naïve', '# Title\nText.', 'A line.', '', '',
  ]  # fmt: skip
  assert documents[3].messages == tuple(TURNS)
  assert documents[4].messages == (*SYSTEM, *TURNS)


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.txt', '', 'a.txt is empty'),
    ('a.md', ' \n\t', 'a.md is empty'),
    ('a.txt', b'text\0text', 'a.txt is a binary file'),
    ('a.txt', b'\x89PNG\xff', 'a.txt is not UTF-8'),
    ('a.jsonl', '{"text": "x"}\n{"text"', 'a.jsonl, line 2 is not JSON'),
    ('a.jsonl', '\n["x"]', 'a.jsonl, line 2 is a list'),
    ('a.jsonl', '{"title": "x"}', "line 1 has none of the fields.*'title'"),
    ('a.jsonl', '{"text": 3}', "line 1: 'text' must be a text"),
    ('a.jsonl', '{"text": " "}', "line 1: 'text' must be a text"),
    ('a.jsonl', '{"question": "x"}', "line 1 has no 'answer'"),
    ('a.jsonl', '{"messages": []}', 'line 1: "messages" must be a list'),
    ('a.jsonl', '{"messages": ["x"]}', 'line 1, message 0 is a str'),
    (
      'a.jsonl',
      '{"messages": [{"role": "bot", "content": "x"}]}',
      "message 0, role='bot' is unknown",
    ),
  ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
  with pytest.raises(config.ConfigError, match=message):
    documents_lib.read([write(tmp_path, name, content)])


def test_a_quiz_needs_questions_and_answers(tmp_path):
  good = write(tmp_path, 'q.jsonl', '{"question": "Who?", "answer": "Ada"}\n')
  assert documents_lib.read_questions(good) == [
    documents_lib.Question('Who?', 'Ada')
  ]
  bad = write(tmp_path, 'b.jsonl', '{"question": "a", "answer": "b"}\n{}\n')
  with pytest.raises(config.ConfigError, match="b.jsonl, line 2 has no 'que"):
    documents_lib.read_questions(bad)
  with pytest.raises(config.ConfigError, match='question 0 is a str'):
    documents_lib.questions(['Who?'])


@pytest.mark.parametrize('path', ['none.txt', '.'])
def test_a_file_that_is_none_is_named(tmp_path, path):
  with pytest.raises(config.ConfigError, match='cannot be read'):
    documents_lib.read([tmp_path / path])


def test_python_values_are_what_files_are():
  one = documents_lib.of('A text.')
  assert (
    one == documents_lib.of(['A text.']) == [documents_lib.Document('A text.')]
  )
  question = {'question': 'Who?', 'answer': 'Ada.'}
  assert (
    documents_lib.of([question])
    == documents_lib.of(TURNS)
    == documents_lib.of([TURNS])
    == [documents_lib.Document(messages=tuple(TURNS))]
  )
  for nothing in ([], '', [''], [3], [[]]):
    with pytest.raises(config.ConfigError):
      documents_lib.of(nothing)


def test_units_are_the_text(tok):
  (document,) = encode(TEXT, tok)
  assert document.units[-1] == (tok.separator,)
  assert tok.decode(ids_of(document)) == TEXT
  assert [tok.decode(list(unit)) for unit in document.units[:-1]] == [
    'One sentence.', ' Another one!', ' Is this', '\nthe third?',
    '\n\nA new paragraph.',
  ]  # fmt: skip


def test_a_conversation_is_written_by_the_template(tok):
  for messages in (TURNS, [*SYSTEM, *TURNS]):
    (document,) = encode([messages], tok)
    text = tok.apply_chat_template(messages)
    assert ids_of(document) == tok.encode(text)
  head = tok.encode('<|im_start|>user\n')
  (document,) = encode([TURNS], tok)
  assert document.silent == len(head)
  rows = documents_lib.pack([document], 64, tok.pad)
  assert not rows.weight[0, : len(head)].any()
  assert rows.weight[0, len(head) : len(document)].all()


def test_a_text_is_an_answer_where_there_is_a_template(tok, plain):
  (document,) = encode(TEXT, tok)
  request = {'role': 'user', 'content': documents_lib.REQUEST}
  prompt = tok.apply_chat_template([request], add_generation_prompt=True)
  assert document.begin == tuple(tok.encode(prompt))
  assert document.frame == (document.begin,)
  (document,) = encode(TEXT, plain)
  assert document.begin == (plain.bos,)


def test_without_a_template_a_conversation_is_plain_words(plain):
  (document,) = encode([TURNS], plain)
  ids = ids_of(document)
  assert (ids[0], ids[-1]) == (plain.bos, plain.separator)
  assert plain.decode(ids) == 'Question: Who?\nAnswer: Ada.'
  prompt = chat.of(plain).prompt('Who?')
  assert ids[: len(prompt)] == prompt
  assert chat.template_tokens(plain) == 0


@pytest.mark.parametrize('length', [2, 5, 16, 64])
def test_packing_keeps_every_token_once_and_in_order(plain, length):
  tok = plain
  encoded = encode([TEXT, 'Short.', TURNS, TEXT * 3, 'x' * 90], tok)
  rows = documents_lib.pack(encoded, length, tok.pad)
  assert rows.tokens.shape == rows.weight.shape
  assert rows.tokens.shape[1] == length
  kept = rows.tokens[rows.weight > 0].tolist()
  assert kept == [
    i for document in encoded for i in ids_of(document)[document.silent :]
  ]
  assert rows.split == sum(len(document) > length for document in encoded)


def test_rows_that_cannot_hold_a_word_are_refused(tok):
  encoded = encode(TEXT, tok)
  with pytest.raises(config.ConfigError, match='rows of more than'):
    documents_lib.pack(encoded, len(encoded[0].begin), tok.pad)


def test_a_document_that_fits_a_row_is_in_one(plain):
  tok = plain
  encoded = encode(['Short one.', 'Another.', 'A third one, longer.'] * 3, tok)
  longest = max(map(len, encoded))
  rows = documents_lib.pack(encoded, longest, tok.pad)
  assert rows.split == 0
  starts = (rows.tokens == tok.bos).sum()
  ends = (rows.tokens == tok.separator).sum()
  assert starts == ends == len(encoded)


def test_a_long_text_is_cut_at_the_end_of_a_sentence(tok):
  (document,) = encode('This is a sentence. ' * 9, tok)
  start = len(document.begin)
  rows = documents_lib.pack([document], start + 30, tok.pad)
  assert rows.split == 1 and len(rows.tokens) > 1
  for row in rows.tokens:
    assert tuple(row[:start]) == document.begin
    assert tok.decode(row[row != tok.pad].tolist()).strip().endswith('.')


@pytest.mark.parametrize('batch', [1, 2, 4])
def test_every_pass_has_every_document_in_another_order(plain, batch):
  tok = plain
  encoded = encode([f'Text {i} is this.' for i in range(11)], tok)
  passes = documents_lib.passes(encoded, (3, 40), tok.pad, [1, 2])
  blocks = documents_lib.blocks(passes, batch)
  assert len({tokens.shape for tokens, _ in blocks}) == 1
  assert all(len(tokens) % batch == 0 for tokens, _ in blocks)
  texts = []
  for part in np.split(np.arange(len(blocks)), 3):
    ids = [t[w > 0] for i in part for t, w in [blocks[i]]]
    text = tok.decode(np.concatenate(ids).tolist())
    texts.append(re.findall(r'Text \d+ is this\.', text))
  assert sorted(texts[0]) == sorted(texts[1]) == sorted(texts[2])
  assert texts[0] == [f'Text {i} is this.' for i in range(11)]
  assert texts[0] != texts[1] != texts[2]
  again = documents_lib.passes(encoded, (3, 40), tok.pad, [1, 2])
  for rows, same in zip(passes, again, strict=True):
    np.testing.assert_array_equal(rows.tokens, same.tokens)


def test_days_share_the_text_in_order(tok):
  encoded = encode([f'Number {i} is a sentence. ' * 4 for i in range(9)], tok)
  for documents in (encoded, encode('A sentence of it. ' * 60, tok)):
    days = documents_lib.days(documents, 3)
    assert [i for day in days for x in day for i in ids_of(x)] == [
      i for x in documents for i in ids_of(x)
    ]
    sizes = [sum(map(len, day)) for day in days]
    assert max(sizes) < 1.5 * min(sizes)
  with pytest.raises(config.ConfigError, match='nights=9'):
    documents_lib.days(encode(['a', 'b'], tok), 9)
