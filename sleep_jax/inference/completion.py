"""Completions of any number of prompts, in batches of few shapes."""

import jax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import padding
from sleep_jax.inference import sampling
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import sharding

_BATCH = 16  # Prompts at a time, at most.
_MULTIPLE = 32  # Prompts are padded to it.


def complete(
  model: model_lib.Model,
  prompts: list[list[int]],
  rng: at.Key,
  sampler: sampling.SamplerConfig,
  costs: costs_lib.CostTracker,
) -> list[list[int]]:
  """What follows each prompt, without the stop token.

  Raises:
    ConfigError: if a prompt is empty, too long for `cfg.max_len`, or has an id
      beyond `cfg.vocab`.
  """
  if not prompts or not all(prompts):
    raise config.ConfigError('a prompt is empty; ask for something.')
  sampling.check_ids(model.cfg, prompts)
  out: list[list[int]] = []
  with costs.phase('eval') as cost:
    for start in range(0, len(prompts), _BATCH):
      batch = prompts[start : start + _BATCH]
      rows = 1 << (len(batch) - 1).bit_length()
      longest = max(map(len, batch))
      room = model.cfg.max_len - sampler.max_new
      width = min(-(-longest // _MULTIPLE) * _MULTIPLE, max(room, longest))
      filled = [*batch, *[[]] * (rows - len(batch))]
      tokens, lengths = padding.left_pad(filled, sampler.pad, multiple=width)
      args = sharding.shard_batch((tokens, lengths), 'batch')
      key = jax.random.fold_in(rng, start)
      got = sharding.fetch(sampling.generate(model, *args, key, sampler))
      cost.add_forward(rows * (width + int(got.lengths.max())))
      for row, length in list(zip(got.tokens, got.lengths))[: len(batch)]:
        ids = row[:length].tolist()
        out.append(ids[:-1] if ids and ids[-1] == sampler.stop else ids)
  return out
