"""Tokenizers: one protocol, and a loader for each file format."""

from sleep_jax.data.tokenizers.chat import ChatFormat as ChatFormat
from sleep_jax.data.tokenizers.chat import chat_of as chat_of
from sleep_jax.data.tokenizers.integers import (
  IntegerTokenizer as IntegerTokenizer,
)
from sleep_jax.data.tokenizers.sentencepiece import (
  SentencePieceTokenizer as SentencePieceTokenizer,
)
from sleep_jax.data.tokenizers.tokenizer import Tokenizer as Tokenizer
from sleep_jax.data.tokenizers.tokenizer import check_fits as check_fits
from sleep_jax.data.tokenizers.tokenizer import load as load
from sleep_jax.data.tokenizers.words import WordTokenizer as WordTokenizer
