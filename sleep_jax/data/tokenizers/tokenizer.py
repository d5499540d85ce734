"""The Tokenizer protocol, and the loader of tokenizer files."""

import pathlib
from typing import Protocol, runtime_checkable

from sleep_jax import config
from sleep_jax.data import assets
from sleep_jax.data import tokenizers
from sleep_jax.data import untrusted
from sleep_jax.data.datasets import catalog
from sleep_jax.data.tokenizers import huggingface as huggingface_tokenizer
from sleep_jax.data.tokenizers import llama2c as llama2c_tokenizer

# Where a checkpoint that `weights.convert` has converted keeps such files.
_CONVERTED = 'source'


@runtime_checkable
class Tokenizer(Protocol):
  """Text to token ids and back.

  vocab: ids are 0..vocab - 1.
  pad, bos: ids of padding and of the beginning of a document.
  separator: the id that ends a segment of a document: a fact, an example.
  stop: the id that ends a document; -1 = documents fill their row.
  """

  vocab: int
  pad: int
  bos: int
  separator: int
  stop: int

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without BOS and stop."""
    ...

  def decode(self, tokens: list[int]) -> str:
    """Text; accepts ids from `vocab` on, which a wider model can generate."""
    ...


def load(path: pathlib.Path | str, folder: str | None = None) -> Tokenizer:
  """A tokenizer of the format of `path`.

  Args:
    path: a sentencepiece `.model`, a llama2.c `.bin` (a file, or a name that
      `catalog` lists), or the folder of a Hugging Face checkpoint, converted
      or not (or the `tokenizer.json` in it).
    folder: the data folder, see `download.data_dir`.

  Raises:
    ConfigError: if it is none of these, or broken.
  """
  if not str(path):
    raise config.ConfigError(
      'task.tokenizer is empty, and the base has no tokenizer of its own; name '
      'one, or take a base that is the folder of a checkpoint.'
    )
  path = assets.find(str(path))
  if path.is_dir():
    converted = untrusted.member(path, _CONVERTED)
    if (converted / 'tokenizer.json').exists():
      path = converted
    return huggingface_tokenizer.HuggingFaceTokenizer(path)
  if path.name == 'tokenizer.json':
    return huggingface_tokenizer.HuggingFaceTokenizer(path.parent)
  if path.suffix == '.model':
    return tokenizers.SentencePieceTokenizer(path)
  if path.suffix == '.bin':
    content = catalog.read(str(path), folder)
    return llama2c_tokenizer.Llama2cTokenizer(content, path.name)
  raise config.ConfigError(
    f'tokenizer {str(path)!r} does not exist, or is none of: a .model of '
    'sentencepiece, a .bin of llama2.c, a folder with tokenizer.json.'
  )


def prepends_bos(tokenizer: Tokenizer) -> bool:
  """Whether BOS is a mark that opens a text, and no part of the text.

  A tokenizer may say so by an attribute of this name; one that does not opens
  every text with BOS. In a chat format BOS may be a token of the format
  (`<|im_start|>`), and a family without BOS has another in its place: there a
  row keeps the BOS that it begins with.
  """
  return getattr(tokenizer, 'prepends_bos', True)


def check_fits(tokenizer: Tokenizer, vocab: int) -> None:
  """Raises ConfigError if the tokenizer has more ids than the embedding."""
  if tokenizer.vocab > vocab:
    raise config.ConfigError(
      f'the tokenizer has {tokenizer.vocab} pieces but model.vocab={vocab}; '
      'use the tokenizer that the base was trained with, or a larger vocab.'
    )
