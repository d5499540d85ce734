"""Omega: which dreams are worth a trial (Sleep section 6, step 2).

The paper scores a dream by the gradient of its loss and leaves the rule open. A
*sketch* of a gradient is that of the B matrices of a fresh adapter: A is drawn,
so it is a random projection of the gradient of the weights it stands beside.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import contexts as contexts_lib
from sleep_jax.data import order as order_lib
from sleep_jax.data import padding
from sleep_jax.inference import budget
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.lifecycle.dreaming import propose as propose_lib
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.models import lora
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding
from sleep_jax.training import loss as loss_lib

_BATCH = 32  # Most gradients in a device's memory at a time,
_ROWS = 512  # and most rows of theirs.
_LOGITS = 4  # So many arrays of the logits' size does a gradient need.


def importance_scores(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  dreams: list[list[propose_lib.Dream]],
  rng: at.Key,
  rules: tuple[str, ...],
) -> dict[str, list[np.ndarray]]:
  """Omega of every dream by each rule, `{rule: [context][m]}`.

  What cannot be used has omega -inf. Tau's gradient is that of its questions
  and answers.
  """
  model = model.merged()
  lora_cfg = dataclasses.replace(
    dreamer.lora, targets=dreamer.cfg.importance_targets
  )
  adapter = lora.init_adapter(model.cfg, lora_cfg, model.params, rng)
  model = model.replace(adapter=adapter)
  sketch = functools.partial(_sketch, dreamer, model)
  flat = [d for dreams_of_context in dreams for d in dreams_of_context]
  length = next(
    (d.required_rows().tokens.shape[1] for d in flat if d.usable), 1
  )
  empty = contexts_lib.TrainingRows(
    np.zeros((1, length), np.int32), np.zeros((1, length), np.float32)
  )
  max_rows = dreamer.cfg.importance_rows
  grads, surprise = sketch(
    [
      _subsample(d.required_rows(), max_rows) if d.usable else empty
      for d in flat
    ]
  )
  pad = dreamer.tokenizer.pad
  references, _ = sketch([_eval_rows(d[0].context, pad) for d in dreams])
  omega, start = {rule: [] for rule in rules}, 0
  for i, dreams_of_context in enumerate(dreams):
    part = slice(start, start + len(dreams_of_context))
    start += len(dreams_of_context)
    usable = np.array([d.usable for d in dreams_of_context])
    for rule in rules:
      scores = score_gradients(
        rule,
        grads[part],
        surprise[part],
        references[i],
        dreamer.cfg.keep,
        order_lib.numpy_rng(jax.random.fold_in(rng, i)),
      )
      omega[rule].append(np.where(usable, scores, -np.inf))
  return omega


def _sketch(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  sets: list[contexts_lib.TrainingRows],
) -> tuple[np.ndarray, np.ndarray]:
  """Gradient sketch and loss of each set of rows."""
  tokens, weight = trials.stack_rows(sets, len(sets), dreamer.tokenizer.pad)
  with dreamer.costs.phase('teacher') as cost:
    grads = sharding.fetch(
      gradients(model, jnp.asarray(tokens), jnp.asarray(weight))
    )
    cost.add_partial_training(tokens.size, steps=0)
  return grads


def _subsample(
  rows: contexts_lib.TrainingRows, max_rows: int
) -> contexts_lib.TrainingRows:
  """At most so many rows, evenly spaced."""
  n = len(rows.tokens)
  index = np.linspace(0, n - 1, min(n, max_rows)).astype(int)
  return contexts_lib.TrainingRows(rows.tokens[index], rows.weight[index])


def _eval_rows(
  context: contexts_lib.Context, pad: int
) -> contexts_lib.TrainingRows:
  """The evaluation as rows: the questions, with the answers as targets."""
  pairs = zip(context.questions, context.answers, strict=True)
  return padding.prompt_rows(list(pairs), pad)


@jax.jit
def gradients(
  model: model_lib.Model,
  tokens: at.Int[jax.Array, 'N R T'],
  weight: at.Float[jax.Array, 'N R T'],
) -> tuple[at.Float[jax.Array, 'N G'], at.Float[jax.Array, 'N']]:
  """Gradient sketch and loss of each of N sets of R rows, in one program.

  A device computes as many sets at a time as `budget` allows, or one in several
  parts; a mesh splits the sets.

  Args:
    model: with a fresh adapter; its targets name the leaves looked at.
    tokens: rows of every set, filled up with rows that weigh nothing.
    weight: weight of every token as a target.
  """

  num_sets, num_rows, length = tokens.shape
  parts = sharding.num_shards('batch')
  rows = budget.rows_per_pass(
    model.cfg, width=length, columns=_LOGITS * length, most=_ROWS
  )
  rows = max(1, rows // parts)
  of_set = functools.partial(_gradient, model, rows)
  sets = max(1, min(_BATCH, rows // num_rows))
  if parts == 1:
    return jax.lax.map(of_set, (tokens, weight), batch_size=sets)
  sets = min(sets, -(-num_sets // parts)) * parts
  grouped = padding.groups((tokens, weight), sets)
  grouped = sharding.shard_batch(grouped, None, 'batch')
  out = jax.lax.map(jax.vmap(of_set), grouped)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_sets], out)


def _gradient(
  model: model_lib.Model,
  rows: int,
  of_set: tuple[at.Int[jax.Array, 'R T'], at.Float[jax.Array, 'R T']],
) -> tuple[at.Float[jax.Array, 'G'], at.Float[jax.Array, '']]:
  """Gradient sketch and loss of one set, at most `rows` of it at a time."""

  def loss_fn(adapter: lora.Adapter, tokens, weight) -> jax.Array:
    instance = model.replace(adapter=adapter)
    return loss_lib.next_token_loss(instance, tokens, weight)

  def targets(weight: jax.Array) -> jax.Array:
    """What the loss divides by."""
    return jnp.maximum(weight[:, 1:].sum(), 1.0)

  def add(total, part):
    share = targets(part[1]) / targets(of_set[1])
    of_part = jax.value_and_grad(loss_fn)(model.adapter, *part)
    return jax.tree.map(lambda t, x: t + share * x, total, of_part), None

  if len(of_set[0]) <= rows:
    loss, grads = jax.value_and_grad(loss_fn)(model.adapter, *of_set)
  else:
    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0.0), model.adapter))
    groups = padding.groups(of_set, rows)
    (loss, grads), _ = jax.lax.scan(add, zeros, groups)
  pairs = jax.tree.leaves(
    grads, is_leaf=lambda x: isinstance(x, lora.LowRankPair)
  )
  return jnp.concatenate([pair.b.ravel() for pair in pairs]), loss


def score_gradients(
  rule: str,
  grads: np.ndarray,
  losses_of: np.ndarray,
  reference: np.ndarray,
  keep: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Omega of the m dreams of one context, `[m]`; more is more important.

  Args:
    rule: `grad_norm`; `grad_cosine` with tau's gradient; `greats`, see there;
      `loss`, the dream's surprise; `random`.
    grads: gradient sketches `[m, G]`.
    losses_of: loss of each dream `[m]`.
    reference: tau's gradient sketch `[G]`.
    keep: how many `greats` expects to be kept.
    rng: of the rule `random`.
  """
  norms = np.linalg.norm(grads, axis=1)
  unit = grads / np.maximum(norms, 1e-12)[:, None]
  aim = reference / max(np.linalg.norm(reference), 1e-12)
  rules = {
    'grad_norm': lambda: norms,
    'grad_cosine': lambda: unit @ aim,
    'greats': lambda: greats(unit, aim, keep),
    'loss': lambda: losses_of,
    'random': lambda: rng.random(len(grads)),
  }
  return config.lookup(rule, rules, 'dreaming.importance')()


def greats(unit: np.ndarray, aim: np.ndarray, keep: int) -> np.ndarray:
  """Order of a greedy choice by gain on tau (GREATS, Wang et al. 2024).

  Each dream stands for one of `keep` equal steps along its own gradient; what a
  dream would gain is its share of tau's gradient, less what those chosen before
  have gained already (the Hessian taken as the identity).
  """
  gain, order = unit @ aim, []
  for _ in range(len(unit)):
    best = int(
      np.argmax(np.where(np.isin(range(len(unit)), order), -np.inf, gain))
    )
    order.append(best)
    gain = gain - unit @ unit[best] / keep
  rank = np.empty(len(order))
  rank[order] = np.arange(len(order))[::-1]
  return rank


def select(
  omega: np.ndarray,
  usable: np.ndarray,
  k: int,
  b: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """The k usable dreams of largest omega and b others at random, by index."""
  index = np.flatnonzero(usable & np.isfinite(omega))
  index = index[np.argsort(-omega[index], kind='stable')]
  rest = index[k:]
  return np.concatenate([index[:k], rng.permutation(rest)[:b]])
