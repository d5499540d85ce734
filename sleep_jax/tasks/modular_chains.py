"""`modular_chains`: chains of assignments modulo 23, solved line by line.

A problem defines variables in any order, some of which the question does not
need: `B a+5` is b = a + 5. Its solution names those that it does need, from
the question back, then has a line for each step, a definition with its value,
and the answer:

  D b*3 ; A 7 ; E f+2 ; B a+5 ; F 9 ; ? D :
  D B A ; A 7 ; B a+5 = 12 ; D b*3 = 13 ; ! 13 .

The number of operations is the problem's depth. A privileged prompt shows the
solution first, and asks for one's own:

  (the problem) ? D given D B A ; A 7 ; ... ! 13 . own

What a variable is stands as one token behind its name: to look up what followed
a token before is the first thing that a small model learns, and what followed
two it may never learn.

A night's dreams are problems that the model makes up, with its own solutions
(`ChainsFormat`); they are worth what an instance that has learnt one solves of
the day's problems.

The base has solved shallow problems and very few deeper ones, and has copied
the solutions of both (`modular_chains_base`); an episode brings new problems of
the depths in between. The evaluation is of those depths, of deeper ones and of
shallow ones.
"""

import dataclasses

import numpy as np

from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import padding
from sleep_jax.data import problems as problems_lib
from sleep_jax.data import tokenizers
from sleep_jax.tasks import base as task_lib
from sleep_jax.tasks import solving

MODULUS = 23
_NAMES = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'
_MARKS = '= ; ? : ! . given own'.split()
_OPERATIONS = '+1 +2 +3 +4 +5 *2 *3'.split()  # Each maps one to one.
_TERMS = [f'{name.lower()}{op}' for name in _NAMES for op in _OPERATIONS]
_SLACK = 8  # Tokens that a completion may have beyond the longest solution.
_PROMPT_WEIGHT = 0.1  # Of a problem's tokens in pretraining; most are random.
# Second entry of the seed of a generator.
_TRAIN, _EVAL, _ORDER, _STREAM, _SAMPLES = range(5)


