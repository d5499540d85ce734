"""Token ids as text, for tasks that generate ids and have no words."""


class IntegerTokenizer:
  """Text is decimal token ids, separated by spaces.

  Args:
    vocab: ids are 0..vocab - 1.
    bos: the id that begins a sequence.
    pad: the id of padding.
  """

  separator = stop = -1  # Sequences have a fixed form, and no end token.

  def __init__(self, vocab: int, bos: int, pad: int = 0):
    self.vocab, self.bos, self.pad = vocab, bos, pad

  def encode(self, text: str) -> list[int]:
    """Ids of whitespace-separated decimal numbers.

    Raises:
      ValueError: for a word that is no number.
    """
    return [int(word) for word in text.split()]

  def decode(self, tokens: list[int]) -> str:
    """The ids as decimal numbers."""
    return ' '.join(str(int(i)) for i in tokens)
