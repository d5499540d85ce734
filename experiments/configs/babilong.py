"""Facts hidden in a book, in context and in weights: SmolLM2-135M.

Twenty questions of bAbI, each with a text of 1,024 tokens (`task.babilong`):
`icl` has the text before the question and `rag` (an extra) its three likeliest
sentences, `wake_only` and `sleep` read it eight times and are asked with
nothing in context, `frozen` is the floor, and `unread` the same question
without the text. Variants: `qa1` (default) to `qa5`.

  python -m experiments.run --config=experiments/configs/babilong.py \
      --workdir=runs/babilong
"""

from experiments.configs import common
from experiments.configs import niah
from sleep_jax import config
from sleep_jax.tasks import babilong

_KINDS = dict.fromkeys(f'qa{i}' for i in range(1, 6))


def get_config(variant: str = 'qa1') -> common.Config:
  """Settings; `variant` is a question of bAbI."""
  config.lookup(variant, _KINDS, 'variant')
  return niah.studied(
    f'babilong_{variant}', 'babilong', babilong.BabilongConfig, kind=variant
  )
