"""`class_incremental`: new classes in each episode, evaluated on all so far.

The splits are those of the paper's experiment (by InCA's authors): CLINC150 in
10 episodes of 15 classes, Banking77 in 7 of 11, DBpedia-70 in 7 of 10. An
example is one document, `text : label`; the answer is generated, closed book,
and must be the label to the token. The order of the classes is drawn by seed.
With `chat` the text is a user's turn, and the label the assistant's.
"""

import collections
import dataclasses
import re

import numpy as np

from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data.datasets import class_incremental as class_incremental_data
from sleep_jax.tasks import base as task_lib

# Episodes and classes per episode.
SPLITS = {'clinc': (10, 15), 'banking': (7, 11), 'dbpedia': (7, 10)}
_MARKER = ':'  # In the books that the base's embedding was trained on.
_REQUEST = (
  'Name the category of the following text. Answer with the name alone.\n\n'
)


@dataclasses.dataclass(frozen=True)
class ClassIncrementalConfig:
  """The data set, and the form of its rows."""

  dataset: str = 'clinc'
  tokenizer: str = 'sleep_jax/assets/text.model'  # '' = the base's own.
  chat: bool = False  # By the tokenizer's chat template, of an instruct model.
  length: config.Count = 32  # Tokens of a row; longer texts lose their end.
  # Occurrences of each example in its episode's stream.
  passes: config.Count = 4
  # Of the data set's: the first episodes, and examples of a class; 0 = all.
  episodes: int = 0
  train_examples: int = 0
  test_examples: int = 0
  text_weight: float = 0.3  # Target weight of the text's tokens; labels have 1.
  # Share of an episode's rows that are read in the next one, so that a night
  # does not fall on the border between two sets of classes.
  late: config.Fraction = 0.0
  # Ask about every fifth training example, which is then not read, instead of
  # the test split: for the choice of settings.
  validation: bool = False
  data_dir: str = ''

  def __post_init__(self):
    if not 0 <= self.late < 1:
      raise config.ConfigError(
        f'task.late={self.late} is a share of an episode; choose 0 to below 1.'
      )


