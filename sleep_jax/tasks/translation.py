"""`translation`: one language after another that the base has never seen.

Continual translation of novel languages into English (Nested Learning Figure
8), as a generated twin: one grammar of meanings, a fixed English for them, and
invented languages that say the same otherwise. `suffixing` puts the verb last
and marks by suffixes whose vowel follows the stem's; `prefixing` puts the verb
first and marks by prefixes. Their stems differ but for false friends, the same
strings with other meanings. A day tells sentences of one language with their
translation, and its list of words; the evaluation translates new sentences of
all languages so far, and asks what the base knew.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

from absl import logging
import numpy as np

from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.tasks import base as task_lib
from sleep_jax.tasks import facts

NOUNS = {
  'animal': 'dog cat horse bird fish cow sheep wolf',
  'food': 'apple bread egg rice soup cake milk bean',
  'tool': 'hammer knife spoon rope saw needle bucket ladder',
  'place': 'house river forest market bridge garden road hill',
  'person': 'teacher child farmer king doctor singer sister friend',
}
_NOUNS: tuple[str, ...] = tuple(' '.join(NOUNS.values()).split())
_VERBS: tuple[str, ...] = tuple(
  'see like find take give hold want hear know paint carry watch follow help '
  'need bring leave lose show visit wash draw count hide guard'.split()
)
_ADJECTIVES: tuple[str, ...] = tuple(
  'big small old new red white good bad long happy'.split()
)
_OWNERS = ('the', 'my', 'your')
_TENSES = ('does', 'did', 'will')
_TAGS = ('<1>', '<2>', '<3>', '<4>')
_MARK, _STOP = '=', '.'
_BACK = ('a', 'o')  # Vowels; the others are front ones.
# Syllables of the affixes: one for stems with back vowels, one for the others.
_AFFIXES: tuple[str, ...] = (
  *('plural', 'object', 'my', 'your', 'did', 'will', 'not'),
)

Word = list[str]  # Syllables, or one word of English.


@dataclasses.dataclass(frozen=True)
class TranslationConfig:
  """The languages in the order of their days, and the size of a day."""

  languages: tuple[str, ...] = ('suffixing', 'prefixing')
  pairs: config.Count = 300  # Sentences of a day, each with its translation.
  passes: config.Count = 4  # How often each of a day's rows is read.
  test: config.Count = 100  # Sentences of a language that are asked for.
  length: config.Count = 40  # Tokens of a row.
  false_friends: int = 12  # Stems that languages share, with other meanings.
  world_seed: int = 0  # Of the languages.

  def __post_init__(self):
    object.__setattr__(self, 'languages', tuple(self.languages))
    for name in self.languages:
      config.lookup(name, GRAMMARS, 'task.languages')
    if not self.languages or len(set(self.languages)) < len(self.languages):
      raise config.ConfigError(
        f'task.languages={self.languages} must name one or more different '
        f'languages of {", ".join(GRAMMARS)}.'
      )
    if not 0 <= self.false_friends <= len(_VERBS):
      raise config.ConfigError(
        f'task.false_friends={self.false_friends} must be 0 to {len(_VERBS)}.'
      )
    if self.length < _LONGEST:
      raise config.ConfigError(
        f'task.length={self.length}: a sentence and its translation can have '
        f'{_LONGEST} tokens; use as many or more.'
      )


@dataclasses.dataclass(frozen=True)
class NounPhrase:
  """Numbers of its words; -1 is no adjective, and owner 0 is nobody's."""

  noun: int
  plural: bool
  adjective: int
  owner: int

  def english(self) -> list[str]:
    """Its words; the plural's s is one of them."""
    adjective = [_ADJECTIVES[self.adjective]] if self.adjective >= 0 else []
    return [
      _OWNERS[self.owner],
      *adjective,
      _NOUNS[self.noun],
      *['s'] * self.plural,
    ]


@dataclasses.dataclass(frozen=True)
class Meaning:
  """What a sentence says."""

  subject: NounPhrase
  verb: int
  object: NounPhrase
  tense: int
  negated: bool

  def english(self) -> list[str]:
    """Its words, without the stop."""
    return [
      *self.subject.english(),
      _TENSES[self.tense],
      *['not'] * self.negated,
      _VERBS[self.verb],
      *self.object.english(),
    ]


