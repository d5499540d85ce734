"""The tokenizer files of llama2.c: byte-pair merges chosen by score."""

import functools
import re
import struct

from sleep_jax import config

_HEADER = struct.Struct('<i')  # Bytes of the longest piece.
_ENTRY = struct.Struct('<fi')  # Score and number of bytes of a piece.
_BOS, _EOS = 1, 2  # By the format's convention; 0 is the unknown piece.
_BYTE = re.compile(rb'<0x([0-9A-F]{2})>')


class Llama2cTokenizer:
  """A `tokenizer.bin`; a space is put before a text, as by sentencepiece.

  A text is split into characters (bytes, for a character that is no piece), and
  the adjacent pair with the best score is merged until no pair is a piece. In
  streams of llama2.c the next document's BOS ends a document, so `stop` is BOS.

  Args:
    content: the file.
    where: its name, for messages.

  Raises:
    ConfigError: if the file is cut short or is not of this format.
  """

  def __init__(self, content: bytes, where: str):
    pieces = _parse(content, where)
    self.vocab = len(pieces)
    self.pad, self.bos = 0, _BOS  # Nothing is encoded as the unknown piece.
    self.separator = self.stop = _BOS
    self._bytes: dict[int, int] = {}  # Byte value -> id.
    self._ids: dict[bytes, int] = {}  # Pieces that text is encoded as.
    self._text: list[bytes] = []  # Decoded text by id.
    for i, (piece, _) in enumerate(pieces):
      byte = _BYTE.fullmatch(piece)
      text = bytes([int(byte[1], 16)]) if byte else piece
      if byte:
        self._bytes[text[0]] = i
      elif i > _EOS:
        self._ids[piece] = i
      self._text.append(text if i > _EOS else b'')
    self._score = [score for _, score in pieces]
    if len(self._bytes) < 256 or b' ' not in self._ids:
      raise config.ConfigError(
        f'{where} has {len(self._bytes)} byte pieces of 256, and '
        f'{"a" if b" " in self._ids else "no"} space; it is not a tokenizer '
        'of llama2.c.'
      )
    # If no piece continues after a word's end, words are encoded separately.
    by_word = not any(re.search(rb'[^ ] ', p) for p in self._ids)
    self._unit = re.compile(' *[^ ]*' if by_word else '.*', re.DOTALL)
    self._encode_unit = functools.lru_cache(1 << 16)(self._merge)

  def encode(self, text: str) -> list[int]:
    """Ids without BOS. Time is quadratic in the longest word."""
    if not text:
      return []
    units = self._unit.findall(' ' + text)
    return [i for unit in units for i in self._encode_unit(unit)]

  def decode(self, tokens: list[int]) -> str:
    """Text without the leading space; special and unknown ids are dropped."""
    known = range(len(self._text))
    raw = b''.join(self._text[int(i)] for i in tokens if i in known)
    return raw.removeprefix(b' ').decode('utf-8', errors='replace')

  def _merge(self, text: str) -> tuple[int, ...]:
    ids = []
    for char in text:
      raw = char.encode()
      whole = self._ids.get(raw)
      ids += [self._bytes[b] for b in raw] if whole is None else [whole]
    while True:
      best = None
      for index, pair in enumerate(zip(ids, ids[1:])):
        merged = self._merger(*pair)
        # Of equal scores the leftmost.
        if merged is not None and (
          best is None or self._score[merged] > self._score[best[1]]
        ):
          best = index, merged
      if best is None:
        return tuple(ids)
      index, merged = best
      ids[index : index + 2] = [merged]

  def _merger(self, left: int, right: int) -> int | None:
    return self._ids.get(self._text[left] + self._text[right])


def _parse(content: bytes, where: str) -> list[tuple[bytes, float]]:
  """Each piece with its score."""
  pieces, end = [], _HEADER.size
  while end < len(content):
    try:
      score, size = _ENTRY.unpack_from(content, end)
    except struct.error:
      size, score = -1, 0.0
    end += _ENTRY.size + size
    if size < 0 or end > len(content):
      raise config.ConfigError(
        f'{where} is cut short, or no tokenizer of llama2.c: its piece '
        f'{len(pieces)} does not fit into {len(content)} bytes.'
      )
    pieces.append((content[end - size : end], score))
  return pieces
