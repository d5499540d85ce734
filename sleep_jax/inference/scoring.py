"""sleep_jax.inference.scoring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import padding
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.models import transformer
from sleep_jax.runtime import sharding

_EVAL_BATCH = 64  # Prompts per pass.


@functools.partial(jax.jit, static_argnums=0)
def _score(
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory,
  tokens_BxT: jax.Array,
  lengths_B: jax.Array,
  answer_BxT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Exact match under greedy decoding, log-probability and token accuracy."""
  positions = jnp.arange(tokens_BxT.shape[1]) - (
    tokens_BxT.shape[1] - lengths_B[:, None]
  )
  positions = jnp.where(positions < 0, positions_lib.PAD_POSITION, positions)
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
  setup,
  params: at.Params,
  memory: memory_lib.Memory,
  prompts: list[list[int]],
  answers: list[list[int]],
) -> experience_lib.Response:
  """Marks answers in one forward pass per prompt.

  Greedy decoding produces an answer exactly when, fed the answer itself, the
  model's argmax is the answer's next token at every step; so nothing has to be
  decoded to know.
  """
  exact = np.zeros(len(prompts), bool)
  logprob, accuracy = np.zeros((2, len(prompts)), np.float32)
  whole = [p + a for p, a in zip(prompts, answers, strict=True)]
  order = np.argsort([len(w) for w in whole], kind='stable')
  with setup.costs.phase('eval') as account:
    for i in range(0, len(order), _EVAL_BATCH):
      index = order[i : i + _EVAL_BATCH]
      tokens, lengths = padding.left_pad(
        [whole[j] for j in index], setup.tokenizer.pad, multiple=16
      )
      asked = np.zeros(tokens.shape, bool)
      for row, j in zip(asked, index, strict=True):
        row[len(row) - len(answers[j]) :] = True
      fill = _EVAL_BATCH - len(index)
      rows = (
        np.pad(tokens, ((0, fill), (0, 0))),
        np.pad(lengths, (0, fill), constant_values=1),
        np.pad(asked, ((0, fill), (0, 0))),
      )
      marks = sharding.fetch(
        _score(
          setup.model, params, memory, *sharding.shard_batch(rows, 'batch')
        )
      )
      for out, mark in zip((exact, logprob, accuracy), marks, strict=True):
        out[index] = mark[: len(index)]
      account.add_forward(_EVAL_BATCH * tokens.shape[1])
  return experience_lib.Response(exact, logprob, accuracy)
