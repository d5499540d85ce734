"""Which general questions does a base answer? Those measure what it keeps.

  python -m experiments.known_questions --config=experiments/configs/smollm2.py

prints their numbers for `task.general` of the task `invented_facts`.
"""

import json
from typing import Any

from absl import app
from absl import flags
import jax

from experiments import command_line
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import student as student_lib
from sleep_jax.runtime import compilation
from sleep_jax.tasks import invented_facts


def known(c: dict[str, Any]) -> list[int]:
  """The numbers of the questions that the base of a config answers."""
  arm = {'frozen': {}}
  task, learner, _ = build_lib.build(
    build_lib.arm_config(c | {'arms': arm}, 'frozen'), seed=0
  )
  assert isinstance(task, invented_facts.InventedFacts)
  life = learner.init(jax.random.PRNGKey(0))
  right = task.ask(
    student_lib.Student(learner, life), invented_facts.general_questions()
  )
  return [i for i, is_right in enumerate(right) if is_right]


def main(_) -> None:
  compilation.enable_cache()
  print(known(json.loads(flags.FLAGS.config.to_json())))


if __name__ == '__main__':
  command_line.define_config()
  app.run(main, flags_parser=command_line.parse)
