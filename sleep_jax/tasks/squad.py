"""`knowledge_incorporation`: SQuAD by the protocol of SEAL (v1).

Implications of a passage are generated, a copy of the model is tuned on them
and on the passage, and the passage's questions are answered without it
(arXiv 2506.10943). Prompts, training sequences and passages are those of
github.com/Continual-Intelligence/SEAL at commit 4cb1e7d: `utils.py`,
`make_squad_data.py`, `query_server.py` and `CPT.py` of knowledge-incorporation.
Test passages are the first of the validation set shuffled by seed 42: 200 with
974 questions. The episodes' are those that SEAL's two rounds of ReST^EM
rewarded, 50 each.

Two things differ. SEAL's padding tokens have a loss, here they have none; and a
row ends with the stop token. SEAL grades by GPT-4.1; here the grader is a rule
of `grading`, or one added to it, with exact match and F1 reported besides.
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
  "Let's read the following passage and {request}.\n\n"
  + _PASSAGE
  + '{heading}:\n'
)
_LIST = (
  'produce a {}list of implications derived directly or indirectly from the '
  'content'
)
# The request of a dream, and the heading before the dream.
_PROMPTS = {
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
  """Passages, and how they are trained on. The defaults are SEAL's."""

  # See `tokenizers.load`; '' = the base's own.
  tokenizer: str = 'bases/qwen2_5_7b'
  # Requests and questions by its chat template, of an instruct model; what is
  # trained on is text as it is.
  chat: bool = False
  episodes: config.Count = 2  # Rounds; SEAL has two.
  train: config.Count = 50  # Passages of an episode.
  reads: config.Count = 1  # Rows of each passage in an episode's stream.
  # Passages that the evaluation studies one by one (n = 1).
  test: config.Count = 200
  joint: int = 200  # Studied together; the first `test` are those.
  attempts: config.Count = 1  # Studies of each single passage.
  length: config.Count = 2048  # Tokens of a training row; longer texts are cut.
  max_dream: config.Count = 8192  # Tokens.
  max_answer: config.Count = 64  # Tokens.
  prompt: str = 'implications'  # | -long | -very-long (after it) | rewrite.
  # A row per line of a dream; SEAL has one row per dream for n = 200.
  split_lines: bool = True
  grader: str = 'contains'  # | exact | f1 | another of `grading.GRADERS`.
  data_dir: str = ''

  def __post_init__(self):
    config.lookup(self.prompt, _PROMPTS, 'task.prompt')
    config.lookup(self.grader, grading.GRADERS, 'task.grader')
    if not 1 <= self.episodes <= len(squad_data.ROUNDS):
      raise config.ConfigError(
        f'task.episodes={self.episodes}: there are passages for 1 to '
        f'{len(squad_data.ROUNDS)}.'
      )
    if not 1 <= self.train <= squad_data.PER_ROUND:
      raise config.ConfigError(
        f'task.train={self.train} must be 1 to {squad_data.PER_ROUND}.'
      )
    if not 1 <= self.test <= self.joint <= squad_data.NUM_TEST:
      raise config.ConfigError(
        f'task.test={self.test} and task.joint={self.joint} must be 1 <= '
        f'test <= joint <= {squad_data.NUM_TEST}.'
      )


def dream_prompt(
  passage: squad_data.SquadPassage, prompt: str = 'implications'
) -> str:
  """The prompt of a dream."""
  request, heading = _PROMPTS[prompt]
  return _REQUEST.format(
    title=passage.title, context=passage.text, request=request, heading=heading
  )


def question_prompt(passage: squad_data.SquadPassage, question: str) -> str:
  """A question, closed book."""
  return _QUESTION.format(title=passage.title, question=question)


def segments(dream: str, split_lines: bool = True) -> list[str]:
  """The parts of a dream that are trained on one by one.

  `---` separates parts, and with `split_lines` newlines do too. A first line
  whose next one begins with `1.` is a preamble and left out.
  """
  parts = [part.strip() for part in dream.split('---') if part.strip()]
  if not split_lines:
    return parts
  lines = [l.strip() for part in parts for l in part.splitlines() if l.strip()]
  return lines[1:] if lines[1:] and lines[1].startswith('1.') else lines


