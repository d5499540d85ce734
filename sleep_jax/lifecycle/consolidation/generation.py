"""Documents that a model makes up: from BOS, or from an empty frame.

From BOS alone an instruct model writes web text. With the chat template up to
the user's turn it makes up a question and answers it (Magpie, arXiv
2406.08464), and with a frame of the day's documents one of their kind. Frames
have no content, so none of these is outside data.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.data import padding
from sleep_jax.data import tokenizers
from sleep_jax.inference import budget
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding

_ROWS = 128  # Documents generated at a time from a frame; bounds the cache.
_COLUMNS = 8  # Prompts are padded to a multiple of so many tokens.


class Documents(NamedTuple):
  """Generated documents, right-padded.

  starts: columns before the first token that the model chose.
  last_turns: columns before the last turn; what comes before it in a frame of
    several turns is a question.
  logprobs: of the last turn as it was sampled, the mean over its tokens.
  """

  tokens: np.ndarray  # [N, T]
  lengths: np.ndarray  # [N]
  starts: np.ndarray  # [N]
  last_turns: np.ndarray  # [N]
  logprobs: np.ndarray  # [N], nats per token

  def rows(self, index: np.ndarray) -> 'Documents':
    """The documents at `index`."""
    return Documents(*(x[index] for x in self))

  def endings(self) -> list[bytes]:
    """The last turn of each, to be compared with others."""
    parts = zip(self.tokens, self.last_turns, self.lengths, strict=True)
    return [row[start:end].tobytes() for row, start, end in parts]


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

  With `cfg.oversample` above 1 they are the best of so many times as many, see
  `keep`.

  Args:
    cfg: how they are sampled, and the shares of the ways to begin.
    model: who writes them.
    tokenizer: gives BOS, the chat template, and the token that ends a document.
    rows: N.
    rng: random key.
    day: frames of the documents that the life has read.
  """
  if cfg.oversample == 1:
    return _sample(cfg, model, tokenizer, rows, rng, day)
  drafts = oversample(cfg, model, tokenizer, rows, rng, day)
  return keep(drafts, rows, tokenizer.stop, rng)


def sample_as_it_is(
  cfg: consolidation_config.SeedingConfig,
  model: model_lib.Model,
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  rng: at.Key,
  day: tuple[experience_lib.Frame, ...] = (),
) -> Documents:
  """`rows` documents at temperature 1, of which none is chosen."""
  cfg = dataclasses.replace(cfg, temperature=1.0, oversample=1)
  return sample(cfg, model, tokenizer, rows, rng, day)


def oversample(
  cfg: consolidation_config.SeedingConfig,
  model: model_lib.Model,
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  rng: at.Key,
  day: tuple[experience_lib.Frame, ...] = (),
) -> Documents:
  """What `sample` has to choose from: `cfg.oversample * rows` documents."""
  return _sample(cfg, model, tokenizer, cfg.oversample * rows, rng, day)


def keep(drafts: Documents, rows: int, stop: int, rng: at.Key) -> Documents:
  """`rows` of the drafts: whole, different, and as even as can be over endings.

  A model dreams some answers far more often than others, and of those that it
  dreams most of all it would forget the rest. Of one answer, those documents
  come first after which it was surest. Some come twice if there are too few.

  Args:
    drafts: at least one.
    rows: how many.
    stop: the token that ends a document; without it none is whole, and all
      are kept that are different.
    rng: decides between answers that have as many documents.
  """
  ends = drafts.tokens[np.arange(len(drafts.tokens)), drafts.lengths - 1]
  usable = np.flatnonzero(ends == stop)
  if not len(usable):
    usable = np.arange(len(drafts.tokens))
  first = {drafts.tokens[i].tobytes(): i for i in usable[::-1]}
  order = np.array(sorted(first.values()))
  order = order[np.argsort(-drafts.logprobs[order], kind='stable')]
  counts: dict[bytes, int] = {}
  rank, endings = np.zeros(len(order)), drafts.endings()
  for place, i in enumerate(order):
    rank[place] = counts.get(endings[i], 0)
    counts[endings[i]] = counts.get(endings[i], 0) + 1
  tie = order_lib.numpy_rng(jax.random.fold_in(rng, rows)).random(len(order))
  return drafts.rows(np.resize(order[np.lexsort((tie, rank))], rows))


