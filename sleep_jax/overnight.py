"""`sleep-jax sleep`: a model reads documents, sleeps, and is measured.

What it has done is saved after every day and every night, as a whole life in
`OUT.part/`; after a kill the same command goes on from there, to the same bits.
`OUT` appears at the end, complete.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any

import tqdm

from sleep_jax import api
from sleep_jax import config
from sleep_jax import overnight_report
from sleep_jax import phases as phases_lib
from sleep_jax import plan as plan_lib
from sleep_jax import reports
from sleep_jax.data import assets
from sleep_jax.data import documents as documents_lib
from sleep_jax.data import untrusted
from sleep_jax.runtime import files

_MERGED = 'merged'
FORMS = ('custom', _MERGED)
_NEUTRAL = 'neutral.txt'  # From George Eliot's Middlemarch (1871), chapter 15.
_MOST_ROWS = 32  # Of 128 tokens, whose perplexity is measured.
_BEFORE = 'before'
# Fields of the plan that may change between two runs of one command.
_OF_NIGHTS = ('dreams', 'steps', 'dream_batch', 'expert_learning_rate', 'slots')
_BAR = '{desc:<9}{percentage:3.0f}% |{bar:30}| {elapsed} < {remaining}'


@dataclasses.dataclass(frozen=True)
class Request:
  """What the command was asked for.

  model: name of a pretrained model, or the folder of a saved life.
  docs: files to read.
  qa: file of questions to ask, if any.
  out: folder to create.
  plan: fields of the plan to set.
  export: forms to write, of `FORMS`.
  allow_failure: go on after a night that transferred nothing.
  """

  model: str
  docs: tuple[pathlib.Path, ...]
  qa: pathlib.Path | None
  out: pathlib.Path
  plan: dict[str, Any]
  seed: int = 0
  export: tuple[str, ...] = ('custom',)
  allow_failure: bool = False


def run(request: Request) -> None:
  """Does all of it, and says what to type next.

  Raises:
    ConfigError: for what is wrong with the request.
    NotTransferred: if a night moved nothing, and that is not allowed.
  """
  out = request.out
  if out.exists():
    raise config.ConfigError(
      f'{out} exists already; name another --out, or delete it yourself.'
    )
  for form in request.export:
    config.lookup(form, dict.fromkeys(FORMS), '--export')
  documents = documents_lib.read(request.docs)
  questions = (
    documents_lib.read_questions(request.qa) if request.qa is not None else []
  )
  state = _State(out.with_name(f'{out.name}.part'))
  with state.claimed(_identity(request, documents, questions)):
    m = _load(request, state)
    neutral = documents_lib.encode_text(
      _neutral(), m.tokenizer, (m.tokenizer.bos,)
    )
    exam = Exam(m.encode(documents), [neutral], questions)
    days = _plan(request, state, m, exam)
    _print_plan(m, exam, state)
    try:
      _live(request, state, m, days, exam)
    except reports.NotTransferred as e:
      raise config.ConfigError(
        f'{e} The day is kept: give the command again with --set steps='
        f'{2 * m.plan.steps}, say, or with --allow-failure.'
      ) from e
    _finish(request, state, m, exam)
  shutil.rmtree(state.folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Exam:
  """What is measured before, after each day and after each night."""

  documents: list[documents_lib.Encoded]
  neutral: list[documents_lib.Encoded]
  questions: list[documents_lib.Question]

  def measure(self, m: api.Sleeper) -> dict[str, float]:
    """Perplexities, and the share of right answers; nothing is in context."""
    speaker = m.speaker
    out = {
      'documents_ppl': speaker.perplexity(self.documents, _MOST_ROWS),
      'neutral_ppl': speaker.perplexity(self.neutral, _MOST_ROWS),
    }
    if self.questions:
      out['quiz'] = m.quiz(self.questions).accuracy
    return out


class _State:
  """The folder of a run in progress: `run.json`, and a life a phase.

  records: one for each phase that was measured.
  pending: what the newest life tells of its phase, until that is measured.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._file = folder / 'run.json'
    self._identity: dict[str, Any] = {}
    self.records: list[dict[str, Any]] = []
    self.pending: dict[str, Any] = {}

  @contextlib.contextmanager
  def claimed(self, identity: dict[str, Any]) -> Iterator[None]:
    """Locks the folder for a run, new or interrupted.

    A folder that nothing was written to is removed again.

    Raises:
      ConfigError: if it is of a run that was asked for something else, or is
        damaged.
    """
    with files.lock_dir(self.folder):
      try:
        if self._file.exists():
          saved = untrusted.read_json(self._file)
          kinds = {'identity': dict, 'records': list, 'pending': dict}
          if not all(isinstance(saved.get(k), t) for k, t in kinds.items()):
            raise config.ConfigError(
              f'{self._file} is damaged; delete {self.folder} yourself to '
              'begin again.'
            )
          self._check(saved['identity'], identity)
          self.records, self.pending = saved['records'], saved['pending']
        self._identity = identity
        yield
      finally:
        if [p.name for p in self.folder.iterdir()] == ['.lock']:
          shutil.rmtree(self.folder)

  def _check(self, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    different = [k for k in identity if saved.get(k) != identity[k]]
    if different:
      raise config.ConfigError(
        f'{self.folder} is of an interrupted run with another '
        f'{different[0]}. Give the same command as then, or delete that '
        'folder yourself to begin again.'
      )

  def life(self) -> pathlib.Path | None:
    """The newest life, if any."""
    lives = sorted(p for p in self.folder.glob('life-*') if p.suffix != '.part')
    return lives[-1] if lives else None

  def save(self, m: api.Sleeper, number: int, facts: dict[str, Any]) -> None:
    """Saves the life after phase `number`; lives before the last are dropped.

    The one that `m` came from is kept: it has its tokenizer.
    """
    for old in sorted(self.folder.glob('life-*'))[:-1]:
      if old != m.source.parent:
        shutil.rmtree(old)
    self.pending = facts
    self._write()
    m.save(self.folder / f'life-{number:03d}')

  def add(self, phase: str, measured: dict[str, float]) -> None:
    """Writes what was measured after a phase, with what the phase told."""
    self.records.append({'phase': phase} | self.pending | measured)
    self.pending = {}
    self._write()

  def _write(self) -> None:
    values = {
      'identity': self._identity,
      'records': self.records,
      'pending': self.pending,
    }
    files.write(self._file, json.dumps(values, indent=1))


def _identity(
  request: Request,
  documents: list[documents_lib.Document],
  questions: list[documents_lib.Question],
) -> dict[str, Any]:
  """What an interrupted run must have in common with this one."""

  def digest(values: list[Any]) -> str:
    text = json.dumps([dataclasses.asdict(x) for x in values])
    return hashlib.sha256(text.encode()).hexdigest()

  return {
    'model': request.model,
    'documents': digest(documents),
    'quiz': digest(questions),
    'plan': {k: v for k, v in request.plan.items() if k not in _OF_NIGHTS},
    'seed': request.seed,
  }


def _neutral() -> str:
  return (assets.folder() / _NEUTRAL).read_text(encoding='utf-8')


def _load(request: Request, state: _State) -> api.Sleeper:
  """The model, or the life that an interrupted run has saved."""
  if (life := state.life()) is None:
    return api.load(request.model, seed=request.seed, **request.plan)
  changes = {k: v for k, v in request.plan.items() if k in _OF_NIGHTS}
  return api.load(life, **changes)


def _plan(
  request: Request, state: _State, m: api.Sleeper, exam: Exam
) -> list[list[documents_lib.Encoded]]:
  """Makes the plan; what is read on each day.

  Raises:
    ConfigError: if there is too little text for the days, or no slot for each
      of the nights.
  """
  lengths = [len(x) for x in exam.documents]
  if m.settings.planned:  # A life that began before, or was interrupted.
    asked = {'nights': plan_lib.nights(lengths)} | request.plan
    m.change(nights=asked['nights'])
  else:
    m.replan(lengths)
  nights, free = m.plan.nights, phases_lib.free_slots(m.life)
  if not state.records and nights > free:
    raise config.ConfigError(
      f'nights={nights} need a free slot each, and {free} are left; give '
      f'--set slots={m.plan.slots + nights - free}.'
    )
  return documents_lib.days(exam.documents, nights)


def _print_plan(m: api.Sleeper, exam: Exam, state: _State) -> None:
  window = m.plan.window
  long = sum(len(x) > window for x in exam.documents)
  print(
    f'{len(exam.documents)} documents, '
    f'{sum(map(len, exam.documents)):,} tokens'
    + (f'; {long} longer than a window will be split' if long else '')
    + f'\nplan (change with --set NAME=VALUE)\n{m.plan}',
    flush=True,
  )
  if state.records:
    print(f'going on after: {state.records[-1]["phase"]}', flush=True)


def _live(
  request: Request,
  state: _State,
  m: api.Sleeper,
  days: list[list[documents_lib.Encoded]],
  exam: Exam,
) -> None:
  """All phases that are not done yet: each is done, saved, and measured."""
  phases = [_BEFORE]
  for night in range(1, len(days) + 1):
    phases += [f'day {night}', f'night {night}']
  newest = state.life()
  done = int(newest.name.removeprefix('life-')) if newest else 0
  for number in range(len(state.records), len(phases)):
    phase = phases[number]
    if number > done:
      with _bar(m, phase):
        facts = _do(request, m, phase, days[(number - 1) // 2])
      state.save(m, number, facts)
    print(f'{phase}: measuring', flush=True)
    state.add(phase, exam.measure(m))
    print(f'  {overnight_report.line(state.records[-1])}', flush=True)


def _do(
  request: Request,
  m: api.Sleeper,
  phase: str,
  day: list[documents_lib.Encoded],
) -> dict[str, Any]:
  """One phase; the figures to keep of it."""
  if phase.startswith('day'):
    report = dataclasses.asdict(m.wake(day))
  else:
    report = dataclasses.asdict(m.sleep(allow_failure=request.allow_failure))
    report.pop('metrics')
  return report


@contextlib.contextmanager
def _bar(m: api.Sleeper, phase: str) -> Iterator[None]:
  """A progress bar with the time that is left."""
  with tqdm.tqdm(total=100, desc=phase, bar_format=_BAR) as bar:

    def show(_: str, share: float) -> None:
      bar.update(100 * share - bar.n)

    m.on_progress = show
    try:
      yield
    finally:
      m.on_progress = None


def _finish(
  request: Request, state: _State, m: api.Sleeper, exam: Exam
) -> None:
  """Exports, report, and the folder's final name."""
  life, out = state.life(), request.out
  assert life is not None  # There was at least one night.
  said = []
  for form in request.export:
    if not (life / form).exists():
      print(f'exporting: {form}', flush=True)
      said.append(m.export(life / form, form).replace(str(life), str(out)))
  if _MERGED in request.export and state.records[-1]['phase'] != _MERGED:
    print(f'{_MERGED}: measuring', flush=True)
    state.add(_MERGED, exam.measure(api.load(life / _MERGED)))
  overnight_report.write(life, state.records)
  life.replace(out)
  print('\n'.join(['', overnight_report.table(state.records), '', *said]))
  print(f'{out}: the model with its life; {out}/sleep.png is the picture.')
  print('\nNext:')
  print(f'  sleep-jax ask {out} "..."')
  print(f'  sleep-jax chat {out}')
  for form in request.export:
    trust = ', trust_remote_code=True' if form == 'custom' else ''
    print(
      f"  transformers: AutoModelForCausalLM.from_pretrained('{out}/{form}'"
      f'{trust})'
    )
