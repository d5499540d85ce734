"""One training step against transformers, eager and compiled."""

import collections
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import llama
from benchmarks import timing
from sleep_jax.models import flops
from sleep_jax.models import model as model_lib
from sleep_jax.training import fit

# dim, layers, heads, kv heads, hidden, vocab.
_MODELS = {
  'D256 L4': (256, 4, 8, 8, 688, 8192),
  'D512 L4': (512, 4, 8, 8, 1376, 8192),
  'D512 L8': (512, 8, 8, 8, 1376, 8192),
}
_TINY = {'D16 L2': (16, 2, 4, 2, 24, 64)}
_LEARNING_RATE = 1e-3


def run(plan: timing.Plan) -> list[dict[str, Any]]:
  """Forward, backward, clip and AdamW in float32."""
  rows, length = plan.choose((8, 256), (2, 8))
  entries = []
  for name, shape in plan.choose(_MODELS, _TINY).items():
    entry = _compare(plan, llama.ours(*shape), rows, length)
    entries.append(
      {'bench': 'train', 'model': name, 'rows': rows, 'length': length} | entry
    )
  return entries


def _compare(plan, cfg, rows, length) -> dict[str, Any]:
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, cfg.vocab, (rows, length))
  models = {'transformers, eager': llama.theirs(cfg)}
  params = llama.params(cfg, models['transformers, eager'])
  sides = {'sleep_jax': Ours(model_lib.Model(cfg, params), tokens)}
  if not plan.tiny:  # Inductor takes minutes, whatever the size.
    models['transformers, compiled'] = llama.theirs(cfg)
  for name, model in models.items():
    sides[name] = _theirs(model, tokens, compiled=name.endswith('compiled'))
  losses = {name: [side() for _ in range(3)] for name, side in sides.items()}
  for name, other in losses.items():
    # The third loss has seen two updates of every weight.
    if not np.allclose(losses['sleep_jax'], other, rtol=1e-4, atol=0):
      raise AssertionError(f'train: losses differ from {name}: {losses}.')
  seconds = timing.interleave(sides, plan)
  size = rows * length
  work = size * flops.train_flops(cfg, length)
  return {
    'parity': {'losses of three steps': losses},
    'seconds': seconds,
    'tokens_per_second': {k: size / s['median'] for k, s in seconds.items()},
    'gflops_per_second': {
      k: work / s['median'] / 1e9 for k, s in seconds.items()
    },
    'speedup': timing.speedup(seconds),
    'where_our_time_goes': sides['sleep_jax'].shares(),
  }


class Ours:
  """`fit.train_steps`, one step a call."""

  def __init__(self, model, tokens):
    self._tokens = jnp.array(tokens, jnp.int32)[None]
    self._weight = jnp.ones(self._tokens.shape)
    optimizer = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(_LEARNING_RATE, weight_decay=0.0),
    )
    self._model = jax.tree.map(jnp.array, model)
    self._opt_state = optimizer.init(self._model.params)
    self._step = fit.train_steps.lower(
      optimizer, self._model, self._opt_state, self._tokens, self._weight
    ).compile()

  def __call__(self) -> float:
    self._model, self._opt_state, loss = self._step(
      self._model, self._opt_state, self._tokens, self._weight
    )
    return float(loss[0])

  def shares(self) -> dict[str, float]:
    """Share of each kind of operation in a step, by XLA's own profile."""
    kinds = _kinds(self._step.as_text())
    spent = collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
      with jax.profiler.trace(scratch):
        self()
      (found,) = pathlib.Path(scratch).rglob('*.xplane.pb')
      for plane in jax.profiler.ProfileData.from_file(str(found)).planes:
        for line in plane.lines:
          for event in line.events:
            if event.name in kinds:
              spent[kinds[event.name]] += event.duration_ns
    total = sum(spent.values()) or 1
    return {kind: ns / total for kind, ns in spent.most_common()}


def _kinds(hlo: str) -> dict[str, str]:
  """What each instruction of a compiled program does, by its name.

  A fusion counts as a matrix product if there is one in it. Instructions that
  only wrap others (loops, calls) or move no data are left out.
  """
  fused = {}  # Of each computation, whether it holds a product.
  for block in re.split(r'\n(?=%|ENTRY)', hlo):
    fused[block.split(' ', 1)[0]] = bool(re.search(r' dot\(', block))
  kinds = {}
  for line in hlo.splitlines():
    found = re.match(r'\s+(?:ROOT )?%(\S+) = (?:\(.*?\)|\S+) ([\w-]+)\(', line)
    if not found:
      continue
    name, operation = found.groups()
    calls = re.search(r'calls=(%[\w.-]+)', line)
    if operation == 'dot' or (calls and fused.get(calls[1])):
      kinds[name] = 'matrix products'
    elif operation in ('copy', 'transpose') or 'copy' in name:
      kinds[name] = 'copies and transposes'
    elif operation == 'fusion':
      kinds[name] = 'element-wise and reductions'
    elif operation in ('reduce', 'scatter', 'sort', 'dynamic-update-slice'):
      kinds[name] = operation
  return kinds


def _theirs(model, tokens, compiled):
  import torch

  ids = torch.tensor(tokens)
  model.train()
  forward = torch.compile(model) if compiled else model
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0
  )

  def step() -> float:
    loss = forward(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())

  return step
