"""`bulletins`: knowledge incorporation (SEAL), generated, for small models.

A bulletin tells four things of a person nobody has heard of, in the form of a
record: `record value key value key ... of name surname .`. Questions are asked
closed book, `question name surname relation`. A record read does not answer
them, for it has the value before the name (the reversal curse, Berglund et al.
2023) and other words for the relations; a statement `name surname relation
value .` does. What a dreamer writes after `record ... implications` is lines of
several kinds: statements, which help; notes, which are records again; what is
true of some people; and plain errors. A dream that helps tells all four things
in statements, and those of the base seldom do.
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

Ids = contexts.TokenIds
_KEYS = ('home', 'job', 'food', 'game')  # Of facts.RELATIONS, in a record.
_VALUES = 24  # Of each relation.
_STOP = '<end>'
_WORDS = ('.', _STOP, 'record', 'of', 'implications', 'question', 'some')
# What the base's dreams are made of. A dream has a bent: its shares of
# statements, notes, general lines and errors are one draw of this Dirichlet.
_BENT = (1.0, 0.8, 0.5, 0.4)
_LINES = (2, 5)  # Fewest and most.
_THOROUGH = 0.05  # Share of dreams that state everything, once.
_LONGEST_LINE = 7  # A note's words.
_LONGEST = 15  # Tokens of a record with BOS and stop.


@dataclasses.dataclass(frozen=True)
class BulletinsConfig:
  """Size of the world, of a day and of the exam."""

  episodes: int = 3
  train: int = 12  # Bulletins of a day.
  reads: int = 16  # Rows of each bulletin in a day's stream.
  test: int = 12  # Bulletins that the exam has studied one by one.
  joint: int = 50  # Studied together; the first `test` are those.
  attempts: int = 1  # Studies of each single bulletin.
  length: int = 16  # Tokens of a row.
  base_entities: int = 64
  world_seed: int = 0  # Of the base's own people; must match the base's.

  def __post_init__(self):
    if not 1 <= self.test <= self.joint:
      raise config.ConfigError(
        f'task.test={self.test} must be 1 to task.joint={self.joint}: both '
        'are of one list.'
      )
    if self.length < _LONGEST:
      raise config.ConfigError(
        f'task.length={self.length} must be at least {_LONGEST}, which a '
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
  """People, and what can be written about them; texts have no BOS or stop."""

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
    self._taken = np.zeros(0, int)
    rng = np.random.default_rng([cfg.world_seed, 11])
    self.own, self._taken = self._people(rng, cfg.base_entities)

  def strangers(self, rng: np.random.Generator, n: int) -> list[Bulletin]:
    """`n` people of different names, none of whom is the base's own."""
    return self._people(rng, n)[0]

  def _people(self, rng, n) -> tuple[list[Bulletin], np.ndarray]:
    side = len(self._names)
    free = np.setdiff1d(np.arange(side**2), self._taken)
    if n > len(free):
      raise config.ConfigError(
        f'task: {n} people are wanted but only {len(free)} names are left; '
        'lower task.train, task.joint or task.base_entities.'
      )
    codes = rng.choice(free, n, replace=False)
    return [self._person(rng, code) for code in codes], codes

  def stranger(self, rng: np.random.Generator) -> Bulletin:
    """One of `strangers`, drawn fast."""
    while True:
      code = int(rng.integers(len(self._names) ** 2))
      if code not in self._taken:
        return self._person(rng, code)

  def _person(self, rng: np.random.Generator, code: int) -> Bulletin:
    first, second = divmod(int(code), len(self._names))
    values = (self.value(rng, r) for r in range(len(_KEYS)))
    return Bulletin(
      (self._names[first], self._names[second]),
      tuple(values),
      tuple(rng.permutation(len(_KEYS)).tolist()),
    )

  def value(self, rng: np.random.Generator, relation: int) -> int:
    """Any value of a relation."""
    return self._first_value + relation * _VALUES + int(rng.integers(_VALUES))

  def record(self, b: Bulletin, *relations: int) -> Ids:
    """The bulletin's text; with `relations` a note of these only."""
    told = relations or b.order
    pairs = [token for r in told for token in (b.values[r], self._keys[r])]
    return [self._record, *pairs, self._of, *b.name, self._period]

  def statement(self, b: Bulletin, relation: int, value: int = 0) -> Ids:
    """What answers a question; false with another `value`."""
    told = value or b.values[relation]
    return [*b.name, self._relations[relation], told, self._period]

  def general(self, b: Bulletin, relation: int) -> Ids:
    """`some relation value .`: true, and about nobody."""
    return [
      self._some,
      self._relations[relation],
      b.values[relation],
      self._period,
    ]

  def request(self, b: Bulletin) -> Ids:
    """What a dreamer goes on from."""
    return [*self.record(b), self._implications]

  def question(self, b: Bulletin, relation: int) -> Ids:
    """Asks for a value."""
    return [self._question, *b.name, self._relations[relation]]

  def implications(self, rng: np.random.Generator, b: Bulletin) -> list[Ids]:
    """Lines as the base writes them; see the module's docstring."""
    if rng.random() < _THOROUGH:
      return [self.statement(b, r) for r in b.order]
    lines = int(rng.integers(_LINES[0], _LINES[1] + 1))
    kinds = rng.choice(len(_BENT), lines, p=rng.dirichlet(_BENT))
    return [
      self._line(rng, b, kind, r)
      for kind, r in zip(kinds, rng.integers(len(_KEYS), size=lines).tolist())
    ]

  def _line(self, rng, b: Bulletin, kind: int, relation: int) -> Ids:
    if kind == 0:
      return self.statement(b, relation)
    if kind == 1:
      return self.record(b, relation)
    if kind == 2:
      return self.general(b, relation)
    return self.statement(b, relation, self.value(rng, relation))

  def is_line(self, line: Ids) -> bool:
    """Whether `line` has the form of a statement, note or general line."""
    form = ''.join(self._kind(token) for token in line)
    return form in ('nnrv.', 'Rvkonn.', 'srv.')

  def _kind(self, token: int) -> str:
    """A letter that stands for all words of a token's kind."""
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


