"""What a model says: answers, dreams, and how well it predicts."""

from collections.abc import Sequence
import dataclasses

from absl import logging
import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import reports
from sleep_jax.data import chat as chat_lib
from sleep_jax.data import documents as documents_lib
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.inference import completion
from sleep_jax.inference import perplexity as perplexity_lib
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from sleep_jax.tasks import grading

_EVAL_LENGTH = 128  # Tokens of a row whose perplexity is measured.


@dataclasses.dataclass(frozen=True)
class Speaker:
  """A model that is asked, and that nothing changes.

  model: without adapter.
  tokenizer: of the model.
  rng: of everything that is drawn.
  costs: where the passes are written down.
  """

  model: model_lib.Model
  tokenizer: tokenizers.Tokenizer
  rng: at.Key
  costs: costs_lib.CostTracker

  def complete(
    self,
    prompts: list[list[int]],
    *,
    max_new: int,
    temperature: float = 0.0,
    seed: int = 0,
  ) -> list[str]:
    """Text after each prompt."""
    tokenizer = self.tokenizer
    sampler = sampling.SamplerConfig(
      max_new=max_new,
      temperature=temperature,
      stop=tokenizer.stop,
      pad=tokenizer.pad,
    )
    key = jax.random.fold_in(self.rng, seed)
    ids = completion.complete(self.model, prompts, key, sampler, self.costs)
    return [tokenizer.decode(x).strip() for x in ids]

  def reply(
    self,
    messages: Sequence[chat_lib.Message],
    *,
    max_new: int,
    temperature: float,
  ) -> str:
    """What the assistant says next; the oldest turns go if all do not fit.

    It is logged how many; the last turn is never cut.
    """
    form, left = chat_lib.of(self.tokenizer), list(messages)
    room = self.model.cfg.max_len - max_new
    prompt = form.prompt(left)
    while len(prompt) > room and len(left) > 2:
      left = left[2:]
      prompt = form.prompt(left)
    if len(left) < len(messages):
      logging.warning(
        'The oldest %d of %d turns are left out: the model reads %d tokens, '
        'with max_new=%d.',
        len(messages) - len(left),
        len(messages),
        self.model.cfg.max_len,
        max_new,
      )
    out = self.complete([prompt], max_new=max_new, temperature=temperature)
    return out[0]

  def documents(
    self,
    cfg: consolidation_config.SeedingConfig,
    n: int,
    frames: tuple[experience_lib.Frame, ...],
    seed: int = 0,
  ) -> generation.Documents:
    """Documents that it makes up, as a night has it."""
    key = jax.random.fold_in(self.rng, seed)
    return generation.sample(cfg, self.model, self.tokenizer, n, key, frames)

  def text(self, documents: generation.Documents) -> list[str]:
    """What was made up, without what the frames add."""
    rows = zip(documents.tokens, documents.starts, documents.lengths)
    return [
      chat_lib.turns(self.tokenizer, row[start:end].tolist())
      for row, start, end in rows
    ]

  def perplexity(
    self, documents: Sequence[documents_lib.Encoded], most_rows: int = 0
  ) -> float:
    """exp of the mean nats a token; each document is its own context.

    Args:
      documents: at least one.
      most_rows: so many rows of them, evenly spread; 0 = all.
    """
    length = min(_EVAL_LENGTH, self.model.cfg.max_len)
    rows = [
      documents_lib.pack([document], length, self.tokenizer.pad)
      for document in documents
    ]
    tokens = np.concatenate([r.tokens for r in rows])
    weight = np.concatenate([r.weight for r in rows])
    if 0 < most_rows < len(tokens):
      some = np.linspace(0, len(tokens) - 1, most_rows).astype(int)
      tokens, weight = tokens[some], weight[some]
    return perplexity_lib.perplexity(
      self.model, tokens, weight, costs=self.costs
    )

  def quiz(
    self, questions: Sequence[documents_lib.Question], max_new: int
  ) -> reports.QuizReport:
    """Greedy answers; one is right if it contains the right words."""
    form = chat_lib.of(self.tokenizer)
    answers = self.complete(
      [form.prompt(q.question) for q in questions], max_new=max_new
    )
    grade = grading.GRADERS['contains']
    right = [
      grade(q.question, q.answer, answer)
      for q, answer in zip(questions, answers, strict=True)
    ]
    return reports.QuizReport(float(np.mean(right)), answers, right)
