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
  """A `tokenizer.bin`; text is led by a space, as sentencepiece does it.

  A text becomes characters (bytes, for a character that is no piece), and the
  neighbours whose merger has the best score are merged until none is left.
  Streams of llama2.c mark the end of a document by the next one's BOS, so
  that is what `stop` is.

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
    self._ids: dict[bytes, int] = {}  # What text may be encoded as.
    self._text: list[bytes] = []  # By id, what it is decoded to.
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
    # Where no piece goes on after a word's end, words are encoded apart.
    apart = not any(re.search(rb'[^ ] ', p) for p in self._ids)
    self._unit = re.compile(' *[^ ]*' if apart else '.*', re.DOTALL)
    self._encode_unit = functools.lru_cache(1 << 16)(self._merge)

  def encode(self, text: str) -> list[int]:
    """Ids without BOS. Time is quadratic in the longest word."""
    if not text:
      return []
    units = self._unit.findall(' ' + text)
    return [i for unit in units for i in self._encode_unit(unit)]

  def decode(self, tokens: list[int]) -> str:
    """Text without the leading space; BOS, EOS and unknown ids are silent."""
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
      for at, pair in enumerate(zip(ids, ids[1:])):
        merged = self._merger(*pair)
        # Of equal scores, the leftmost.
        if merged is not None and (
          best is None or self._score[merged] > self._score[best[1]]
        ):
          best = at, merged
      if best is None:
        return tuple(ids)
      at, merged = best
      ids[at : at + 2] = [merged]

  def _merger(self, left: int, right: int) -> int | None:
    return self._ids.get(self._text[left] + self._text[right])


def _parse(content: bytes, where: str) -> list[tuple[bytes, float]]:
  """Every piece with its score."""
  pieces, at = [], _HEADER.size
  while at < len(content):
    try:
      score, size = _ENTRY.unpack_from(content, at)
    except struct.error:
      size, score = -1, 0.0
    at += _ENTRY.size + size
    if size < 0 or at > len(content):
      raise config.ConfigError(
        f'{where} is cut short, or no tokenizer of llama2.c: its piece '
        f'{len(pieces)} does not fit into {len(content)} bytes.'
      )
    pieces.append((content[at - size : at], score))
  return pieces
