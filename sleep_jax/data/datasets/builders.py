"""Builders of tensorflow_datasets for the datasets of more than one record.

Importing this takes a second; `datasets.load` does, when it is called.
Records are in the order of their files, whose origins and checksums are in
`checksums.tsv`.
"""

from collections.abc import Iterator
import csv
import io
import json
from typing import Any, ClassVar

from etils import epath
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.core.download import download_manager
from tensorflow_datasets.core.download import downloader

from sleep_jax.data.datasets import download

# Ten, with growing pauses, are minutes on a machine without a network.
downloader.MAX_RETRIES = 2

Records = Iterator[dict[str, Any]]
_TEXT = tfds.features.Text()
_GRID = tfds.features.Tensor(
  shape=(None, None), dtype=np.int64, encoding='bytes'
)


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What all builders share.

  FEATURES: of a record.
  LICENSE, HOMEPAGE: of the data.
  """

  VERSION = tfds.core.Version('1.0.0')
  # Looking for its own checksums.tsv, tensorflow_datasets needs a package that
  # it does not require.
  url_infos = checksums.load_url_infos(
    epath.resource_path('sleep_jax.data.datasets') / download.TABLE
  )
  FEATURES: ClassVar[dict[str, Any]]
  LICENSE: ClassVar[str]
  HOMEPAGE: ClassVar[str]

  @classmethod
  def files(cls, variant: str) -> dict[str, list[str]]:
    """Paths in `checksums.tsv` of the files of each split of a config."""
    raise NotImplementedError

  def records(self, *contents: str) -> Records:
    """The records of a split, from the contents of its files."""
    raise NotImplementedError

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(self.FEATURES),
      license=self.LICENSE,
      homepage=self.HOMEPAGE,
      disable_shuffling=True,
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    splits = self.files(self.builder_config_name or '')
    return {
      split: self._generate_examples(
        [_fetch(dl_manager, path) for path in paths]
      )
      for split, paths in splits.items()
    }

  def _generate_examples(
    self, paths: list[epath.Path]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    # As bytes: reading text would change line ends within a field.
    return enumerate(self.records(*(p.read_bytes().decode() for p in paths)))


def _fetch(dl_manager: tfds.download.DownloadManager, path: str) -> epath.Path:
  """A listed file, from the manager's manual folder or its origin."""
  file = download.FILES[path]
  try:
    return dl_manager.download(file.url)
  except (OSError, tfds.download.DownloadError) as e:
    raise download.unreachable(file, e) from None
  except download_manager.NonMatchingChecksumError:
    raise download.DataError(
      f'{file.url} has other content than it had; set $SLEEP_JAX_DATA to a '
      f'folder that holds {path}[.gz] of SHA-256 {file.sha256}.'
    ) from None


def _variants(*names: str) -> list[tfds.core.BuilderConfig]:
  return [tfds.core.BuilderConfig(name=name) for name in names]


class ClassIncremental(Builder):
  """CLINC150, Banking77, DBpedia-70 in the splits of InCA's authors."""

  BUILDER_CONFIGS = _variants('clinc', 'banking', 'dbpedia')
  FEATURES = dict(text=_TEXT, label=_TEXT)
  LICENSE = 'CC BY 3.0 (clinc), CC BY 4.0 (banking), CC BY-SA 3.0 (dbpedia)'
  HOMEPAGE = 'https://github.com/SalehMomeni/KLDA'

  @classmethod
  def files(cls, variant: str) -> dict[str, list[str]]:
    return {s: [f'cil/{variant}_{s}.csv'] for s in ('train', 'test')}

  def records(self, *contents: str) -> Records:
    for row in csv.DictReader(io.StringIO(contents[0])):
      yield {name: row[name] for name in self.FEATURES}


