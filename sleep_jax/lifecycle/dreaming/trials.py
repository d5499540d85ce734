"""Dream trials: isolated instances, fine-tuned side by side (Sleep 6, step 3).

An instance is the model with a LoRA of its own. The instances of a batch share
every weight but that; one compiled program trains them all, and one batched
rollout asks them all. On several devices they are spread over them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sleep_jax import array_typing as at
from sleep_jax.data import contexts
from sleep_jax.data import order as order_lib
from sleep_jax.data import packing
from sleep_jax.data import padding
from sleep_jax.inference import sampling
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.lifecycle.dreaming import dreamer as dreamer_lib
from sleep_jax.models import lora
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding
from sleep_jax.training import fit
from sleep_jax.training import loss as loss_lib

# Without a learning rate: each instance's falls by a schedule of its own.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def run(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  updates: list[contexts.TrainingRows | None],
  questions: list[list[contexts.TokenIds]],
  rng: at.Key,
) -> tuple[list[list[contexts.TokenIds]], np.ndarray]:
  """Fine-tunes an isolated instance on each update, and asks it.

  Args:
    dreamer: settings of instances and of their training.
    model: what every instance begins as; it is not changed.
    updates: of each instance; None leaves it untuned.
    questions: of each instance, prompts.
    rng: random key.

  Returns:
    The completions `[instance][question]` without stop tokens, and whether
    each instance stayed finite, `[instances]`.
  """
  model = model.merged()
  updates = [None if u is None else packed(dreamer, u) for u in updates]
  completions, finite = [], []
  for start in range(0, len(updates), dreamer.trial.max_parallel):
    part = slice(start, start + dreamer.trial.max_parallel)
    answers, is_finite = _run_batch(
      dreamer,
      model,
      updates[part],
      questions[part],
      jax.random.fold_in(rng, start),
    )
    completions += answers
    finite.append(is_finite)
  return completions, np.concatenate(finite)


def _run_batch(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  updates: list[contexts.TrainingRows | None],
  questions: list[list[contexts.TokenIds]],
  rng: at.Key,
) -> tuple[list[list[contexts.TokenIds]], np.ndarray]:
  """`run` for the instances of one program."""
  instances = num_instances(len(updates))
  first = next((u for u in updates if u is not None), None)
  adapters = init_adapters(dreamer, model, instances, rng)
  finite = np.ones(instances, bool)
  if first is not None:
    empty = contexts.TrainingRows(first.tokens[:0], first.weight[:0])
    sets = [empty if u is None else u for u in updates]
    rows = stack_rows(sets, instances, dreamer.tokenizer.pad)
    steps = schedules(dreamer.trial, sets, instances, order_lib.numpy_rng(rng))
    with dreamer.costs.phase('trials') as cost:
      adapters, finite = jax.block_until_ready(
        train_instances(model, *_shard_instances((adapters, rows, steps)))
      )
      num = steps[0].shape[1]
      size = instances * num * dreamer.trial.batch * rows[0].shape[2]
      cost.add_partial_training(size, steps=num * instances)
  with dreamer.costs.phase('trials') as cost:
    completions, size = _answers(dreamer, model, adapters, questions)
    cost.add_forward(size)
  return completions, sharding.fetch(finite)[: len(updates)]


@jax.jit
def train_instances(
  model: model_lib.Model,
  adapters: lora.Adapter,
  rows: tuple[jax.Array, jax.Array],
  steps: tuple[jax.Array, jax.Array],
) -> tuple[lora.Adapter, at.Bool[jax.Array, 'I']]:
  """Trains every instance on its own rows, side by side.

  Args:
    model: shared by the instances.
    adapters: leaves `[I, ...]`.
    rows: tokens `[I, N, T]` and their weights as targets.
    steps: row numbers of every step `[I, S, B]`, -1 for none, and learning
      rates `[I, S]`.

  Returns:
    The adapters, and whether each is still finite.
  """

  def train(adapter, rows, steps):
    adapter, _ = train_instance(
      model, adapter, OPTIMIZER.init(adapter), rows, steps
    )
    leaves = jax.tree.leaves(adapter)
    return adapter, jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()

  return jax.vmap(train)(adapters, rows, steps)


def train_instance(
  model: model_lib.Model,
  adapter: lora.Adapter,
  opt_state: optax.OptState,
  rows: tuple[jax.Array, jax.Array],
  steps: tuple[jax.Array, jax.Array],
) -> tuple[lora.Adapter, optax.OptState]:
  """Optimizer steps of one instance; see `train_instances`, without its I."""
  tokens, weight = rows
  order, rates = steps

  def loss_fn(adapter, index):
    row_weight = weight[index] * (index >= 0)[:, None]
    instance = model.replace(adapter=adapter)
    loss = loss_lib.next_token_loss(instance, tokens[index], row_weight)
    return loss, None

  adapter, opt_state, _ = fit.fit(
    loss_fn, OPTIMIZER, adapter, opt_state, order, rates=rates
  )
  return adapter, opt_state


@functools.partial(jax.jit, static_argnums=4)
def answer(
  model: model_lib.Model,
  adapters: lora.Adapter,
  prompts: at.Int[jax.Array, 'I Q P'],
  lengths: at.Int[jax.Array, 'I Q'],
  sampler: sampling.SamplerConfig,
) -> tuple[at.Int[jax.Array, 'I Q M'], at.Int[jax.Array, 'I Q']]:
  """Greedy answers of every instance to its own questions, in one rollout."""

  def answer_as(adapter, prompts, lengths):
    instance = model.replace(adapter=adapter).merged()
    key = jax.random.key(0)  # Greedy: nothing is drawn.
    out = sampling.generate(instance, prompts, lengths, key, sampler)
    return out.tokens, out.lengths

  return jax.vmap(answer_as)(adapters, prompts, lengths)


def _answers(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  adapters: lora.Adapter,
  questions: list[list[contexts.TokenIds]],
) -> tuple[list[list[contexts.TokenIds]], int]:
  """Each instance's answers without stop tokens, and the tokens computed."""
  instances = len(jax.tree.leaves(adapters)[0])
  most = max(map(len, questions))
  if not most:
    return [[] for _ in questions], 0
  # Rows of length 0 fill up, and yield nothing.
  filled = [q + [[]] * (_bucket(most) - len(q)) for q in questions]
  filled += [[[]] * _bucket(most)] * (instances - len(filled))
  pad, form = dreamer.tokenizer.pad, dreamer.format
  prompts, lengths = padding.left_pad(sum(filled, []), pad)
  shape = (instances, -1)
  rows = prompts.reshape(*shape, prompts.shape[1]), lengths.reshape(shape)
  rows = sharding.shard_batch(jax.tree.map(jnp.asarray, rows), 'instances')
  sampler = sampling.SamplerConfig(
    max_new=form.max_answer, temperature=0.0, stop=form.stop, pad=pad
  )
  tokens, counts = sharding.fetch(answer(model, adapters, *rows, sampler))
  completions = [
    [
      [token for token in row[:count].tolist() if token != form.stop]
      for row, count in zip(rows[: len(asked)], row_counts)
    ]
    for rows, row_counts, asked in zip(tokens, counts, questions)
  ]
  return completions, prompts.size + tokens.size


