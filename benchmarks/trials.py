"""16 dream trials in one batch, against one at a time here and in peft."""

import functools
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
from sleep_jax.models import memory as memory_lib

_LEARNING_RATE = 1e-3


def run(plan: timing.Plan) -> list[dict[str, Any]]:
  """A model of the quickstart's size; SEAL's batch of one row, and of four."""
  shape = plan.choose((64, 2, 4, 4, 256, 168), (16, 2, 4, 2, 24, 64))
  instances, rows, length = plan.choose((16, 8, 32), (2, 2, 4))
  cfg = llama.ours(*shape)
  model = llama.theirs(cfg)
  params = jax.tree.map(jnp.asarray, llama.params(cfg, model))
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, cfg.vocab, (instances, rows, length), np.int32)
  return [
    {'bench': 'trials', 'instances': instances, 'rows': rows}
    | _compare(plan, cfg, params, model, tokens, batch)
    for batch in plan.choose((1, 4), (1,))
  ]


def _compare(plan, cfg, params, model, tokens, batch) -> dict[str, Any]:
  ours = Ours(cfg, params, tokens, batch)
  theirs = Theirs(model, ours)
  sides = {
    'sleep_jax': ours.batched,
    'sleep_jax, one by one': ours.one_by_one,
    'sleep_jax, one by one and step by step': ours.step_by_step,
    'peft, one by one': theirs.one_by_one,
  }
  # B of the last layer's value projection, which depends on all steps.
  results = {name: side() for name, side in sides.items()}
  errors = {
    name: float(np.abs(other - results['sleep_jax']).max())
    for name, other in results.items()
  }
  if max(errors.values()) > 0.05 * np.abs(results['sleep_jax']).max():
    raise AssertionError(f'trials: the trained weights differ: {errors}.')
  seconds = timing.interleave(sides, plan)
  return {
    'batch': batch,
    'length': tokens.shape[2],
    'steps': ours.steps,
    'parity': {'farthest weight': errors},
    'seconds': seconds,
    'speedup': timing.speedup(seconds),
  }


class Ours:
  """The same trials by `trials.train`, in calls of different size."""

  def __init__(self, cfg, params, tokens, batch):
    self._cfg, self._params = cfg, params
    self._memory = memory_lib.init_memory(cfg)
    self._step = jax.jit(functools.partial(trials.train_step, cfg))
    trial_cfg = dreaming_config.TrialConfig(
      epochs=10, batch=batch, learning_rate=_LEARNING_RATE
    )
    lora_cfg = lora.LoraConfig(rank=4, alpha=8.0, targets=('q', 'v'))
    rows = [
      contexts.TrainingRows(x, np.ones(x.shape, np.float32), trial_cfg.epochs)
      for x in tokens
    ]
    self.adapters = jax.vmap(
      lambda key: lora.init_adapter(cfg, lora_cfg, params, key)
    )(jax.random.split(jax.random.key(1), len(rows)))
    self.steps = trials.num_steps(trial_cfg, rows[0])
    order, rate = trials.schedules(
      trial_cfg, rows, len(rows), np.random.default_rng(0)
    )
    self.order, self.rate = order[:, : self.steps], rate[:, : self.steps]
    self.tokens = tokens
    self._all = jax.tree.map(
      jnp.asarray,
      (
        self.adapters,
        *trials.stack_rows(rows, len(rows), 0),
        self.order,
        self.rate,
      ),
    )
    self._single = [
      jax.tree.map(lambda x, i=i: x[i : i + 1], self._all)
      for i in range(len(rows))
    ]

  def _train(self, arguments) -> np.ndarray:
    tuned, _ = trials.train_instances(
      self._cfg, self._params, self._memory, *arguments
    )
    return np.asarray(tuned.pairs['attention']['v'].b[:, -1])

  def batched(self) -> np.ndarray:
    """All trials in one call."""
    return self._train(self._all)

  def one_by_one(self) -> np.ndarray:
    """One call per trial."""
    return np.concatenate([self._train(trial) for trial in self._single])

  def step_by_step(self) -> np.ndarray:
    """One call per trial and optimizer step."""
    weights = []
    for trial in self._single:
      adapter, *rest = jax.tree.map(lambda x: x[0], trial)
      tokens, weight, order, rate = map(np.asarray, rest)
      state = trials.OPTIMIZER.init(adapter)
      for batch, step_rate in zip(order, rate, strict=True):
        adapter, state = self._step(
          self._params,
          self._memory,
          adapter,
          state,
          tokens,
          weight,
          batch,
          step_rate,
        )
      weights.append(np.asarray(adapter.pairs['attention']['v'].b[-1]))
    return np.stack(weights)


class Theirs:
  """peft's LoRA with the same model, initial A and rows."""

  def __init__(self, model, ours):
    import peft

    lora_cfg = peft.LoraConfig(
      r=4, lora_alpha=8, lora_dropout=0.0, target_modules=['q_proj', 'v_proj']
    )
    self._ours, self._model = ours, peft.get_peft_model(model, lora_cfg)
    self._weights = dict(self._model.named_parameters())
    self._trained = [w for w in self._weights.values() if w.requires_grad]

  def _weight(self, layer: int, target: str, side: str) -> Any:
    return self._weights[
      f'base_model.model.model.layers.{layer}.self_attn.{target}_proj.'
      f'lora_{side}.default.weight'
    ]

  def _reset(self, instance: int) -> None:
    import torch

    with torch.no_grad():
      for target in ('q', 'v'):
        pair = self._ours.adapters.pairs['attention'][target]
        for layer, a in enumerate(np.array(pair.a[instance])):
          self._weight(layer, target, 'A').copy_(torch.from_numpy(a.T))
          self._weight(layer, target, 'B').zero_()

  def one_by_one(self) -> np.ndarray:
    import torch

    weights, ours = [], self._ours
    last = ours.adapters.pairs['attention']['v'].a.shape[1] - 1
    for i, rows in enumerate(ours.tokens):
      self._reset(i)
      optimizer = torch.optim.Adam(self._trained, lr=_LEARNING_RATE)
      for order, rate in zip(ours.order[i], ours.rate[i], strict=True):
        optimizer.param_groups[0]['lr'] = float(rate)
        ids = torch.from_numpy(rows[order]).long()
        optimizer.zero_grad()
        self._model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        optimizer.step()
      weights.append(self._weight(last, 'v', 'B').detach().numpy().T.copy())
    return np.stack(weights)
