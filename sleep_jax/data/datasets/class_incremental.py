"""The CSV files of CLINC150, Banking77 and DBpedia-70 by InCA's authors."""

import csv
import io

from sleep_jax.data.datasets import download

_ORIGIN = (
  'https://raw.githubusercontent.com/SalehMomeni/KLDA/'
  'ee5f05b283b9a9445c0906eb8826244d359f0ec8/data/'
)
_SHA256 = {
  'clinc_train': (
    '3f48327035d65c212b7ea7add693c6aeae0ebe3d0bc48e00ea8fadf1c4d09c88'
  ),
  'clinc_test': (
    '039d4307bff41c2b6e0c26ea4574bf19d19b1e95dbbdf6a893e0f461e8da2f2b'
  ),
  'banking_train': (
    'b9dae5166535cc6016f1400e972b9e46ab5819aa94c572d29740969ed3c7034a'
  ),
  'banking_test': (
    'd2500ddaccc3674c390c8f8cf93d1fc5b78cc8aa8c7b986aa7a950b4f7ff9a50'
  ),
  'dbpedia_train': (
    '586aea674428bdd107c5c634ee13c52aa383fabc3b484b7d86161910956d1214'
  ),
  'dbpedia_test': (
    'ae7e8ba7ac6a5d7e5b59416800f0cda42e8e9ba6bbefc5b1874359b5afa09fd4'
  ),
}


def examples(dataset: str, split: str, folder: str) -> list[tuple[str, str]]:
  """(text, label) of each line of one split.

  Raises:
    DataError: if the file is absent, altered, or lacks a column.
  """
  name = f'{dataset}_{split}'
  file = download.RawFile(
    f'cil/{name}.csv', f'{_ORIGIN}{name}.csv', _SHA256[name]
  )
  reader = csv.DictReader(io.StringIO(download.read(file, folder).decode()))
  return parse(reader, file.path)


def parse(reader: csv.DictReader, where: str) -> list[tuple[str, str]]:
  """The rows of an opened CSV file with columns `text` and `label`."""
  missing = {'text', 'label'} - set(reader.fieldnames or ())
  if missing:
    raise download.DataError(
      f'{where}: column {sorted(missing)[0]!r} is missing; found '
      f'{reader.fieldnames}. The file must have columns text,label.'
    )
  return [(row['text'], row['label']) for row in reader]
