"""cartridge: a trained prefix of keys and values (arXiv 2506.06266).

The base is frozen. What is read trains the keys and values of `tokens` columns
that stand before every prompt; they begin as those of the text's first tokens.
A study makes a prefix of its own by self-study (`lifecycle.self_study`): it is
trained to predict without the text what the model predicts with it. A stream
of rows trains one prefix on the next token, which the paper finds weaker (its
section 5.3), but which a base that cannot talk can do as well.
"""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.inference import decoding
from sleep_jax.inference import prefix as prefix_lib
from sleep_jax.inference import scoring
from sleep_jax.learners import base
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import self_study
from sleep_jax.lifecycle.dreaming import study as study_lib
from sleep_jax.metrics import observation
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import finite
from sleep_jax.runtime import sharding
from sleep_jax.training import fit

_INITIAL = {'text': 0, 'random_tokens': 0, 'normal': 0}
_SEEDS = {'task': 0, 'chat': 0}
_STEPS_PER_CALL = 20
_STUDY_KEY, _INITIAL_KEY = 1, 2


@dataclasses.dataclass(frozen=True)
class CartridgeConfig:
  """The prefix, and how it is trained; rates are the paper's."""

  tokens: config.Count = 64  # p: columns of the prefix.
  # Begins as keys and values of the text's first tokens, of random tokens, or
  # drawn: the paper's controls, which lose.
  initial: str = 'text'
  learning_rate: config.Positive = 2e-2  # Of Adam, constant.
  batch: config.Count = 8  # Rows of a step.
  passes: config.Count = 1  # Over a day's rows, or a study's conversations.
  joint_passes: int = 0  # Of a study of several contexts; 0 = as many.
  # What a study talks about: the task's own prompt for dreams (task), or pieces
  # of the text by the model's chat template (chat).
  seeds: str = 'task'
  conversations: config.Count = 64  # Of each studied context.
  piece: config.Count = 512  # Most tokens of a piece; at least an eighth of it.
  message: config.Count = 64  # Tokens of the longest message.
  temperature: config.Positive = 0.6  # Of a message; its answer is greedy.
  top_k: config.Count = 20  # Tokens of a prediction that are kept.

  def __post_init__(self):
    config.lookup(self.initial, _INITIAL, 'learner_config.initial')
    config.lookup(self.seeds, _SEEDS, 'learner_config.seeds')


Layers = tuple[tuple[jax.Array, jax.Array], ...]  # Keys and values, one row.


