r"""`mathematics`: problems in words and formulas, with answers to be checked.

For models with a chat template, or without (`data.chat`). Problems are those of
GSM8K, or JSON lines by path with `problem` (or `question`), `answer` and, to
train on, `solution`: the columns of AIME 2024 and 2025, of MathArena's HMMT and
of OpenThoughts, whose licences do not let us ship them. The final answer is
that of the last `\boxed{}`; see `data.answers` for when two agree.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re

from absl import logging
import numpy as np

from sleep_jax import config
from sleep_jax.data import answers as answers_lib
from sleep_jax.data import chat
from sleep_jax.data import contexts
from sleep_jax.data import datasets
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import problems as problems_lib
from sleep_jax.data import tokenizers
from sleep_jax.data import untrusted
from sleep_jax.tasks import base as task_lib
from sleep_jax.tasks import solving

_REQUEST = 'Solve this problem step by step. Put the final answer in \\boxed{}.'
_SHOWN = (
  'Here is how it can be solved:\n\n{solution}\n\nNow that you have understood '
  'this solution, solve the problem yourself, in your own words.'
)
_GSM8K = 'gsm8k/'
_CALCULATED = re.compile(r'<<[^>]*>>')  # GSM8K's notes for a calculator.
_ORDER, _CHOICE, _SAMPLES = range(3)  # Second entry of a generator's seed.


@dataclasses.dataclass(frozen=True)
class MathematicsConfig:
  """Where problems come from, and sizes of an episode and the evaluation."""

  tokenizer: str = ''  # A folder; '' = that of the base.
  # gsm8k/train, gsm8k/test, or the path of a file of JSON lines.
  train: str = 'gsm8k/train'
  test: str = 'gsm8k/test'
  test_sha256: str = ''  # What the test file must have; '' = anything.
  episodes: config.Count = 2
  problems: config.Count = 64  # New ones of an episode.
  reads: config.Count = 1  # Times that an episode's rows have each of them.
  length: config.Count = 512  # Tokens of a row: a problem and its solution.
  max_new: config.Count = 256  # Tokens of a solution.
  eval_problems: config.Count = 32
  samples: config.Count = 4  # k of avg@k and pass@k, at temperature 1.
  data_dir: str = ''


@dataclasses.dataclass(frozen=True)
class _Problem:
  question: str
  answer: str
  solution: str | None


class Mathematics(task_lib.Task):
  """The task; see the module's docstring."""

  name = 'mathematics'
  Config = MathematicsConfig
  columns = (
    *('accuracy', 'accuracy_se', 'pass', 'entropy', 'tokens'),
    *('truncated', 'unreadable'),
  )
  headline = ('accuracy',)

  def __init__(self, cfg: MathematicsConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
    self._chat = chat.of(self.tokenizer)
    test = _load(cfg.test, cfg.data_dir, cfg.test_sha256)
    answers_lib.check_comparable([p.answer for p in test])
    rng = np.random.default_rng([seed, _CHOICE])
    self.evaluated = self._problems(_choice(test, cfg.eval_problems, rng))
    train = _load(cfg.train, cfg.data_dir)
    answers_lib.check_comparable([p.answer for p in train])
    self._train = self._that_fit(train, rng)

  def _that_fit(
    self, train: list[_Problem], rng: np.random.Generator
  ) -> list[_Problem]:
    """As many as the episodes need, with solutions that fit a row."""
    cfg, chosen, left_out = self.cfg, [], 0
    needed = cfg.episodes * cfg.problems
    for i in rng.permutation(len(train)):
      problem = train[i]
      if problem.solution is None:
        continue
      solution = self._solution(problem)
      size = len(self._prompt(problem)) + len(solution)
      if size > cfg.length or len(solution) > cfg.max_new:
        left_out += 1
        continue
      chosen.append(problem)
      if len(chosen) == needed:
        break
    if left_out:
      logging.warning(
        '%d problems of %s were left out: with their solutions they exceed '
        'task.length=%d tokens, or these task.max_new=%d.',
        *(left_out, cfg.train, cfg.length, cfg.max_new),
      )
    if len(chosen) < needed:
      raise config.ConfigError(
        f'task.train={cfg.train} has {len(chosen)} problems whose solutions '
        f'fit task.length={cfg.length} and task.max_new={cfg.max_new}, and '
        f'{cfg.episodes} episodes of {cfg.problems} need {needed}; raise the '
        'former, or lower task.problems.'
      )
    return chosen

  def _prompt(self, problem: _Problem) -> contexts.TokenIds:
    return self._chat.prompt(f'{_REQUEST}\n\n{problem.question}')

  def _privileged(self, problem: _Problem) -> contexts.TokenIds:
    shown = _SHOWN.format(solution=problem.solution)
    return self._chat.prompt(f'{_REQUEST}\n\n{problem.question}\n\n{shown}')

  def _solution(self, problem: _Problem) -> contexts.TokenIds:
    text = problem.solution or ''
    if answers_lib.final(text) is None:
      text = f'{text}\n\\boxed{{{problem.answer}}}'
    return [*self.tokenizer.encode(text), self.tokenizer.stop]

  def _problems(self, chosen: list[_Problem]) -> problems_lib.Problems:
    return problems_lib.Problems(
      [self._prompt(p) for p in chosen],
      [self._privileged(p) for p in chosen],
      [self._solution(p) for p in chosen],
      [p.answer for p in chosen],
      read=self.read,
      max_new=self.cfg.max_new,
      stop=self.tokenizer.stop,
      agree=answers_lib.agree,
    )

  def read(self, completion: contexts.TokenIds) -> str | None:
    """The final answer of a completion; None where it has none."""
    return answers_lib.final(self.tokenizer.decode(completion))

  def experience(self, episode: int) -> experience_lib.Experience:
    """Problems with their solutions in random order; these are the targets."""
    cfg = self.cfg
    start = episode * cfg.problems
    problems = self._problems(self._train[start : start + cfg.problems])
    rng = np.random.default_rng([self._seed, _ORDER, episode])
    rows = solving.rows(
      problems, self.tokenizer.pad, cfg.length, cfg.reads, rng
    )
    return experience_lib.Experience(
      rows.tokens, rows.weight, problems=problems
    )

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """Scores of problems of the test file, see `solving.score`."""
    del episode
    rng = np.random.default_rng([self._seed, _SAMPLES])
    return experience_lib.EvalResult(
      [],
      solving.score(
        student, self.evaluated, self.cfg.samples, int(rng.integers(2**31))
      ),
    )


def _choice(
  problems: list[_Problem], count: int, rng: np.random.Generator
) -> list[_Problem]:
  """`count` of the problems, or all, in their order."""
  count = min(count, len(problems))
  index = rng.choice(len(problems), count, replace=False)
  return [problems[i] for i in sorted(index)]


@functools.lru_cache
def _load(name: str, data_dir: str, sha256: str = '') -> list[_Problem]:
  """All problems of a dataset or file.

  Raises:
    ConfigError: naming the file and line that cannot be read.
  """
  if name.startswith(_GSM8K):
    split = name.removeprefix(_GSM8K)
    config.lookup(split, dict.fromkeys(('train', 'test')), 'task: gsm8k/')
    return [_of_gsm8k(r) for r in datasets.load('gsm8k', split, data_dir)]
  path = pathlib.Path(name)
  text = untrusted.read_text(path)
  found = hashlib.sha256(text.encode()).hexdigest()
  if sha256 and found != sha256:
    raise config.ConfigError(
      f'{path} has SHA-256 {found[:12]}..., and task.test_sha256 is '
      f'{sha256[:12]}...; bring the file that was meant, or change it.'
    )
  lines = enumerate(text.splitlines(), 1)
  problems = [_of_line(x, f'{path}, line {i}') for i, x in lines if x.strip()]
  if not problems:
    raise config.ConfigError(f'{path} has no problems; give another file.')
  return problems


def _of_gsm8k(record: dict[str, str]) -> _Problem:
  steps, answer = record['answer'].split('####')
  solution = _CALCULATED.sub('', steps).strip()
  return _Problem(record['question'], answer.strip(), solution)


def _of_line(line: str, where: str) -> _Problem:
  record = untrusted.parse_json(line, where)
  question = record.get('problem', record.get('question'))
  answer, solution = record.get('answer'), record.get('solution')
  if isinstance(answer, int):
    answer = str(answer)
  for name, value in (('problem', question), ('answer', answer)):
    if not isinstance(value, str) or not value.strip():
      raise config.ConfigError(
        f'{where}: {name} is {json.dumps(value)[:60]}; it must be text.'
      )
  if solution is not None and not isinstance(solution, str):
    raise config.ConfigError(f'{where}: solution must be text.')
  return _Problem(str(question), str(answer).strip(), solution)