def _sample(
  cfg: consolidation_config.SeedingConfig,
  model: model_lib.Model,
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  rng: at.Key,
  day: tuple[experience_lib.Frame, ...],
) -> Documents:
  """`rows` documents as they come."""
  shares = frames(cfg, tokenizer, day)
  ends = np.rint(np.cumsum([share for _, share in shares]) * rows).astype(int)
  sizes = np.diff(ends, prepend=0)
  bos = 0
  if len(shares[0][0]) == len(shares[0][0][0]) == 1:
    bos, (_, *shares), (_, *sizes) = int(sizes[0]), shares, sizes
  parts = [_from_bos(cfg, model, tokenizer, bos, rng)] if bos else []
  # Frames whose gaps end alike are filled in one batch.
  wanted: dict[tuple[int, ...], list[experience_lib.Frame]] = {}
  for (frame, _), size in zip(shares, sizes, strict=True):
    ends = experience_lib.gap_ends(frame, tokenizer.stop)
    wanted.setdefault(ends, []).extend([frame] * int(size))
  for ends, of_rows in wanted.items():
    if of_rows:
      key = jax.random.fold_in(rng, len(ends))
      parts.append(_from_frames(cfg, model, tokenizer, of_rows, key))
  return Documents(*(np.concatenate(x) for x in zip(*parts)))


def _from_bos(
  cfg: consolidation_config.SeedingConfig,
  model: model_lib.Model,
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  rng: at.Key,
) -> Documents:
  """`rows` documents from BOS, as many at a time as a device has room for."""
  size = budget.rows_per_rollout(
    model.cfg, prompt=1, new=cfg.dream_length - 1, most=rows
  )
  if size < rows:
    parts = []
    for i in range(0, rows, size):
      key, num = jax.random.fold_in(rng, i), min(size, rows - i)
      parts.append(_from_bos(cfg, model, tokenizer, num, key))
    return Documents(*(np.concatenate(x) for x in zip(*parts)))
  prompts = jnp.full((rows, 1), tokenizer.bos), jnp.ones((rows,), jnp.int32)
  out = sampling.generate(
    model,
    *sharding.shard_batch(prompts, 'batch'),
    rng,
    _sampler(cfg, cfg.dream_length - 1, tokenizer.stop, tokenizer.pad),
  )
  out = sharding.fetch(out)
  bos = np.full((rows, 1), tokenizer.bos, np.int32)
  tokens = np.concatenate([bos, out.tokens], 1)
  starts, logprobs = np.ones(rows, int), out.logprobs.sum(1) / out.lengths
  return Documents(tokens, out.lengths + 1, starts, starts, logprobs)


class _Draft(NamedTuple):
  """A document as far as it is written."""

  frame: experience_lib.Frame
  tokens: list[int]
  last_turn: int = 0  # Where the latest gap begins.
  logprobs: tuple[float, ...] = ()  # Of that gap's tokens, nats.


