"""`squad`: knowledge incorporation on SQuAD, by the protocol of SEAL (v1).

A passage is read, implications of it are written, a copy of the model is tuned
on them and on the passage, and the passage's questions are asked without it
(arXiv 2506.10943). Prompts, training sequences and passages are those of
github.com/Continual-Intelligence/SEAL at commit 4cb1e7d: `utils.py`,
`make_squad_data.py`, `query_server.py` and `CPT.py` of knowledge-incorporation.
Test passages are the first of the validation set shuffled by seed 42: 200 with
974 questions. The days' are those that SEAL's two rounds of ReST^EM rewarded,
50 each.

Two things differ. SEAL's padding carries loss, ours does not; and a row ends
with the stop token. SEAL's judge is GPT-4.1; here it is a rule of `grading`, or
a judge of one's own, and exact match and F1 stand beside it.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np

from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.data.datasets import squad as squad_data
from sleep_jax.tasks import base as task_lib
from sleep_jax.tasks import grading
from sleep_jax.tasks import knowledge_incorporation

_PASSAGE = 'Passage:\n{title}\n{context}\n\n'
_REQUEST = (
  "Let's read the following passage and {do}.\n\n" + _PASSAGE + '{head}:\n'
)
_LIST = (
  'produce a {}list of implications derived directly or indirectly from the '
  'content'
)
# What is asked of a dreamer, and the head that its dream stands under.
_WAYS = {
  'implications': (_LIST.format(''), 'Implications'),
  'implications-long': (_LIST.format('long '), 'Implications'),
  'implications-very-long': (_LIST.format('very long '), 'Implications'),
  'rewrite': (
    'rewrite it in a few different ways, each one separated by a newline',
    'Rewritten passages',
  ),
}
_QUESTION = (
  "Let's answer a question directly and concisely.\n"
  'Question: Topic: {title}\n{question}\n'
  'Answer:\n'
)


@dataclasses.dataclass(frozen=True)
class SquadConfig:
  """How many passages, and how they are read. The defaults are SEAL's."""

  tokenizer: str = 'bases/qwen2_5_7b'  # See `tokenizers.load`.
  episodes: int = 2  # Rounds; SEAL has two.
  train: int = 50  # Passages of a day.
  reads: int = 1  # Rows of each passage in a day's stream.
  test: int = 200  # Passages that the exam has studied one by one (n = 1).
  joint: int = 200  # Studied together; the first `test` are those.
  attempts: int = 1  # Studies of each single passage.
  length: int = 2048  # Tokens of a training row; longer texts are cut.
  max_dream: int = 8192  # Tokens.
  max_answer: int = 64  # Tokens.
  prompt: str = 'implications'  # | -long | -very-long (after it) | rewrite.
  # One row per line of a dream; SEAL keeps a dream in one for n = 200.
  split_lines: bool = True
  judge: str = 'contains'  # | exact | f1 | one's own, see `grading.JUDGES`.
  data_dir: str = ''

  def __post_init__(self):
    config.lookup(self.prompt, _WAYS, 'task.prompt')
    config.lookup(self.judge, grading.GRADERS, 'task.judge')
    if not 1 <= self.episodes <= len(squad_data._ROUNDS):
      raise config.ConfigError(
        f'task.episodes={self.episodes}: there are passages for 1 to '
        f'{len(squad_data._ROUNDS)}.'
      )
    if not 1 <= self.train <= squad_data._OF_A_ROUND:
      raise config.ConfigError(
        f'task.train={self.train} must be 1 to {squad_data._OF_A_ROUND}.'
      )
    if not 1 <= self.test <= self.joint <= squad_data._TEST:
      raise config.ConfigError(
        f'task.test={self.test} and task.joint={self.joint} are of one list '
        f'of {squad_data._TEST}, and joint is not the smaller.'
      )


def dream_prompt(
  passage: squad_data.Passage, prompt: str = 'implications'
) -> str:
  """What a dreamer reads."""
  do, head = _WAYS[prompt]
  return _REQUEST.format(
    title=passage.title, context=passage.text, do=do, head=head
  )


def question_prompt(passage: squad_data.Passage, question: str) -> str:
  """A question, closed book."""
  return _QUESTION.format(title=passage.title, question=question)


def segments(dream: str, split_lines: bool = True) -> list[str]:
  """The parts of a dream that are trained on one by one.

  Lines of `---` split, and so do newlines if asked for; a line before one that
  begins with `1.` is a preamble and goes.
  """
  parts = [part.strip() for part in dream.split('---') if part.strip()]
  if not split_lines:
    return parts
  lines = [l.strip() for part in parts for l in part.splitlines() if l.strip()]
  return lines[1:] if lines[1:] and lines[1].startswith('1.') else lines


