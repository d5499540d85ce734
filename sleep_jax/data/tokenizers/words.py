"""Tokenizers with a closed vocabulary of words."""

_UNKNOWN = '<unk>'


class WordTokenizer:
  """A closed vocabulary of words, for generated tasks.

  Args:
    words: the vocabulary, without padding and BOS.
    separator: the word that ends a segment.
    stop: the word that ends a document; empty = none does.
  """

  def __init__(self, words: list[str], separator: str, stop: str = ''):
    self._words = ['<pad>', '<bos>', *words]
    self._ids = {w: i for i, w in enumerate(self._words)}
    self.vocab = len(self._words)
    self.pad, self.bos = 0, 1
    self.separator = self._ids[separator]
    self.stop = self._ids[stop] if stop else -1

  def encode(self, text: str) -> list[int]:
    """Ids of whitespace-separated words.

    Raises:
      KeyError: for a word outside the vocabulary.
    """
    return [self._ids[w] for w in text.split()]

  def decode(self, tokens: list[int]) -> str:
    known = range(self.vocab)
    return ' '.join(self._words[i] if i in known else _UNKNOWN for i in tokens)
