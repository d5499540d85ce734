"""`facts`: every episode tells new facts about entities nobody has heard of.

A fact is `name surname relation value .`, five words of a closed vocabulary. A
base model knows the facts of its own world by heart, and knows the form; each
episode brings new entities, whose facts it can only learn by living. The exam
is closed book, over all episodes and over the base's own world, at the start
of a document and in the middle of other facts.
"""

import dataclasses

import numpy as np

from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.data import tokenizers
from sleep_jax.data import windows
from sleep_jax.tasks import base as task_lib

_ONSETS = 'b d f g k l m n p r s t v z br st'.split()
_NUCLEI = 'a e i o'.split()
SYLLABLES = [o + n for o in _ONSETS for n in _NUCLEI]
RELATIONS = ('lives-in', 'works-as', 'eats', 'plays')
_VALUES = 24  # Of each relation.
_FACT = 5  # Words.


@dataclasses.dataclass(frozen=True)
class FactsConfig:
  """Size of the world and of a day."""

  episodes: int = 8
  entities: int = 6  # New ones per episode, each with every relation.
  base_entities: int = 24
  rows: int = 240  # Rows of an episode's stream.
  length: int = 64  # Tokens of a row.
  context: int = 8  # Facts before the question in a mixed-context probe.
  probes: int = 2  # Mixed contexts per fact.
  world_seed: int = 0  # Of the base's own facts; must match the base's.


def build_tokenizer() -> tokenizers.WordTokenizer:
  """The closed vocabulary of `facts`."""
  values = [f'{r.split("-")[0]}{i}' for r in RELATIONS for i in range(_VALUES)]
  return tokenizers.WordTokenizer(
    ['.', *SYLLABLES, *RELATIONS, *values], separator='.'
  )


class World:
  """Token arrays of facts; every array is `[facts, 5]`."""

  def __init__(self, tokenizer: tokenizers.WordTokenizer):
    self._name = np.array([tokenizer.encode(s)[0] for s in SYLLABLES])
    self._relation = np.array([tokenizer.encode(r)[0] for r in RELATIONS])
    self._first_value = tokenizer.encode('lives0')[0]
    self._stop = tokenizer.separator
    self._bos = tokenizer.bos

  def pairs(self, rng: np.random.Generator, n: int, taken=()) -> np.ndarray:
    """`n` distinct entities that are not `taken`, `[n]` codes."""
    free = np.setdiff1d(np.arange(len(SYLLABLES) ** 2), np.array(taken, int))
    if n > len(free):
      raise config.ConfigError(
        f'task: {n} new entities are wanted but only {len(free)} names are '
        'left; lower task.entities or task.episodes.'
      )
    return rng.choice(free, n, replace=False)

  def facts(self, rng: np.random.Generator, pairs: np.ndarray) -> np.ndarray:
    """One random fact per entity and relation, `[entities * relations, 5]`."""
    n, r = len(pairs), len(RELATIONS)
    value = rng.integers(0, _VALUES, (n, r)) + np.arange(r) * _VALUES
    first, second = np.divmod(np.repeat(pairs, r), len(SYLLABLES))
    return np.stack(
      [
        self._name[first],
        self._name[second],
        np.tile(self._relation, n),
        value.reshape(-1) + self._first_value,
        np.full(n * r, self._stop),
      ],
      axis=1,
    ).astype(np.int32)

  def rows(self, facts_RxNx5: np.ndarray, length: int) -> np.ndarray:
    """Documents: BOS, then the row's facts, cut at `length`."""
    rows = facts_RxNx5.shape[0]
    bos = np.full((rows, 1), self._bos, np.int32)
    return np.concatenate([bos, facts_RxNx5.reshape(rows, -1)], 1)[:, :length]


def base_facts(world: World, cfg: FactsConfig) -> tuple[np.ndarray, np.ndarray]:
  """Entities and facts that the base model is trained on."""
  rng = np.random.default_rng([cfg.world_seed, 7])
  pairs = world.pairs(rng, cfg.base_entities)
  return pairs, world.facts(rng, pairs)


