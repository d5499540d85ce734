"""The retention gate: how much of what a transfer has learnt is committed."""

import functools

import jax

from sleep_jax import array_typing as at
from sleep_jax.lifecycle import retention
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib

_ROWS = 64
SHARES = (1.0, 0.5, 0.25)


def commit(
  job: job_lib.SeedingJob,
  before: model_lib.Model,
  after: model_lib.Model,
  previous: memory_lib.Memory,
  rng: at.Key,
) -> tuple[model_lib.Model, float, float]:
  """The largest share of what was learnt that keeps what the past generates.

  Documents of the model as it was before this day may lose at most
  `sleep.retention_margin` nats per token; where the whole of what the target
  has learnt loses more, it is moved half of the way, or a quarter.

  Args:
    job: says what was trained.
    before: the student before seeding.
    after: and after it.
    previous: the memory before this day.
    rng: random key.

  Returns:
    The student with that share of it, the share, and the nats that are lost
    with it. The share is 0 where a quarter loses too much; the loss is then
    that of the quarter.
  """
  morning = job.teachers.current.with_memory(previous)
  documents = retention.sample(
    *(job.cfg, morning, _ROWS, job.tokenizer, job.costs, rng), job.frames
  )
  at_first = retention.nll(morning, documents, job.costs)
  trees = job.target.get(before), job.target.get(after)
  loss = 0.0
  for share in SHARES:
    mixed = jax.tree.map(functools.partial(_mix, share), *trees)
    student = after if share == 1.0 else job.target.put(after, mixed)
    loss = retention.nll(student, documents, job.costs) - at_first
    # `<=`, which a model that is no longer finite does not pass.
    if loss <= job.cfg.retention_margin:
      return student, share, loss
  return before, 0.0, loss


def _mix(share: float, before: jax.Array, after: jax.Array) -> jax.Array:
  return before + share * (after - before)
