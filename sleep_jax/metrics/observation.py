"""What a phase shows while it runs: losses of its steps, and its dreams.

Code that trains or generates reports here and need not know who looks. The
observer is ambient, as the mesh is; without one a report is dropped. No random
draw, no cost and no result depends on it.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import contextvars
from typing import Protocol, runtime_checkable

import numpy as np

from sleep_jax import array_typing as at


@runtime_checkable
class Observer(Protocol):
  """Receives what the functions of this module are given."""

  def on_steps(self, values: Mapping[str, np.ndarray]) -> None: ...

  def on_dreams(self, kind: str, dreams: Sequence[Sequence[int]]) -> None: ...


_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
  'observer', default=None
)


@contextlib.contextmanager
def use(observer: Observer) -> Iterator[None]:
  """Within the block reports go to `observer`."""
  token = _observer.set(observer)
  try:
    yield
  finally:
    _observer.reset(token)


def steps(values: Mapping[str, np.ndarray]) -> None:
  """Reports the last K optimizer steps.

  Call it after their cost was added, which is where their number comes from.

  Args:
    values: measurements by name, each `[K]` on the host.
  """
  if (observer := _observer.get()) is not None:
    observer.on_steps(values)


def dreams(kind: str, rows: Sequence[Sequence[int]]) -> None:
  """Reports what was dreamt.

  Args:
    kind: who wrote it, or what became of it; a few words for a reader.
    rows: token ids of each dream.
  """
  if (observer := _observer.get()) is not None:
    observer.on_dreams(kind, rows)


def documents(
  kind: str,
  tokens: at.Int[np.ndarray, 'N T'],
  lengths: at.Int[np.ndarray, 'N'],
) -> None:
  """Reports dreams that are padded, each with its length."""
  if _observer.get() is not None:
    pairs = zip(tokens, lengths, strict=True)
    dreams(kind, [row[:length].tolist() for row, length in pairs])
