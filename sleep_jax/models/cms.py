"""The Continuum Memory System: a chain of MLP levels with grown experts.

`Sleep Eq. 1`: y = MLP^(f_k)( ... MLP^(f_1)(x)), fast to slow, each level with
its own norm and residual (the paper omits both). One code path serves k = 1,
which is a Transformer's feed-forward block, to any k.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import layers
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib

# The null choice. A gate below sigmoid(-4) = 0.018 is exactly off; between it
# and 1 gates are soft, because where a fact begins, the old and the new
# continuation are both right and the gate is the odds between them.
_MIN_ROUTER_LOGIT = -4.0


class LayerMemory(at.Pytree):
  """One level's memory in one layer (no layer axis), or stacked over layers."""

  delta: at.Tree | None
  experts: memory_lib.Expert | None
  status: jax.Array | None  # [S]
  min_gate: jax.Array | None = None  # [B, S], see `with_random_experts`.


PerLayerMemory = tuple[LayerMemory, ...]  # By level; leaves are [L, ...].


def per_layer_memory(memory: memory_lib.Memory) -> PerLayerMemory:
  """Memory as a scan over layers wants it: every leaf `[L, ...]`."""

  def convert(level: memory_lib.LevelMemory) -> LayerMemory:
    bank = level.bank
    return LayerMemory(
      delta=level.dense_change(),
      experts=bank.experts if bank else None,
      status=(
        jnp.broadcast_to(bank.status, bank.experts.bias.shape) if bank else None
      ),
    )

  return tuple(convert(level) for level in memory.levels)


def select_layer(
  per_layer: PerLayerMemory, layer: int
) -> tuple[LayerMemory, ...]:
  """What `layer` sees of a memory whose levels span the same layers."""
  return jax.tree.map(lambda leaf: leaf[layer], per_layer)


def select_rows(layer_memory: LayerMemory, ids: jax.Array) -> LayerMemory:
  """What the rows `ids` see: `min_gate` `[B, S]` is all that a row has."""
  if layer_memory.min_gate is None:
    return layer_memory
  return layer_memory.replace(min_gate=layer_memory.min_gate[ids])


def with_random_experts(
  per_layer: PerLayerMemory, rows: int, weight: float, rng: at.Key
) -> PerLayerMemory:
  """A memory under which every router also picks one random active expert.

  For a dreamer's samples (Sleep section 6, step 1). Each layer of each level
  draws one expert per row, uniformly and for the whole row, and gives it a gate
  of at least `weight`. Where no expert is active nothing changes.
  """

  def draw(i: int, layer_memory: LayerMemory) -> LayerMemory:
    if layer_memory.experts is None:
      return layer_memory
    active = layer_memory.status == memory_lib.ACTIVE
    layers, slots = active.shape
    picked = jax.random.categorical(
      jax.random.fold_in(rng, i),
      jnp.where(active, 0.0, -jnp.inf)[:, None],
      shape=(layers, rows),
    )
    one_hot = jax.nn.one_hot(picked, slots) * active[:, None]
    return layer_memory.replace(min_gate=weight * one_hot)

  return tuple(draw(i, level) for i, level in enumerate(per_layer))


def route(
  logits_BxTxS: jax.Array, status_S: jax.Array, top_k: int
) -> at.Float[jax.Array, 'B T S']:
  """Gate of every slot for every token; zero means not used.

  An active slot fires when its logit beats the null choice and is among the
  token's `top_k`. A slot that was only just unlocked stays out of the
  competition: unlocking it must not change what the others do.
  """
  active = jnp.where(status_S == memory_lib.ACTIVE, logits_BxTxS, -jnp.inf)
  fires = active > _MIN_ROUTER_LOGIT
  if top_k < logits_BxTxS.shape[-1]:
    threshold = jax.lax.top_k(active, top_k)[0][..., -1:]
    fires &= active >= threshold
  fires |= status_S == memory_lib.SEEDING
  return jnp.where(fires, jax.nn.sigmoid(logits_BxTxS), 0.0)


def apply_experts(
  layer_memory: LayerMemory, x_BxTxD: jax.Array, top_k: int
) -> tuple[jax.Array, jax.Array]:
  """Sum of the gated low-rank experts, and the router's logits `[B, T, S]`."""
  assert layer_memory.status is not None  # It comes with the experts.
  e = jax.tree.map(lambda w: w.astype(x_BxTxD.dtype), layer_memory.experts)
  logits = jnp.einsum('btd,sd->bts', x_BxTxD, e.router) + e.bias
  gate = route(logits, layer_memory.status, top_k)
  if layer_memory.min_gate is not None:
    gate = jnp.maximum(gate, layer_memory.min_gate[:, None].astype(gate.dtype))
  slots, dim, rank = e.a.shape
  # The experts of all slots side by side, as one of rank S R.
  a = e.a.swapaxes(0, 1).reshape(dim, slots * rank)
  b = e.b.reshape(slots * rank, dim)
  h = jax.nn.silu(layers.by_token(lambda x: x @ a, x_BxTxD))
  h = h.reshape(*gate.shape, rank) * gate[..., None]
  h = h.reshape(*gate.shape[:2], slots * rank)
  return layers.by_token(lambda x: x @ b, h), logits


class Level(nn.Module):
  """One CMS level: a dense SwiGLU base, its fast change, and its experts."""

  cfg: config.ModelConfig
  level: config.LevelConfig

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    layer_memory: LayerMemory | None,
    adapter: lora.Adapter | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    d, f = self.cfg.dim, self.level.hidden
    init = nn.initializers.lecun_normal()
    w = {
      'gate': self.param('gate', init, (d, f)),
      'up': self.param('up', init, (d, f)),
      'down': self.param('down', init, (f, d)),
    }
    delta = None if layer_memory is None else layer_memory.delta
    if delta is not None:
      w = jax.tree.map(jnp.add, w, delta)
    w = jax.tree.map(lambda p: p.astype(x_BxTxD.dtype), w)
    if delta is not None:
      # Else a TPU adds anew for every tile of a product that reads the sum.
      w = jax.lax.optimization_barrier(w)

    def project(x: jax.Array, matrix: str) -> jax.Array:
      y = layers.by_token(lambda x: x @ w[matrix], x)
      return lora.apply(y, adapter, self.name or '', matrix, x)

    h = jax.nn.silu(project(x_BxTxD, 'gate')) * project(x_BxTxD, 'up')
    # Else XLA computes h anew, column by column, for the gradient of `down`.
    y = project(jax.lax.optimization_barrier(h), 'down')
    if layer_memory is None or layer_memory.experts is None:
      return y, None
    expert_sum, logits = apply_experts(layer_memory, x_BxTxD, self.level.top_k)
    return y + expert_sum, logits
