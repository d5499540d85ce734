"""16 dream trials at once: against one after the other, here and in peft."""

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

_RATE = 1e-3


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
    'sleep_jax': ours.at_once,
    'sleep_jax, one by one': ours.one_by_one,
    'sleep_jax, one by one and step by step': ours.step_by_step,
    'peft, one by one': theirs.one_by_one,
  }
  # B of the last layer's values, which all that went before has shaped.
  found = {name: side() for name, side in sides.items()}
  apart = {
    name: float(np.abs(other - found['sleep_jax']).max())
    for name, other in found.items()
  }
  if max(apart.values()) > 0.05 * np.abs(found['sleep_jax']).max():
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
  """The same trials by `trials.train`, in calls of different size."""

  def __init__(self, cfg, params, tokens, batch):
    self._cfg, self._params = cfg, params
    self._memory = memory_lib.init_memory(cfg)
    self._step = jax.jit(functools.partial(trials.train_step, cfg))
    how = dreaming_config.TrialConfig(
      epochs=10, batch=batch, learning_rate=_RATE
    )
    kind = lora.LoraConfig(rank=4, alpha=8.0, targets=('q', 'v'))
    edits = [
      contexts.TrainingRows(x, np.ones(x.shape, np.float32), how.epochs)
      for x in tokens
    ]
    self.adapters = jax.vmap(
      lambda key: lora.init_adapter(cfg, kind, params, key)
    )(jax.random.split(jax.random.key(1), len(edits)))
    self.steps = trials.num_steps(how, edits[0])
    order, rate = trials.schedules(
      how, edits, len(edits), np.random.default_rng(0)
    )
    self.order, self.rate = order[:, : self.steps], rate[:, : self.steps]
    self.tokens = tokens
    self._all = jax.tree.map(
      jnp.asarray,
      (
        self.adapters,
        *trials.stack_rows(edits, len(edits), 0),
        self.order,
        self.rate,
      ),
    )
    self._each = [
      jax.tree.map(lambda x, i=i: x[i : i + 1], self._all)
      for i in range(len(edits))
    ]

  def _train(self, some) -> np.ndarray:
    tuned, _ = trials.train_instances(
      self._cfg, self._params, self._memory, *some
    )
    return np.asarray(tuned.pairs['attention']['v'].b[:, -1])

  def at_once(self) -> np.ndarray:
    return self._train(self._all)

  def one_by_one(self) -> np.ndarray:
    return np.concatenate([self._train(some) for some in self._each])

  def step_by_step(self) -> np.ndarray:
    """As a loop over jitted optimizer steps would."""
    learnt = []
    for some in self._each:
      adapter, *rest = jax.tree.map(lambda x: x[0], some)
      tokens, weight, order, rate = map(np.asarray, rest)
      state = trials.OPTIMIZER.init(adapter)
      for rows, now in zip(order, rate, strict=True):
        adapter, state = self._step(
          self._params, self._memory, adapter, state, tokens, weight, rows, now
        )
      learnt.append(np.asarray(adapter.pairs['attention']['v'].b[-1]))
    return np.stack(learnt)


class Theirs:
  """peft's LoRA on the same model, from the same A, over the same rows."""

  def __init__(self, model, ours):
    import peft

    kind = peft.LoraConfig(
      r=4, lora_alpha=8, lora_dropout=0.0, target_modules=['q_proj', 'v_proj']
    )
    self._ours, self._model = ours, peft.get_peft_model(model, kind)
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

    learnt, ours = [], self._ours
    last = ours.adapters.pairs['attention']['v'].a.shape[1] - 1
    for i, rows in enumerate(ours.tokens):
      self._begin(i)
      rule = torch.optim.Adam(self._trained, lr=_RATE)
      for order, rate in zip(ours.order[i], ours.rate[i], strict=True):
        rule.param_groups[0]['lr'] = float(rate)
        ids = torch.from_numpy(rows[order]).long()
        rule.zero_grad()
        self._model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        rule.step()
      learnt.append(self._named(last, 'v', 'B').detach().numpy().T.copy())
    return np.stack(learnt)
