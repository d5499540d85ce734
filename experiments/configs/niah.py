"""RULER's needles in a haystack, in context and in weights: SmolLM2-135M.

Twenty texts of 1,024 tokens with one question each (`task.niah`): `icl` has the
text before the question and `rag` its three likeliest sentences, `wake_only`
and `sleep` read it eight times and are asked with nothing in context, `frozen`
is the floor. `unread` is the same question without the text, which must be at
the floor for all. Variants: RULER's niah_multikey_1 (default), 2 and 3; the
extras `niah` and `rag` are needed.

  python -m experiments.run --config=experiments/configs/niah.py \
      --workdir=runs/niah
"""

from experiments.configs import common
from experiments.configs import smollm2
from sleep_jax import config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.tasks import long_text
from sleep_jax.tasks import niah

_KINDS = {'multikey_1': 1, 'multikey_2': 2, 'multikey_3': 3}
_CONTEXT, _LENGTH, _READS = 1024, 256, 8


def get_config(variant: str = 'multikey_1') -> common.Config:
  """Settings; `variant` is one of RULER's multi-key tasks."""
  number = config.lookup(variant, _KINDS, 'variant')
  return studied(f'niah_{number}', 'niah', niah.NiahConfig, kind=variant)


def studied(
  name: str, task: str, cls: type[long_text.LongTextConfig], **changes: str
) -> common.Config:
  """SmolLM2 and samples of a task on long texts.

  Args:
    name: of the experiment.
    task: its name.
    cls: its settings.
    **changes: of these.
  """
  c = smollm2.get_config()
  c.name = name
  c.seeds = (1,)
  c.task = common.settings(
    cls,
    chat=True,
    context=_CONTEXT,
    samples=20,
    length=_LENGTH,
    reads=_READS,
    **changes,
  )
  c.task.name = task
  c.model.levels[0].update(chunk=_LENGTH, sleep_every=8)
  c.model.levels[1].update(slots=2, top_k=2)
  # Texts have no frame: they are dreamt from their beginning.
  c.sleep.update(
    dreams=64,
    dream_length=_LENGTH,
    day_dreams=0.0,
    splice=False,
    distinct=False,
    archive=0,
    batch=2,
    steps=100,
  )
  # Studied by a day and a night; without dreams about what will be asked.
  c.dreaming = common.settings(
    dreaming_config.DreamingConfig,
    enabled=False,
    study_night=True,
    study_rows=_READS * _CONTEXT // _LENGTH,
  )
  c.arms = {
    'frozen': {},
    'icl': {},
    'rag': dict(learner_config=dict(top=3, pieces='sentence')),
    'wake_only': common.WAKE_ONLY,
    'sleep': {},
  }
  return c
