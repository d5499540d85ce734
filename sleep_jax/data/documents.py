"""A person's own documents: files and Python values to rows of tokens.

A document is a text or a conversation. Files are `.jsonl`, one object a line
with `text`, or `question` and `answer`, or `messages`; or any other UTF-8 text
(txt, md), which is one document.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np

from sleep_jax import config
from sleep_jax.data import chat
from sleep_jax.data import tokenizers

_FIELDS = '"text"; or "question" and "answer"; or "messages"'
REQUEST = 'What did you learn today?'  # What a text is the answer to.
_GROUPS = 8  # Batches in a block, at most.
# Before white space that follows the end of a sentence, and before a new line.
_UNIT_END = re.compile(r'(?<=[.!?])(?=\s)|(?<!\n)(?=\n)')


_Marked = tuple[int, float]  # A token, and its weight as a target.


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, or a conversation; the other of the two is empty."""

  text: str = ''
  messages: tuple[chat.Message, ...] = ()


@dataclasses.dataclass(frozen=True)
class Question:
  """A question that is asked closed book, and its right answer."""

  question: str
  answer: str


@dataclasses.dataclass(frozen=True)
class Encoded:
  """A document as ids.

  begin: ids that every piece of it begins with, no targets.
  units: ids of its units, which should not be split: sentences, lines.
  silent: how many of the first ids of the units are no targets.
  frame: its fixed parts, after each of which something is made up.
  """

  begin: tuple[int, ...]
  units: tuple[tuple[int, ...], ...]
  silent: int
  frame: tuple[tuple[int, ...], ...]

  def __len__(self) -> int:
    return len(self.begin) + sum(map(len, self.units))


@dataclasses.dataclass(frozen=True)
class Rows:
  """Documents in windows.

  tokens: `[N, T]` int32.
  weight: `[N, T]` float32, of each token as a target; 0 on padding.
  split: how many documents were longer than a row.
  """

  tokens: np.ndarray
  weight: np.ndarray
  split: int


def read(paths: Sequence[pathlib.Path | str]) -> list[Document]:
  """The documents of all files, in order.

  Raises:
    ConfigError: naming the file, and the line of a `.jsonl`, that is absent,
      empty, not text, or lacks the fields.
  """
  documents = []
  for path in map(pathlib.Path, paths):
    if path.suffix == '.jsonl':
      documents += [_document(row, where) for where, row in _json_lines(path)]
    else:
      documents.append(Document(text=_text(path)))
  if not documents:
    raise config.ConfigError('no document is given; name at least one file.')
  return documents


def read_questions(path: pathlib.Path | str) -> list[Question]:
  """The questions of a `.jsonl` with `question` and `answer` on each line.

  Raises:
    ConfigError: see `read`.
  """
  return [
    question(row, where) for where, row in _json_lines(pathlib.Path(path))
  ]


def question(value: Any, where: str) -> Question:
  """A question from a mapping.

  Raises:
    ConfigError: if it lacks `question` or `answer`; `where` names it.
  """
  if not isinstance(value, Mapping):
    raise config.ConfigError(
      f'{where} is a {type(value).__name__}; it must have "question" and '
      '"answer".'
    )
  _check_strings(value, ('question', 'answer'), where)
  return Question(value['question'], value['answer'])


def questions(values: Sequence[Any]) -> list[Question]:
  """Questions from mappings, or from questions.

  Raises:
    ConfigError: naming the first item that is neither, or if there is none.
  """
  items = [
    x if isinstance(x, Question) else question(x, f'question {i}')
    for i, x in enumerate(values)
  ]
  if not items:
    raise config.ConfigError('a quiz needs at least one question.')
  return items


def of(texts: Any) -> list[Document]:
  """Documents from Python values.

  Args:
    texts: a string; or a list of strings, of lists of messages, or of mappings
      as a line of a `.jsonl` has them. A list of messages alone is one
      conversation.

  Raises:
    ConfigError: naming the first item that is none of these, or is empty.
  """
  if isinstance(texts, (str, Document, Mapping)):
    texts = [texts]
  texts = list(texts)
  if texts and isinstance(texts[0], Mapping) and 'role' in texts[0]:
    texts = [texts]
  documents = [_of_value(x, f'item {i}') for i, x in enumerate(texts)]
  if not documents:
    raise config.ConfigError('there is nothing to read: no text is given.')
  return documents


def encode(
  documents: Sequence[Document], tokenizer: tokenizers.Tokenizer
) -> list[Encoded]:
  """Documents as ids.

  A conversation is written by the chat template; what stands before the user's
  first words (a system prompt, say) is no target. A text is what the assistant
  answers to `REQUEST`: so an instruct model can tell it, and at night dreams of
  its like are asked for in the same words. Without a chat template a text
  stands between BOS and the token that separates documents.
  """
  form = chat.of(tokenizer)
  begin = (tokenizer.bos,)
  if chat.template_tokens(tokenizer):
    begin = tuple(form.prompt(REQUEST))
  return [
    _encode_chat(document.messages, form, tokenizer.stop)
    if document.messages
    else encode_text(document.text, tokenizer, begin)
    for document in documents
  ]