def draw_meaning(
  rng: np.random.Generator,
  nouns: np.ndarray,
  verbs: np.ndarray,
  adjectives: np.ndarray,
) -> Meaning:
  """A random sentence of these words."""

  def phrase() -> NounPhrase:
    has_adjective = rng.random() < 0.4
    return NounPhrase(
      noun=int(rng.choice(nouns)),
      plural=bool(rng.random() < 0.4),
      adjective=int(rng.choice(adjectives)) if has_adjective else -1,
      owner=int(rng.integers(0, len(_OWNERS))),
    )

  return Meaning(
    subject=phrase(),
    verb=int(rng.choice(verbs)),
    object=phrase(),
    tense=int(rng.integers(0, len(_TENSES))),
    negated=bool(rng.random() < 0.3),
  )


@dataclasses.dataclass(frozen=True)
class Grammar:
  """How a language says it.

  order: of subject, verb and object.
  suffixes: whether affixes follow the stem; else they precede it.
  adjective_first: whether it stands before its noun.
  """

  order: str
  suffixes: bool
  adjective_first: bool


GRAMMARS = {
  'suffixing': Grammar('SOV', suffixes=True, adjective_first=True),
  'prefixing': Grammar('VSO', suffixes=False, adjective_first=False),
}
# BOS, tag, mark and stop; two phrases of an adjective and a noun with three
# affixes at most, a verb with two; and the longest English.
_LONGEST = 4 + 2 * (2 + 2 + 3) + (2 + 2) + 2 * 4 + 3


class Language:
  """Stems and affixes of one language.

  Args:
    grammar: its grammar.
    rng: of its affixes.
    stems: pairs of syllables, one for each noun, verb and adjective, by their
      English word.
  """

  def __init__(
    self,
    grammar: Grammar,
    rng: np.random.Generator,
    stems: dict[str, tuple[str, str]],
  ):
    self.grammar, self.stems = grammar, stems
    back = [s for s in facts.SYLLABLES if s[-1] in _BACK]
    front = [s for s in facts.SYLLABLES if s[-1] not in _BACK]
    forms = (
      rng.permutation(x)[: len(_AFFIXES)].tolist() for x in (back, front)
    )
    self._affixes = dict(zip(_AFFIXES, zip(*forms), strict=True))

  def _inflect(self, english: str, affixes: list[str]) -> Word:
    stem = self.stems[english]
    front = stem[-1][-1] not in _BACK
    marks = [self._affixes[affix][front] for affix in affixes]
    return [*stem, *marks] if self.grammar.suffixes else [*marks, *stem]

  def _phrase(self, phrase: NounPhrase, is_object: bool) -> list[Word]:
    affixes = ['plural'] * phrase.plural
    affixes += [_OWNERS[phrase.owner]] if phrase.owner else []
    affixes += ['object'] * is_object
    words = [self._inflect(_NOUNS[phrase.noun], affixes)]
    if phrase.adjective >= 0:
      adjective = self._inflect(_ADJECTIVES[phrase.adjective], [])
      words.insert(0 if self.grammar.adjective_first else 1, adjective)
    return words

  def say(self, meaning: Meaning) -> list[Word]:
    """The words of a sentence."""
    affixes = ['not'] * meaning.negated
    affixes += [_TENSES[meaning.tense]] if meaning.tense else []
    parts = {
      'S': self._phrase(meaning.subject, is_object=False),
      'V': [self._inflect(_VERBS[meaning.verb], affixes)],
      'O': self._phrase(meaning.object, is_object=True),
    }
    return [word for role in self.grammar.order for word in parts[role]]


def build_tokenizer() -> tokenizers.WordTokenizer:
  """English words, syllables, and a tag for each language; `.` ends a text."""
  english = [*_OWNERS, *_TENSES, 'not', 's', *_ADJECTIVES, *_NOUNS, *_VERBS]
  return tokenizers.WordTokenizer(
    [_STOP, _MARK, *_TAGS, 'is', 'a', *NOUNS, *english, *facts.SYLLABLES],
    separator=_STOP,
    stop=_STOP,
  )


def _all(words: Sequence[str]) -> np.ndarray:
  return np.arange(len(words))


def draw_stems(
  rng: np.random.Generator, words: list[str], taken: set[tuple[str, str]]
) -> dict[str, tuple[str, str]]:
  """Different pairs of syllables for `words`, none of which is `taken`."""
  free = [
    (a, b)
    for a in facts.SYLLABLES
    for b in facts.SYLLABLES
    if (a, b) not in taken
  ]
  picked = rng.permutation(len(free))[: len(words)]
  return {w: free[i] for w, i in zip(words, picked, strict=True)}