class SquadFormat:
  """The self-edits of passages; see `contexts.SelfEditFormat`."""

  def __init__(self, cfg: SquadConfig, tokenizer: tokenizers.Tokenizer):
    self._cfg, self._tokenizer = cfg, tokenizer
    self._chat = tokenizers.chat_of(tokenizer) if cfg.chat else None
    self.max_dream, self.max_answer = cfg.max_dream, cfg.max_answer
    self.stop = tokenizer.stop

  def context(self, passage: squad_data.SquadPassage) -> contexts.Context:
    """A passage as tokens, with its questions."""
    encode, cfg = self._encode_prompt, self._cfg
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

  def _encode_prompt(self, text: str) -> contexts.TokenIds:
    if self._chat is not None:
      return self._chat.prompt(text)
    return self._encode(text)

  def _end(self) -> contexts.TokenIds:
    return [self.stop] if self.stop >= 0 else []

  def parse(
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
    """A row, the passage under its title."""
    return self._rows(context.source, [context.source.text.strip()])

  def _rows(
    self, passage: squad_data.SquadPassage, parts: list[str]
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
    self, context: contexts.Context, answers: list[contexts.TokenIds]
  ) -> np.ndarray:
    """By the grader; 0 for an empty answer, without calling it."""
    grader = grading.GRADERS[self._cfg.grader]
    return np.array(
      [
        float(bool(text) and grader(question, gold, text))
        for question, gold, text in self._decoded(context, answers)
      ]
    )

  def exact(
    self, context: contexts.Context, answers: list[contexts.TokenIds]
  ) -> np.ndarray:
    """SQuAD's exact match of each answer."""
    decoded = self._decoded(context, answers)
    return np.array([grading.exact_match(t, [g]) for _, g, t in decoded])

  def f1(
    self, context: contexts.Context, answers: list[contexts.TokenIds]
  ) -> np.ndarray:
    """SQuAD's F1 of each answer."""
    decoded = self._decoded(context, answers)
    return np.array([grading.f1(t, [g]) for _, g, t in decoded])

  def _decoded(
    self, context: contexts.Context, answers: list[contexts.TokenIds]
  ) -> Iterator[tuple[str, str, str]]:
    """(question, gold answer, answer) as text."""
    for (question, gold), ids in zip(context.source.questions, answers):
      yield question, gold, self._tokenizer.decode(ids).strip()

  def open_book(
    self, context: contexts.Context, question: contexts.TokenIds
  ) -> contexts.TokenIds:
    """The passage, and then the question (not a part of SEAL's protocol)."""
    source = context.source
    passage = _PASSAGE.format(title=source.title, context=source.text)
    if self._chat is not None:
      text, _ = source.questions[context.questions.index(question)]
      return self._encode_prompt(passage + question_prompt(source, text))
    return [*self._encode(passage), *question[1:]]


class Squad(task_lib.Task):
  """The task; see the module's docstring. The seed is of the rows' order."""

  name = 'knowledge_incorporation'
  Config = SquadConfig
  columns = ('n1', 'n1_f1', 'closed_book')
  headline = ('n1', 'n1_f1')
  format: SquadFormat

  def __init__(self, cfg: SquadConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
    form = self.format = SquadFormat(cfg, self.tokenizer)
    self._trained_contexts = [
      self._contexts(squad_data.train_passages(e, cfg.data_dir)[: cfg.train])
      for e in range(cfg.episodes)
    ]
    self._evaluation = knowledge_incorporation.KnowledgeIncorporation(
      test=self._contexts(squad_data.test_passages(cfg.data_dir)[: cfg.joint]),
      singles=cfg.test,
      attempts=cfg.attempts,
      grades={'': form.grade, '_exact': form.exact, '_f1': form.f1},
    )

  def _contexts(
    self, passages: list[squad_data.SquadPassage]
  ) -> tuple[contexts.Context, ...]:
    return tuple(map(self.format.context, passages))

  def experience(self, episode: int) -> experience_lib.Experience:
    """The episode's passages, each `reads` times."""
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
      last=episode == self.episodes - 1,
    )
