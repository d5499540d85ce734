"""Configs of models that slept: a Llama or Qwen, and what its levels added.

`sleep_levels` lists the levels from fast to slow. Each entry is a dict:
  layers: the layers that have a part in the level;
  hidden: width of its dense MLP;
  slots, rank, top_k: its low-rank experts, and how many a token may use;
  status: of each slot; 1 = always on, 2 = chosen by the router.
"""

from transformers.models.llama import configuration_llama
from transformers.models.qwen2 import configuration_qwen2
from transformers.models.qwen3 import configuration_qwen3


class SleepLlamaConfig(configuration_llama.LlamaConfig):
  """A Llama whose MLPs have levels and experts."""

  model_type = 'sleep_llama'


class SleepQwen2Config(configuration_qwen2.Qwen2Config):
  """A Qwen 2 or 2.5 whose MLPs have levels and experts."""

  model_type = 'sleep_qwen2'


class SleepQwen3Config(configuration_qwen3.Qwen3Config):
  """A Qwen 3 whose MLPs have levels and experts."""

  model_type = 'sleep_qwen3'
