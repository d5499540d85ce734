"""Ways to live, by name; a new baseline is one class and one line here."""

from sleep_jax import config
from sleep_jax.learners import finetuning
from sleep_jax.learners import learner
from sleep_jax.learners import online
from sleep_jax.learners import recurrence
from sleep_jax.learners import selfedit

_LEARNERS = {
  'frozen': online.Frozen,
  'icl': online.InContext,
  'wake_only': online.WakeOnly,
  'sleep': online.Sleep,
  'sft': finetuning.Finetune,
  'ewc': finetuning.ElasticWeights,
  'joint': finetuning.Joint,
  'recurrence': recurrence.Recurrence,
  'recurrence_seeding': recurrence.RecurrenceAndSeeding,
}

# Where a task has contexts to dream about and an exam that lets one study them.
_READERS = {
  'frozen': selfedit.Base,
  'icl': selfedit.OpenBook,
  'finetune_passage': selfedit.Passage,
  'ttt': selfedit.Untrained,
  'seal': selfedit.Seal,
  'sleep': selfedit.Sleep,
}


def build(name: str, setup: learner.Setup) -> learner.Learner:
  """The learner called `name`, as the task wants it.

  Raises:
    ConfigError: if there is none of that name.
  """
  known = _LEARNERS if setup.reader is None else _READERS
  return config.choose(name, known, 'learner')(setup)