def languages(cfg: TranslationConfig) -> dict[str, Language]:
  """The languages of `GRAMMARS`; each depends on the seed of the world alone.

  In the second of two the stems of `false_friends` verbs are those of nouns in
  the first.
  """
  rng = np.random.default_rng([cfg.world_seed, 31])
  made, taken = {}, set()
  words = [*_NOUNS, *_VERBS, *_ADJECTIVES]
  friends: list[tuple[str, str]] = []
  for name, grammar in GRAMMARS.items():
    stems = draw_stems(rng, words, taken)
    stems |= dict(zip(rng.permutation(_VERBS).tolist(), friends))
    taken |= set(stems.values())
    made[name] = Language(grammar, rng, stems)
    nouns = rng.permutation(_NOUNS)[: cfg.false_friends].tolist()
    friends = [stems[noun] for noun in nouns]
  return made


def pretraining_rows(
  rng: np.random.Generator, rows: int, length: int
) -> np.ndarray:
  """Documents for the base `[rows, length]`, cut there.

  Half are English: sentences, and what kind of thing a noun is. The others are
  a few words of a language that is drawn anew, and sentences of these words
  with their translation, so that the base learns to read them in its context.
  """
  tok = build_tokenizer()
  out = np.full((rows, length), tok.pad, np.int32)
  for i in range(rows):
    sentences = _new_language(rng) if i % 2 else _plain_english(rng)
    document = [tok.bos]
    for sentence in sentences:
      document += tok.encode(' '.join(sentence))
      if len(document) >= length:
        break
    out[i] = document[:length]
  return out


def _plain_english(rng: np.random.Generator) -> Iterator[list[str]]:
  """Sentences and kinds of nouns, without end."""
  kinds = [(n, kind) for kind, nouns in NOUNS.items() for n in nouns.split()]
  while True:
    if rng.random() < 0.3:
      noun, kind = kinds[rng.integers(0, len(kinds))]
      yield [*_kind(noun), kind, _STOP]
    else:
      meaning = draw_meaning(rng, _all(_NOUNS), _all(_VERBS), _all(_ADJECTIVES))
      yield [*meaning.english(), _STOP]


def _kind(noun: str) -> list[str]:
  """The words before its kind."""
  return [noun, 'is', 'a']


def _new_language(rng: np.random.Generator) -> Iterator[list[str]]:
  """A few words of a new language, then sentences of them without end."""
  few = [
    rng.permutation(len(words))[:n]
    for words, n in ((_NOUNS, 3), (_VERBS, 2), (_ADJECTIVES, 1))
  ]
  words = [
    all_words[i]
    for all_words, index in zip((_NOUNS, _VERBS, _ADJECTIVES), few, strict=True)
    for i in index
  ]
  grammar = Grammar(
    ''.join(rng.permutation(list('SVO'))),
    bool(rng.random() < 0.5),
    bool(rng.random() < 0.5),
  )
  language = Language(grammar, rng, draw_stems(rng, words, set()))
  tag = _TAGS[rng.integers(0, len(_TAGS))]
  for word in words:
    yield [tag, *language.stems[word], _MARK, word, _STOP]
  while True:
    meaning = draw_meaning(rng, *few)
    yield [*_source(tag, language.say(meaning)), *meaning.english(), _STOP]


def _source(tag: str, words: list[Word]) -> list[str]:
  """A sentence, and what its translation follows."""
  return [tag, *(syllable for word in words for syllable in word), _MARK]


def chrf(hypotheses: list[str], references: list[str]) -> float:
  """chrF of a corpus, 0 to 100, by sacrebleu with its default settings.

  Raises:
    ConfigError: that package is not installed.
  """
  return _chrf().corpus_score(hypotheses, [references]).score


def chrf_signature() -> str:
  """What sacrebleu calls these settings."""
  metric = _chrf()
  metric.corpus_score(['a'], [['a']])
  return str(metric.get_signature())


def _chrf() -> Any:
  try:
    from sacrebleu.metrics import chrf as sacrebleu_chrf
  except ModuleNotFoundError as e:
    raise config.ConfigError(
      'task translation is scored by the package sacrebleu, which is not '
      "installed; run: pip install 'sleep_jax[translation]'."
    ) from e
  return sacrebleu_chrf.CHRF()


