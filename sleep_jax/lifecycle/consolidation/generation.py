"""Documents that a model makes up: from BOS, or from an empty frame.

From BOS alone an instruct model writes web text. With the chat template up to
the user's turn it makes up a question and answers it (Magpie, arXiv
2406.08464), and with a frame of the day's documents one of their kind. Frames
have no content, so none of these is outside data.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import padding
from sleep_jax.data import tokenizers
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding

_ROWS = 128  # Documents generated at a time from a frame; bounds the cache.


class Documents(NamedTuple):
  """Generated documents, right-padded.

  starts: columns before the first token that the model chose.
  """

  tokens: np.ndarray  # [N, T]
  lengths: np.ndarray  # [N]
  starts: np.ndarray  # [N]


def frames(
  cfg: consolidation_config.SeedingConfig,
  tokenizer: tokenizers.Tokenizer,
  day: tuple[experience_lib.Frame, ...],
) -> list[tuple[experience_lib.Frame, float]]:
  """The frames to generate from, each with its share of the documents.

  Args:
    cfg: `chat_dreams` and `day_dreams`; the rest begins with BOS.
    tokenizer: gives BOS and the chat template.
    day: frames of the documents that the life has read; if there are none,
      their share goes to BOS.
  """
  day_share = cfg.day_dreams if day else 0.0
  shares = [(frame, day_share / len(day)) for frame in day]
  if cfg.chat_dreams:
    chat = tokenizers.chat_of(tokenizer).frame(tokenizer.stop)
    shares.append((chat, cfg.chat_dreams))
  bos: experience_lib.Frame = ((tokenizer.bos,),)
  shares.insert(0, (bos, 1.0 - cfg.chat_dreams - day_share))
  return [(frame, share) for frame, share in shares if share > 1e-6]


def sample(
  cfg: consolidation_config.SeedingConfig,
  model: model_lib.Model,
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  rng: at.Key,
  day: tuple[experience_lib.Frame, ...] = (),
) -> Documents:
  """`rows` documents of at most `cfg.dream_length` tokens.

  Args:
    cfg: how they are sampled, and the shares of the ways to begin.
    model: who writes them.
    tokenizer: gives BOS, the chat template, and the token that ends a document.
    rows: N.
    rng: random key.
    day: frames of the documents that the life has read.
  """
  shares = frames(cfg, tokenizer, day)
  ends = np.rint(np.cumsum([share for _, share in shares]) * rows).astype(int)
  sizes = np.diff(ends, prepend=0)
  bos = 0
  if len(shares[0][0]) == len(shares[0][0][0]) == 1:
    bos, (_, *shares), (_, *sizes) = int(sizes[0]), shares, sizes
  parts = [_from_bos(cfg, model, tokenizer, bos, rng)] if bos else []
  # Frames with as many gaps are filled in one batch.
  wanted: dict[int, list[experience_lib.Frame]] = {}
  for (frame, _), size in zip(shares, sizes, strict=True):
    wanted.setdefault(len(frame), []).extend([frame] * int(size))
  for gaps, of_rows in wanted.items():
    key = jax.random.fold_in(rng, gaps)
    parts.append(_from_frames(cfg, model, tokenizer, of_rows, key))
  return Documents(*(np.concatenate(x) for x in zip(*parts)))


def _from_bos(
  cfg: consolidation_config.SeedingConfig,
  model: model_lib.Model,
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  rng: at.Key,
) -> Documents:
  prompts = jnp.full((rows, 1), tokenizer.bos), jnp.ones((rows,), jnp.int32)
  out = sampling.generate(
    model,
    *sharding.shard_batch(prompts, 'batch'),
    rng,
    _sampler(cfg, tokenizer, cfg.dream_length - 1, cfg.temperature),
  )
  out = sharding.fetch(out)
  bos = np.full((rows, 1), tokenizer.bos, np.int32)
  tokens = np.concatenate([bos, out.tokens], 1)
  return Documents(tokens, out.lengths + 1, np.ones(rows, int))


def _from_frames(
  cfg: consolidation_config.SeedingConfig,
  model: model_lib.Model,
  tokenizer: tokenizers.Tokenizer,
  of_rows: list[experience_lib.Frame],
  rng: at.Key,
) -> Documents:
  """Fills the gaps of each row's frame, one after the other.

  All frames have as many gaps. A document of which any gap but the last was cut
  short is dropped, and others stand for it.
  """
  rows, gaps = len(of_rows), len(of_rows[0])
  longest = max(sum(map(len, frame)) for frame in of_rows)
  gap = (cfg.dream_length - longest) // gaps
  if gap < 1:
    raise config.ConfigError(
      f'sleep.dream_length={cfg.dream_length} leaves no room in a frame of '
      f'{longest} tokens; raise it.'
    )
  size = rows if rows < _ROWS else -(-rows // _ROWS) * _ROWS
  of_rows = [of_rows[i] for i in np.arange(size) * rows // size]
  documents: list[list[int]] = [[] for _ in of_rows]
  for number in range(gaps):
    if number:
      ended = [i for i in range(size) if documents[i][-1] == tokenizer.stop]
      chosen = np.resize(ended or np.arange(size), size)
      documents = [documents[i] for i in chosen]
      of_rows = [of_rows[i] for i in chosen]
    documents = [[*d, *f[number]] for d, f in zip(documents, of_rows)]
    width = longest + number * gap
    temperature = cfg.temperature
    if number < gaps - 1 and cfg.question_temperature:
      temperature = cfg.question_temperature
    sampler = _sampler(cfg, tokenizer, gap, temperature)
    new = []
    for i in range(0, size, _ROWS):
      prompts = padding.left_pad(
        documents[i : i + _ROWS], tokenizer.pad, width=width
      )
      out = sampling.generate(
        model,
        *sharding.shard_batch(prompts, 'batch'),
        jax.random.fold_in(jax.random.fold_in(rng, number), i),
        sampler,
      )
      out = sharding.fetch(out)
      new += [x[:n].tolist() for x, n in zip(out.tokens, out.lengths)]
    documents = [d + x for d, x in zip(documents, new, strict=True)]
  if size > rows:  # Evenly, so that no frame is left out.
    kept = np.arange(rows) * size // rows
    documents = [documents[i] for i in kept]
    of_rows = [of_rows[i] for i in kept]
  tokens = np.full((rows, cfg.dream_length), tokenizer.pad, np.int32)
  for row, document in zip(tokens, documents, strict=True):
    row[: len(document)] = document
  lengths = np.array([len(document) for document in documents])
  return Documents(tokens, lengths, np.array([len(f[0]) for f in of_rows]))


def _sampler(
  cfg: consolidation_config.SeedingConfig,
  tokenizer: tokenizers.Tokenizer,
  max_new: int,
  temperature: float,
) -> sampling.SamplerConfig:
  return sampling.SamplerConfig(
    max_new=max_new,
    temperature=temperature,
    min_p=cfg.min_p,
    stop=tokenizer.stop,
    pad=tokenizer.pad,
  )
