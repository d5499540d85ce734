"""Invented languages: what they say can be told apart, and is scored right."""

import numpy as np
import pytest

from sleep_jax import config
from sleep_jax import tasks
from sleep_jax.tasks import translation
from tests import students

SMALL = dict(pairs=20, passes=2, test=10)


def meanings(n, seed=0):
  rng = np.random.default_rng(seed)
  words = map(np.arange, (40, 25, 10))
  words = list(words)
  return {translation.draw_meaning(rng, *words): None for _ in range(n)}


def made(**changes):
  return tasks.build('translation', SMALL | changes, 1)


@pytest.fixture(name='made_languages')
def _made_languages():
  return translation.languages(translation.TranslationConfig())


@pytest.mark.parametrize('name', translation.GRAMMARS)
def test_other_meanings_are_said_otherwise(made_languages, name):
  said = {}
  for meaning in meanings(3000):
    text = tuple(map(tuple, made_languages[name].say(meaning)))
    assert said.setdefault(text, meaning) == meaning
  assert len({' '.join(m.english()) for m in said.values()}) == len(said)


def test_languages_differ_in_order_and_in_where_they_mark(made_languages):
  for meaning in meanings(200):
    verb = translation._VERBS[meaning.verb]
    for name, place in (('suffixing', -1), ('prefixing', 0)):
      stem = list(made_languages[name].stems[verb])
      word = made_languages[name].say(meaning)[place]
      marks = meaning.negated + (meaning.tense > 0)
      assert len(word) == 2 + marks
      assert (word[:2] if name == 'suffixing' else word[marks:]) == stem


def test_an_affix_has_a_vowel_like_the_stem(made_languages):
  language, vowels = made_languages['suffixing'], {'back': 'ao', 'front': 'ei'}
  seen = set()
  for meaning in meanings(200):
    for word in language.say(meaning):
      for affix in word[2:]:
        (kind,) = (k for k, v in vowels.items() if word[1][-1] in v)
        assert affix[-1] in vowels[kind]
        seen.add(affix)
  assert len(seen) == 2 * 7


def test_false_friends_are_the_only_stems_in_common(made_languages):
  a, b = (made_languages[name].stems for name in translation.GRAMMARS)
  assert len(set(a.values())) == len(a) == len(set(b.values())) == 75
  common = set(a.values()) & set(b.values())
  assert len(common) == 12
  by_stem = {stem: word for word, stem in a.items()}
  for word, stem in b.items():
    if stem in common:
      assert by_stem[stem] in translation._NOUNS and word in translation._VERBS
  other = translation.languages(translation.TranslationConfig(world_seed=1))
  assert other['suffixing'].stems != a


def test_a_day_tells_its_language_and_no_sentence_that_is_asked():
  task = made()
  for episode, tag in enumerate(('<1>', '<2>')):
    experience = task.experience(episode)
    rows = [
      task.tokenizer.decode(row[weight > 0].tolist())
      for row, weight in zip(experience.tokens, experience.weight)
    ]
    assert len(rows) == 2 * (20 + 75)
    assert all(row.startswith(f'<bos> {tag} ') for row in rows)
    assert all(row.endswith(' .') and row.count('=') == 1 for row in rows)
    told = {row.split('= ')[1] for row in rows}
    asked = {' '.join([*m.english(), '.']) for m in task._test[episode]}
    assert len(asked) == 10 and not told & asked
    (frame,) = experience.frames
    assert task.tokenizer.decode(list(frame[0])) == f'<bos> {tag}'


def test_translations_are_scored_by_language():
  task = made()
  known = {}
  for episode in range(2):
    language = task._languages[episode]
    for i, meaning in enumerate(task._test[episode]):
      prompt = tuple(task._prompt(episode, language.say(meaning)))
      text = ' '.join([*meaning.english(), '.'])
      if episode:  # Of the second language every other sentence, too long.
        text = text + ' the dog' if i % 2 else 'apple .'
      known[prompt] = task.tokenizer.encode(text)
  student = students.FakeStudent(
    lambda prompt, answer: answer == task.tokenizer.encode('food'),
    complete=lambda prompt: known[tuple(prompt)],
  )
  result = task.evaluate(student, 1)
  assert result.metrics['chrf_first'] == 100 == 100 * result.by_episode[0]
  assert 30 < result.metrics['chrf_last'] < 70
  assert result.metrics['exact'] == 0.75
  assert result.metrics['english'] == 8 / 40
  floor = task.chance_level()
  assert 5 < floor['chrf'] < 15 and floor['english'] == 1 / 5
  assert len(task.evaluate(student, 0).by_episode) == 1


def test_the_order_of_the_days_is_a_setting():
  task = made(languages=('prefixing', 'suffixing'))
  text = task.tokenizer.decode(task.experience(0).tokens[0].tolist())
  assert text.startswith('<bos> <2> ')


def test_the_base_reads_languages_that_are_no_days():
  rows = translation.pretraining_rows(np.random.default_rng(0), 20, 128)
  tokenizer = translation.build_tokenizer()
  assert rows.shape == (20, 128) and (rows > 0).all()
  assert '=' not in tokenizer.decode(rows[0].tolist())
  tag, first, second, mark, word, stop = (
    tokenizer.decode([token]) for token in rows[1, 1:7].tolist()
  )
  assert tag[0] == '<' and mark == '=' and stop == '.'
  made_languages = translation.languages(translation.TranslationConfig())
  for language in made_languages.values():
    assert language.stems.get(word) != (first, second)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(languages=()), r'task.languages=\(\)'),
    (dict(languages=('suffixing', 'suffixing')), 'different'),
    (dict(languages=('klingon',)), 'task.languages'),
    (dict(length=20), 'task.length=20'),
    (dict(false_friends=26), 'task.false_friends=26'),
  ],
)
def test_what_cannot_be_is_refused(changes, words):
  with pytest.raises(config.ConfigError, match=words):
    made(**changes)


def test_chrf_says_how_it_is_computed():
  assert 'nc:6' in translation.chrf_signature()
  assert translation.chrf(['the dog s'], ['the dogs']) == 100
