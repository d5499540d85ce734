"""`bulletins`: knowledge incorporation (SEAL), generated, for small models.

A bulletin is a record of four attributes of a person unknown to the base:
`record value key value key ... of name surname .`. Questions are closed book,
`question name surname relation`. Training on records does not answer them: the
value precedes the name (the reversal curse, Berglund et al. 2023), and keys
differ from relations; training on statements `name surname relation value .`
does. A dream, what is generated after `record ... implications`, has lines of
several kinds: statements; notes, which are partial records; general lines,
which name no person; and false statements. The most useful dream has a
statement of each attribute, which those of the base seldom have.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np

from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.tasks import base as task_lib
from sleep_jax.tasks import facts
from sleep_jax.tasks import knowledge_incorporation

_KEYS = ('home', 'job', 'food', 'game')  # As facts.RELATIONS, in a record.
_VALUES = 24  # Of each relation.
_STOP = '<end>'
_WORDS = ('.', _STOP, 'record', 'of', 'implications', 'question', 'some')
# In the base's dreams the shares of statements, notes, general lines and false
# statements are drawn from this Dirichlet, once a dream.
_DIRICHLET = (1.0, 0.8, 0.5, 0.4)
_LINES = (2, 5)  # Fewest and most.
_P_COMPLETE = 0.05  # Share of dreams that state each attribute once.
_MAX_LINE = 7  # Words of a note.
_MAX_RECORD = 15  # Tokens of a record with BOS and stop.


@dataclasses.dataclass(frozen=True)
class BulletinsConfig:
  """Size of the vocabulary, of an episode and of the evaluation."""

  episodes: config.Count = 3
  train: config.Count = 12  # Bulletins of an episode.
  reads: config.Count = 16  # Rows of each bulletin in an episode's stream.
  test: config.Count = 12  # Bulletins that the evaluation studies one by one.
  joint: int = 50  # Studied together; the first `test` are those.
  attempts: config.Count = 1  # Studies of each single bulletin.
  length: config.Count = 16  # Tokens of a row.
  base_entities: config.Count = 64
  world_seed: int = 0  # Of the base's people; must be that of its pretraining.

  def __post_init__(self):
    if not 1 <= self.test <= self.joint:
      raise config.ConfigError(
        f'task.test={self.test} must be 1 to task.joint={self.joint}: the '
        'former are the first of the latter.'
      )
    if self.length < _MAX_RECORD:
      raise config.ConfigError(
        f'task.length={self.length} must be at least {_MAX_RECORD}, which a '
        'record takes.'
      )


@dataclasses.dataclass(frozen=True)
class Bulletin:
  """A person: two syllables, a value per relation, and the record's order."""

  name: tuple[int, int]
  values: tuple[int, ...]
  order: tuple[int, ...]


def build_tokenizer() -> tokenizers.WordTokenizer:
  """The closed vocabulary of `bulletins`."""
  values = [f'{key}{i}' for key in _KEYS for i in range(_VALUES)]
  return tokenizers.WordTokenizer(
    [*_WORDS, *facts.SYLLABLES, *facts.RELATIONS, *_KEYS, *values],
    separator='.',
    stop=_STOP,
  )


