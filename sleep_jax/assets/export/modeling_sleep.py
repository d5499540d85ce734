# pyright: reportMissingImports=false
"""A Llama or Qwen that slept, for transformers.

What reading has changed in the weights is already in them. What the nights have
added stands beside each dense MLP: low-rank experts, each of which a router
turns on token by token. Attention, cache and generation are those of the base.
"""

import torch
from torch import nn
import torch.nn.functional as F
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from .configuration_sleep import SleepLlamaConfig
from .configuration_sleep import SleepQwen2Config
from .configuration_sleep import SleepQwen3Config

MIN_ROUTER_LOGIT = -4.0  # A router that says less turns its expert off.
ALWAYS_ON, ROUTED = 1, 2  # Status of a slot.


class Experts(nn.Module):
  """The sum over slots of `gate * silu(x A) B`."""

  def __init__(self, dim, level):
    super().__init__()
    slots, rank = level['slots'], level['rank']
    self.top_k, self.status = level['top_k'], list(level['status'])
    self.a = nn.Parameter(torch.zeros(slots, dim, rank))
    self.b = nn.Parameter(torch.zeros(slots, rank, dim))
    self.router = nn.Parameter(torch.zeros(slots, dim))
    self.bias = nn.Parameter(torch.zeros(slots))

  def gate(self, x):
    """The gate of every slot, `[..., S]`; zero where it is off."""
    logits = F.linear(x, self.router, self.bias)
    status = torch.tensor(self.status, device=x.device)
    routed = logits.masked_fill(status != ROUTED, -torch.inf)
    on = routed > MIN_ROUTER_LOGIT
    if self.top_k < len(self.status):
      least = routed.topk(self.top_k, dim=-1).values[..., -1:]
      on &= routed >= least
    on |= status == ALWAYS_ON
    return torch.where(on, torch.sigmoid(logits), torch.zeros_like(logits))

  def forward(self, x):
    h = F.silu(torch.einsum('...d,sdr->...sr', x, self.a))
    return torch.einsum('...sr,srd->...d', h * self.gate(x)[..., None], self.b)


class Level(nn.Module):
  """One level in one layer: a dense SwiGLU, and its experts if it has any."""

  def __init__(self, dim, level):
    super().__init__()
    self.gate_proj = nn.Linear(dim, level['hidden'], bias=False)
    self.up_proj = nn.Linear(dim, level['hidden'], bias=False)
    self.down_proj = nn.Linear(level['hidden'], dim, bias=False)
    self.experts = Experts(dim, level) if level['slots'] else None

  def forward(self, x):
    y = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
    return y if self.experts is None else y + self.experts(x)


class Chain(nn.Module):
  """Several levels of one block, fast to slow, each with norm and residual.

  It reads the residual stream itself, and returns what the levels add to it.
  """

  def __init__(self, config, levels, norm):
    super().__init__()
    dim = config.hidden_size
    self.norms = nn.ModuleList(
      norm(dim, eps=config.rms_norm_eps) for _ in levels
    )
    self.levels = nn.ModuleList(Level(dim, level) for level in levels)

  def forward(self, x):
    change = torch.zeros_like(x)
    for norm, level in zip(self.norms, self.levels):
      change = change + level(norm(x + change))
    return change


def add_levels(model, config):
  """Gives every layer of a decoder its levels in place of its MLP."""
  for i, layer in enumerate(model.layers):
    levels = [level for level in config.sleep_levels if i in level['layers']]
    if len(levels) == 1:
      layer.mlp = Level(config.hidden_size, levels[0])
    else:
      norm = type(layer.post_attention_layernorm)
      layer.post_attention_layernorm = nn.Identity()
      layer.mlp = Chain(config, levels, norm)


class SleepLlamaForCausalLM(modeling_llama.LlamaForCausalLM):
  """A Llama with levels and experts."""

  config_class = SleepLlamaConfig

  def __init__(self, config):
    super().__init__(config)
    add_levels(self.model, config)
    self.post_init()


class SleepQwen2ForCausalLM(modeling_qwen2.Qwen2ForCausalLM):
  """A Qwen 2 or 2.5 with levels and experts."""

  config_class = SleepQwen2Config

  def __init__(self, config):
    super().__init__(config)
    add_levels(self.model, config)
    self.post_init()


class SleepQwen3ForCausalLM(modeling_qwen3.Qwen3ForCausalLM):
  """A Qwen 3 with levels and experts."""

  config_class = SleepQwen3Config

  def __init__(self, config):
    super().__init__(config)
    add_levels(self.model, config)
    self.post_init()
