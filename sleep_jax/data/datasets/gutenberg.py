"""Novels of Project Gutenberg, from the repositories of GITenberg."""

import dataclasses
import pathlib
import re

from sleep_jax.data.datasets import download


def strip_header(raw: bytes) -> bytes:
  """A Project Gutenberg text without the licence around it, as UTF-8."""
  try:
    text = raw.decode('utf-8-sig')
  except UnicodeDecodeError:
    text = raw.decode('cp1252', errors='replace')  # Older files.
  text = re.sub(r'\r\n?', '\n', text)
  mark = r'^\*\*\* ?{} TH(?:IS|E) PROJECT GUTENBERG'
  start = re.search(
    mark.format('START OF') + r'.*?\*\*\*[^\n]*\n', text, re.M | re.S
  )
  end = re.search(mark.format('END OF'), text, re.M)
  if not start or not end:
    raise download.DataError('no START and END marks of Project Gutenberg.')
  text = text[start.end() : end.start()].strip()
  text = re.sub(r'\n*End of (?:the )?Project Gutenberg[^\n]*$', '', text)
  return (text.strip() + '\n').encode()


BOOKS = {
  pathlib.PurePosixPath(path).stem: dataclasses.replace(
    file, prepare=strip_header
  )
  for path, file in download.FILES.items()
  if path.startswith('gutenberg/')
}


def paragraphs(text: str) -> list[str]:
  """The paragraphs of a book, each on one line."""
  parts = (' '.join(p.split()) for p in re.split(r'\n\s*\n', text))
  return [p for p in parts if p]
