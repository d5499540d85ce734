"""rag: nothing learns; what is likest the question stands before it.

All that was read is kept, in pieces. For each question the pieces that rank
highest stand before it, in the order of their rank or of the stream: by common
words (Okapi BM25 of the package rank_bm25), or by the cosine of static word
vectors (`inference.encoder`). A study ranks the pieces of its own contexts.
"""

from collections.abc import Callable
import dataclasses
import re
from typing import Any, ClassVar

import numpy as np

from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import experience as experience_lib
from sleep_jax.inference import encoder as encoder_lib
from sleep_jax.inference import scoring
from sleep_jax.learners import in_context
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.dreaming import study as study_lib

_PIECES = {'document': None, 'sentence': re.compile(r'(?<=[.!?\n])\s+')}


@dataclasses.dataclass(frozen=True)
class RagConfig:
  """What is retrieved."""

  top: config.Count = 5  # Pieces before a question.
  pieces: str = 'document'  # or sentence.
  order: str = 'rank'  # Best first; or stream, as they were read.
  retriever: str = 'bm25'  # or encoder.

  def __post_init__(self):
    config.lookup(
      self.retriever, {'bm25': 0, 'encoder': 0}, 'learner_config.retriever'
    )
    config.lookup(self.pieces, _PIECES, 'learner_config.pieces')
    config.lookup(self.order, {'rank': 0, 'stream': 0}, 'learner_config.order')


def words(text: str) -> list[str]:
  """What BM25 counts: words and numbers, without case."""
  return re.findall(r'\w+', text.lower())


class Rag(in_context.InContext):
  """Retrieval-augmented generation; state as that of `InContext`."""

  name: ClassVar[str] = 'rag'
  Config: ClassVar[type] = RagConfig

  def check(self) -> None:
    super(in_context.InContext, self).check()
    self._index(['a'])

  def _kept(self, documents: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """All different ones, in the order of their last reading."""
    return [d for d in dict.fromkeys(reversed(documents)) if d][::-1]

  def respond(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    answers: list[list[int]],
  ) -> experience_lib.Response:
    """Answers with the retrieved pieces before every prompt, scored."""
    return scoring.score(
      life.model,
      self._retrieve(
        self.pieces_of(life), prompts, max(map(len, answers), default=0)
      ),
      answers,
      pad=self.setup.tokenizer.pad,
      costs=self.setup.costs,
    )

  def complete(
    self,
    life: life_lib.Life,
    prompts: list[list[int]],
    max_new: int,
    seed: int | None = None,
  ) -> list[list[int]]:
    """Completions with the retrieved pieces before every prompt."""
    prompts = self._retrieve(self.pieces_of(life), prompts, max_new)
    return self._complete(life.model, prompts, max_new, seed=seed)

  def study(
    self, life: life_lib.Life, requests: list[contexts.StudyRequest]
  ) -> experience_lib.Answers:
    """Answers with pieces of the request's own contexts."""
    form, setup = self.setup.required_format(self.name), self.setup
    answers = []
    for request in requests:
      rows = study_lib.context_rows(form, request)
      stream = experience_lib.Experience(rows.tokens, rows.weight)
      pieces = self._split(self._kept(list(self._documents(stream))))
      completions = study_lib.answer(
        life.model,
        form,
        self._retrieve(pieces, request.questions, form.max_answer),
        pad=setup.tokenizer.pad,
        costs=setup.costs,
      )
      answers.append([completions] * request.attempts)
    return answers

  def pieces_of(self, life: life_lib.Life) -> list[list[int]]:
    """The pieces of all that a life has read, as token ids."""
    state = life.learner_state
    ends = np.cumsum(np.asarray(state['lengths']))[:-1]
    documents = np.split(np.asarray(state['context']), ends)
    return self._split([tuple(d.tolist()) for d in documents if len(d)])

  def _split(self, documents: list[tuple[int, ...]]) -> list[list[int]]:
    """The pieces of documents, in order."""
    pattern, tokenizer = _PIECES[self.cfg.pieces], self.setup.tokenizer
    if pattern is None:
      return [list(document) for document in documents]
    # A sentence may go over the end of a row.
    text = ' '.join(tokenizer.decode(list(d)).strip() for d in documents)
    parts = dict.fromkeys(filter(None, pattern.split(text)))
    return [tokenizer.encode(f'{part} ') for part in parts]

  def _retrieve(
    self, pieces: list[list[int]], prompts: list[list[int]], longest: int
  ) -> list[list[int]]:
    """Each prompt after its pieces.

    Raises:
      ConfigError: they and an answer of `longest` tokens exceed the model.
    """
    if not pieces or not prompts:
      return prompts
    decode, bos = self.setup.tokenizer.decode, self._bos()
    scores_of = self._index([decode(piece) for piece in pieces])
    out = []
    for prompt in prompts:
      question = prompt[len(bos) :] if prompt[: len(bos)] == bos else prompt
      scores = scores_of(decode(question))
      best = np.argsort(-scores, kind='stable')[: self.cfg.top]
      if self.cfg.order == 'stream':
        best = np.sort(best)
      found = [token for i in best for token in pieces[i]]
      out.append([*bos, *found, *question])
    size, max_len = max(map(len, out)) + longest, self.setup.model.cfg.max_len
    if size > max_len:
      raise config.ConfigError(
        f'{self.cfg.top} pieces, a question and its answer have {size} tokens, '
        f'which exceeds model.max_len={max_len}; lower learner_config.top, or '
        'set learner_config.pieces=sentence.'
      )
    return out

  def _index(self, pieces: list[str]) -> Callable[[str], np.ndarray]:
    """A function from a question to the score of every piece."""
    if self.cfg.retriever == 'encoder':
      encoder = encoder_lib.load()
      vectors = encoder(pieces)
      return lambda question: vectors @ encoder([question])[0]
    index = _bm25()([words(piece) or [''] for piece in pieces])
    return lambda question: index.get_scores(words(question))


def _bm25() -> Any:
  """The class of an index.

  Raises:
    ConfigError: the package is not installed.
  """
  try:
    import rank_bm25
  except ModuleNotFoundError as e:
    raise config.ConfigError(
      'learner rag needs the package rank_bm25, which is not installed; run: '
      "pip install 'sleep_jax[rag]'."
    ) from e
  return rank_bm25.BM25Okapi