def _carve(
  rows: list[tuple[str, str]],
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
  """Rows to read, and every fifth of each label to ask about."""
  parts: tuple[list, list] = [], []
  counts = collections.Counter()
  for text, label in rows:
    parts[counts[label] % 5 == 4].append((text, label))
    counts[label] += 1
  return parts


def normalize_label(label: str) -> str:
  """A label in words: `direct_deposit`, `WinterSportPlayer` -> lower case."""
  return re.sub(r'(?<=[a-z])(?=[A-Z])|_', ' ', label).lower()


class ClassIncremental(task_lib.Task):
  """The task; see the module's docstring."""

  name = 'class_incremental'
  Config = ClassIncrementalConfig
  columns = ('accuracy', 'accuracy_first', 'accuracy_last', 'answer_prob')
  headline = ('accuracy',)

  def __init__(self, cfg: ClassIncrementalConfig, seed: int):
    self.episodes, per_episode = config.lookup(
      cfg.dataset, SPLITS, 'task.dataset'
    )
    self.cfg, self._seed = cfg, seed
    self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
    self._chat = tokenizers.chat_of(self.tokenizer) if cfg.chat else None
    train = class_incremental_data.examples(cfg.dataset, 'train', cfg.data_dir)
    if cfg.validation:
      train, test = _carve(train)
    else:
      test = class_incremental_data.examples(cfg.dataset, 'test', cfg.data_dir)
    classes = sorted({label for _, label in train})
    order = np.random.default_rng([seed, 1]).permutation(classes)
    self.classes = order.reshape(self.episodes, per_episode)
    episode = {c: e for e, row in enumerate(self.classes) for c in row}
    self._train = self._split(train, episode, cfg.train_examples)
    self._test = self._split(test, episode, cfg.test_examples)
    self._shorten(cfg.episodes)

  def _shorten(self, episodes: int) -> None:
    """Leaves out all episodes from number `episodes` on, if that is not 0."""
    if not 0 <= episodes <= self.episodes:
      raise config.ConfigError(
        f'task.episodes={episodes} must be 0 (all) to {self.episodes}.'
      )
    self.episodes = episodes or self.episodes
    self.classes = self.classes[: self.episodes]

  def _split(
    self, rows: list[tuple[str, str]], episode: dict[str, int], most: int
  ) -> list[list[tuple[list[int], list[int]]]]:
    """Prompts and answers in tokens, by the episode of their label.

    Of each label the first `most`, if that is not 0.
    """
    out = [[] for _ in range(self.episodes)]
    counts = collections.Counter()
    for text, label in rows:
      counts[label] += 1
      if not most or counts[label] <= most:
        out[episode[label]].append(self.encode(text, label))
    return out

  def encode(self, text: str, label: str) -> tuple[list[int], list[int]]:
    """Prompt `BOS text :` and answer `label EOS`; long texts are cut."""
    tok = self.tokenizer
    answer = [*tok.encode(normalize_label(label)), tok.stop]
    ids = tok.encode(text.lower())
    most = self.cfg.length - len(answer)
    prompt = self._prompt(ids)
    while len(prompt) > most and ids:
      ids = ids[: most - len(prompt)]
      prompt = self._prompt(ids)
    if text and not ids:
      raise config.ConfigError(
        f'task.length={self.cfg.length} leaves no tokens for a text beside '
        f'label {label!r} of {len(answer)} tokens; raise it.'
      )
    return prompt, answer

  def _prompt(self, text: list[int]) -> list[int]:
    """What the label of a text follows."""
    tok = self.tokenizer
    if self._chat is not None:
      return self._chat.prompt(_REQUEST + tok.decode(text))
    return [tok.bos, *text, *tok.encode(_MARKER)]

  def experience(self, episode: int) -> experience_lib.Experience:
    """The examples of the episode's classes, shuffled in each of `passes`.

    With `late`, the last rows stand in the next episode; the last has its own.
    """
    order = self._order(episode)
    if self.cfg.late:
      last = episode == self.episodes - 1
      order = order[: None if last else len(order) - self._late(episode)]
      if episode:
        before = self._order(episode - 1)
        order = before[len(before) - self._late(episode - 1) :] + order
    tokens = np.full(
      (len(order), self.cfg.length), self.tokenizer.pad, np.int32
    )
    weight = np.zeros(tokens.shape, np.float32)
    for i, (prompt, answer) in enumerate(order):
      end = len(prompt) + len(answer)
      tokens[i, :end] = prompt + answer
      weight[i, : len(prompt)] = self.cfg.text_weight
      weight[i, len(prompt) : end] = 1.0
    return experience_lib.Experience(tokens, weight, frames=self._frames())

  def _order(self, episode: int) -> list[tuple[list[int], list[int]]]:
    """The rows of an episode's classes, pass after pass."""
    rng = np.random.default_rng([self._seed, 2, episode])
    rows = self._train[episode]
    orders = [rng.permutation(len(rows)) for _ in range(self.cfg.passes)]
    return [rows[i] for i in np.concatenate(orders)]

  def _late(self, episode: int) -> int:
    """How many of them are read in the next episode."""
    return round(self.cfg.late * self.cfg.passes * len(self._train[episode]))

  def _frames(self) -> tuple[experience_lib.Frame, ...]:
    """An example without its text and its label."""
    if self._chat is None:
      # Its last token is what ends a text, whatever the tokenizer puts before.
      mark = self.tokenizer.encode(_MARKER)[-1]
      return (((self.tokenizer.bos,), (mark,)),)
    before, between = self._chat.frame(self.tokenizer.stop)
    return (((*before, *self.tokenizer.encode(_REQUEST)), between),)

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """On the test examples of all classes so far.

    accuracy, answer_prob: share of exact labels and their mean probability,
      over examples.
    accuracy_first, accuracy_last: of the first and of the newest episode.
    """
    test = self._test[: episode + 1]
    prompts, answers = zip(*(pair for rows in test for pair in rows))
    response = student.respond(list(prompts), list(answers))
    ends = np.cumsum([len(rows) for rows in test])[:-1]
    by_episode = [float(hit.mean()) for hit in np.split(response.exact, ends)]
    return experience_lib.EvalResult(
      by_episode=by_episode,
      metrics={
        'accuracy': float(response.exact.mean()),
        'accuracy_last': by_episode[-1],
        'accuracy_first': by_episode[0],
        'answer_prob': float(np.exp(response.answer_logprob).mean()),
      },
    )