def encode_text(
  text: str, tokenizer: tokenizers.Tokenizer, begin: tuple[int, ...]
) -> Encoded:
  """A text as ids, after `begin`."""
  units = [tuple(tokenizer.encode(u)) for u in _UNIT_END.split(text.strip())]
  return Encoded(
    begin=begin,
    units=(*(unit for unit in units if unit), (tokenizer.separator,)),
    silent=0,
    frame=(begin,),
  )


def _encode_chat(
  messages: Sequence[chat.Message], form: chat.Chat, stop: int
) -> Encoded:
  ids = form.document(messages)
  silent = 0
  for token, fixed in zip(ids, form.before_user):
    if token != fixed:
      break
    silent += 1
  return Encoded((), (tuple(ids),), silent, form.frame(stop))


def days(documents: Sequence[Encoded], nights: int) -> list[list[Encoded]]:
  """Documents in order, over so many days of about the same length.

  A text longer than a day is cut between units.

  Raises:
    ConfigError: if a day would have nothing to read.
  """
  most = -(-sum(map(len, documents)) // nights)
  parts = [part for document in documents for part in _parts(document, most)]
  total, position = sum(map(len, parts)), 0.0
  out: list[list[Encoded]] = [[] for _ in range(nights)]
  for part in parts:
    middle = position + len(part) / 2
    out[min(nights - 1, int(nights * middle / total))].append(part)
    position += len(part)
  if not all(out):
    raise config.ConfigError(
      f'nights={nights}: there is not enough text for so many days; lower '
      'nights, or give more documents.'
    )
  return out


def _parts(document: Encoded, most: int) -> Iterator[Encoded]:
  """A document, or its parts of about `most` tokens; chats stay whole."""
  units: list[tuple[int, ...]] = []
  for unit in document.units:
    size = sum(map(len, units)) + len(unit)
    if units and size > most and len(unit) > 1:
      yield dataclasses.replace(document, units=tuple(units))
      units = []
    units.append(unit)
  yield dataclasses.replace(document, units=tuple(units))


def pack(documents: Sequence[Encoded], length: int, pad: int) -> Rows:
  """Documents in rows of `length` tokens, in order, as many to a row as fit.

  A document that fits a row is never split; a longer one is split between
  units, and within a unit where that alone is longer. Nothing keeps a document
  from attending to those before it in its row.

  Args:
    documents: at least one.
    length: T, tokens of a row.
    pad: fills a row after its last document.

  Raises:
    ConfigError: if there is no document, or rows are too short for any.
  """
  longest = max((len(d.begin) for d in documents), default=0)
  if not documents or length <= longest:
    raise config.ConfigError(
      f'{len(documents)} documents cannot be put into rows of {length} tokens; '
      f'give at least one document, and rows of more than {longest} tokens.'
    )
  rows: list[list[_Marked]] = []
  num_split = 0
  for document in documents:
    pieces = list(_pieces(document, length))
    num_split += len(pieces) > 1
    for piece in pieces:
      if not rows or len(rows[-1]) + len(piece) > length:
        rows.append([])
      rows[-1] += piece
  tokens = np.full((len(rows), length), pad, np.int32)
  weight = np.zeros((len(rows), length), np.float32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], weight[i, : len(row)] = zip(*row)
  return Rows(tokens, weight, num_split)


def blocks(
  days: Sequence[Rows], batch: int
) -> list[tuple[np.ndarray, np.ndarray]]:
  """The rows of every pass, in blocks of one shape.

  Args:
    days: what each pass reads, see `passes`.
    batch: rows read side by side.

  Returns:
    (tokens, weight) of every block, a multiple of `batch` rows each; every pass
    has as many blocks, and ends with rows of padding.
  """
  groups = -(-max(len(rows.tokens) for rows in days) // batch)
  size = max(k for k in range(1, _GROUPS + 1) if groups % k == 0) * batch
  out = []
  for rows in days:
    fill = ((0, groups * batch - len(rows.tokens)), (0, 0))
    tokens, weight = np.pad(rows.tokens, fill), np.pad(rows.weight, fill)
    for start in range(0, len(tokens), size):
      part = slice(start, start + size)
      out.append((tokens[part], weight[part]))
  return out


def passes(
  documents: Sequence[Encoded],
  shape: tuple[int, int],
  pad: int,
  seed: list[int],
) -> list[Rows]:
  """A day's documents packed anew for every pass.

  After the first pass they are in another order, so that none always stands
  beside the same others: what one tells could be read off its neighbour.

  Args:
    documents: of the day, at least one.
    shape: passes, and tokens of a row.
    pad: see `pack`.
    seed: of the orders.
  """
  num, length = shape
  rng, order = np.random.default_rng(seed), list(documents)
  out = []
  for i in range(num):
    if i:
      order = [documents[j] for j in rng.permutation(len(documents)).tolist()]
    out.append(pack(order, length, pad))
  return out


def _pieces(document: Encoded, length: int) -> Iterator[list[_Marked]]:
  """A document in pieces of at most `length` tokens."""
  begin = [(token, 0.0) for token in document.begin]
  piece, position = begin, 0
  for unit in document.units:
    marked = [
      (token, float(position + i >= document.silent))
      for i, token in enumerate(unit)
    ]
    position += len(unit)
    if len(piece) > len(begin) and len(piece) + len(marked) > length:
      yield piece
      piece = begin
    while len(piece) + len(marked) > length:
      end = length - len(piece)
      yield piece + marked[:end]
      piece, marked = begin, marked[end:]
    piece = piece + marked
  if len(piece) > len(begin):
    yield piece


def _text(path: pathlib.Path) -> str:
  """The content of a text file; see `read`."""
  try:
    raw = path.read_bytes()
  except OSError as e:
    raise config.ConfigError(
      f'{path} cannot be read: {e.strerror}; name a text file.'
    ) from None
  try:
    text = raw.decode('utf-8-sig')
  except UnicodeDecodeError as e:
    raise config.ConfigError(
      f'{path} is not UTF-8 text (byte {e.start}); save it as text first.'
    ) from None
  if '\0' in text:
    raise config.ConfigError(
      f'{path} is a binary file (it has a NUL byte); save it as text first.'
    )
  if not text.strip():
    raise config.ConfigError(f'{path} is empty; leave it out.')
  return text


def _json_lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """(place for messages, object) of every line that is not blank."""
  for number, line in enumerate(_text(path).split('\n'), 1):
    if not line.strip():
      continue
    try:
      yield f'{path}, line {number}', json.loads(line)
    except (ValueError, RecursionError) as e:
      raise config.ConfigError(
        f'{path}, line {number} is not JSON: {getattr(e, "msg", e)}.'
      ) from None


def _of_value(value: Any, where: str) -> Document:
  if isinstance(value, Document):
    return value
  if isinstance(value, str):
    return _document({'text': value}, where)
  if isinstance(value, (list, tuple)):
    return _document({'messages': list(value)}, where)
  return _document(value, where)


def _document(value: Any, where: str) -> Document:
  """One object of a `.jsonl` as a document."""
  if not isinstance(value, Mapping):
    raise config.ConfigError(
      f'{where} is a {type(value).__name__}; it must be an object with '
      f'{_FIELDS}.'
    )
  if 'messages' in value:
    return Document(messages=_messages(value['messages'], where))
  if 'text' in value:
    _check_strings(value, ('text',), where)
    return Document(text=value['text'])
  if 'question' not in value and 'answer' not in value:
    raise config.ConfigError(
      f'{where} has none of the fields {_FIELDS}; it has '
      f'{", ".join(map(repr, value)) or "no field"}.'
    )
  asked = question(value, where)
  return Document(
    messages=(
      {'role': 'user', 'content': asked.question},
      {'role': 'assistant', 'content': asked.answer},
    )
  )


def _messages(value: Any, where: str) -> tuple[chat.Message, ...]:
  if not isinstance(value, Sequence) or isinstance(value, str) or not value:
    raise config.ConfigError(
      f'{where}: "messages" must be a list of {{"role", "content"}}, of at '
      'least one.'
    )
  for i, message in enumerate(value):
    place = f'{where}, message {i}'
    if not isinstance(message, Mapping):
      raise config.ConfigError(
        f'{place} is a {type(message).__name__}; it must have "role" and '
        '"content".'
      )
    _check_strings(message, ('role', 'content'), place)
    config.lookup(message['role'], dict.fromkeys(chat.ROLES), f'{place}, role')
  return tuple(dict(message) for message in value)


def _check_strings(
  value: Mapping[str, Any], names: Sequence[str], where: str
) -> None:
  """Refuses a mapping in which one of the fields is not a text."""
  for name in names:
    if name not in value:
      raise config.ConfigError(f'{where} has no {name!r}.')
    if not isinstance(value[name], str) or not value[name].strip():
      raise config.ConfigError(f'{where}: {name!r} must be a text, not empty.')
    try:
      value[name].encode('utf-8')
    except UnicodeEncodeError as e:  # JSON can spell half of a pair.
      raise config.ConfigError(f'{where}: {name!r} is no text: {e}.') from None
