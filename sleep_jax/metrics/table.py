"""A table of text, and its Markdown."""

from collections.abc import Sequence
import dataclasses


@dataclasses.dataclass(frozen=True)
class Table:
  """What is shown as a table.

  title: said above it; '' = nothing.
  header: of every column.
  rows: cells; of the first column, the row's name.
  """

  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[str]]

  def markdown(self) -> str:
    """Its header and rows."""
    rule = ['---'] * len(self.header)
    lines = [self.header, rule, *self.rows]
    return ''.join(f'| {" | ".join(map(_cell, line))} |\n' for line in lines)


def _cell(text: str) -> str:
  """Text that ends neither its cell nor its row."""
  return ' '.join(text.replace('|', '\\|').splitlines())