class Cartridge(base.Learner):
  """Trains a prefix; `learner_state`: 'layers', 'opt_state', and 'read'.

  'read' is 0 before the first row: what the prefix begins as is not known yet.
  """

  name: ClassVar[str] = 'cartridge'
  Config: ClassVar[type] = CartridgeConfig

  def __init__(self, cfg: CartridgeConfig, setup: base.Setup):
    super().__init__(cfg, setup)
    self.optimizer = optax.adam(cfg.learning_rate)

  @property
  def trains_backbone(self) -> bool:
    return False

  def batch_rows(self) -> dict[str, int]:
    return {'learner_config.batch': self.cfg.batch}

  def check(self) -> None:
    super().check()
    model, cfg = self.setup.model.cfg, self.cfg
    if model.mixers:
      raise config.ConfigError(
        f'model.mixers={model.mixers}: a prefix of keys and values is for '
        'models of attention alone; take another learner than cartridge.'
      )
    if cfg.tokens >= model.max_len:
      raise config.ConfigError(
        f'learner_config.tokens={cfg.tokens} leaves no room in model.max_len='
        f'{model.max_len}; lower it.'
      )
    if cfg.top_k > model.vocab:
      raise config.ConfigError(
        f'learner_config.top_k={cfg.top_k} exceeds model.vocab={model.vocab}.'
      )

  def init(self, rng: at.Key) -> life_lib.Life:
    cache = decoding.init_decode_cache(
      self.setup.model.cfg, 1, self.cfg.tokens, None
    )
    state = {
      'layers': cache.layers,
      'opt_state': self.optimizer.init(cache.layers),
      'read': jnp.zeros((), jnp.int32),
    }
    return life_lib.init_life(self.setup.model, rng, learner_state=state)

  def wake(
    self, life: life_lib.Life, experience: experience_lib.AnyExperience
  ) -> tuple[life_lib.Life, at.Metrics]:
    if experience.contexts:  # They are studied when they are asked about.
      return life, {}
    day = experience_lib.in_memory(experience, self.name)
    state, weight = life.learner_state, day.weight
    key = jax.random.fold_in(life.rng, life.clock.nights)
    if not int(state['read']):
      text = day.tokens[weight > 0].tolist()
      layers = self._initial(life.model, text, key)
      state = state | {'layers': layers, 'read': jnp.ones((), jnp.int32)}
    rows = self_study.Rows(
      jnp.asarray(day.tokens),
      jnp.asarray(np.pad(weight[:, 1:], ((0, 0), (0, 1)))),
    )
    trained = state['layers'], state['opt_state']
    trained, loss = self._train(life.model, trained, rows, key, self.cfg.passes)
    layers, opt_state = trained
    clock = life.clock.replace(tokens=life.clock.tokens + day.tokens.size)
    state = state | {'layers': layers, 'opt_state': opt_state}
    life = life.replace(learner_state=state, clock=clock)
    return life, {'loss': float(loss.mean()), 'loss_last': float(loss[-1])}

  def respond(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    answers: list[list[int]],
  ) -> experience_lib.Response:
    """Answers behind the prefix, scored."""
    return scoring.score(
      life.model,
      prompts,
      answers,
      pad=self.setup.tokenizer.pad,
      costs=self.setup.costs,
      prefix=self.prefix(life),
    )

  def complete(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    max_new: int,
    seed: int | None = None,
  ) -> list[list[int]]:
    """Completions behind the prefix."""
    prefix = self.prefix(life)
    return self._complete(life.model, prompts, max_new, prefix, seed)

  def study(
    self, life: life_lib.Life, requests: list[contexts.StudyRequest]
  ) -> experience_lib.Answers:
    """Answers behind a prefix for each request and attempt, by self-study."""
    form, out = self.setup.required_format(self.name), []
    key = jax.random.fold_in(life.rng, life.clock.nights)
    key = jax.random.fold_in(key, _STUDY_KEY)
    for i, request in enumerate(requests):
      attempts = []
      for j in range(request.attempts):
        rng = jax.random.fold_in(jax.random.fold_in(key, i), j)
        prefix = self._studied(life, request, rng)
        completions = self._complete(
          life.model, request.questions, form.max_answer, prefix
        )
        attempts.append([[t for t in x if t != form.stop] for x in completions])
      out.append(attempts)
    return out

  def prefix(self, life: life_lib.Life) -> prefix_lib.Prefix | None:
    """What stands before every prompt; None before anything was read."""
    state = life.learner_state
    return _prefix(state['layers']) if int(state['read']) else None

  def _studied(
    self, life: life_lib.Life, request: contexts.StudyRequest, rng: at.Key
  ) -> prefix_lib.Prefix:
    """A prefix that was trained on conversations about the contexts."""
    cfg, setup = self.cfg, self.setup
    form = setup.required_format(self.name)
    rows = study_lib.context_rows(form, request)
    text = rows.tokens[rows.weight > 0].tolist()
    study = self_study.SelfStudy(
      life.model, setup.tokenizer, setup.costs, cfg.message, cfg.temperature
    )
    write_key, train_key, pieces_key = jax.random.split(rng, 3)
    count = cfg.conversations * len(request.contexts)
    if cfg.seeds == 'chat':
      pieces = self._pieces(text, count, order_lib.numpy_rng(pieces_key))
      talks = study.about_pieces(pieces, write_key)
    else:
      prompts = [c.prompt for c in request.contexts] * cfg.conversations
      talks = study.about_prompts(prompts, write_key)
    layers = self._initial(life.model, text, rng)
    if talks:
      trained = layers, self.optimizer.init(layers)
      labels = study.label(talks, cfg.top_k, cfg.batch)
      passes = cfg.passes
      if len(request.contexts) > 1 and cfg.joint_passes:
        passes = cfg.joint_passes
      (layers, _), _ = self._train(
        life.model, trained, labels, train_key, passes
      )
    return _prefix(layers)

  def _pieces(
    self, text: list[int], count: int, rng: np.random.Generator
  ) -> list[list[int]]:
    """Pieces of random place and length."""
    longest = min(self.cfg.piece, len(text))
    pieces = []
    for size in rng.integers(-(-longest // 8), longest + 1, count):
      start = rng.integers(0, len(text) - size + 1)
      pieces.append(text[start : start + size])
    return pieces

  def _initial(
    self, model: model_lib.Model, text: list[int], rng: at.Key
  ) -> Layers:
    """Keys and values that a prefix begins with."""
    size, tokenizer = self.cfg.tokens, self.setup.tokenizer
    key = jax.random.fold_in(rng, _INITIAL_KEY)
    if self.cfg.initial == 'random_tokens':
      text = (
        order_lib.numpy_rng(key).integers(0, model.cfg.vocab, size).tolist()
      )
    repeated = (text * (size // max(1, len(text)) + 1))[: size - 1]
    tokens = [tokenizer.bos, *repeated][:size]
    with self.setup.costs.phase('wake') as cost:
      prefix = prefix_lib.prefill(model.merged(), tokens, tokenizer.pad)
      cost.add_forward(size)
    layers = tuple(
      (k[..., -size:], v[..., -size:, :]) for k, v in prefix.cache.layers
    )
    if self.cfg.initial != 'normal':
      return layers
    leaves, treedef = jax.tree.flatten(layers)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, drawn)

  def _train(
    self,
    model: model_lib.Model,
    state: tuple[Layers, Any],
    rows: self_study.Rows,
    rng: at.Key,
    passes: int,
  ) -> tuple[tuple[Layers, Any], np.ndarray]:
    """All passes over the rows; the new state, and every step's loss."""
    (layers, opt_state), losses = state, []
    for index in self._steps(len(rows.tokens), rng, passes):
      batches = jax.tree.map(lambda x, i=index: jnp.asarray(x)[i], rows)
      empty = jnp.asarray(index < 0)[..., None]
      batches = batches.replace(weight=jnp.where(empty, 0.0, batches.weight))
      with self.setup.costs.phase('wake') as cost:
        layers, opt_state, loss = train_steps(
          self.optimizer,
          model,
          layers,
          opt_state,
          sharding.shard_batch(batches, None, 'batch'),
        )
        loss = jax.block_until_ready(loss)
        cost.add_partial_training(batches.tokens.size, steps=loss.size)
      finite.check_finite('wake', loss, layers)
      losses.append(np.asarray(loss))
      observation.steps({'loss': losses[-1]})
    return (layers, opt_state), np.concatenate(losses)

  def _steps(self, rows: int, rng: at.Key, passes: int) -> Iterator[np.ndarray]:
    """Numbers of rows `[K, B]`, -1 where a batch lacks one."""
    batch, order = self.cfg.batch, order_lib.numpy_rng(rng)
    size = -(-rows // batch) * batch
    orders = [
      np.pad(order.permutation(rows), (0, size - rows), constant_values=-1)
      for _ in range(passes)
    ]
    steps = np.concatenate(orders).reshape(-1, batch)
    for start in range(0, len(steps), _STEPS_PER_CALL):
      yield steps[start : start + _STEPS_PER_CALL]


def _prefix(layers: Layers) -> prefix_lib.Prefix:
  """The prefix of these keys and values, at positions from 0."""
  size = layers[0][0].shape[-1]
  cache = cache_lib.Cache(
    layers=layers,
    positions=jnp.arange(size)[None],
    end_index=jnp.asarray(size, jnp.int32),
  )
  return prefix_lib.Prefix(cache, jnp.asarray(size, jnp.int32))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def train_steps(
  optimizer: optax.GradientTransformation,
  model: model_lib.Model,
  layers: Layers,
  opt_state: Any,
  batches: self_study.Rows,
) -> tuple[Layers, Any, at.Float[jax.Array, 'K']]:
  """K steps of a prefix; its first column stays as it is, for stability.

  Args:
    optimizer: static.
    model: constant; its adapter is merged.
    layers: keys and values; donated.
    opt_state: donated.
    batches: leaves `[K, B, ...]`.

  Returns:
    The new prefix and state, and each step's loss in nats per predicted token:
    the cross-entropy against the next token, or, not renormalised, against the
    teacher's likeliest.
  """

  def loss_fn(layers: Layers, rows: self_study.Rows):
    fixed = tuple(
      (_without_first(k, 3), _without_first(v, 2)) for k, v in layers
    )
    b, t = rows.tokens.shape
    cache = cache_lib.stacked(_prefix(fixed).broadcast(b, t))
    logits = model.forward(rows.tokens, cache=cache).logits
    logp = jax.nn.log_softmax(logits)
    if rows.ids is None or rows.logprobs is None:
      target = jnp.pad(rows.tokens[:, 1:], ((0, 0), (0, 1)))[..., None]
      loss = -jnp.take_along_axis(logp, target, axis=-1)[..., 0]
    else:
      of_top = jnp.take_along_axis(logp, rows.ids, axis=-1)
      loss = -(jnp.exp(rows.logprobs) * of_top).sum(-1)
    loss = (loss * rows.weight).sum() / jnp.maximum(rows.weight.sum(), 1.0)
    return loss, loss

  return fit.fit(loss_fn, optimizer, layers, opt_state, batches)


def _without_first(x: jax.Array, axis: int) -> jax.Array:
  """`x`, whose first column gets no gradient."""
  first = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) == 0
  return jnp.where(first, jax.lax.stop_gradient(x), x)
