"""Dream trials: isolated instances, fine-tuned all at once (Sleep 6, step 3).

An instance is the life's self with a LoRA of its own. The instances of a batch
share every weight but that; one compiled program trains them all, and one
batched rollout asks them all. On several devices they are spread over them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import order as order_lib
from sleep_jax.data import padding
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.objectives import losses
from sleep_jax.runtime import sharding

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


@dataclasses.dataclass(frozen=True)
class Lab:
  """Where trials are made: one self, never changed by them.

  cfg, params, memory: the self; a LoRA of its own is folded into `params`.
  lora, how: of an instance and of its training.
  reader: of the task.
  pad: the token that fills rows.
  ledger: where tokens, FLOPs and seconds are written down.
  """

  cfg: config.ModelConfig
  params: at.Params
  memory: memory_lib.Memory
  lora: lora.LoraConfig
  how: dreaming_config.TrialConfig
  format: contexts.SelfEditFormat
  pad: int
  costs: costs_lib.CostTracker


def num_steps(
  how: dreaming_config.TrialConfig, edit: contexts.TrainingRows
) -> int:
  """Optimizer steps that an edit asks for."""
  per_epoch = -(-len(edit.tokens) // how.batch)
  return (edit.epochs or how.epochs) * per_epoch


def _bucket(n: int) -> int:
  """A size not below `n`, of few: 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
  if n <= 2:
    return max(n, 1)
  power = 1 << (n - 1).bit_length()
  return power * 3 // 4 if n <= power * 3 // 4 else power


