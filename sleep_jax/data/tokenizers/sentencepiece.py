"""The tokenizer files of sentencepiece."""

import pathlib

import sentencepiece

from sleep_jax import config


class SentencePieceTokenizer:
  """A sentencepiece `.model` with BOS and EOS; EOS ends a document.

  Args:
    path: of the file.

  Raises:
    ConfigError: if it is absent, broken, or has no BOS or EOS.
  """

  def __init__(self, path: pathlib.Path | str):
    if not pathlib.Path(path).is_file():
      raise config.ConfigError(
        f'tokenizer file {str(path)!r} does not exist; train one with '
        'task.name=corpus and task.corpus=text, or correct the path.'
      )
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as e:
      raise config.ConfigError(f'{path} is no sentencepiece model: {e}') from e
    self.vocab = self._model.vocab_size()
    self.bos = self._model.bos_id()
    self.separator = self.stop = self._model.eos_id()
    if min(self.bos, self.stop) < 0:
      raise config.ConfigError(
        f'{path} has BOS {self.bos} and EOS {self.stop}, -1 meaning none; '
        'documents need both.'
      )
    # Llama 2's has no padding id; padding is masked, so any id is correct.
    self.pad = max(self._model.pad_id(), 0)

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text)

  def decode(self, tokens: list[int]) -> str:
    unknown, known = self._model.unk_id(), range(self.vocab)
    return self._model.decode(
      [int(i) if i in known else unknown for i in tokens]
    )