@dataclasses.dataclass(frozen=True)
class ChainsConfig:
  """Depths (first and last), and sizes of an episode and of the evaluation."""

  episodes: config.Count = 4
  problems: config.Count = 128  # New ones of an episode.
  reads: config.Count = 1  # Times that an episode's rows have each of them.
  depths: tuple[int, int] = (5, 6)  # Of the episodes.
  out_of_range: tuple[int, int] = (7, 8)
  old: tuple[int, int] = (1, 4)  # Those that the base has solved.
  distractors: int = 2  # Definitions that the question does not need.
  eval_problems: config.Count = 64  # Of each of the three ranges.
  samples: config.Count = 16  # k of avg@k and pass@k, at temperature 1.
  # Groups of an episode's problems that dreams are about, and what each has.
  contexts: int = 8
  context_problems: config.Count = 8

  def __post_init__(self):
    for name in ('depths', 'out_of_range', 'old'):
      first, last = getattr(self, name)
      if not 1 <= first <= last:
        raise config.ConfigError(
          f'task.{name}={(first, last)} must be two depths, 1 <= first <= last.'
        )
      object.__setattr__(self, name, (first, last))
      needed = last + 1 + self.distractors
      if needed > len(_NAMES):
        raise config.ConfigError(
          f'task.{name}={(first, last)} and task.distractors='
          f'{self.distractors} need {needed} variables, and there are '
          f'{len(_NAMES)}; lower one of them.'
        )

    if self.contexts * self.context_problems > self.problems:
      raise config.ConfigError(
        f'task: contexts={self.contexts} of context_problems='
        f'{self.context_problems} are more than problems={self.problems}; '
        'lower one of them.'
      )

  @property
  def length(self) -> int:
    """Tokens of a row: a problem and its solution."""
    depth = self.depths[1]
    size = _prompt_length(depth, self.distractors) + _solution_length(depth)
    return -(-size // padding.MULTIPLE) * padding.MULTIPLE


def _prompt_length(depth: int, distractors: int) -> int:
  return 1 + 3 * (1 + depth + distractors) + 3


def _solution_length(depth: int) -> int:
  return (depth + 2) + 3 + 5 * depth + 3


def _max_new(depths: tuple[int, int]) -> int:
  """Tokens of the longest completion of a problem of these depths."""
  return _solution_length(depths[1]) + _SLACK


def build_tokenizer() -> tokenizers.WordTokenizer:
  """Numbers, variables and marks."""
  numbers = [str(i) for i in range(MODULUS)]
  return tokenizers.WordTokenizer(
    [*numbers, *_NAMES, *_TERMS, *_MARKS], separator=';', stop='.'
  )


def draw_problem(
  rng: np.random.Generator, depth: int, distractors: int
) -> tuple[str, str, int]:
  """The text of a problem up to the question, its solution, and the answer.

  Distractors are such a chain of their own.
  """
  names = [_NAMES[i] for i in rng.permutation(len(_NAMES))]
  chain, rest = names[: depth + 1], names[depth + 1 :][:distractors]
  definitions, lines, value = _chain(rng, chain)
  if rest:
    definitions = [*definitions, *_chain(rng, rest)[0]]
  shuffled = [definitions[i] for i in rng.permutation(len(definitions))]
  text = ' '.join([*shuffled, '?', chain[-1]])
  trace = ' '.join([*reversed(chain), ';'])
  return text, ' '.join([trace, *lines, '!', str(value), '.']), value


def _chain(
  rng: np.random.Generator, names: list[str]
) -> tuple[list[str], list[str], int]:
  """Definitions in order, a solution's lines, and the last value."""
  value = int(rng.integers(MODULUS))
  definitions = [f'{names[0]} {value} ;']
  lines = list(definitions)
  for before, name in zip(names, names[1:], strict=False):
    operation = str(rng.choice(_OPERATIONS))
    value = _apply(value, operation)
    definition = f'{name} {before.lower()}{operation}'
    definitions.append(f'{definition} ;')
    lines.append(f'{definition} = {value} ;')
  return definitions, lines, value


def solve(problem: str) -> int | None:
  """The answer to a problem, as text up to its question mark's variable.

  None where there is none: the text is no problem, or needs a variable that is
  defined by itself, twice, or not at all.
  """
  *definitions, question = (part.split() for part in problem.split(';'))
  if len(question) != 2 or question[0] != '?':
    return None
  meaning = {name: rest for name, *rest in definitions if rest}
  if len(meaning) < len(definitions):
    return None
  name, operations = question[1], []
  for _ in definitions:
    term = ' '.join(meaning.get(name, ()))
    if term.isdecimal():
      value = int(term)
      for operation in reversed(operations):
        value = _apply(value, operation)
      return value
    if term not in _TERMS:
      return None
    name = term[0].upper()
    operations.append(term[1:])
  return None


def _apply(value: int, operation: str) -> int:
  number = int(operation[1:])
  return (value + number if operation[0] == '+' else value * number) % MODULUS


class _Generator:
  """Problems of some depths, as token ids."""

  def __init__(self, distractors: int, fewest: int):
    self.tokenizer = build_tokenizer()
    self._distractors = fewest, distractors + 1
    self._answer = self.tokenizer.encode('!')[0]
    self._first_number = self.tokenizer.encode('0')[0]

  def draw(
    self,
    rng: np.random.Generator,
    depths: tuple[int, int],
    count: int,
    taken: set[str],
  ) -> problems_lib.Problems:
    """`count` problems that are not `taken`, to which they are added."""
    encode, bos = self.tokenizer.encode, self.tokenizer.bos
    prompts, privileged, solutions, answers = [], [], [], []
    while len(prompts) < count:
      depth = int(rng.integers(depths[0], depths[1] + 1))
      distractors = int(rng.integers(*self._distractors))
      text, solution, answer = draw_problem(rng, depth, distractors)
      if text in taken:
        continue
      taken.add(text)
      prompts.append([bos, *encode(f'{text} :')])
      privileged.append([bos, *encode(f'{text} given {solution} own')])
      solutions.append(encode(solution))
      answers.append(answer)
    return problems_lib.Problems(
      *(prompts, privileged, solutions, answers),
      read=self.read,
      max_new=_max_new(depths),
      stop=self.tokenizer.stop,
    )

  def read(self, completion: contexts.TokenIds) -> int | None:
    """The number after the last answer mark; None where there is none."""
    for mark, token in reversed(list(zip(completion, completion[1:]))):
      if mark == self._answer:
        number = token - self._first_number
        return number if 0 <= number < MODULUS else None
    return None


class ChainsFormat:
  """Self-made problems as self-edits; see `contexts.SelfEditFormat`.

  A context is a group of problems. Its dreams begin as the first of them does,
  by one definition, so that they differ; its evaluation is all of them.
  """

  def __init__(self, cfg: ChainsConfig, tokenizer: tokenizers.WordTokenizer):
    self._length, self._tok = cfg.length, tokenizer
    (self._colon,) = tokenizer.encode(':')
    self.stop = tokenizer.stop
    self.max_dream = cfg.length
    self.max_answer = _max_new(cfg.depths)

  def context(
    self, name: str, problems: problems_lib.Problems
  ) -> contexts.Context:
    """A group of problems as a context."""
    first = problems.prompts[0]
    definition = first.index(self._tok.separator) + 1
    return contexts.Context(
      name,
      prompt=first[:definition],
      questions=problems.prompts,
      answers=problems.solutions,
      source=problems,
    )

  def parse(
    self, context: contexts.Context, dream: contexts.TokenIds
  ) -> contexts.TrainingRows | contexts.Rejected:
    """The made-up problem as a row whose targets are its solution."""
    if not dream:
      return contexts.Rejected('empty')
    tokens = [*context.prompt, *dream, self.stop]
    if tokens.count(self._colon) != 1 or context.source.read(tokens) is None:
      return contexts.Rejected('unreadable')
    if len(tokens) > self._length:
      return contexts.Rejected('too long')
    solution = tokens.index(self._colon) + 1
    return self._rows([(tokens[:solution], tokens[solution:])])

  def from_context(self, context: contexts.Context) -> contexts.TrainingRows:
    """The problems themselves, with their solutions."""
    pairs = zip(context.questions, context.answers, strict=True)
    return self._rows(list(pairs))

  def grade(
    self, context: contexts.Context, answers: list[contexts.TokenIds]
  ) -> np.ndarray:
    """1 for the right number, else 0; `[questions]`."""
    index = np.arange(len(answers))
    return context.source.grade(index, answers).right.astype(float)

  def open_book(
    self, context: contexts.Context, question: contexts.TokenIds
  ) -> contexts.TokenIds:
    """The question after its solution."""
    return context.source.privileged[context.questions.index(question)]

  def _rows(
    self, pairs: list[tuple[contexts.TokenIds, contexts.TokenIds]]
  ) -> contexts.TrainingRows:
    return padding.prompt_rows(pairs, self._tok.pad, width=self._length)


class ModularChains(task_lib.Task):
  """The task; see the module's docstring."""

  name = 'modular_chains'
  Config = ChainsConfig
  columns = (
    *('accuracy', 'pass', 'accuracy_out', 'pass_out', 'accuracy_old'),
    *('entropy', 'tokens', 'truncated', 'unreadable'),
  )
  headline = ('accuracy', 'accuracy_out', 'accuracy_old')
  format: ChainsFormat

  def __init__(self, cfg: ChainsConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    self._generator = _Generator(cfg.distractors, self._fewest())
    self.tokenizer = self._generator.tokenizer
    self.format = ChainsFormat(cfg, self.tokenizer)
    self._taken: set[str] = set()
    rng = np.random.default_rng([seed, _EVAL])
    self.evaluated = {
      suffix: self._generator.draw(rng, depths, cfg.eval_problems, self._taken)
      for suffix, depths in (
        ('', cfg.depths),
        ('_out', cfg.out_of_range),
        ('_old', cfg.old),
      )
    }

  def _fewest(self) -> int:
    """The fewest distractors of a problem."""
    return self.cfg.distractors

  def problems(self, episode: int) -> problems_lib.Problems:
    """Those of an episode; none is of the evaluation."""
    rng = np.random.default_rng([self._seed, _TRAIN, episode])
    return self._generator.draw(
      rng, self.cfg.depths, self.cfg.problems, set(self._taken)
    )

  def experience(self, episode: int) -> experience_lib.Experience:
    """Problems with their solutions in random order; these are the targets."""
    cfg, problems = self.cfg, self.problems(episode)
    rng = np.random.default_rng([self._seed, _ORDER, episode])
    rows = solving.rows(
      problems, self.tokenizer.pad, cfg.length, cfg.reads, rng
    )
    return experience_lib.Experience(
      *(rows.tokens, rows.weight),
      contexts=self._contexts(episode, problems),
      problems=problems,
    )

  def _contexts(
    self, episode: int, problems: problems_lib.Problems
  ) -> tuple[contexts.Context, ...]:
    """The first problems of an episode in groups."""
    size = self.cfg.context_problems
    return tuple(
      self.format.context(
        f'problems {episode}.{i}',
        problems.some(slice(i * size, (i + 1) * size)),
      )
      for i in range(self.cfg.contexts)
    )

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """Scores by depth: `_out` is deeper than the episodes', `_old` shallower.

    The metrics are those of `solving.score`.
    """
    del episode
    metrics = {}
    for number, (suffix, problems) in enumerate(self.evaluated.items()):
      scores = solving.score(
        student, problems, self.cfg.samples, self._sample_seed(number)
      )
      metrics |= {f'{name}{suffix}': x for name, x in scores.items()}
    return experience_lib.EvalResult([], metrics)

  def audit(
    self, student: task_lib.Student, episode: int, documents: list[list[int]]
  ) -> dict[str, float]:
    """See `Audited`, of made-up problems: whether their answers are right.

    `unread` are problems without an answer; none is asked again.
    """
    del student, episode
    kinds = [self._kind(row) for row in documents]
    names = ('true', 'outdated', 'false', 'unread', 'unreadable')
    shares = {name: kinds.count(name) / max(len(kinds), 1) for name in names}
    return shares | {'believed': float('nan')}

  def _kind(self, row: list[int]) -> str:
    words = self.tokenizer.decode([i for i in row if i != self.tokenizer.bos])
    problem, colon, _ = words.partition(':')
    found = self._generator.read(row)
    if not colon or found is None:
      return 'unreadable'
    answer = solve(problem)
    if answer is None:
      return 'unread'
    return 'true' if found == answer else 'false'

  def _sample_seed(self, number: int) -> int:
    """Of the samples of evaluation `number`, the same after every episode."""
    rng = np.random.default_rng([self._seed, _SAMPLES, number])
    return int(rng.integers(2**31))


@dataclasses.dataclass(frozen=True)
class ChainsBaseConfig(ChainsConfig):
  """Size of an episode of the base's training."""

  rows: config.Count = 12_800
  # Of the problems that are solved, those of `depths`; the others are `old`.
  deep_share: config.Fraction = 0.01
  contexts: int = 0
  distractors: int = 3  # At most: where they are is not to be learnt by heart.

  @property
  def length(self) -> int:
    """Tokens of a row: a privileged prompt and a solution."""
    depth = self.depths[1]
    size = _prompt_length(depth, self.distractors) + 1
    size += 2 * _solution_length(depth)
    return -(-size // padding.MULTIPLE) * padding.MULTIPLE


class ModularChainsBase(ModularChains):
  """What the base of `modular_chains` is trained on.

  Every second row has problems with their solutions, as many as fit, hardly any
  of them deep. The others are a problem of any depth but those `out_of_range`,
  with a privileged prompt: there the second solution alone is a target.
  """

  name = 'modular_chains_base'
  Config = ChainsBaseConfig
  columns = (
    *('accuracy_old', 'accuracy', 'accuracy_out'),
    *('accuracy_privileged', 'entropy', 'truncated'),
  )
  headline = ('accuracy', 'accuracy_privileged')

  def _fewest(self) -> int:
    return 0

  def experience(self, episode: int) -> experience_lib.LazyExperience:
    """Rows of both kinds, drawn while they are read."""
    return experience_lib.LazyExperience(
      self.cfg.rows, self._draw, (self._seed, _STREAM, episode)
    )

  def _draw(
    self, rng: np.random.Generator, rows: int
  ) -> tuple[np.ndarray, np.ndarray]:
    cfg, taken = self.cfg, set(self._taken)
    copied = rows // 2
    every = cfg.old[0], cfg.depths[1]
    shown = self._generator.draw(rng, every, copied, taken)
    copies = padding.prompt_rows(
      list(zip(shown.privileged, shown.solutions, strict=True)),
      self.tokenizer.pad,
      width=cfg.length,
    )
    tokens = np.full((rows, cfg.length), self.tokenizer.pad, np.int32)
    weight = np.zeros(tokens.shape, np.float32)
    order = rng.permutation(rows)
    tokens[order[:copied]], weight[order[:copied]] = (
      copies.tokens,
      copies.weight,
    )
    for row in order[copied:]:
      end = 0
      while True:
        deep = rng.random() < cfg.deep_share
        depths = cfg.depths if deep else cfg.old
        one = self._generator.draw(rng, depths, 1, taken)
        prompt, solution = one.prompts[0], one.solutions[0]
        start, end = end, end + len(prompt) + len(solution)
        if end > cfg.length:
          break
        tokens[row, start:end] = prompt + solution
        weight[row, start:end] = _PROMPT_WEIGHT
        weight[row, start + len(prompt) : end] = 1.0
    return tokens, weight

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """As `ModularChains`, and `_privileged`: who has seen the solution.

    That is the teacher of OPSD as training begins; it can teach what it has
    beyond `accuracy`.
    """
    result = super().evaluate(student, episode)
    problems = self.evaluated['']
    shown = solving.score(
      student,
      problems,
      self.cfg.samples,
      self._sample_seed(len(self.evaluated)),
      problems.privileged,
    )
    metrics = {f'{name}_privileged': x for name, x in shown.items()}
    return experience_lib.EvalResult([], result.metrics | metrics)