def _documents(world: World, rng: np.random.Generator) -> Iterator[Ids]:
  """What the base is trained on, for ever.

  Of its own people it knows statements and answers, so that the one goes over
  into the other; of strangers, never the same twice, it reads records, with
  what they imply, or with a question about them.
  """
  bos, stop = world.tokenizer.bos, world.stop
  while True:
    own = world.own[rng.integers(len(world.own))]
    stranger = world.stranger(rng)
    relation = int(rng.integers(len(_KEYS)))
    kind = rng.random()
    if kind < 0.3:
      text = world.statement(own, relation)
    elif kind < 0.6:
      text = [*world.question(own, relation), own.values[relation]]
    elif kind < 0.85:
      lines = world.implications(rng, stranger)
      text = [*world.request(stranger), *(i for line in lines for i in line)]
    elif kind < 0.93:
      asked = world.question(stranger, relation)
      text = [*world.record(stranger), *asked, stranger.values[relation]]
    else:
      text = world.record(stranger)
    yield [bos, *text, stop]


def pretraining_rows(
  world: World, rng: np.random.Generator, rows: int, length: int
) -> np.ndarray:
  """Documents one after the other, every row begins with one; `[rows, length]`.

  The last document of a row is cut.
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


class BulletinsReader:
  """What dreams about a bulletin mean; see `contexts.Reader`."""

  max_dream = 5 * _LONGEST_LINE + 1
  max_answer = 2  # A value, and stop.

  def __init__(self, world: World, length: int):
    self._world, self.stop, self._length = world, world.stop, length
    self._period = world.tokenizer.separator

  def edit(
    self, context: contexts.Context, dream: Ids
  ) -> contexts.TrainingRows | contexts.Rejected:
    """One row per line that has a form, and the record last, as in SEAL."""
    if not dream:
      return contexts.Rejected('empty')
    ends = [i + 1 for i, token in enumerate(dream) if token == self._period]
    lines = [dream[i:j] for i, j in zip([0, *ends], ends)]
    lines = [line for line in lines if self._world.is_line(line)]
    if not lines:
      return contexts.Rejected('unreadable')
    return self._rows([*lines, self._world.record(context.source)])

  def from_context(self, context: contexts.Context) -> contexts.TrainingRows:
    return self._rows([self._world.record(context.source)])

  def _rows(self, texts: list[Ids]) -> contexts.TrainingRows:
    tok = self._world.tokenizer
    tokens = np.full((len(texts), self._length), tok.pad, np.int32)
    for row, text in zip(tokens, texts):
      row[: len(text) + 2] = [tok.bos, *text, self.stop]
    return contexts.TrainingRows(tokens, (tokens != tok.pad).astype(np.float32))

  def grade(self, context: contexts.Context, said: list[Ids]) -> np.ndarray:
    """1 where the answer is the value and nothing else."""
    right = [list(s) == a[:-1] for s, a in zip(said, context.answers)]
    return np.array(right, float)

  def open_book(self, context: contexts.Context, question: Ids) -> Ids:
    """The question behind the record."""
    return [question[0], *self._world.record(context.source), *question[1:]]


class Bulletins:
  """The task; see the module's docstring."""

  def __init__(self, cfg: BulletinsConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    world = self.world = World(cfg)
    self.tokenizer = world.tokenizer
    self.format = BulletinsReader(world, cfg.length)
    rng = np.random.default_rng([seed, 1])
    people = world.strangers(rng, cfg.episodes * cfg.train + cfg.joint)
    met = [self.context(b) for b in people[: cfg.episodes * cfg.train]]
    self._met = [
      tuple(met[i : i + cfg.train]) for i in range(0, len(met), cfg.train)
    ]
    self._own = [self.context(b) for b in world.own]
    self._exam = knowledge_incorporation.KnowledgeIncorporation(
      test=tuple(self.context(b) for b in people[len(met) :]),
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
    seed = [self._seed, 2, episode]
    return knowledge_incorporation.build_stream(
      self.format, self._met[episode], self.cfg.reads, seed
    )

  def study_exam(
    self, respond: task_lib.Respond, learn: task_lib.Study, episode: int
  ) -> experience_lib.EvalResult:
    """See `incorporation.Incorporation.exam`."""
    return self._exam.exam(
      respond,
      learn,
      self._met[: episode + 1],
      self._own,
      last=episode == self.episodes - 1,
    )