class Translation(task_lib.Task):
  """The task; see the module's docstring."""

  name = 'translation'
  Config = TranslationConfig
  columns = ('chrf_first', 'chrf', 'chrf_last', 'exact', 'english')
  headline = ('chrf_first', 'chrf', 'chrf_last', 'english')

  def __init__(self, cfg: TranslationConfig, seed: int):
    self.cfg, self.episodes, self._seed = cfg, len(cfg.languages), seed
    self.tokenizer = build_tokenizer()
    logging.info('chrF is that of sacrebleu, %s.', chrf_signature())
    made = languages(cfg)
    self._languages = [made[name] for name in cfg.languages]
    self._tags = dict(zip(GRAMMARS, _TAGS))
    self._train, self._test = [], []
    for episode in range(self.episodes):
      rng = np.random.default_rng([seed, 1, episode])
      meanings: dict[Meaning, None] = {}  # In the order in which they came.
      while len(meanings) < cfg.pairs + cfg.test:
        words = _all(_NOUNS), _all(_VERBS), _all(_ADJECTIVES)
        meanings[draw_meaning(rng, *words)] = None
      self._train.append([*meanings][: cfg.pairs])
      self._test.append([*meanings][cfg.pairs :])

  def _tag(self, episode: int) -> str:
    return self._tags[self.cfg.languages[episode]]

  def _prompt(self, episode: int, words: list[Word]) -> list[int]:
    text = ' '.join(_source(self._tag(episode), words))
    return [self.tokenizer.bos, *self.tokenizer.encode(text)]

  def _rows(self, episode: int) -> list[list[int]]:
    """The day's sentences and words, each with its translation."""
    language, tok = self._languages[episode], self.tokenizer
    pairs = [(language.say(m), m.english()) for m in self._train[episode]]
    pairs += [([list(s)], [word]) for word, s in language.stems.items()]
    return [
      [*self._prompt(episode, words), *tok.encode(' '.join([*english, _STOP]))]
      for words, english in pairs
    ]

  def experience(self, episode: int) -> experience_lib.Experience:
    """Its rows, shuffled in each of `passes`; all tokens are targets."""
    rng = np.random.default_rng([self._seed, 2, episode])
    rows, cfg = self._rows(episode), self.cfg
    order = np.concatenate(
      [rng.permutation(len(rows)) for _ in range(cfg.passes)]
    )
    tokens = np.full((len(order), cfg.length), self.tokenizer.pad, np.int32)
    weight = np.zeros(tokens.shape, np.float32)
    for i, row in enumerate(order):
      tokens[i, : len(rows[row])] = rows[row]
      weight[i, : len(rows[row])] = 1.0
    begin = (self.tokenizer.bos, *self.tokenizer.encode(self._tag(episode)))
    frame = (begin, tuple(self.tokenizer.encode(_MARK)))
    return experience_lib.Experience(tokens, weight, frames=(frame,))

  def evaluate(
    self, student: task_lib.Student, episode: int
  ) -> experience_lib.EvalResult:
    """Greedy translations of new sentences of every language so far.

    chrf, exact: means over languages of chrF (0 to 100) and of the share that
      is right to the word; `_first` and `_last` of one language.
    english: share of the base's nouns whose kind is answered.
    """
    scores, exact = [], []
    longest = len(max((m.english() for t in self._test for m in t), key=len))
    for i in range(episode + 1):
      said = [self._languages[i].say(m) for m in self._test[i]]
      prompts = [self._prompt(i, words) for words in said]
      completions = student.complete(prompts, longest + 1)
      found = [self._text(tokens) for tokens in completions]
      wanted = [' '.join(m.english()) for m in self._test[i]]
      scores.append(chrf(found, wanted))
      exact.append(np.mean([a == b for a, b in zip(found, wanted)]))
    return experience_lib.EvalResult(
      by_episode=[score / 100 for score in scores],
      metrics={
        'chrf': float(np.mean(scores)),
        'chrf_first': scores[0],
        'chrf_last': scores[-1],
        'exact': float(np.mean(exact)),
        'english': self._english(student),
      },
    )

  def _text(self, tokens: list[int]) -> str:
    if self.tokenizer.stop in tokens:
      tokens = tokens[: tokens.index(self.tokenizer.stop)]
    return self.tokenizer.decode(tokens)

  def _english(self, student: task_lib.Student) -> float:
    tok = self.tokenizer
    pairs = [(n, kind) for kind, nouns in NOUNS.items() for n in nouns.split()]
    response = student.respond(
      [[tok.bos, *tok.encode(' '.join(_kind(noun)))] for noun, _ in pairs],
      [tok.encode(kind) for _, kind in pairs],
    )
    return float(response.exact.mean())

  def chance_level(self) -> dict[str, float]:
    """Of copying the source, and of guessing a kind."""
    copied = [
      chrf(
        [' '.join(map(''.join, language.say(m))) for m in test],
        [' '.join(m.english()) for m in test],
      )
      for language, test in zip(self._languages, self._test, strict=True)
    ]
    return {
      'chrf': float(np.mean(copied)),
      'chrf_first': copied[0],
      'chrf_last': copied[-1],
      'exact': 0.0,
      'english': 1 / len(NOUNS),
    }
