"""A language model that wakes and sleeps: strings in, strings out.

  import sleep_jax

  m = sleep_jax.load('smollm2')
  m.wake(['The lighthouse of Orvane was built in 1882 by Ada Brennick.'])
  report = m.sleep()
  print(m.ask('Who built the lighthouse of Orvane?'))
  m.save('slept')

The life itself, a value that every verb replaces, is `m.life`; what it does
awake and asleep is in `lifecycle.wake` and `lifecycle.consolidation`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import config
from sleep_jax import phases
from sleep_jax import plan as plan_lib
from sleep_jax import reports
from sleep_jax import settings as settings_lib
from sleep_jax import speech
from sleep_jax.data import chat as chat_lib
from sleep_jax.data import documents as documents_lib
from sleep_jax.data import tokenizers
from sleep_jax.data import untrusted
from sleep_jax.harness import life_folder
from sleep_jax.learners import base as learner_lib
from sleep_jax.learners import sleep as sleep_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import wake as wake_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib
from sleep_jax.weights import add_levels
from sleep_jax.weights import export as export_lib
from sleep_jax.weights import pretrained as pretrained_lib

# What may be read: see `Sleeper.wake`.
Texts = Any
# (phase, share of it that is done), for a progress bar.
Progress = Callable[[str, float], None]

_MERGE_DREAMS = 64  # Rows on which a merged export is fitted and measured.


def load(
  name: str | pathlib.Path,
  *,
  cfg: config.ModelConfig | None = None,
  wake: wake_lib.WakeConfig | None = None,
  seeding: consolidation_config.SeedingConfig | None = None,
  seed: int = 0,
  **plan: Any,
) -> 'Sleeper':
  """A model that can wake and sleep.

  Args:
    name: of a pretrained model (`smollm2`, a folder, a file, a hub id), or the
      folder of a life that was saved.
    cfg: the model with levels of your own; by default the plan's.
    wake: how a day is read; by default the plan's.
    seeding: how a night consolidates; by default the plan's.
    seed: of everything that is drawn; a saved life has its own.
    **plan: fields of `plan.Plan`, such as `passes=5`; the others follow from
      the first day's text.

  Raises:
    ConfigError: naming what cannot be found, or cannot be.
  """
  plan_lib.check_fields(plan)
  for section, where in ((wake, 'wake'), (seeding, 'seeding')):
    if section is not None:
      config.check_fields(section, where)
  path = pathlib.Path(name)
  if life_folder.is_life(path):
    if cfg is not None:
      raise config.ConfigError(f'{path} is a saved life, which keeps its cfg.')
    return _load_life(path, wake, seeding, plan)
  found = pretrained_lib.load(str(name))
  tokenizer = found.tokenizer()
  tokenizers.check_fits(tokenizer, found.cfg.vocab)
  chat_tokens = chat_lib.template_tokens(tokenizer)
  own_levels = cfg is not None or len(found.cfg.levels) > 1
  settings = settings_lib.Settings(
    name=str(name),
    digest=found.digest,
    plan=plan_lib.plan(
      plan_lib.plain(found.cfg), chat_tokens=chat_tokens, **plan
    ),
    given=dict(plan),
    chat_tokens=chat_tokens,
    own_levels=own_levels,
    wake=wake,
    seeding=seeding,
  )
  cfg = settings.model_config(cfg or found.cfg)
  key = jax.random.key(seed)
  params = add_levels.add_levels(found.cfg, found.params, cfg, key)
  weights = found.folder if params is found.params else None
  params = jax.tree.map(jnp.asarray, params)
  life = life_lib.init_life(model_lib.Model(cfg, params), key)
  if found.memory is not None:
    life = life.with_memory(found.memory)
  source = found.folder / life_folder.SOURCE
  return Sleeper(life, tokenizer, settings, source, weights)


def _load_life(
  path: pathlib.Path,
  wake: wake_lib.WakeConfig | None,
  seeding: consolidation_config.SeedingConfig | None,
  plan: dict[str, Any],
) -> 'Sleeper':
  life, notes = life_folder.load(path)
  try:
    settings = settings_lib.Settings.from_json(notes)
    own = settings.model_config(life.model.cfg)
  except config.ConfigError as e:
    raise config.ConfigError(f'{path / life_folder.NOTES}: {e}') from None
  if own != life.model.cfg:
    raise config.ConfigError(
      f'{path / life_folder.NOTES} and the config.json beside it are of two '
      'lives; save this one again.'
    )
  given = {'wake': wake, 'seeding': seeding}
  given = {k: v for k, v in given.items() if v is not None}
  source = untrusted.member(path, life_folder.SOURCE)
  tokenizer = tokenizers.load(source)
  tokenizers.check_fits(tokenizer, life.model.cfg.vocab)
  m = Sleeper(
    life,
    tokenizer,
    dataclasses.replace(settings, **given),
    source,
    path,
  )
  m.change(**plan)
  return m


class Sleeper:
  """A pretrained model and its life, which every verb replaces.

  life: model, memory, clock and random key, as one value.
  tokenizer: of the model.
  settings: how it wakes and sleeps.
  source: the folder of the tokenizer's and the licence's files.
  on_progress: called during `wake` and `sleep`, if set.
  """

  on_progress: Progress | None = None

  def __init__(
    self,
    life: life_lib.Life,
    tokenizer: tokenizers.Tokenizer,
    settings: settings_lib.Settings,
    source: pathlib.Path,
    weights: pathlib.Path | None = None,
  ):
    self.life, self.tokenizer, self.source = life, tokenizer, source
    self._weights = weights
    self._configure(settings)

  def _configure(self, settings: settings_lib.Settings) -> None:
    """Puts settings in force that keep the shape of the memory."""
    model = self.life.model
    cfg = settings.model_config(model.cfg)
    self.settings = settings
    self.life = self.life.replace(model=model.replace(cfg=cfg))
    self.costs = costs_lib.CostTracker(cfg, settings.plan.window)
    self.learner = sleep_lib.Sleep(
      settings.learner(cfg.vocab),
      learner_lib.Setup(
        model_lib.Model(cfg, model.params), self.tokenizer, self.costs
      ),
    )
    self.learner.check()

  def __repr__(self) -> str:
    clock = self.life.clock
    return (
      f'Sleeper({self.settings.name!r}, nights={int(clock.nights)}, '
      f'tokens_read={int(clock.tokens)})'
    )

  @property
  def plan(self) -> plan_lib.Plan:
    """The settings that depend on the amount of text."""
    return self.settings.plan

  @property
  def nights(self) -> int:
    """Nights that it has slept."""
    return int(self.life.clock.nights)

  @property
  def speaker(self) -> speech.Speaker:
    """The model as it is now, to be asked."""
    return speech.Speaker(
      self.life.model.merged(),
      self.tokenizer,
      jax.random.fold_in(self.life.rng, self.nights),
      self.costs,
    )

  def encode(self, texts: Texts) -> list[documents_lib.Encoded]:
    """Documents as token ids; see `wake` for what `texts` may be."""
    if isinstance(texts, list) and texts:
      if all(isinstance(x, documents_lib.Encoded) for x in texts):
        return texts
    return documents_lib.encode(documents_lib.of(texts), self.tokenizer)

  def wake(self, texts: Texts) -> reports.DayReport:
    """Reads; the fast weights change, and nothing else does.

    Before the first day the plan is made from the amount of text.

      m.wake('One text.')
      m.wake([{'question': 'Who built it?', 'answer': 'Ada Brennick.'}])

    Args:
      texts: a string, or a list of strings, of conversations (lists of `{role,
        content}`) or of `{question, answer}`.

    Raises:
      ConfigError: if there is nothing to read, or no slot for the night.
    """
    encoded = self.encode(texts)
    phases.check_slot(self.learner.cfg.sleep, self.life)
    if not self.settings.planned:
      self.replan([len(x) for x in encoded])
    tell = functools.partial(self._tell, 'wake')
    self.life, report = phases.day(
      self.learner, self.life, encoded, self.plan, tell
    )
    return report

  def replan(self, lengths: list[int]) -> None:
    """Makes the plan for documents of so many tokens each, before day 1.

    Raises:
      ConfigError: after the first day: a life keeps its plan.
    """
    if int(self.life.clock.tokens):
      raise config.ConfigError('this life has begun, and keeps its plan.')
    self._configure(self.settings.replanned(self.life.model.cfg, lengths))

  def change(self, **plan: Any) -> None:
    """Changes fields of the plan in a life that has begun, such as `steps`.

    Raises:
      ConfigError: for a field that the life cannot change any more.
    """
    settings = self.settings.changed(**plan)
    if 'slots' in plan and not settings.own_levels:
      self.life = life_folder.with_slots(self.life, 1, plan['slots'])
    self._configure(settings)

  def sleep(self, *, allow_failure: bool = False) -> reports.NightReport:
    """A night: what the fast weights hold moves into a new expert.

    It takes no data. Afterwards the fast weights begin again, so that what is
    still answered has moved. The night comes now, whatever the clock says.

    Args:
      allow_failure: go on although nothing was transferred. Otherwise the life
        stays as it was in the evening.

    Raises:
      NotTransferred: if the new expert did not learn what the day taught.
      ConfigError: if nothing was read since the last night, or no slot is left.
    """
    tell = functools.partial(self._tell, 'sleep')
    flops = self.plan.night_flops(self.life.model.cfg)
    with phases.watched(self.costs, flops, tell):
      life, report = phases.night(
        self.learner.cfg.sleep, self.life, self.tokenizer, self.costs
      )
    if not (report.transferred or allow_failure):
      raise reports.NotTransferred(report)
    self.life = life
    return report

  def ask(
    self, question: str, *, max_new: int = 128, temperature: float = 0.0
  ) -> str:
    """The answer to a question, closed book; greedy by default."""
    message = {'role': 'user', 'content': question}
    return self.chat([message], max_new=max_new, temperature=temperature)

  def chat(
    self,
    messages: Sequence[chat_lib.Message],
    *,
    max_new: int = 128,
    temperature: float = 0.0,
  ) -> str:
    """What the assistant says next; the oldest turns go if all do not fit."""
    return self.speaker.reply(
      messages, max_new=max_new, temperature=temperature
    )

  def dream(
    self,
    n: int = 8,
    about: str | None = None,
    *,
    temperature: float = 1.0,
    seed: int = 0,
  ) -> list[str]:
    """What the model makes up, as a night has it dream.

    Args:
      n: how many dreams.
      about: what to tell of; by default it chooses itself.
      temperature: 0 is greedy.
      seed: another one gives other dreams.
    """
    if n < 1:
      raise config.ConfigError(f'n={n}: ask for at least one dream.')
    if about is None:
      documents = self._documents(n, temperature, seed)
      return self.speaker.text(documents)
    prompt = chat_lib.of(self.tokenizer).prompt(f'Tell me about {about}.')
    return self.speaker.complete(
      [prompt] * n,
      max_new=self.plan.window,
      temperature=temperature,
      seed=seed,
    )

  def perplexity(self, texts: Texts) -> float:
    """exp of the mean nats a token; each document is its own context."""
    return self.speaker.perplexity(self.encode(texts))

  def quiz(
    self, questions: Sequence[Any], *, max_new: int = 48
  ) -> reports.QuizReport:
    """Asks, closed book; an answer is right if it contains the right words.

    Args:
      questions: mappings with `question` and `answer`.
      max_new: tokens of an answer, at most.

    Raises:
      ConfigError: naming the first item that is not such a mapping.
    """
    return self.speaker.quiz(documents_lib.questions(questions), max_new)

  def save(self, path: str | pathlib.Path) -> pathlib.Path:
    """Writes everything to a new folder that `load` reads.

    Raises:
      ConfigError: if the folder exists, or the disk is full.
    """
    path = pathlib.Path(path)
    life_folder.save(
      path,
      self.life,
      self.settings.to_json(),
      weights=self._weights,
      source=self.source,
    )
    return path

  def export(self, path: str | pathlib.Path, form: str = 'custom') -> str:
    """Writes a new folder that transformers loads.

    Args:
      path: the folder.
      form: `custom`, which computes the same with `trust_remote_code`; or
        `merged`, a plain checkpoint that comes near.

    Returns:
      What was written, in words; of `merged`, what it cost.
    """
    config.lookup(form, {'custom': 0, 'merged': 0}, 'export')
    args = self.life.model, pathlib.Path(path), self.source
    if form == 'custom':
      return export_lib.custom(*args)
    dreams = self._documents(_MERGE_DREAMS, 1.0, 0)
    return str(
      export_lib.merged(*args, dreams=dreams.tokens, lengths=dreams.lengths)
    )

  def _documents(
    self, n: int, temperature: float, seed: int
  ) -> generation.Documents:
    """Documents that it makes up, as a night has it dream."""
    cfg = dataclasses.replace(self.learner.cfg.sleep, temperature=temperature)
    return self.speaker.documents(cfg, n, self.life.frames, seed)

  def _tell(self, phase: str, share: float) -> None:
    if self.on_progress:
      self.on_progress(phase, share)