def stack_rows(
  edits: list[contexts.TrainingRows], instances: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of all edits, `[instances, N, T]`, and their weights.

  N and T are the largest there are: references may differ in both.
  """
  rows = _bucket(max(len(e.tokens) for e in edits))
  length = max(e.tokens.shape[1] for e in edits)
  tokens = np.full((instances, rows, length), pad, np.int32)
  weight = np.zeros(tokens.shape, np.float32)
  for i, edit in enumerate(edits):
    own = i, *map(slice, edit.tokens.shape)
    tokens[own], weight[own] = edit.tokens, edit.weight
  return tokens, weight


def schedules(
  how: dreaming_config.TrialConfig,
  edits: list[contexts.TrainingRows],
  instances: int,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """Which rows each step of each instance takes, and its learning rate.

  Returns:
    Row numbers `[instances, S, batch]`, -1 for none, and rates
    `[instances, S]`, which fall linearly to zero and stay there: an instance
    with fewer steps than others waits.
  """
  steps = _bucket(max(1, *(num_steps(how, e) for e in edits)))
  order = np.full((instances, steps, how.batch), -1, np.int32)
  rate = np.zeros((instances, steps), np.float32)
  for i, edit in enumerate(edits):
    n, own = len(edit.tokens), num_steps(how, edit)
    for epoch in range((edit.epochs or how.epochs) if n else 0):
      shuffled = np.full(-(-n // how.batch) * how.batch, -1)
      shuffled[:n] = rng.permutation(n)
      shuffled = shuffled.reshape(-1, how.batch)
      order[i, epoch * len(shuffled) :][: len(shuffled)] = shuffled
    peak = edit.learning_rate or how.learning_rate
    rate[i, :own] = peak * (1.0 - np.arange(own) / max(own, 1))
  return order, rate


def train_step(cfg, params, memory, adapter, state, tokens, weight, rows, rate):
  """One optimizer step of one instance, on the rows of those numbers."""

  def objective(adapter):
    chosen = weight[rows] * (rows >= 0)[:, None]
    out = transformer.forward(
      cfg, params, tokens[rows], memory, adapter=adapter
    )
    return losses.next_token_loss(out.logits, tokens[rows], chosen)

  update, state = OPTIMIZER.update(jax.grad(objective)(adapter), state)
  return jax.tree.map(lambda w, u: w - rate * u, adapter, update), state


@functools.partial(jax.jit, static_argnums=0)
def train_instances(
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory,
  adapters: lora.Adapter,
  tokens: at.Int[jax.Array, 'I N T'],
  weight: at.Float[jax.Array, 'I N T'],
  order: at.Int[jax.Array, 'I S B'],
  rate: at.Float[jax.Array, 'I S'],
) -> tuple[lora.Adapter, at.Bool[jax.Array, 'I']]:
  """Trains every instance on its own rows, side by side.

  Returns:
    The adapters, and whether each is still finite.
  """

  def one(adapter, tokens, weight, order, rate):
    def proceed(carry, now):
      return train_step(cfg, params, memory, *carry, tokens, weight, *now), None

    (adapter, _), _ = jax.lax.scan(
      proceed, (adapter, OPTIMIZER.init(adapter)), (order, rate)
    )
    leaves = jax.tree.leaves(adapter)
    return adapter, jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()

  return jax.vmap(one)(adapters, tokens, weight, order, rate)


@functools.partial(jax.jit, static_argnums=(0, 6))
def answer(
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory,
  adapters: lora.Adapter,
  prompts: at.Int[jax.Array, 'I Q P'],
  lengths: at.Int[jax.Array, 'I Q'],
  how: sampling.SamplerConfig,
) -> tuple[at.Int[jax.Array, 'I Q M'], at.Int[jax.Array, 'I Q']]:
  """Greedy answers of every instance to its own questions, in one rollout."""

  def one(adapter, prompts, lengths):
    folded = lora.merge(params, adapter)
    key = jax.random.key(0)  # Greedy: nothing is drawn.
    out = sampling.generate(cfg, folded, memory, prompts, lengths, key, how)
    return out.tokens, out.lengths

  return jax.vmap(one)(adapters, prompts, lengths)


def _shard_instances(tree: at.Tree) -> at.Tree:
  """Leaves `[I, ...]` over the mesh; without one, over this process's devices
  if they divide I."""
  if sharding.current():
    return sharding.shard_batch(tree, 'instances')
  local = jax.local_devices()
  if len(local) == 1 or len(jax.tree.leaves(tree)[0]) % len(local):
    return jax.tree.map(jnp.asarray, tree)
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((len(local),), ('trials',), auto, devices=local)
  spec = jax.sharding.NamedSharding(mesh, jax.P('trials'))
  return jax.device_put(tree, spec)


def init_adapters(lab: Lab, instances: int, rng: at.Key) -> lora.Adapter:
  """One adapter per instance; each depends on its own number alone."""
  keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(instances))
  return jax.vmap(
    lambda key: lora.init_adapter(lab.cfg, lab.lora, lab.params, key)
  )(keys)


def run(
  lab: Lab,
  edits: list[contexts.TrainingRows | None],
  questions: list[list[contexts.TokenIds]],
  rng: at.Key,
) -> tuple[list[list[contexts.TokenIds]], np.ndarray]:
  """Fine-tunes an isolated instance on each edit, and asks it.

  Args:
    lab: the self that is tried.
    edits: of each instance; None leaves it untuned.
    questions: of each instance, prompts.
    rng: random key.

  Returns:
    The completions `[instance][question]` without stop tokens, and whether
    each instance stayed finite, `[instances]`.
  """
  said, finite = [], []
  for start in range(0, len(edits), lab.how.max_parallel):
    part = slice(start, start + lab.how.max_parallel)
    answers, whole = _run(
      lab, edits[part], questions[part], jax.random.fold_in(rng, start)
    )
    said += answers
    finite.append(whole)
  return said, np.concatenate(finite)


def _run(lab, edits, questions, rng):
  split = sharding.num_shards('instances')
  instances = -(-_bucket(len(edits)) // split) * split
  some = next((e for e in edits if e is not None), None)
  adapters = init_adapters(lab, instances, rng)
  finite = np.ones(instances, bool)
  if some is not None:
    nothing = contexts.TrainingRows(some.tokens[:0], some.weight[:0])
    own = [nothing if e is None else e for e in edits]
    rows = stack_rows(own, instances, lab.pad)
    plan = schedules(lab.how, own, instances, order_lib.numpy_rng(rng))
    with lab.costs.phase('trials') as account:
      adapters, finite = jax.block_until_ready(
              train_instances(
                lab.cfg, lab.params, lab.memory,
                *_shard_instances((adapters, *rows, *plan)),
              )
            )  # fmt: skip
      steps = plan[0].shape[1]
      size = instances * steps * lab.how.batch * rows[0].shape[2]
      account.add_partial_training(size, steps=steps * instances)
  with lab.costs.phase('trials') as account:
    answers, size = _answers(lab, adapters, questions, instances)
    account.add_forward(size)
  return answers, sharding.fetch(finite)[: len(edits)]


def _answers(lab, adapters, questions, instances):
  most = max(map(len, questions))
  if not most:
    return [[] for _ in questions], 0
  # Rows of length 0 fill up, and say nothing.
  asked = [q + [[]] * (_bucket(most) - len(q)) for q in questions]
  asked += [[[]] * _bucket(most)] * (instances - len(asked))
  prompts, lengths = padding.left_pad(sum(asked, []), lab.pad)
  shape = (instances, -1)
  how = sampling.SamplerConfig(
    max_new=lab.format.max_answer,
    temperature=0.0,
    stop=lab.format.stop,
    pad=lab.pad,
  )
  rows = prompts.reshape(*shape, prompts.shape[1]), lengths.reshape(shape)
  rows = sharding.shard_batch(jax.tree.map(jnp.asarray, rows), 'instances')
  tokens, counts = sharding.fetch(
    answer(lab.cfg, lab.params, lab.memory, adapters, *rows, how)
  )
  said = [
    [
      [token for token in row[:n].tolist() if token != lab.format.stop]
      for row, n in zip(rows[: len(own)], ends)
    ]
    for rows, ends, own in zip(tokens, counts, questions)
  ]
  return said, prompts.size + tokens.size