class SealSquad(Builder):
  """SEAL's copy of SQuAD 1.1: validation, and its two rounds' passages."""

  FEATURES = dict(
    title=_TEXT,
    context=_TEXT,
    questions=tfds.features.Sequence(dict(question=_TEXT, answer=_TEXT)),
  )
  LICENSE = 'CC BY-SA 4.0'
  HOMEPAGE = 'https://github.com/Continual-Intelligence/SEAL'

  @classmethod
  def files(cls, variant: str) -> dict[str, list[str]]:
    return {
      'validation': ['seal_squad/squad_val.json'],
      'round0': ['seal_squad/synthetic__train__iter0_train.json'],
      'round1': ['seal_squad/synthetic__train__iter1_train.json'],
    }

  def records(self, *contents: str) -> Records:
    for passage in json.loads(contents[0]):
      pairs = [
        {name: pair[name] for name in ('question', 'answer')}
        for pair in passage['questions']
      ]
      yield dict(
        title=passage['title'], context=passage['context'], questions=pairs
      )


class SealArc(Builder):
  """The puzzles of SEAL's few-shot experiment; a record is a pair of grids.

  `part` of a pair is `train` or `test`, within its puzzle.
  """

  FEATURES = dict(puzzle=_TEXT, part=_TEXT, input=_GRID, output=_GRID)
  LICENSE = 'Apache-2.0'
  HOMEPAGE = 'https://github.com/Continual-Intelligence/SEAL'

  @classmethod
  def files(cls, variant: str) -> dict[str, list[str]]:
    return {
      split: [
        f'seal_fewshot_arc/arc-agi_{name}_{kind}_filtered_1B_{suffix}_set.json'
        for kind in ('challenges', 'solutions')
      ]
      for split, name, suffix in (
        ('train', 'training', 'training'),
        ('test', 'evaluation', 'eval'),
      )
    }

  def records(self, *contents: str) -> Records:
    challenges, solutions = map(json.loads, contents)
    for name, puzzle in challenges.items():
      for pair in puzzle['train']:
        yield dict(puzzle=name, part='train', **pair)
      for pair, output in zip(puzzle['test'], solutions[name], strict=True):
        yield dict(puzzle=name, part='test', input=pair['input'], output=output)


class Gsm8k(Builder):
  """Word problems; what follows `####` in an answer is the number."""

  FEATURES = dict(question=_TEXT, answer=_TEXT)
  LICENSE = 'MIT'
  HOMEPAGE = 'https://github.com/openai/grade-school-math'

  @classmethod
  def files(cls, variant: str) -> dict[str, list[str]]:
    return {split: [f'gsm8k/{split}.jsonl'] for split in ('train', 'test')}

  def records(self, *contents: str) -> Records:
    return map(json.loads, contents[0].strip().split('\n'))


class Babi(Builder):
  """bAbI v1.2 en-10k, whose facts BABILong hides among the text of books.

  A record is a question and the facts that precede it in its story, without
  the earlier questions; `supporting` are the positions of those that answer
  it. `qa3` has no `train`: its origin stores that file otherwise.
  """

  BUILDER_CONFIGS = _variants(*(f'qa{i}' for i in range(1, 21)))
  FEATURES = dict(
    facts=tfds.features.Sequence(_TEXT),
    question=_TEXT,
    answer=_TEXT,
    supporting=tfds.features.Sequence(tfds.features.Scalar(np.int64)),
  )
  LICENSE = 'CC BY 3.0'
  HOMEPAGE = 'https://github.com/booydar/babilong'

  @classmethod
  def files(cls, variant: str) -> dict[str, list[str]]:
    files = [
      p for p in download.FILES if p.startswith(f'babi/en-10k/{variant}_')
    ]
    return {p.removesuffix('.txt').rpartition('_')[2]: [p] for p in files}

  def records(self, *contents: str) -> Records:
    facts = {}  # By the number of their line in the story.
    for line in contents[0].strip().split('\n'):
      number, _, text = line.partition(' ')
      if number == '1':
        facts = {}
      question, *rest = text.split('\t')
      if not rest:
        facts[number] = text
        continue
      answer, supporting = rest
      yield dict(
        facts=list(facts.values()),
        question=question.strip(),
        answer=answer,
        supporting=[list(facts).index(n) for n in supporting.split()],
      )


def by_name() -> dict[str, tuple[type[Builder], str]]:
  """Builder and config by `builder` or `builder/config`."""
  out: dict[str, tuple[type[Builder], str]] = {}
  for cls in (Babi, ClassIncremental, Gsm8k, SealArc, SealSquad):
    for variant in [c.name for c in cls.BUILDER_CONFIGS] or ['']:
      out['/'.join(filter(None, (cls.name, variant)))] = cls, variant
  return out
