"""`facts`: each episode has new facts about entities unknown to the base.

A fact is `name surname relation value .`, five words of a closed vocabulary.
The base model is trained on a fixed set of facts; each episode has facts of new
entities. The evaluation is closed book, over all episodes so far and over the
base's facts, at the start of a document and after other facts. A relation may
have several wordings, of which one is only ever asked about, and facts may
change their value from one episode to the next.
"""

import dataclasses

import numpy as np
from numpy import typing as npt

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
  """Size of the vocabulary, of an episode and of the evaluation."""

  episodes: config.Count = 8
  # New ones per episode, each with all four relations.
  entities: config.Count = 6
  base_entities: config.Count = 24
  rows: config.Count = 240  # Rows of an episode's stream.
  length: config.Count = 64  # Tokens of a row.
  context: int = 8  # Facts before the question of a mixed-context probe.
  probes: config.Count = 2  # Mixed contexts per fact.
  # Words for each relation. Streams have all but the last, questions that one;
  # the base knows all of them, and that they say the same.
  wordings: config.Count = 1
  # Facts of earlier episodes that an episode tells again, with another value.
  changes: int = 0
  world_seed: int = 0  # Of the base's facts; must be that of its pretraining.


def _wording(number: int) -> list[str]:
  """A word for each relation."""
  return [r if not number else f'{r}~{number}' for r in RELATIONS]


def build_tokenizer(wordings: int = 1) -> tokenizers.WordTokenizer:
  """The closed vocabulary of `facts`."""
  values = [f'{r.split("-")[0]}{i}' for r in RELATIONS for i in range(_VALUES)]
  others = sum(map(_wording, range(1, wordings)), [])
  return tokenizers.WordTokenizer(
    ['.', *SYLLABLES, *RELATIONS, *values, *others], separator='.'
  )


