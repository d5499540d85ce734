"""What are dreams about, by the way in which they begin?

After a life's first day, before any night, the model and the model before the
day each write documents from BOS, from the chat template up to the user's turn
and from the frames of the day's documents. A document counts as about the day
if three words in a row are in the day's text; the model before the day shows
how many do so by chance.

  python -m experiments.dream_frames --config=experiments/configs/smollm2.py \
      --out=results/smollm2_dreams
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

from absl import app
from absl import flags
import jax
import numpy as np

from experiments import command_line
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import tables
from sleep_jax.learners import sleep
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.runtime import compilation

WAYS = {
  'BOS': dict(chat_dreams=0.0, day_dreams=0.0),
  'chat template': dict(chat_dreams=1.0, day_dreams=0.0),
  'frames of the day': dict(chat_dreams=0.0, day_dreams=1.0),
}
_WORDS = 3  # In a row.

Scores = dict[str, float]


def word_ngrams(text: str) -> set[tuple[str, ...]]:
  """The `_WORDS` words in a row that are in a text, in lower case."""
  words = re.findall(r"[\w']+", text.lower())
  return set(zip(*(words[i:] for i in range(_WORDS))))


def score(dreams: list[str], ended: np.ndarray, day: str) -> Scores:
  """Shares of all dreams.

  Args:
    dreams: what the model wrote, without frames.
    ended: `[N]`, whether it ended by itself.
    day: the day's text.
  """
  of_day = word_ngrams(day)
  own = [word_ngrams(dream) for dream in dreams]
  return {
    'about the day': float(np.mean([bool(x & of_day) for x in own])),
    'ended': float(ended.mean()),
    'distinct': len(set(dreams)) / len(dreams),
  }


def measure(
  c: dict[str, Any], seed: int, rows: int
) -> dict[str, tuple[Scores, list[str]]]:
  """Scores of `rows` dreams and some of them, by who wrote them and how."""
  task, learner, _ = build_lib.build(build_lib.arm_config(c, 'sleep'), seed)
  if not isinstance(learner, sleep.Sleep):
    raise config.ConfigError("arms.sleep is not the learner 'sleep'.")
  day = experience_lib.in_memory(task.experience(0), learner.name)
  life, _ = learner.wake(learner.init(jax.random.PRNGKey(seed)), day)
  text = task.tokenizer.decode(day.tokens[day.weight > 0].tolist())
  model = life.model.merged()
  authors = {
    'the model after the day': model,
    'the model before the day': model.with_memory(life.previous_memory()),
  }
  results = {}
  for author, writer in authors.items():
    for way, shares in WAYS.items():
      cfg = dataclasses.replace(learner.cfg.sleep, **shares)
      generated = generation.sample(
        cfg, writer, task.tokenizer, rows, jax.random.key(seed), life.frames
      )
      dreams = contents(generated, task.tokenizer)
      last = generated.tokens[np.arange(rows), generated.lengths - 1]
      scores = score(dreams, last == task.tokenizer.stop, text)
      results[f'{author}, {way}'] = scores, dreams[:8]
  return results


def contents(
  generated: generation.Documents, tokenizer: tokenizers.Tokenizer
) -> list[str]:
  """The documents' texts after their beginning."""
  rows = zip(generated.tokens, generated.starts, generated.lengths)
  return [
    tokenizer.decode(tokens[start:end].tolist()) for tokens, start, end in rows
  ]


def report(results: list[dict[str, tuple[Scores, list[str]]]]) -> str:
  """The table as Markdown, and the first seed's dreams."""
  keys = ('about the day', 'ended', 'distinct')
  rows = [
    [name, *(tables.cell([r[name][0][key] for r in results]) for key in keys)]
    for name in results[0]
  ]
  text = f'{len(results)} seeds; ± is a 95% t interval over them.\n\n'
  text += tables.markdown(['author, beginning', *keys], rows)
  for name, (_, dreams) in results[0].items():
    text += f'\n{name}:\n\n'
    text += ''.join(f'- {" ".join(x.split())}\n' for x in
                    (d.replace('\n', ' ') for d in dreams))  # fmt: skip
  return text


def define_flags() -> None:
  """Called by `main` alone: other commands have flags of the same names."""
  command_line.define_config()
  flags.DEFINE_string('out', None, 'A folder.', required=True)
  flags.DEFINE_integer('dreams', 64, 'Dreams of each kind.')


def main(_) -> None:
  values = flags.FLAGS
  c: dict[str, Any] = json.loads(values.config.to_json())
  compilation.enable_cache()
  results = [measure(c, seed, values.dreams) for seed in c['seeds']]
  out = pathlib.Path(values.out)
  out.mkdir(parents=True, exist_ok=True)
  (out / 'scores.json').write_text(json.dumps(results, indent=1) + '\n')
  (out / 'table.md').write_text(report(results))
  print(report(results))


if __name__ == '__main__':
  define_flags()
  app.run(main, flags_parser=command_line.parse)