class World:
  """People and texts about them, as tokens without BOS and stop."""

  def __init__(self, cfg: BulletinsConfig):
    tok = self.tokenizer = build_tokenizer()
    self._period, self.stop, self._record, self._of = tok.encode(
      f'. {_STOP} record of'
    )
    self._implications, self._question, self._some = tok.encode(
      'implications question some'
    )
    self._names = tok.encode(' '.join(facts.SYLLABLES))
    self._relations = tok.encode(' '.join(facts.RELATIONS))
    self._keys = tok.encode(' '.join(_KEYS))
    self._first_value = tok.encode(f'{_KEYS[0]}0')[0]
    self._base_names = np.zeros(0, int)
    rng = np.random.default_rng([cfg.world_seed, 11])
    self.base_people, self._base_names = self._people(rng, cfg.base_entities)

  def new_entities(self, rng: np.random.Generator, n: int) -> list[Bulletin]:
    """`n` people of distinct names, none of them among the base's."""
    return self._people(rng, n)[0]

  def _people(
    self, rng: np.random.Generator, n: int
  ) -> tuple[list[Bulletin], np.ndarray]:
    """`n` people whose names are not the base's, and the names' codes."""
    side = len(self._names)
    free = np.setdiff1d(np.arange(side**2), self._base_names)
    if n > len(free):
      raise config.ConfigError(
        f'task: {n} people are wanted but only {len(free)} names are left; '
        'lower task.train, task.joint or task.base_entities.'
      )
    codes = rng.choice(free, n, replace=False)
    return [self._person(rng, code) for code in codes], codes

  def new_entity(self, rng: np.random.Generator) -> Bulletin:
    """As one of `new_entities`; faster, by rejection."""
    while True:
      code = int(rng.integers(len(self._names) ** 2))
      if code not in self._base_names:
        return self._person(rng, code)

  def _person(
    self, rng: np.random.Generator, code: int | np.integer
  ) -> Bulletin:
    first, second = divmod(int(code), len(self._names))
    values = (self.value(rng, r) for r in range(len(_KEYS)))
    return Bulletin(
      (self._names[first], self._names[second]),
      tuple(values),
      tuple(rng.permutation(len(_KEYS)).tolist()),
    )

  def value(self, rng: np.random.Generator, relation: int) -> int:
    """A random value of a relation."""
    return self._first_value + relation * _VALUES + int(rng.integers(_VALUES))

  def record(self, b: Bulletin, *relations: int) -> contexts.TokenIds:
    """The bulletin's text; with `relations` a note of these alone."""
    relations = relations or b.order
    pairs = [token for r in relations for token in (b.values[r], self._keys[r])]
    return [self._record, *pairs, self._of, *b.name, self._period]

  def statement(
    self, b: Bulletin, relation: int, value: int = 0
  ) -> contexts.TokenIds:
    """`name surname relation value .`; false with another `value`."""
    value = value or b.values[relation]
    return [*b.name, self._relations[relation], value, self._period]

  def general(self, b: Bulletin, relation: int) -> contexts.TokenIds:
    """`some relation value .`, without a name."""
    return [
      self._some,
      self._relations[relation],
      b.values[relation],
      self._period,
    ]

  def request(self, b: Bulletin) -> contexts.TokenIds:
    """The prompt of a dream."""
    return [*self.record(b), self._implications]

  def question(self, b: Bulletin, relation: int) -> contexts.TokenIds:
    """`question name surname relation`, answered by the value."""
    return [self._question, *b.name, self._relations[relation]]

  def implications(
    self, rng: np.random.Generator, b: Bulletin
  ) -> list[contexts.TokenIds]:
    """The lines of a dream of the base; see the module's docstring."""
    if rng.random() < _P_COMPLETE:
      return [self.statement(b, r) for r in b.order]
    lines = int(rng.integers(_LINES[0], _LINES[1] + 1))
    kinds = rng.choice(
      len(_DIRICHLET), lines, p=rng.dirichlet(_DIRICHLET)
    ).tolist()
    return [
      self._line(rng, b, kind, r)
      for kind, r in zip(kinds, rng.integers(len(_KEYS), size=lines).tolist())
    ]

  def _line(
    self,
    rng: np.random.Generator,
    b: Bulletin,
    kind: int | np.integer,
    relation: int,
  ) -> contexts.TokenIds:
    """A line of the kind with this index in `_DIRICHLET`."""
    if kind == 0:
      return self.statement(b, relation)
    if kind == 1:
      return self.record(b, relation)
    if kind == 2:
      return self.general(b, relation)
    return self.statement(b, relation, self.value(rng, relation))

  def is_line(self, line: contexts.TokenIds) -> bool:
    """Whether `line` has the form of a statement, note or general line."""
    form = ''.join(self._kind(token) for token in line)
    return form in ('nnrv.', 'Rvkonn.', 'srv.')

  def _kind(self, token: int) -> str:
    """A letter for the kind of word that a token is."""
    fixed = {
      self._period: '.',
      self._record: 'R',
      self._of: 'o',
      self._some: 's',
    }
    if token in fixed:
      return fixed[token]
    if token >= self._first_value:
      return 'v'
    ranges = ((self._keys, 'k'), (self._relations, 'r'), (self._names, 'n'))
    return next((k for ids, k in ranges if ids[0] <= token <= ids[-1]), '?')


def _documents(
  world: World, rng: np.random.Generator
) -> Iterator[contexts.TokenIds]:
  """Pretraining documents of the base, without end.

  Of its people these are statements, and questions with answers, so that
  answers follow from statements; of new entities, drawn for each document,
  they are records, alone, with their implications, or with a question.
  """
  bos, stop = world.tokenizer.bos, world.stop
  while True:
    known = world.base_people[rng.integers(len(world.base_people))]
    new = world.new_entity(rng)
    relation = int(rng.integers(len(_KEYS)))
    kind = rng.random()
    if kind < 0.3:
      text = world.statement(known, relation)
    elif kind < 0.6:
      text = [*world.question(known, relation), known.values[relation]]
    elif kind < 0.85:
      lines = world.implications(rng, new)
      text = [*world.request(new), *(i for line in lines for i in line)]
    elif kind < 0.93:
      question = world.question(new, relation)
      text = [*world.record(new), *question, new.values[relation]]
    else:
      text = world.record(new)
    yield [bos, *text, stop]