class FactEncoder:
  """Entities and facts as tokens; an array of facts is `[facts, 5]`."""

  def __init__(self, tokenizer: tokenizers.WordTokenizer, wordings: int = 1):
    self._name = np.array([tokenizer.encode(s)[0] for s in SYLLABLES])
    self._wordings = np.array(
      [tokenizer.encode(' '.join(_wording(i))) for i in range(wordings)]
    )
    self._relation = self._wordings[0]
    self._first_value = tokenizer.encode('lives0')[0]
    self._stop = tokenizer.separator
    self._bos = tokenizer.bos

  def pairs(
    self, rng: np.random.Generator, n: int, taken: npt.ArrayLike = ()
  ) -> np.ndarray:
    """`n` distinct entities that are not `taken`, `[n]` codes."""
    free = np.setdiff1d(np.arange(len(SYLLABLES) ** 2), np.array(taken, int))
    if n > len(free):
      raise config.ConfigError(
        f'task: {n} new entities are wanted but only {len(free)} names are '
        'left; lower task.entities or task.episodes.'
      )
    return rng.choice(free, n, replace=False)

  def facts(self, rng: np.random.Generator, pairs: np.ndarray) -> np.ndarray:
    """A random fact per entity and relation, `[entities * relations, 5]`."""
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

  def reword(
    self, facts: np.ndarray, wordings: int, rng: np.random.Generator
  ) -> np.ndarray:
    """Facts `[..., 5]`, each in one of the first `wordings` wordings."""
    if wordings <= 1:
      return facts
    return self._in(facts, rng.integers(0, wordings, facts.shape[:-1]))

  def as_asked(self, facts: np.ndarray) -> np.ndarray:
    """Facts `[..., 5]` in the last wording."""
    return self._in(facts, np.array(len(self._wordings) - 1))

  def _in(self, facts: np.ndarray, wording: np.ndarray) -> np.ndarray:
    facts = facts.copy()
    facts[..., 2] = self._wordings[wording, self._relation_of(facts)]
    return facts

  def _relation_of(self, facts: np.ndarray) -> np.ndarray:
    return (facts[..., 3] - self._first_value) // _VALUES

  def parse(self, document: list[int]) -> list[tuple[int, ...] | None]:
    """The facts of a document in the first wording; None for what is none.

    What is cut off at its end is left out.
    """
    words = [token for token in document if token != self._bos]
    ends = [i for i, token in enumerate(words) if token == self._stop]
    starts = [0, *(i + 1 for i in ends)]
    facts: list[tuple[int, ...] | None] = []
    for start, end in zip(starts, ends):  # The last start has no end.
      fact = words[start : end + 1]
      if not self._is_fact(fact):
        facts.append(None)
      else:
        (in_first,) = self._in(np.array([fact]), np.array(0)).tolist()
        facts.append(tuple(in_first))
    return facts

  def _is_fact(self, words: list[int]) -> bool:
    if len(words) != _FACT or not np.isin(words[:2], self._name).all():
      return False
    (relation,) = self._relation_of(np.array([words])).tolist()
    return (
      0 <= relation < len(RELATIONS) and words[2] in self._wordings[:, relation]
    )

  def change(self, facts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The facts with other values."""
    facts, first = facts.copy(), self._relation_of(facts) * _VALUES
    first += self._first_value
    by = rng.integers(1, _VALUES, len(facts))
    facts[:, 3] = first + (facts[:, 3] - first + by) % _VALUES
    return facts

  def rows(self, facts_RxNx5: np.ndarray, length: int) -> np.ndarray:
    """Documents: BOS, then the row's facts, cut at `length`."""
    rows = facts_RxNx5.shape[0]
    bos = np.full((rows, 1), self._bos, np.int32)
    return np.concatenate([bos, facts_RxNx5.reshape(rows, -1)], 1)[:, :length]


def base_facts(
  encoder: FactEncoder, cfg: FactsConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Entities and facts that the base model is trained on."""
  rng = np.random.default_rng([cfg.world_seed, 7])
  pairs = encoder.pairs(rng, cfg.base_entities)
  return pairs, encoder.facts(rng, pairs)


def pretraining_rows(
  encoder: FactEncoder, cfg: FactsConfig, rng: np.random.Generator, rows: int
) -> np.ndarray:
  """Documents for the base, `[rows, length]`: its facts, and new entities.

  In every third document three quarters of the facts are one to six facts of
  new entities, repeated, so that the base also learns to read its context.
  """
  _, known = base_facts(encoder, cfg)
  per_row = -(-(cfg.length - 1) // _FACT)
  pick = known[rng.integers(0, len(known), (rows, per_row))]
  for row in range(0, rows, 3):
    new_facts = rng.permutation(encoder.facts(rng, encoder.pairs(rng, 3)))
    repeated = new_facts[rng.integers(0, rng.integers(1, 7), per_row)]
    swap = rng.random(per_row) < 0.75
    pick[row, swap] = repeated[swap]
  return encoder.rows(encoder.reword(pick, cfg.wordings, rng), cfg.length)


def pretraining_windows(
  encoder: FactEncoder,
  cfg: FactsConfig,
  rng: np.random.Generator,
  rows: int,
  context: int,
  new_entities: int,
) -> windows.WindowBatch:
  """Sequences that train a hybrid to carry context in its recurrent states.

  Facts of 1 to `new_entities` new entities are read over 0 to `context`
  windows, each fact about equally often. The document to be predicted has three
  quarters of these, one quarter of the base's facts. All of its tokens are
  targets, so the hybrid also learns to generate, unprompted, what its states
  hold: its replay samples.
  """
  _, known = base_facts(encoder, cfg)
  whole, per_row = (cfg.length - 1) // _FACT, -(-(cfg.length - 1) // _FACT)
  stream = np.zeros((rows, context, per_row, _FACT), np.int32)
  document = known[rng.integers(0, len(known), (rows, per_row))]
  read = rng.integers(0, context + 1, rows)
  for row in range(rows):
    pairs = encoder.pairs(rng, int(rng.integers(1, new_entities + 1)))
    new_facts = encoder.facts(rng, pairs)
    shape = stream[row].shape
    stream[row] = order_lib.shuffled(
      new_facts, shape[0] * shape[1], rng
    ).reshape(shape)
    if read[row]:  # Only facts that were read whole can be predicted.
      new_facts = stream[row, : read[row], :whole].reshape(-1, _FACT)
    swap = rng.random(per_row) < 0.75
    document[row, swap] = new_facts[rng.integers(0, len(new_facts), swap.sum())]
  flat = stream.reshape(-1, per_row, _FACT)
  tokens = encoder.rows(flat, cfg.length).reshape(rows, context, cfg.length)
  token_mask = np.arange(context) < read[:, None]
  token_mask = np.repeat(token_mask[..., None], cfg.length, axis=2)
  document = encoder.rows(document, cfg.length)
  inputs, targets = document[:, :-1], document[:, 1:]
  return windows.WindowBatch(
    context=np.where(token_mask, tokens, windows.PAD),
    token_mask=token_mask,
    inputs=inputs,
    input_mask=np.ones(inputs.shape, bool),
    targets=targets,
    weight=np.ones(inputs.shape, np.float32),
    depth=np.zeros(inputs.shape, np.int32),
  )


class Facts(task_lib.Task):
  """The task; see the module's docstring."""

  name = 'facts'
  Config = FactsConfig
  columns = (
    'accuracy_first',
    'accuracy',
    'accuracy_last',
    'base_accuracy',
    'answer_prob',
  )
  headline = ('accuracy_first', 'accuracy', 'base_accuracy')

  def __init__(self, cfg: FactsConfig, seed: int):
    self.cfg, self.episodes = cfg, cfg.episodes
    self.tokenizer = build_tokenizer(cfg.wordings)
    self._seed = seed
    self._encoder = FactEncoder(self.tokenizer, cfg.wordings)
    if cfg.changes:
      self.columns = (*self.columns, 'accuracy_changed')
    taken, self._base = base_facts(self._encoder, cfg)
    rng = np.random.default_rng([seed, 1])
    pairs = self._encoder.pairs(rng, cfg.episodes * cfg.entities, taken)
    new = [
      self._encoder.facts(rng, p)
      for p in pairs.reshape(cfg.episodes, cfg.entities)
    ]
    # What each episode tells; what is true after it, by the episode that was
    # the first to tell it; and which of that has ever changed.
    self._told, self._true, self._changed = [], [], []
    true, changed = np.zeros((0, _FACT), np.int32), np.zeros(0, bool)
    for episode, facts in enumerate(new):
      draw = np.random.default_rng([seed, 4, episode])
      again = draw.permutation(len(true))[: cfg.changes]
      true = true.copy()
      true[again] = self._encoder.change(true[again], draw)
      changed = changed.copy()
      changed[again] = True
      self._told.append(np.concatenate([facts, true[again]]))
      true = np.concatenate([true, facts])
      changed = np.concatenate([changed, np.zeros(len(facts), bool)])
      self._true.append(np.split(true, episode + 1))
      self._changed.append(changed)

  def experience(self, episode: int) -> experience_lib.Experience:
    """The facts of the episode, each equally often, in random order."""
    rng = np.random.default_rng([self._seed, 2, episode])
    facts, cfg = self._told[episode], self.cfg
    per_row = -(-(cfg.length - 1) // _FACT)
    stream = order_lib.shuffled(facts, cfg.rows * per_row, rng)
    stream = self._encoder.reword(stream, cfg.wordings - 1, rng)
    stream = stream.reshape(cfg.rows, per_row, _FACT)
    tokens = self._encoder.rows(stream, cfg.length)
    return experience_lib.Experience(tokens, np.ones(tokens.shape, np.float32))

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """Accuracy after other facts; `_at_start`: at a document's start.

    accuracy, accuracy_first, accuracy_last: mean over episodes, of the first
      and of the newest one.
    accuracy_changed: of facts that have changed, by their newest value; 0 while
      none has.
    base_accuracy: on the base's facts.
    answer_prob, answer_prob_first: probability of the value, as accuracy.
    """
    rng = np.random.default_rng([self._seed, 3, episode])
    groups = [self._base, *self._true[episode]]
    known = np.concatenate(groups)
    start, mixed, sizes = [], [], []
    for facts in groups:
      sizes.append(len(facts))
      for fact in facts:
        start.append((fact, known[:0]))
        for _ in range(self.cfg.probes):
          others = known[(known != fact).any(1)]
          others = rng.choice(others, self.cfg.context)
          told = self._encoder.reword(others, self.cfg.wordings - 1, rng)
          mixed.append((fact, told))
    hit_start, _ = self._probe(student, start)
    hit_mixed, prob = self._probe(student, mixed)
    group = np.repeat(np.arange(len(groups)), sizes)
    group_mixed = np.repeat(group, self.cfg.probes)

    def means(x: np.ndarray, group: np.ndarray) -> list[float]:
      return [float(x[group == g].mean()) for g in range(len(groups))]

    accuracy = means(hit_mixed, group_mixed)
    at_start = means(hit_start, group)
    answer_prob = means(prob, group_mixed)
    metrics = {}
    if self.cfg.changes:
      new = hit_mixed[group_mixed > 0].reshape(-1, self.cfg.probes)
      changed = new[self._changed[episode]]
      metrics['accuracy_changed'] = float(changed.sum() / max(changed.size, 1))
    return experience_lib.EvalResult(
      by_episode=accuracy[1:],
      metrics=metrics
      | {
        'base_accuracy': accuracy[0],
        'accuracy': float(np.mean(accuracy[1:])),
        'accuracy_first': accuracy[1],
        'accuracy_last': accuracy[-1],
        'accuracy_at_start': float(np.mean(at_start[1:])),
        'accuracy_first_at_start': at_start[1],
        'base_accuracy_at_start': at_start[0],
        'answer_prob': float(np.mean(answer_prob[1:])),
        'answer_prob_first': answer_prob[1],
      },
    )

  def _probe(
    self,
    student: task_lib.Student,
    probes: list[tuple[np.ndarray, np.ndarray]],
  ) -> tuple[np.ndarray, np.ndarray]:
    """Of each (fact, context): whether its value is answered, and its prob."""
    asked = self._encoder.as_asked(np.array([fact for fact, _ in probes]))
    prompts = [
      [self.tokenizer.bos, *context.reshape(-1).tolist(), *fact[:3].tolist()]
      for fact, (_, context) in zip(asked, probes, strict=True)
    ]
    answers = [[int(fact[3])] for fact, _ in probes]
    response = student.respond(prompts, answers)
    return response.exact.astype(float), np.exp(response.answer_logprob)

  def audit(
    self, student: task_lib.Student, episode: int, documents: list[list[int]]
  ) -> dict[str, float]:
    """See `Audited`; outdated and false facts are asked for by themselves."""
    newest, told = {}, set()
    for facts in (self._base, *self._told[: episode + 1]):
      for *about, value, _ in facts.tolist():
        newest[tuple(about)] = value
        told.add((*about, value))
    kinds: dict[str, list[tuple[int, ...]]] = {
      kind: [] for kind in ('true', 'outdated', 'false', 'unread')
    }
    statements = [x for row in documents for x in self._encoder.parse(row)]
    for fact in statements:
      if fact is None:
        continue
      *about, value, _ = fact
      if tuple(about) not in newest:
        kind = 'unread'
      elif value == newest[tuple(about)]:
        kind = 'true'
      else:
        kind = 'outdated' if (*about, value) in told else 'false'
      kinds[kind].append(fact)
    total = max(len(statements), 1)
    shares = {kind: len(facts) / total for kind, facts in kinds.items()}
    shares['unreadable'] = statements.count(None) / total
    wrong = sorted(set(kinds['outdated'] + kinds['false']))
    shares['believed'] = float('nan')
    if wrong:
      nothing = self._base[:0]
      hits, _ = self._probe(student, [(x, nothing) for x in np.array(wrong)])
      shares['believed'] = float(hits.mean())
    return shares
