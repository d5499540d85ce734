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
from sleep_jax.data import contexts
from sleep_jax.data import order as order_lib
from sleep_jax.data import padding
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.lifecycle.dreaming import propose as propose_lib
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import losses
from sleep_jax.runtime import sharding

_AT_ONCE = 32  # Gradients in memory at a time.


@functools.partial(jax.jit, static_argnums=0)
def gradients(
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory,
  adapter: lora.Adapter,
  tokens: at.Int[jax.Array, 'N R T'],
  weight: at.Float[jax.Array, 'N R T'],
) -> tuple[at.Float[jax.Array, 'N G'], at.Float[jax.Array, 'N']]:
  """Gradient sketch and loss of each of N sets of R rows, in one program.

  Args:
    cfg: the model (static).
    params: backbone weights.
    memory: fast weights and experts.
    adapter: a fresh one; its targets name the leaves that are looked at.
    tokens: rows of every set, filled up with rows that weigh nothing.
    weight: weight of every token as a target.
  """

  def one(rows):
    def objective(adapter: lora.Adapter) -> jax.Array:
      out = transformer.forward(cfg, params, rows[0], memory, adapter=adapter)
      return losses.next_token_loss(out.logits, *rows)

    loss, grads = jax.value_and_grad(objective)(adapter)
    pairs = jax.tree.leaves(
      grads, is_leaf=lambda x: isinstance(x, lora.LowRankPair)
    )
    return jnp.concatenate([pair.b.ravel() for pair in pairs]), loss

  return jax.lax.map(one, (tokens, weight), batch_size=_AT_ONCE)


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


def importance_scores(
  dreamer: dreamer_lib.Dreamer,
  life: life_lib.Life,
  dreamt: list[list[propose_lib.Dream]],
  rng: at.Key,
  rules: tuple[str, ...],
) -> dict[str, list[np.ndarray]]:
  """Step 2: omega of every dream by each rule, `{rule: [context][m]}`.

  What cannot be used has omega -inf. Tau's gradient is that of its questions
  and answers.
  """
  lab = dreamer.lab(life)
  leaves = dataclasses.replace(
    dreamer.lora, targets=dreamer.how.importance_targets
  )
  adapter = lora.init_adapter(lab.cfg, leaves, lab.params, rng)

  def sketch(
    sets: list[contexts.TrainingRows],
  ) -> tuple[np.ndarray, np.ndarray]:
    rows = trials.stack_rows(sets, len(sets), lab.pad)
    with dreamer.costs.phase('teacher') as account:
      grads = sharding.fetch(
        gradients(
          lab.cfg, lab.params, lab.memory, adapter, *map(jnp.asarray, rows)
        )
      )
      account.add_partial_training(rows[0].size, steps=0)
    return grads

  flat = [d for of_one in dreamt for d in of_one]
  length = next((d.edit.tokens.shape[1] for d in flat if d.usable), 1)
  none = contexts.TrainingRows(
    np.zeros((1, length), np.int32), np.zeros((1, length), np.float32)
  )
  most = dreamer.how.importance_rows
  grads, surprise = sketch(
    [_subsample(d.edit, most) if d.usable else none for d in flat]
  )
  references, _ = sketch(
    [_eval_rows(of_one[0].context, lab.pad) for of_one in dreamt]
  )
  omega, start = {rule: [] for rule in rules}, 0
  for i, of_one in enumerate(dreamt):
    own = slice(start, start + len(of_one))
    start += len(of_one)
    usable = np.array([d.usable for d in of_one])
    for rule in rules:
      found = score_gradients(
        rule,
        grads[own],
        surprise[own],
        references[i],
        dreamer.how.keep,
        order_lib.numpy_rng(jax.random.fold_in(rng, i)),
      )
      omega[rule].append(np.where(usable, found, -np.inf))
  return omega


def _subsample(edit: contexts.TrainingRows, most: int) -> contexts.TrainingRows:
  """At most so many of an edit's rows, evenly spaced."""
  n = len(edit.tokens)
  rows = np.linspace(0, n - 1, min(n, most)).astype(int)
  return contexts.TrainingRows(edit.tokens[rows], edit.weight[rows])


def _eval_rows(context: contexts.Context, pad: int) -> contexts.TrainingRows:
  """The evaluation as rows: the questions, with the answers as targets."""
  pairs = zip(context.questions, context.answers, strict=True)
  return padding.prompt_rows(list(pairs), pad)
