"""What a day, a night and a quiz report."""

import dataclasses

from sleep_jax import array_typing as at


@dataclasses.dataclass(frozen=True)
class DayReport:
  """What was read.

  tokens: of the documents, read once.
  rows: windows that they were packed into.
  split: documents that were longer than a window, and therefore split.
  loss_first, loss_last: nats a token in the first and in the last pass over the
    documents, each token predicted before it was learnt.
  """

  tokens: int
  rows: int
  split: int
  loss_first: float
  loss_last: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class NightReport:
  """What a night did.

  night: its number, from 1.
  transferred: whether every transfer counted.
  kl_first, kl_last: KL(teacher || student) before and after, in nats a token on
    the same dreams; of the fastest level that was transferred.
  metrics: all figures of the night by name.
  """

  night: int
  transferred: bool
  kl_first: float
  kl_last: float
  seconds: float
  metrics: at.Metrics


@dataclasses.dataclass(frozen=True)
class QuizReport:
  """Answers to questions, closed book.

  accuracy: share of the answers that contain the right words.
  """

  accuracy: float
  answers: list[str]
  right: list[bool]


class NotTransferred(RuntimeError):
  """A night that moved nothing; `report` tells of it."""

  def __init__(self, report: NightReport):
    super().__init__(
      f'night {report.night} did not move what the day taught: KL went from '
      f'{report.kl_first:.4f} to {report.kl_last:.4f} nats a token. Raise '
      'steps or expert_learning_rate, or allow a night to fail.'
    )
    self.report = report


def night_report(
  night: int, metrics: at.Metrics, seconds: float
) -> NightReport:
  """The report of a night with these figures (`consolidation.night`)."""
  names = sorted(k.partition('/')[0] for k in metrics if '/kl_first' in k)
  return NightReport(
    night=night,
    transferred=all(metrics[f'{name}/transferred'] for name in names),
    kl_first=metrics[f'{names[0]}/kl_first'],
    kl_last=metrics[f'{names[0]}/kl_last'],
    seconds=seconds,
    metrics=metrics,
  )
