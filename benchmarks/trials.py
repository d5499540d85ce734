"""16 dream trials at once: against one after the other, here and in peft."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import llama
from benchmarks import timing
from sleep_jax.data import contexts
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.models import lora
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib

_RATE = 1e-3


def run(plan: timing.Plan) -> list[dict[str, Any]]:
  """A model of the quickstart's size; SEAL's batch of one row, and of four."""
  shape = plan.choose((64, 2, 4, 4, 256, 168), (16, 2, 4, 2, 24, 64))
  instances, rows, length = plan.choose((16, 8, 32), (2, 2, 4))
  cfg = llama.ours(*shape)
  opponent = llama.theirs(cfg)
  params = jax.tree.map(jnp.asarray, llama.params(cfg, opponent))
  model = model_lib.Model(cfg, params, memory_init.init_memory(cfg))
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, cfg.vocab, (instances, rows, length), np.int32)
  return [
    {'bench': 'trials', 'instances': instances, 'rows': rows}
    | _compare(plan, model, opponent, tokens, batch)
    for batch in plan.choose((1, 4), (1,))
  ]


def _compare(plan, model, opponent, tokens, batch) -> dict[str, Any]:
  ours = Ours(model, tokens, batch)
  theirs = Theirs(opponent, ours)
  sides = {
    'sleep_jax': ours.at_once,
    'sleep_jax, one by one': ours.one_by_one,
    'sleep_jax, one by one and step by step': ours.step_by_step,
    'peft, one by one': theirs.one_by_one,
  }
  # B of the last layer's value projection, which depends on all updates.
  weights = {name: side() for name, side in sides.items()}
  apart = {
    name: float(np.abs(other - weights['sleep_jax']).max())
    for name, other in weights.items()
  }
  if max(apart.values()) > 0.05 * np.abs(weights['sleep_jax']).max():
    raise AssertionError(f'trials: what was learnt differs: {apart}.')
  seconds = timing.interleave(sides, plan)
  return {
    'batch': batch,
    'length': tokens.shape[2],
    'steps': ours.steps,
    'parity': {'farthest weight': apart},
    'seconds': seconds,
    'speedup': timing.speedup(seconds),
  }


class Ours:
  """The same trials by `train_instances`, in calls of different size."""

  def __init__(self, model, tokens, batch):
    self._model = model
    self._step = jax.jit(trials.train_instance)
    cfg = dreaming_config.TrialConfig(
      epochs=10, batch=batch, learning_rate=_RATE
    )
    lora_cfg = lora.LoraConfig(rank=4, alpha=8.0, targets=('q', 'v'))
    updates = [
      contexts.TrainingRows(x, np.ones(x.shape, np.float32), cfg.epochs)
      for x in tokens
    ]
    self.adapters = jax.vmap(
      lambda key: lora.init_adapter(model.cfg, lora_cfg, model.params, key)
    )(jax.random.split(jax.random.key(1), len(updates)))
    self.steps = trials.num_steps(cfg, updates[0])
    order, rates = trials.schedules(
      cfg, updates, len(updates), np.random.default_rng(0)
    )
    self.order, self.rates = order[:, : self.steps], rates[:, : self.steps]
    self.tokens = tokens
    self._all = jax.tree.map(
      jnp.asarray,
      (
        self.adapters,
        trials.stack_rows(updates, len(updates), 0),
        (self.order, self.rates),
      ),
    )
    self._each = [
      jax.tree.map(lambda x, i=i: x[i : i + 1], self._all)
      for i in range(len(updates))
    ]

  def _train(self, instances) -> np.ndarray:
    adapters, _ = trials.train_instances(self._model, *instances)
    return np.asarray(adapters.pairs['attention']['v'].b[:, -1])

  def at_once(self) -> np.ndarray:
    return self._train(self._all)

  def one_by_one(self) -> np.ndarray:
    return np.concatenate([self._train(single) for single in self._each])

  def step_by_step(self) -> np.ndarray:
    """As a loop over jitted optimizer steps would."""
    weights = []
    for single in self._each:
      adapter, rows, steps = jax.tree.map(lambda x: x[0], single)
      rows, (order, rates) = jax.tree.map(np.asarray, (rows, steps))
      opt_state = trials.OPTIMIZER.init(adapter)
      for i in range(len(rates)):
        step = order[i : i + 1], rates[i : i + 1]
        adapter, opt_state = self._step(
          self._model, adapter, opt_state, rows, step
        )
      weights.append(np.asarray(adapter.pairs['attention']['v'].b[-1]))
    return np.stack(weights)


class Theirs:
  """peft's LoRA on the same model, from the same A, over the same rows."""

  def __init__(self, model, ours):
    import peft

    lora_cfg = peft.LoraConfig(
      r=4, lora_alpha=8, lora_dropout=0.0, target_modules=['q_proj', 'v_proj']
    )
    self._ours, self._model = ours, peft.get_peft_model(model, lora_cfg)
    self._weights = dict(self._model.named_parameters())
    self._trained = [w for w in self._weights.values() if w.requires_grad]

  def _named(self, layer: int, target: str, side: str) -> Any:
    return self._weights[
      f'base_model.model.model.layers.{layer}.self_attn.{target}_proj.'
      f'lora_{side}.default.weight'
    ]

  def _begin(self, instance: int) -> None:
    import torch

    with torch.no_grad():
      for target in ('q', 'v'):
        pair = self._ours.adapters.pairs['attention'][target]
        for layer, a in enumerate(np.array(pair.a[instance])):
          self._named(layer, target, 'A').copy_(torch.from_numpy(a.T))
          self._named(layer, target, 'B').zero_()

  def one_by_one(self) -> np.ndarray:
    import torch

    weights, ours = [], self._ours
    last = ours.adapters.pairs['attention']['v'].a.shape[1] - 1
    for i, rows in enumerate(ours.tokens):
      self._begin(i)
      optimizer = torch.optim.Adam(self._trained, lr=_RATE)
      for order, rate in zip(ours.order[i], ours.rates[i], strict=True):
        optimizer.param_groups[0]['lr'] = float(rate)
        ids = torch.from_numpy(rows[order]).long()
        optimizer.zero_grad()
        self._model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        optimizer.step()
      weights.append(self._named(last, 'v', 'B').detach().numpy().T.copy())
    return np.stack(weights)