def packed(
  dreamer: dreamer_lib.Dreamer, update: contexts.TrainingRows
) -> contexts.TrainingRows:
  """The rows that an instance trains on, by `trial.window`."""
  window = dreamer.trial.window
  if not window:
    return update
  return packing.repack(update, window, dreamer.tokenizer.pad)


def num_steps(
  cfg: dreaming_config.TrialConfig, update: contexts.TrainingRows
) -> int:
  """Optimizer steps that an update asks for."""
  per_epoch = -(-len(update.tokens) // cfg.batch)
  return (update.epochs or cfg.epochs) * per_epoch


def stack_rows(
  updates: list[contexts.TrainingRows], instances: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of all updates, `[instances, N, T]`, and their weights.

  N and T are the largest there are, or a little more: updates may differ in
  both, and few shapes are compiled. Columns in which no row has a target any
  more are left out.
  """
  rows = _bucket(max(len(u.tokens) for u in updates))
  length = -(-max(map(_last_target, updates)) // padding.MULTIPLE)
  length = _bucket(length) * padding.MULTIPLE
  tokens = np.full((instances, rows, length), pad, np.int32)
  weight = np.zeros(tokens.shape, np.float32)
  for i, update in enumerate(updates):
    n, width = update.tokens[:, :length].shape
    tokens[i, :n, :width] = update.tokens[:, :length]
    weight[i, :n, :width] = update.weight[:, :length]
  return tokens, weight


def _last_target(update: contexts.TrainingRows) -> int:
  """How many columns there are up to the last with a target, at least 1."""
  columns = np.flatnonzero(update.weight.any(axis=0))
  return 1 + int(np.max(columns, initial=0))


def schedules(
  cfg: dreaming_config.TrialConfig,
  updates: list[contexts.TrainingRows],
  instances: int,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """Which rows each step of each instance takes, and its learning rate.

  Returns:
    Row numbers `[instances, S, batch]`, -1 for none, and rates
    `[instances, S]`, which fall linearly to zero and stay there: an instance
    with fewer steps than others waits.
  """
  steps = _bucket(max(1, *(num_steps(cfg, u) for u in updates)))
  order = np.full((instances, steps, cfg.batch), -1, np.int32)
  rate = np.zeros((instances, steps), np.float32)
  for i, update in enumerate(updates):
    n, num = len(update.tokens), num_steps(cfg, update)
    for epoch in range((update.epochs or cfg.epochs) if n else 0):
      shuffled = np.full(-(-n // cfg.batch) * cfg.batch, -1)
      shuffled[:n] = rng.permutation(n)
      shuffled = shuffled.reshape(-1, cfg.batch)
      order[i, epoch * len(shuffled) :][: len(shuffled)] = shuffled
    peak = update.learning_rate or cfg.learning_rate
    rate[i, :num] = peak * (1.0 - np.arange(num) / max(num, 1))
  return order, rate


def init_adapters(
  dreamer: dreamer_lib.Dreamer,
  model: model_lib.Model,
  instances: int,
  rng: at.Key,
) -> lora.Adapter:
  """One adapter per instance; each depends on its own number alone."""
  keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(instances))
  return jax.vmap(
    lambda key: lora.init_adapter(model.cfg, dreamer.lora, model.params, key)
  )(keys)


def num_instances(updates: int) -> int:
  """Instances of the program that trains so many: the mesh divides them."""
  num_shards = sharding.num_shards('instances')
  return -(-_bucket(updates) // num_shards) * num_shards


def _bucket(n: int) -> int:
  """A size not below `n`, of few: 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
  if n <= 2:
    return max(n, 1)
  power = 1 << (n - 1).bit_length()
  return power * 3 // 4 if n <= power * 3 // 4 else power


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
