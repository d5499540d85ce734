"""Scores of given answers: teacher forcing in place of decoding."""

from collections.abc import Callable, Iterator
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import padding
from sleep_jax.inference import budget
from sleep_jax.inference import prefix as prefix_lib
from sleep_jax.inference import sampling
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.models import token_logits
from sleep_jax.runtime import sharding

EVAL_BATCH = 64  # Most prompts of a pass.
_MULTIPLE = 16  # Rows are padded to it, so that few shapes are compiled.


@functools.partial(jax.jit, static_argnums=5)
def score_batch(
  model: model_lib.Model,
  tokens_BxT: at.Int[jax.Array, 'B T'],
  lengths_B: at.Int[jax.Array, 'B'],
  is_answer_BxT: at.Bool[jax.Array, 'B T'],
  prefix: prefix_lib.Prefix | None,
  longest: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Exact match under greedy decoding, log-probability and token accuracy.

  Answers end their rows, so logits exist for the last `longest` columns alone.
  """
  rows, width = tokens_BxT.shape
  if prefix is None:
    cache, first = None, 0
  else:
    cache = cache_lib.stacked(prefix.broadcast(rows, width))
    first = prefix.length
  positions = positions_lib.left_padded_positions(lengths_B, width, first)
  out = model.forward(tokens_BxT, positions=positions, cache=cache)
  columns = min(longest, width - 1)
  hidden = out.hidden[:, -1 - columns : -1]
  target, is_answer = tokens_BxT[:, -columns:], is_answer_BxT[:, -columns:]

  def of_target(
    logits: jax.Array, target: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    logp = jax.nn.log_softmax(logits)
    logp = jnp.take_along_axis(logp, target[..., None], axis=-1)[..., 0]
    return logp, logits.argmax(-1) == target

  logp, is_top = token_logits.map_tokens(
    of_target, hidden, model.unembedding(), target
  )
  hit = is_top & is_answer
  hits, length = hit.sum(axis=1), is_answer.sum(axis=1)
  return (
    hits == length,
    (logp * is_answer).sum(axis=1),
    hits / jnp.maximum(length, 1),
  )


def score(
  model: model_lib.Model,
  prompts: list[list[int]],
  answers: list[list[int]],
  *,
  pad: int,
  costs: costs_lib.CostTracker,
  prefix: prefix_lib.Prefix | None = None,
) -> experience_lib.Response:
  """Scores answers in one forward pass per prompt.

  Greedy decoding produces an answer exactly when, fed the answer itself, the
  model's argmax is the answer's next token at every step; so exact match needs
  no decoding.

  Args:
    model: who is asked.
    prompts: token ids.
    answers: token ids, one answer a prompt.
    pad: the token that fills rows.
    costs: where the passes are written down, in phase `eval`.
    prefix: what stands before every prompt, see `prefix.prefill`.

  Raises:
    ConfigError: if a prompt or an answer has an id beyond `cfg.vocab`.
  """
  exact = np.zeros(len(prompts), bool)
  logprob, accuracy = np.zeros((2, len(prompts)), np.float32)
  rows = [p + a for p, a in zip(prompts, answers, strict=True)]
  sampling.check_ids(model.cfg, rows)
  longest = -(-max(1, *map(len, answers), 1) // _MULTIPLE) * _MULTIPLE
  order = np.argsort([len(row) for row in rows], kind='stable')
  most, before = EVAL_BATCH, 0
  if prefix is not None:
    most, before = prefix.batch_size(most), int(prefix.length)
  limits = functools.partial(
    budget.rows_per_pass, model.cfg, columns=longest, before=before
  )
  with costs.phase('eval') as cost:
    for part, size in _batches([len(rows[i]) for i in order], most, limits):
      index = order[part]
      tokens, lengths = padding.left_pad(
        [rows[j] for j in index], pad, multiple=_MULTIPLE
      )
      is_answer = np.zeros(tokens.shape, bool)
      for row, j in zip(is_answer, index, strict=True):
        row[len(row) - len(answers[j]) :] = True
      fill = size - len(index)
      batch = (
        np.pad(tokens, ((0, fill), (0, 0))),
        np.pad(lengths, (0, fill), constant_values=1),
        np.pad(is_answer, ((0, fill), (0, 0))),
      )
      scores = sharding.fetch(
        score_batch(
          model, *sharding.shard_batch(batch, 'batch'), prefix, longest
        )
      )
      for out, values in zip((exact, logprob, accuracy), scores, strict=True):
        out[index] = values[: len(index)]
      cost.add_forward(size * tokens.shape[1])
  return experience_lib.Response(exact, logprob, accuracy)


def _batches(
  widths: list[int], most: int, limit: Callable[..., int]
) -> Iterator[tuple[slice, int]]:
  """Parts of rows of ascending `widths`, and the rows that each is filled to.

  Long rows, or a large vocabulary, make smaller batches.

  Args:
    widths: tokens of each row.
    most: rows of a batch, a power of two.
    limit: of the rows that there may be, by `width` and `most`.
  """
  start = 0
  while start < len(widths):
    size = most
    while size > 1:
      width = widths[min(start + size, len(widths)) - 1]
      if limit(width=width, most=size) == size:
        break
      size //= 2
    yield slice(start, min(start + size, len(widths))), size
    start += size
