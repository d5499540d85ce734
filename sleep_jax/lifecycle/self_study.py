"""Self-study: a model talks to itself about a text it has before it.

Cartridges' training data (arXiv 2506.06266, section 4): a seed prompt asks for
a message about a piece of the text, the model writes it (A) and answers it (B),
both with the piece in context. What the model would have predicted there is
what a prefix learns to make it predict without the piece.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import contexts
from sleep_jax.data import tokenizers
from sleep_jax.inference import sampling
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib

# One of each of the paper's five kinds.
SEEDS = (
  'Rewrite the facts of this text as a list, one fact on each line.',
  'Summarize this text in a few sentences that name people, places and values.',
  'Ask one question about this text that can be answered without seeing it '
  'again. Write the question alone.',
  'Name one task for which somebody would need this text, and write what they '
  'would ask. Write the request alone.',
  'Write a creative question that connects two things in this text. Write the '
  'question alone.',
)
_ANSWER = 'Answer from this text.'


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A text that is predicted with a context, and is to be without.

  teacher: ids before the answer, the context among them.
  student: ids before the answer, without it.
  shared: how many of the last ids before the answer are learnt too; they are
    the same in both.
  answer: ids.
  """

  teacher: contexts.TokenIds
  student: contexts.TokenIds
  shared: int
  answer: contexts.TokenIds


class Rows(at.Pytree):
  """What a prefix learns from; position t predicts token t + 1.

  tokens: padded on the right.
  weight: of each position's prediction.
  ids, logprobs: the teacher's likeliest tokens; None: the next token is right.
  """

  tokens: at.Int[jax.Array, 'N T']
  weight: at.Float[jax.Array, 'N T']
  ids: at.Int[jax.Array, 'N T K'] | None = None
  logprobs: at.Float[jax.Array, 'N T K'] | None = None


@dataclasses.dataclass(frozen=True)
class SelfStudy:
  """How a model talks about a text.

  model: with its adapter merged.
  length: tokens of the longest message.
  """

  model: model_lib.Model
  tokenizer: tokenizers.Tokenizer
  costs: costs_lib.CostTracker
  length: int
  temperature: float

  def about_prompts(
    self, prompts: list[contexts.TokenIds], rng: at.Key
  ) -> list[Conversation]:
    """Continuations of prompts, to be predicted from BOS alone."""
    answers = self._write(prompts, rng, self.temperature)
    bos = [self.tokenizer.bos]
    return [
      Conversation(prompt, bos, 0, answer)
      for prompt, answer in zip(prompts, answers, strict=True)
      if answer and answer[0] != self.tokenizer.stop
    ]

  def about_pieces(
    self, pieces: list[contexts.TokenIds], rng: at.Key
  ) -> list[Conversation]:
    """A message about each piece and its answer, by the chat template.

    Raises:
      ConfigError: the tokenizer has no chat template.
    """
    chat = tokenizers.chat_of(self.tokenizer)
    decode = self.tokenizer.decode
    texts = [decode(piece).strip() for piece in pieces]
    asked = self._write(
      [
        chat.prompt(f'{text}\n\n{SEEDS[i % len(SEEDS)]}')
        for i, text in enumerate(texts)
      ],
      rng,
      self.temperature,
    )
    stop = self.tokenizer.stop
    questions = [decode([t for t in x if t != stop]).strip() for x in asked]
    pairs = [(t, q) for t, q in zip(texts, questions, strict=True) if q]
    teachers = [chat.prompt(f'{t}\n\n{_ANSWER}\n\n{q}') for t, q in pairs]
    answers = self._write(teachers, rng, 0.0)
    out = []
    for (_, question), teacher, answer in zip(
      pairs, teachers, answers, strict=True
    ):
      student = chat.prompt(question)
      shared = _common_end(teacher, student)
      out.append(Conversation(teacher, student, shared, answer))
    return out

  def _write(
    self, prompts: list[contexts.TokenIds], rng: at.Key, temperature: float
  ) -> list[contexts.TokenIds]:
    """What follows each prompt; one that ended has the stop token as last."""
    if not prompts:
      return []
    sampler = sampling.SamplerConfig(
      max_new=self.length,
      temperature=temperature,
      stop=self.tokenizer.stop,
      pad=self.tokenizer.pad,
    )
    with self.costs.phase('rollout') as cost:
      written = sampling.complete(self.model, prompts, rng, sampler)
      cost.add_forward(sum(map(len, prompts)) + sum(map(len, written)))
    return written

  def label(
    self, conversations: list[Conversation], top_k: int, rows: int
  ) -> Rows:
    """What the model predicts with the context, as rows without it.

    Args:
      conversations: N of them.
      top_k: tokens of each prediction that are kept.
      rows: of a forward pass.

    Returns:
      As many rows, of one length.
    """
    size = len(conversations)
    before, after = (
      _padded(
        [prompt + c.answer for prompt, c in zip(prompts, conversations)],
        -(-size // rows) * rows,
        self.tokenizer.pad,
      )
      for prompts in (
        [c.teacher for c in conversations],
        [c.student for c in conversations],
      )
    )
    offset = np.zeros(len(after), np.int32)
    weight = np.zeros(after.shape, np.float32)
    for i, c in enumerate(conversations):
      offset[i] = len(c.teacher) - len(c.student)
      first, last = len(c.student) - c.shared, len(c.student) + len(c.answer)
      weight[i, first - 1 : last - 1] = 1.0
    parts = []
    with self.costs.phase('teacher') as cost:
      for i in range(0, len(after), rows):
        part = slice(i, i + rows)
        place = np.arange(after.shape[1]) + offset[part, None]
        predicted = _predictions(
          self.model, jnp.asarray(before[part]), jnp.asarray(place), top_k
        )
        parts.append(predicted)
      cost.add_forward(before.size)
    ids, logprobs = (np.concatenate(x)[:size] for x in zip(*parts, strict=True))
    parts = after[:size], weight[:size], ids, logprobs
    return Rows(*map(jnp.asarray, parts))


@functools.partial(jax.jit, static_argnums=3)
def _predictions(
  model: model_lib.Model, tokens: jax.Array, place: jax.Array, top_k: int
) -> tuple[jax.Array, jax.Array]:
  """The likeliest tokens after `place` `[B, T]`, and their log-probability."""
  hidden = model.forward(tokens).hidden
  place = jnp.minimum(place, tokens.shape[1] - 1)[..., None]
  hidden = jnp.take_along_axis(hidden, place, axis=1)

  def top(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(logits), top_k)
    return ids, logprobs

  # Row by row: logits of a large vocabulary would not fit at once.
  return jax.lax.map(
    lambda h: top((h @ model.unembedding().T).astype(jnp.float32)), hidden
  )


def _common_end(a: list[int], b: list[int]) -> int:
  """How many last ids are the same, and of `b` not all."""
  most = min(len(a), len(b) - 1)
  return next((i for i in range(most) if a[-1 - i] != b[-1 - i]), most)


def _padded(rows: list[list[int]], size: int, pad: int) -> np.ndarray:
  """`[size, T]`, padded on the right, T a multiple of 16."""
  length = -(-max(map(len, rows)) // 16) * 16
  out = np.full((size, length), pad, np.int32)
  for i, row in enumerate(rows):
    out[i, : len(row)] = row
  return out
