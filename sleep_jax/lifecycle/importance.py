"""Omega: which dreams are worth a trial (Sleep section 6, step 2).

The paper scores a dream by the gradient of its loss and leaves the rule open. A
*sketch* of a gradient is that of the B matrices of a fresh adapter: A is drawn,
so it is a random projection of the gradient of the weights it stands beside.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import config
from sleep_jax import typing as t
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import losses

_AT_ONCE = 32  # Gradients in memory at a time.


@functools.partial(jax.jit, static_argnums=0)
def gradients(
  cfg: config.ModelConfig,
  params: t.Params,
  memory: memory_lib.Memory,
  adapter: lora.Adapter,
  tokens: t.Int[jax.Array, 'N R T'],
  weight: t.Float[jax.Array, 'N R T'],
) -> tuple[t.Float[jax.Array, 'N G'], t.Float[jax.Array, 'N']]:
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
    pairs = jax.tree.leaves(grads, is_leaf=lambda x: isinstance(x, lora.Pair))
    return jnp.concatenate([pair.b.ravel() for pair in pairs]), loss

  return jax.lax.map(one, (tokens, weight), batch_size=_AT_ONCE)


def scores(
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
  return config.choose(rule, rules, 'dreaming.importance')()


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
