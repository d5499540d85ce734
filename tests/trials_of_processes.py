"""Dream trials of one of several processes; prints the answers as JSON.

  python -m tests.trials_of_processes COORDINATOR PROCESSES PROCESS_ID

Without arguments they are run on one device.
"""

import json
import sys
from typing import Any

import jax
import numpy as np

from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.runtime import distributed
from sleep_jax.runtime import sharding
from tests import dreaming_test


def answers() -> dict[str, Any]:
  """Of five instances, each trained on a dream of its own; on the mesh."""
  life = dreaming_test.life_of(dreaming_test.init_model(), 5)
  life = sharding.shard_params(life)
  form = dreaming_test.Bandit()
  updates = [
    form.parse(c, [value])
    for c, value in zip(life.contexts, dreaming_test.VALUES)
  ]
  questions = [c.questions for c in life.contexts]
  completions, finite = trials.run(
    dreaming_test.dreamer_of(),
    life.model,
    [*updates[:4], None],
    questions,
    jax.random.key(0),
  )
  return {'completions': completions, 'finite': np.asarray(finite).tolist()}


def main(argv: list[str]) -> None:
  mesh = {}
  if argv:
    coordinator, processes, process_id = argv
    distributed.start(coordinator, int(processes), int(process_id))
    mesh = {'data': jax.device_count()}
  with sharding.use_mesh(mesh):
    result = answers()
  print(json.dumps(result | {'devices': jax.device_count()}))


if __name__ == '__main__':
  main(sys.argv[1:])