class SquadReader:
  """What dreams about a passage mean; see `contexts.Reader`."""

  def __init__(self, cfg: SquadConfig, tokenizer: tokenizers.Tokenizer):
    self._cfg, self._tokenizer = cfg, tokenizer
    self.max_dream, self.max_answer = cfg.max_dream, cfg.max_answer
    self.stop = tokenizer.stop

  def context(self, passage: squad_data.Passage) -> contexts.Context:
    """A passage as tokens, with its questions."""
    encode, cfg = self._encode, self._cfg
    pairs = passage.questions
    return contexts.Context(
      name=passage.title,
      prompt=encode(dream_prompt(passage, cfg.prompt)),
      questions=[encode(question_prompt(passage, q)) for q, _ in pairs],
      answers=[[*self._tokenizer.encode(a), *self._end()] for _, a in pairs],
      source=passage,
    )

  def _encode(self, text: str) -> contexts.TokenIds:
    return [self._tokenizer.bos, *self._tokenizer.encode(text)]

  def _end(self) -> contexts.TokenIds:
    return [self.stop] if self.stop >= 0 else []

  def edit(
    self, context: contexts.Context, dream: contexts.TokenIds
  ) -> contexts.TrainingRows | contexts.Rejected:
    """A row per line under the passage's title, and the passage last."""
    if not dream:
      return contexts.Rejected('empty')
    text = self._tokenizer.decode(dream)
    if not (parts := segments(text, self._cfg.split_lines)):
      return contexts.Rejected('unreadable')
    return self._rows(context.source, [*parts, context.source.text.strip()])

  def from_context(self, context: contexts.Context) -> contexts.TrainingRows:
    return self._rows(context.source, [context.source.text.strip()])

  def _rows(
    self, passage: squad_data.Passage, parts: list[str]
  ) -> contexts.TrainingRows:
    shape = len(parts), self._cfg.length
    tokens = np.full(shape, self._tokenizer.pad, np.int32)
    weight = np.zeros(shape, np.float32)
    for i, part in enumerate(parts):
      ids = [*self._encode(f'{passage.title}\n{part}'), *self._end()]
      ids = ids[: self._cfg.length]
      tokens[i, : len(ids)] = ids
      weight[i, : len(ids)] = 1.0
    return contexts.TrainingRows(tokens, weight)

  def grade(
    self, context: contexts.Context, said: list[contexts.TokenIds]
  ) -> np.ndarray:
    """What the judge says; an empty answer is wrong, unasked."""
    judge = grading.GRADERS[self._cfg.judge]
    return np.array(
      [
        float(bool(text) and judge(question, gold, text))
        for question, gold, text in self._answered(context, said)
      ]
    )

  def exact(
    self, context: contexts.Context, said: list[contexts.TokenIds]
  ) -> np.ndarray:
    """SQuAD's exact match of each answer."""
    answered = self._answered(context, said)
    return np.array([grading.exact_match(t, [g]) for _, g, t in answered])

  def f1(
    self, context: contexts.Context, said: list[contexts.TokenIds]
  ) -> np.ndarray:
    """SQuAD's F1 of each answer."""
    answered = self._answered(context, said)
    return np.array([grading.f1(t, [g]) for _, g, t in answered])

  def _answered(
    self, context: contexts.Context, said: list[contexts.TokenIds]
  ) -> Iterator[tuple[str, str, str]]:
    for (question, gold), ids in zip(context.source.questions, said):
      yield question, gold, self._tokenizer.decode(ids).strip()

  def open_book(
    self, context: contexts.Context, question: contexts.TokenIds
  ) -> contexts.TokenIds:
    """The passage, and then the question (not a part of SEAL's protocol)."""
    source = context.source
    book = _PASSAGE.format(title=source.title, context=source.text)
    return [*self._encode(book), *question[1:]]


class Squad:
  """The task; see the module's docstring. The seed shuffles a day's rows."""

  def __init__(self, cfg: SquadConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
    reader = self.format = SquadReader(cfg, self.tokenizer)
    self._met = [
      self._contexts(squad_data.train_passages(e, cfg.data_dir)[: cfg.train])
      for e in range(cfg.episodes)
    ]
    self._exam = knowledge_incorporation.KnowledgeIncorporation(
      test=self._contexts(squad_data.test_passages(cfg.data_dir)[: cfg.joint]),
      singles=cfg.test,
      attempts=cfg.attempts,
      grades={'': reader.grade, '_exact': reader.exact, '_f1': reader.f1},
    )

  def _contexts(
    self, passages: list[squad_data.Passage]
  ) -> tuple[contexts.Context, ...]:
    return tuple(map(self.format.context, passages))

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
      last=episode == self.episodes - 1,
    )