def _from_frames(
  cfg: consolidation_config.SeedingConfig,
  model: model_lib.Model,
  tokenizer: tokenizers.Tokenizer,
  of_rows: list[experience_lib.Frame],
  rng: at.Key,
) -> Documents:
  """Fills the gaps of each row's frame, one after the other.

  The gaps of all frames end alike. A document of which any gap but the last is
  empty or was cut short is dropped, and others stand for it. A gap may take
  twice its share of the room: questions are longer than answers, or shorter.
  """
  rows, ends = len(of_rows), experience_lib.gap_ends(of_rows[0], tokenizer.stop)
  longest = max(sum(map(len, frame)) for frame in of_rows)
  room = cfg.dream_length - longest
  if room < len(ends):
    raise config.ConfigError(
      f'sleep.dream_length={cfg.dream_length} leaves no room in a frame of '
      f'{longest} tokens; raise it.'
    )
  gap = min(2 * room // len(ends), room)
  size = rows if rows < _ROWS else -(-rows // _ROWS) * _ROWS
  drafts = [_Draft(of_rows[i], []) for i in np.arange(size) * rows // size]
  most = min(cfg.dream_length - 1, model.cfg.max_len - gap)
  for number in range(len(ends)):
    if number:
      drafts = _whole(drafts, ends[number - 1], most)
    temperature = cfg.temperature
    if number < len(ends) - 1 and cfg.question_temperature:
      temperature = cfg.question_temperature
    sampler = _sampler(cfg, gap, ends[number], tokenizer.pad, temperature)
    key = jax.random.fold_in(rng, number)
    width = min(longest + number * gap, most)
    drafts = _continue(model, drafts, number, width, sampler, key)
  # Evenly, so that no frame is left out.
  drafts = [drafts[i] for i in np.arange(rows) * size // rows]
  tokens = np.full((rows, cfg.dream_length), tokenizer.pad, np.int32)
  for row, draft in zip(tokens, drafts, strict=True):
    row[: len(draft.tokens)] = draft.tokens[: cfg.dream_length]
  return Documents(
    tokens,
    np.array([min(len(d.tokens), cfg.dream_length) for d in drafts]),
    np.array([len(d.frame[0]) for d in drafts]),
    np.array([d.last_turn for d in drafts]),
    np.array(
      [np.mean(d.logprobs[: cfg.dream_length - d.last_turn]) for d in drafts]
    ),
  )


def _whole(drafts: list[_Draft], end: int, most: int) -> list[_Draft]:
  """As many drafts, of those whose gap ends, is not empty and leaves room.

  If there are none, of all, cut where `most` tokens would be exceeded.
  """

  def room(draft: _Draft) -> int:
    return most - sum(map(len, draft.frame[1:]))

  def goes_on(draft: _Draft) -> bool:
    return (
      draft.tokens[-1] == end
      and len(draft.tokens) > draft.last_turn + 1
      and len(draft.tokens) <= room(draft)
    )

  chosen = [d for d in drafts if goes_on(d)]
  chosen = chosen or [d._replace(tokens=d.tokens[: room(d)]) for d in drafts]
  return [chosen[i % len(chosen)] for i in range(len(drafts))]


def _continue(
  model: model_lib.Model,
  drafts: list[_Draft],
  number: int,
  width: int,
  sampler: sampling.SamplerConfig,
  rng: at.Key,
) -> list[_Draft]:
  """Each draft with the frame's part `number` and what is written after it.

  Args:
    model: who writes.
    drafts: before the part.
    number: of the frame's parts and gaps.
    width: columns that no draft exceeds.
    sampler: how, and how much.
    rng: random key.
  """
  prompts = []
  for draft in drafts:
    part = list(draft.frame[number])
    if number and part == draft.tokens[-1:]:
      part = []  # It ended the gap before it.
    prompts.append([*draft.tokens, *part])
  # Prompts of one length go together, so that short ones are padded little.
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  longer = list(drafts)
  for start in range(0, len(order), _ROWS):
    chosen = order[start : start + _ROWS]
    columns = -(-len(prompts[chosen[-1]]) // _COLUMNS) * _COLUMNS
    rows = padding.left_pad(
      [prompts[i] for i in chosen], sampler.pad, width=min(columns, width)
    )
    batch = sharding.shard_batch(rows, 'batch')
    key = jax.random.fold_in(rng, start)
    out = sharding.fetch(sampling.generate(model, *batch, key, sampler))
    for i, new, logprobs, count in zip(
      chosen, out.tokens, out.logprobs, out.lengths, strict=True
    ):
      longer[i] = _Draft(
        drafts[i].frame,
        prompts[i] + new[:count].tolist(),
        len(prompts[i]),
        tuple(logprobs[:count].tolist()),
      )
  return longer


def _sampler(
  cfg: consolidation_config.SeedingConfig,
  max_new: int,
  stop: int,
  pad: int,
  temperature: float | None = None,
) -> sampling.SamplerConfig:
  """How a gap is filled; `temperature` stands in place of `cfg`'s."""
  return sampling.SamplerConfig(
    max_new=max_new,
    temperature=cfg.temperature if temperature is None else temperature,
    min_p=cfg.min_p,
    stop=stop,
    pad=pad,
  )
