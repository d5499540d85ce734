"""The Learner protocol: one way to live, behind four verbs.

Every baseline stands behind it, so each is compared on the same stream, with
the same exam and the same accounts. `sleep` takes no data: its type says so.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import config
from sleep_jax import sampling
from sleep_jax import typing as t
from sleep_jax.data import contexts
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.runtime import accounts
from sleep_jax.runtime import sharding
from sleep_jax.tasks import task

Metrics = dict[str, float]

_EXAM_ROWS = 64  # Prompts per pass.


@dataclasses.dataclass(frozen=True)
class Setup:
  """What every learner is made of."""

  model: config.ModelConfig
  params: t.Params  # The pretrained base.
  tokenizer: tokenizers.Tokenizer
  wake: config.WakeConfig
  sleep: config.SeedingConfig
  finetune: config.FinetuneConfig
  ledger: accounts.Ledger
  # Of a task with contexts to dream about.
  reader: contexts.Reader | None = None
  lora: config.LoraConfig = config.LoraConfig()
  trial: config.TrialConfig = config.TrialConfig()
  dreaming: config.DreamingConfig = config.DreamingConfig()
  # Of a hybrid that sleeps by recurrence.
  recurrence: config.RecurrenceConfig = config.RecurrenceConfig()

  def __post_init__(self):
    tokenizers.check_fits(self.tokenizer, self.model.vocab)


class Learner(Protocol):
  """A way to live. Lives are values: each verb returns a new one."""

  def init(self, rng: t.Key) -> life_lib.Life: ...

  def wake(
    self, life: life_lib.Life, experience: task.Experience
  ) -> tuple[life_lib.Life, Metrics]: ...

  def sleep(self, life: life_lib.Life) -> tuple[life_lib.Life, Metrics]: ...

  def respond(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    answers: list[list[int]],
  ) -> task.Response: ...


def batches(
  experience: task.Experience, rows: int
) -> tuple[jax.Array, jax.Array]:
  """The stream in reading order, filled up to whole batches of `rows`.

  Returns:
    Tokens and weights `[N', T]`; rows that were added weigh nothing.
  """
  extra = ((0, -len(experience.tokens) % rows), (0, 0))
  return (
    jnp.asarray(np.pad(experience.tokens, extra)),
    jnp.asarray(np.pad(experience.weight, extra)),
  )


@functools.partial(jax.jit, static_argnums=0)
def _score(
  cfg: config.ModelConfig,
  params: t.Params,
  memory: memory_lib.Memory,
  tokens_BxT: jax.Array,
  lengths_B: jax.Array,
  answer_BxT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Exact match under greedy decoding, log-probability and token accuracy."""
  positions = jnp.arange(tokens_BxT.shape[1]) - (
    tokens_BxT.shape[1] - lengths_B[:, None]
  )
  positions = jnp.where(positions < 0, transformer.PAD_POSITION, positions)
  logits = transformer.forward(
    cfg, params, tokens_BxT, memory, positions=positions
  ).logits[:, :-1]
  target, asked = tokens_BxT[:, 1:], answer_BxT[:, 1:]
  logp = jax.nn.log_softmax(logits)
  logp = jnp.take_along_axis(logp, target[..., None], axis=-1)[..., 0]
  hit = (logits.argmax(-1) == target) & asked
  hits, length = hit.sum(axis=1), asked.sum(axis=1)
  return (
    hits == length,
    (logp * asked).sum(axis=1),
    hits / jnp.maximum(length, 1),
  )


def score(
  setup: Setup,
  params: t.Params,
  memory: memory_lib.Memory,
  prompts: list[list[int]],
  answers: list[list[int]],
) -> task.Response:
  """Marks answers in one forward pass per prompt.

  Greedy decoding produces an answer exactly when, fed the answer itself, the
  model's argmax is the answer's next token at every step; so nothing has to be
  decoded to know.
  """
  exact = np.zeros(len(prompts), bool)
  logprob, accuracy = np.zeros((2, len(prompts)), np.float32)
  whole = [p + a for p, a in zip(prompts, answers, strict=True)]
  order = np.argsort([len(w) for w in whole], kind='stable')
  with setup.ledger.phase('exam') as account:
    for i in range(0, len(order), _EXAM_ROWS):
      index = order[i : i + _EXAM_ROWS]
      tokens, lengths = sampling.left_pad(
        [whole[j] for j in index], setup.tokenizer.pad, multiple=16
      )
      asked = np.zeros(tokens.shape, bool)
      for row, j in zip(asked, index, strict=True):
        row[len(row) - len(answers[j]) :] = True
      fill = _EXAM_ROWS - len(index)
      rows = (
        np.pad(tokens, ((0, fill), (0, 0))),
        np.pad(lengths, (0, fill), constant_values=1),
        np.pad(asked, ((0, fill), (0, 0))),
      )
      marks = sharding.fetch(
        _score(setup.model, params, memory, *sharding.split(rows, 'batch'))
      )
      for out, mark in zip((exact, logprob, accuracy), marks, strict=True):
        out[index] = mark[: len(index)]
      account.forward(_EXAM_ROWS * tokens.shape[1])
  return task.Response(exact, logprob, accuracy)
