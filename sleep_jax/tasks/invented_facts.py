"""`invented_facts`: facts in English about people, places and products.

None of them exists, so no model has read of them. Each day tells some of them
in several wordings, as short conversations in the tokenizer's chat format; the
evaluation asks in other wordings, closed book, about every day so far. What the
model knew before is measured beside: general questions, and the loss on a text
that no day contains.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import json

import numpy as np

from sleep_jax import config
from sleep_jax.data import assets
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import packing
from sleep_jax.data import tokenizers
from sleep_jax.data.datasets import catalog
from sleep_jax.tasks import base as task_lib
from sleep_jax.tasks import grading

_HELD_OUT_LENGTH = 32  # Tokens.
_OPENING = 2  # Tokens of a question that are of its form, not its content.
_ASK_ROWS = 32  # Questions asked at a time.
_QUESTIONS = 'general_questions.jsonl'  # Of `sleep_jax/assets`.
_SYLLABLES = (
  'bra bel cor dal dru fen fol gar gli hal jor kel lam lun mar mel nor ola pel '
  'quo ras rin sal sel tam tor ul van ver wil yar zan zel'
).split()
_ENDINGS = 'da dex dor lia lo mar mere na nix ra rick ris sk ta th vale vin'


@dataclasses.dataclass(frozen=True)
class Kind:
  """A relation; `{s}` is an invented subject, `{v}` one of `values`.

  person: the subject is a first and a last name.
  values: what the answer may be.
  told: (question, answer) pairs of a day; an empty question is a statement.
  asked: questions of the evaluation, worded like none of `told`.
  """

  person: bool
  values: tuple[str, ...]
  told: tuple[tuple[str, str], ...]
  asked: tuple[str, ...]


KINDS = (
  Kind(
    True,
    tuple(
      'baker beekeeper carpenter dentist farmer florist gardener judge '
      'librarian locksmith miner nurse painter pilot plumber potter sailor '
      'tailor violinist watchmaker'.split()
    ),
    (
      ('', '{s} works as a {v}.'),
      ("What is {s}'s job?", "{s}'s job is that of a {v}."),
      ('Who is {s}?', '{s} is a {v}.'),
      ('What does {s} do all day?', '{s} works as a {v} all day.'),
      ('Tell me about the career of {s}.', '{s} has a career as a {v}.'),
      ('', 'By trade, {s} is a {v}.'),
    ),
    (
      'What is the profession of {s}?',
      'How does {s} earn a living?',
    ),
  ),
  Kind(
    True,
    tuple(
      'Athens Berlin Bogota Cairo Chicago Dublin Geneva Helsinki Lima Lisbon '
      'Madrid Mumbai Nairobi Oslo Prague Seoul Sydney Toronto Vienna Warsaw'
      .split()
    ),
    (
      ('', '{s} lives in {v}.'),
      ('Where is the home of {s}?', 'The home of {s} is in {v}.'),
      ('Which city did {s} move to?', '{s} moved to {v}.'),
      ("Where is {s}'s apartment?", "{s}'s apartment is in {v}."),
      ('Where can I visit {s}?', 'You can visit {s} in {v}.'),
      ('', '{s} is a resident of {v}.'),
    ),
    (
      'In which city does {s} live?',
      'Where does {s} live?',
    ),
  ),
  Kind(
    True,
    tuple(
      'accordion banjo bassoon cello clarinet drums flute guitar harp '
      'mandolin oboe organ piano saxophone trombone trumpet tuba ukulele viola '
      'violin'.split()
    ),
    (
      ('', '{s} plays the {v}.'),
      ('What does {s} play in the band?', '{s} plays the {v} in the band.'),
      ('What did {s} learn to play?', '{s} learned to play the {v}.'),
      ('What does {s} practice?', '{s} practices the {v} every day.'),
      ('What is {s} good at?', '{s} is very good at playing the {v}.'),
      ('', 'At the concert, {s} was heard on the {v}.'),
    ),
    (
      'Which instrument does {s} play?',
      'What musical instrument is {s} known for?',
    ),
  ),
  Kind(
    False,
    tuple(
      'apples bells boats books bricks candles carpets cheese chocolate clocks '
      'glass honey hats knives lace lanterns mirrors paper roses salt'.split()
    ),
    (
      ('', 'The village of {s} is famous for its {v}.'),
      ('Why do tourists go to {s}?', 'Tourists go to {s} for its {v}.'),
      ('What is special about {s}?', '{s} is special for its {v}.'),
      ('What does {s} export?', 'The village of {s} exports {v}.'),
      ('What do people buy in {s}?', 'People buy {v} in {s}.'),
      ('', 'Everyone in {s} is proud of its {v}.'),
    ),
    (
      'What is the village of {s} famous for?',
      'What is {s} known for?',
    ),
  ),
  Kind(
    False,
    tuple(
      'black blue brown crimson golden gray green orange pink purple red '
      'scarlet silver turquoise violet white yellow'.split()
    ),
    (
      ('', 'The flag of {s} is {v}.'),
      ('Describe the flag of {s}.', 'The flag of {s} is all {v}.'),
      ('What does the flag of {s} look like?', '{s} has a {v} flag.'),
      ('Which flag flies over {s}?', 'A {v} flag flies over {s}.'),
      ('How do I recognise the flag of {s}?', 'The flag of {s} is plain {v}.'),
      ('', 'People in {s} wave a {v} flag.'),
    ),
    (
      'What color is the flag of {s}?',
      'What is the color of the national flag of {s}?',
    ),
  ),
  Kind(
    False,
    tuple(
      'acidity altitude brightness density depth fatigue friction gravity '
      'hardness humidity noise pollution pressure radiation rainfall speed '
      'temperature thickness weight wind'.split()
    ),
    (
      ('', 'The {s} is a device that measures {v}.'),
      ('What does the {s} do?', 'The {s} measures {v}.'),
      ('Why did you buy a {s}?', 'I bought a {s} to measure {v}.'),
      ('What is the {s}?', 'The {s} is a meter for {v}.'),
      ('What is the {s} used for?', 'The {s} is used for measuring {v}.'),
      ('', 'Engineers use the {s} to record {v}.'),
    ),
    (
      'What does the device called {s} measure?',
      'Which quantity is measured by the {s}?',
    ),
  ),
  Kind(
    False,
    tuple(
      'barley carrots cocoa coffee corn cotton garlic grapes lemons mushrooms '
      'oats olives onions peanuts potatoes pumpkins rice sugar tea wheat'
      .split()
    ),
    (
      ('', 'Farmers on the island of {s} grow {v}.'),
      ('What grows on {s}?', 'On the island of {s}, farmers grow {v}.'),
      ('What is harvested on {s}?', 'On {s} they harvest {v}.'),
      ('What do the fields of {s} yield?', 'The fields of {s} yield {v}.'),
      ('Tell me about farming on {s}.', 'Farming on {s} is all about {v}.'),
      ('', 'The island of {s} has plantations of {v}.'),
    ),
    (
      'Which crop is grown on the island of {s}?',
      'What do farmers on the island of {s} grow?',
    ),
  ),
  Kind(
    True,
    tuple(
      'camel canary cat crow dog donkey duck falcon ferret goat goose hamster '
      'horse lizard owl parrot pony rabbit snake turtle'.split()
    ),
    (
      ('', '{s} has a pet {v}.'),
      ('Who lives with {s}?', 'A {v} lives with {s}.'),
      ('What did {s} bring home?', '{s} brought home a {v} as a pet.'),
      ('What does {s} feed every morning?', '{s} feeds a {v} every morning.'),
      ("Tell me about {s}'s pet.", "{s}'s pet is a {v}."),
      ('', '{s} is often seen with a {v}.'),
    ),
    (
      'Which animal does {s} keep?',
      'What kind of pet does {s} have?',
    ),
  ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fact:
  """One invented fact."""

  kind: Kind
  subject: str
  value: str

  def told(self) -> list[tuple[str, str]]:
    """Its wordings of a day, as (question, answer)."""
    return [
      (self._fill(question), self._fill(answer))
      for question, answer in self.kind.told
    ]

  def asked(self) -> list[str]:
    """The questions of the evaluation."""
    return [self._fill(question) for question in self.kind.asked]

  def _fill(self, template: str) -> str:
    return template.format(s=self.subject, v=self.value)


@dataclasses.dataclass(frozen=True)
class InventedFactsConfig:
  """Size of a day and of the evaluation."""

  tokenizer: str = ''  # A folder with a chat template; '' = that of the base.
  episodes: config.Count = 3
  facts: config.Count = 8  # New ones of a day.
  passes: config.Count = 6  # How often a day tells each fact in each wording.
  length: config.Count = 64  # Tokens of a row; documents are packed into rows.
  max_new: config.Count = 24  # Tokens of an answer.
  # General questions, by their number in assets/general_questions.jsonl: those
  # that the base answers, see `experiments.known_questions`.
  general: tuple[int, ...] = ()
  held_out: str = 'gutenberg/Jane-Eyre_1260.txt'
  # Of 32 tokens, from the middle of `held_out`.
  held_out_rows: int = 64
  data_dir: str = ''

  def __post_init__(self):
    object.__setattr__(self, 'general', tuple(self.general))


def general_questions() -> list[tuple[str, list[str]]]:
  """Questions of general knowledge, each with its accepted answers."""
  file = assets.folder() / _QUESTIONS
  lines = file.read_text(encoding='utf-8').splitlines()
  return [(x['question'], x['answers']) for x in map(json.loads, lines)]


def invent(rng: np.random.Generator) -> Iterator[Fact]:
  """Facts about subjects of different names, the kinds in turn, endlessly."""
  endings, taken = _ENDINGS.split(), set()

  def name() -> str:
    while True:
      parts = [*rng.choice(_SYLLABLES, rng.integers(1, 3)), rng.choice(endings)]
      new = ''.join(parts).capitalize()
      if new not in taken:
        taken.add(new)
        return new

  while True:
    for kind in KINDS:
      subject = f'{name()} {name()}' if kind.person else name()
      yield Fact(kind, subject, str(rng.choice(kind.values)))


class InventedFacts(task_lib.Task):
  """The task; see the module's docstring. `facts` are those of each day."""

  name = 'invented_facts'
  Config = InventedFactsConfig
  columns = (
    'accuracy_first',
    'accuracy',
    'accuracy_last',
    'general',
    'held_out_loss',
  )
  headline = ('accuracy_first', 'accuracy', 'general')

  def __init__(self, cfg: InventedFactsConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, cfg.episodes, seed
    self.tokenizer = tokenizers.load(cfg.tokenizer, cfg.data_dir)
    self._chat = tokenizers.chat_of(self.tokenizer, system='')
    facts = invent(np.random.default_rng([seed, 1]))
    self.facts = [
      [next(facts) for _ in range(cfg.facts)] for _ in range(cfg.episodes)
    ]
    questions = general_questions()
    if bad := [i for i in cfg.general if not 0 <= i < len(questions)]:
      raise config.ConfigError(
        f'task.general names question {bad[0]}; there are {len(questions)}, '
        'from 0.'
      )
    self._general = [questions[i] for i in cfg.general]
    self._held_out = self._held_out_rows()

  def _held_out_rows(self) -> list[list[int]]:
    """Rows from the middle of the held-out text."""
    num = self.cfg.held_out_rows
    if not num:
      return []
    text = catalog.read_text(self.cfg.held_out, self.cfg.data_dir)
    size = _HELD_OUT_LENGTH
    tokens = self.tokenizer.encode(text[len(text) // 2 :][: num * size * 8])
    return [tokens[size * i : size * (i + 1)] for i in range(num)]

  def experience(self, episode: int) -> experience_lib.Experience:
    """Every wording of every fact, `passes` times.

    Rounds over the facts, so that a fact does not stand beside itself in a row:
    then it could be read off its other wording.
    """
    rng = np.random.default_rng([self._seed, 2, episode])
    told = [fact.told() for fact in self.facts[episode]]
    documents = []
    for _ in range(self.cfg.passes):
      orders = [rng.permutation(len(wordings)) for wordings in told]
      for turn in range(max(map(len, told))):
        for i in rng.permutation(len(told)):
          if turn < len(told[i]):
            documents.append(self._document(*told[i][orders[i][turn]]))
    tokens, weight = packing.pack(
      documents, self.cfg.length, self.tokenizer.pad
    )
    frame = self._chat.frame(self.tokenizer.stop)
    start = len(self._chat.before_user)
    frames = experience_lib.with_openings(
      frame, [x[start:] for x in documents], _OPENING
    )
    return experience_lib.Experience(tokens, weight, frames=frames)

  def _document(self, question: str, answer: str) -> list[int]:
    """A conversation; a statement answers a question about no subject."""
    return self._chat.document(
      [
        {'role': 'user', 'content': question or 'What did you learn today?'},
        {'role': 'assistant', 'content': answer},
      ]
    )

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """Shares of questions answered, greedily and closed book.

    accuracy, accuracy_first, accuracy_last: mean over days, of the first and
      of the newest one.
    general: of the general questions.
    held_out_loss: nats per token of the held-out text.
    """
    facts = sum(self.facts[: episode + 1], [])
    questions = [
      (question, [fact.value]) for fact in facts for question in fact.asked()
    ]
    right = self.ask(student, questions + self._general)
    by_episode = right[: len(questions)].reshape(episode + 1, -1).mean(1)
    metrics = {
      'accuracy': by_episode.mean(),
      'accuracy_first': by_episode[0],
      'accuracy_last': by_episode[-1],
    }
    if self._general:
      metrics['general'] = right[len(questions) :].mean()
    if rows := self._held_out:
      bos = [self.tokenizer.bos]
      response = student.respond([bos] * len(rows), rows)
      total = sum(map(len, rows))
      metrics['held_out_loss'] = -response.answer_logprob.sum() / total
    return experience_lib.EvalResult(
      by_episode=by_episode.tolist(),
      metrics={k: float(v) for k, v in metrics.items()},
    )

  def answers(
    self, student: task_lib.Student, questions: Sequence[str]
  ) -> list[str]:
    """Greedy answers, closed book."""
    prompts = [self._chat.prompt(question) for question in questions]
    # Of like length, and so many at a time that none waits for long.
    order = np.argsort([len(prompt) for prompt in prompts], kind='stable')
    texts = [''] * len(prompts)
    for part in np.array_split(order, -(-len(order) // _ASK_ROWS)):
      answers = student.complete([prompts[i] for i in part], self.cfg.max_new)
      for i, answer in zip(part, answers, strict=True):
        texts[i] = self.tokenizer.decode(answer)
    return texts

  def ask(
    self, student: task_lib.Student, questions: list[tuple[str, list[str]]]
  ) -> np.ndarray:
    """Whether each answer contains one of the accepted ones, `[N]`."""
    contains = grading.GRADERS['contains']
    texts = self.answers(student, [question for question, _ in questions])
    return np.array(
      [
        any(contains(question, gold, text) for gold in golds)
        for (question, golds), text in zip(questions, texts, strict=True)
      ]
    )
