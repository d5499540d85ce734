"""sleep_jax.lifecycle.consolidation.night."""

from sleep_jax import array_typing as at
from sleep_jax.lifecycle.consolidation import transfer as transfer_lib


def transfer_metrics(
  report: transfer_lib.TransferReport, steps: int
) -> at.Metrics:
  """One transfer's figures; level 0 is the states of recurrent mixers."""
  transfer, curves = report.transfer, report.curves
  name = f'{transfer.sender + 1}to{transfer.receiver + 1}'
  tenth = max(1, steps // 10)
  return {
    f'{name}/kl_first': report.kl_first,
    f'{name}/kl_last': report.kl_last,
    f'{name}/transferred': float(report.transferred),
    f'{name}/slot': float(report.slot),
    f'{name}/router': float(curves['router'][-tenth:].mean()),
    f'{name}/on_policy': float(curves['on_policy'][-tenth:].mean()),
    f'{name}/reward_first': float(curves['reward'][0]),
    f'{name}/reward_last': float(curves['reward'][-1]),
  }
