"""CLINC150, Banking77 and DBpedia-70 in the splits of InCA's authors."""

from sleep_jax.data import datasets


def examples(dataset: str, split: str, folder: str) -> list[tuple[str, str]]:
  """(text, label) of each line of one split; raises as `datasets.load`."""
  records = datasets.load(f'class_incremental/{dataset}', split, folder)
  return [(record['text'], record['label']) for record in records]