def pretraining_rows(
  world: World, rng: np.random.Generator, rows: int, length: int
) -> np.ndarray:
  """Concatenated documents, `[rows, length]`.

  A row begins with a document; its last one is cut.
  """
  documents = _documents(world, rng)
  out = np.zeros((rows, length), np.int32)
  for row in out:
    at = 0
    while at < length:
      ids = next(documents)[: length - at]
      row[at : at + len(ids)] = ids
      at += len(ids)
  return out


class BulletinsFormat:
  """The self-edits of bulletins; see `contexts.SelfEditFormat`."""

  max_dream = 5 * _MAX_LINE + 1
  max_answer = 2  # A value, and stop.

  def __init__(self, world: World, length: int):
    self._world, self.stop, self._length = world, world.stop, length
    self._period = world.tokenizer.separator

  def parse(
    self, context: contexts.Context, dream: contexts.TokenIds
  ) -> contexts.TrainingRows | contexts.Rejected:
    """A row per well-formed line, and the record last, as in SEAL."""
    if not dream:
      return contexts.Rejected('empty')
    ends = [i + 1 for i, token in enumerate(dream) if token == self._period]
    lines = [dream[i:j] for i, j in zip([0, *ends], ends)]
    lines = [line for line in lines if self._world.is_line(line)]
    if not lines:
      return contexts.Rejected('unreadable')
    return self._rows([*lines, self._world.record(context.source)])

  def from_context(self, context: contexts.Context) -> contexts.TrainingRows:
    """A row, the record."""
    return self._rows([self._world.record(context.source)])

  def _rows(self, texts: list[contexts.TokenIds]) -> contexts.TrainingRows:
    tok = self._world.tokenizer
    tokens = np.full((len(texts), self._length), tok.pad, np.int32)
    for row, text in zip(tokens, texts):
      row[: len(text) + 2] = [tok.bos, *text, self.stop]
    return contexts.TrainingRows(tokens, (tokens != tok.pad).astype(np.float32))

  def grade(
    self, context: contexts.Context, answers: list[contexts.TokenIds]
  ) -> np.ndarray:
    """1 where the answer is the value and nothing else."""
    pairs = zip(answers, context.answers)
    return np.array([list(given) == gold[:-1] for given, gold in pairs], float)

  def open_book(
    self, context: contexts.Context, question: contexts.TokenIds
  ) -> contexts.TokenIds:
    """The record, and then the question."""
    return [question[0], *self._world.record(context.source), *question[1:]]


class Bulletins(task_lib.Task):
  """The task; see the module's docstring."""

  name = 'bulletins'
  Config = BulletinsConfig
  headline = ('n1', 'n50', 'base_accuracy')
  columns = ('n1', 'n50', 'closed_book', 'base_accuracy')
  format: BulletinsFormat

  def __init__(self, cfg: BulletinsConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    world = self.world = World(cfg)
    self.tokenizer = world.tokenizer
    self.format = BulletinsFormat(world, cfg.length)
    rng = np.random.default_rng([seed, 1])
    people = world.new_entities(rng, cfg.episodes * cfg.train + cfg.joint)
    trained = [self.context(b) for b in people[: cfg.episodes * cfg.train]]
    self._trained_contexts = [
      tuple(trained[i : i + cfg.train])
      for i in range(0, len(trained), cfg.train)
    ]
    self._base_contexts = [self.context(b) for b in world.base_people]
    self._evaluation = knowledge_incorporation.KnowledgeIncorporation(
      test=tuple(self.context(b) for b in people[len(trained) :]),
      singles=cfg.test,
      attempts=cfg.attempts,
      grades={'': self.format.grade},
    )

  def context(self, b: Bulletin) -> contexts.Context:
    """A bulletin with a question per relation."""
    world, bos = self.world, self.tokenizer.bos
    relations = range(len(_KEYS))
    return contexts.Context(
      name=self.tokenizer.decode(list(b.name)),
      prompt=[bos, *world.request(b)],
      questions=[[bos, *world.question(b, r)] for r in relations],
      answers=[[b.values[r], world.stop] for r in relations],
      source=b,
    )

  def experience(self, episode: int) -> experience_lib.Experience:
    """The episode's records, each `reads` times."""
    seed = [self._seed, 2, episode]
    return knowledge_incorporation.build_stream(
      self.format, self._trained_contexts[episode], self.cfg.reads, seed
    )

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """See `KnowledgeIncorporation.evaluate`."""
    return self._evaluation.evaluate(
      student,
      self._trained_contexts[: episode + 1],
      self._base_contexts,
      last=episode == self.episodes - 1,
    )
