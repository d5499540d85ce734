"""Ways to live, by name; a new baseline is one class and one line here."""

from sleep_jax import config
from sleep_jax.learners import finetuning
from sleep_jax.learners import learner
from sleep_jax.learners import online

_LEARNERS = {
  'frozen': online.Frozen,
  'icl': online.InContext,
  'wake_only': online.WakeOnly,
  'sleep': online.Sleep,
  'sft': finetuning.Finetune,
  'ewc': finetuning.ElasticWeights,
  'joint': finetuning.Joint,
}


def build(name: str, setup: learner.Setup) -> learner.Learner:
  """The learner called `name`.

  Raises:
    ConfigError: if there is none of that name.
  """
  return config.choose(name, _LEARNERS, 'learner')(setup)