def pretraining_rows(
  world: World, cfg: FactsConfig, rng: np.random.Generator, rows: int
) -> np.ndarray:
  """Documents for the base: its own facts, and passing strangers.

  In every third document most facts are about strangers, one to six facts,
  and come up again, so that the base also learns to read from its context.
  """
  _, known = base_facts(world, cfg)
  per_row = -(-(cfg.length - 1) // _FACT)
  pick = known[rng.integers(0, len(known), (rows, per_row))]
  for row in range(0, rows, 3):
    strangers = rng.permutation(world.facts(rng, world.pairs(rng, 3)))
    told = strangers[rng.integers(0, rng.integers(1, 7), per_row)]
    swap = rng.random(per_row) < 0.75
    pick[row, swap] = told[swap]
  return world.rows(pick, cfg.length)


def pretraining_windows(
  world: World,
  cfg: FactsConfig,
  rng: np.random.Generator,
  rows: int,
  context: int,
  strangers: int,
) -> windows.WindowBatch:
  """Sequences that teach a hybrid to keep what it has read.

  One to `strangers` entities that nobody knows are told of over none to
  `context` windows, each of their facts about as often as any other. The
  document to be predicted is three quarters about those, one quarter about the
  base's own world. All of it is asked for, so the hybrid also learns to speak,
  unasked, of what it keeps: that is what it will dream.
  """
  _, known = base_facts(world, cfg)
  whole, per_row = (cfg.length - 1) // _FACT, -(-(cfg.length - 1) // _FACT)
  told = np.zeros((rows, context, per_row, _FACT), np.int32)
  document = known[rng.integers(0, len(known), (rows, per_row))]
  read = rng.integers(0, context + 1, rows)
  for row in range(rows):
    pairs = world.pairs(rng, rng.integers(1, strangers + 1))
    news = world.facts(rng, pairs)
    told[row] = order_lib.shuffled(news, told[row, ..., 0].size, rng).reshape(
      told[row].shape
    )
    if read[row]:  # What was not told, nobody can know.
      news = told[row, : read[row], :whole].reshape(-1, _FACT)
    swap = rng.random(per_row) < 0.75
    document[row, swap] = news[rng.integers(0, len(news), swap.sum())]
  flat = told.reshape(-1, per_row, _FACT)
  stream = world.rows(flat, cfg.length).reshape(rows, context, cfg.length)
  present = np.arange(context) < read[:, None]
  present = np.repeat(present[..., None], cfg.length, axis=2)
  document = world.rows(document, cfg.length)
  inputs, targets = document[:, :-1], document[:, 1:]
  return windows.WindowBatch(
    context=np.where(present, stream, windows.PAD),
    token_mask=present,
    inputs=inputs,
    input_mask=np.ones(inputs.shape, bool),
    targets=targets,
    weight=np.ones(inputs.shape, np.float32),
    depth=np.zeros(inputs.shape, np.int32),
  )


class Facts:
  """The task; see the module's docstring."""

  def __init__(self, cfg: FactsConfig, seed: int):
    self.cfg, self.episodes = cfg, cfg.episodes
    self.tokenizer = build_tokenizer()
    self._seed = seed
    self._world = World(self.tokenizer)
    taken, self._base = base_facts(self._world, cfg)
    rng = np.random.default_rng([seed, 1])
    pairs = self._world.pairs(rng, cfg.episodes * cfg.entities, taken)
    self._new = [
      self._world.facts(rng, p)
      for p in pairs.reshape(cfg.episodes, cfg.entities)
    ]

  def experience(self, episode: int) -> experience_lib.Experience:
    rng = np.random.default_rng([self._seed, 2, episode])
    facts, cfg = self._new[episode], self.cfg
    per_row = -(-(cfg.length - 1) // _FACT)
    stream = order_lib.shuffled(facts, cfg.rows * per_row, rng)
    stream = stream.reshape(cfg.rows, per_row, _FACT)
    tokens = self._world.rows(stream, cfg.length)
    return experience_lib.Experience(tokens, np.ones(tokens.shape, np.float32))

  def exam(
    self, respond: task_lib.Respond, episode: int
  ) -> experience_lib.EvalResult:
    rng = np.random.default_rng([self._seed, 3, episode])
    groups = [self._base, *self._new[: episode + 1]]
    known = np.concatenate(groups)
    start, mixed, sizes = [], [], []
    for facts in groups:
      sizes.append(len(facts))
      for fact in facts:
        start.append((fact, known[:0]))
        for _ in range(self.cfg.probes):
          others = known[(known != fact).any(1)]
          mixed.append((fact, rng.choice(others, self.cfg.context)))
    hit_start, _ = self._probe(respond, start)
    hit_mixed, prob = self._probe(respond, mixed)
    where = np.repeat(np.arange(len(groups)), sizes)
    where_mixed = np.repeat(where, self.cfg.probes)

    def means(x: np.ndarray, where: np.ndarray) -> list[float]:
      return [float(x[where == g].mean()) for g in range(len(groups))]

    recall = means(hit_mixed, where_mixed)
    return experience_lib.EvalResult(
      by_episode=recall[1:],
      metrics={
        'base': recall[0],
        'recall': float(np.mean(recall[1:])),
        'first': recall[1],
        'newest': recall[-1],
        'recall_at_start': float(np.mean(means(hit_start, where)[1:])),
        'first_at_start': means(hit_start, where)[1],
        'base_at_start': means(hit_start, where)[0],
        'answer_prob': float(np.mean(means(prob, where_mixed)[1:])),
        'answer_prob_first': means(prob, where_mixed)[1],
      },
    )

  def _probe(self, respond, probes) -> tuple[np.ndarray, np.ndarray]:
    """Whether each value is recalled, and its probability."""
    prompts = [
      [self.tokenizer.bos, *context.reshape(-1).tolist(), *fact[:3].tolist()]
      for fact, context in probes
    ]
    answers = [[int(fact[3])] for fact, _ in probes]
    got = respond(prompts, answers)
    return got.exact.astype(float), np.exp(got.answer_logprob)
