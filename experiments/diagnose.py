"""Where a finished life of `sleep` lost what it was told: stage by stage.

Its last night is looked at again, from the two checkpoints around it. What is
not right before the night was lost in reading; what the two teachers know, and
their dreams do not show, in the dreams; what the dreams show, and the new
expert does not say, in seeding (KL left, gates); and what is right as long as
the fast weights stay, in their reset.

  python -m experiments.diagnose --workdir=runs/facts --life=sleep_1 \
      --out=results/facts_diagnosis
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
import sys
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments import command_line
from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import order as order_lib
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.harness import report as report_lib
from sleep_jax.harness import student as student_lib
from sleep_jax.harness import tables
from sleep_jax.learners import sleep
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import generation
from sleep_jax.lifecycle.consolidation import job as job_lib
from sleep_jax.lifecycle.consolidation import rehearsal
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.lifecycle.consolidation import teacher_labels
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.objectives import divergences
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import compilation
from sleep_jax.tasks import base as task_lib

_NGRAM = 4  # Tokens in a row that make a dream's part one of a day's text.
_MOST_COLUMNS = 20  # Of more days, the means of so many in a row are shown.


@dataclasses.dataclass(frozen=True)
class Night:
  """The last night of a life, before and after."""

  task: task_lib.Task
  learner: sleep.Sleep
  episode: int
  awake: life_lib.Life
  after: life_lib.Life

  @property
  def cfg(self) -> consolidation_config.SeedingConfig:
    """Its settings."""
    return self.learner.cfg.sleep

  @property
  def stop(self) -> int:
    """The token that ends a document, or a part of one."""
    return self.task.tokenizer.separator

  def teachers(self) -> replay_lib.Teachers:
    """The two of a night, whichever of them taught in this one."""
    return replay_lib.Teachers(
      self.awake.model.merged(), self.awake.previous_memory()
    )


def load(c: dict[str, Any], arm: str, seed: int, folder: pathlib.Path) -> Night:
  """The last night of the life in `folder`.

  Raises:
    ConfigError: the arm does not sleep, or the checkpoints around the night are
      not there.
  """
  settings = build_lib.arm_config(c, arm)
  task, learner, _ = build_lib.build(settings, seed)
  if not isinstance(learner, sleep.Sleep) or not learner.cfg.sleep.consolidate:
    raise config.ConfigError(
      f'{arm} has no nights; give a --life of the learner sleep.'
    )
  checkpoints = checkpoint.Checkpoints(
    folder / 'checkpoints',
    build_lib.life_digest(settings, seed),
    live_lib.base_digest(learner),
  )
  template = learner.init(jax.random.PRNGKey(seed))
  awake, after = (checkpoints.newest(template, x) for x in checkpoint.PHASES)
  checkpoints.close()
  if awake is None or after is None or awake.night != after.night:
    raise config.ConfigError(
      f'{folder}/checkpoints does not hold both sides of a night; let the '
      'night end (run the experiment again), and do not delete them.'
    )
  frames = live_lib.frames_of(after)
  return Night(
    task,
    learner,
    after.night,
    awake.life.replace(frames=frames),
    after.life.replace(frames=frames),
  )


def marks(night: Night) -> dict[str, experience_lib.EvalResult]:
  """What four models answer: by name, the task's evaluation of each."""
  kept = night.after.memory.with_fast_state(night.awake.memory.fast_state())
  lives = {
    'before the day': night.awake.with_memory(night.awake.previous_memory()),
    'after the day (reading)': night.awake,
    'after the night, fast weights kept': night.after.with_memory(kept),
    'after the night': night.after,
  }
  return {
    name: night.task.evaluate(
      student_lib.Student(night.learner, life), night.episode
    )
    for name, life in lives.items()
  }


def ngrams(tokens: np.ndarray) -> set[tuple[int, ...]]:
  """The `_NGRAM` tokens in a row that occur in `tokens` `[T]`."""
  row = tokens.tolist()
  return set(zip(*(row[i:] for i in range(_NGRAM))))


def day_ngrams(night: Night, episode: int) -> set[tuple[int, ...]]:
  """Those of one day's text."""
  day = experience_lib.in_memory(night.task.experience(episode), 'diagnose')
  rows = [row[w > 0] for row, w in zip(day.tokens, day.weight, strict=True)]
  return set().union(*map(ngrams, rows))


def dream(night: Night, rng: at.Key) -> dict[str, generation.Documents]:
  """Dreams of both teachers, as many as a night has."""
  teachers = night.teachers()
  models = {'before the day': teachers.previous, 'after it': teachers.current}
  drawn = {}
  for i, (name, model) in enumerate(models.items()):
    assert model is not None
    drawn[name] = generation.sample(
      night.cfg,
      model,
      night.task.tokenizer,
      night.cfg.dreams // 2,
      jax.random.fold_in(rng, i),
      night.awake.frames,
    )
  return drawn


def coverage(
  night: Night, dreamt: dict[str, generation.Documents]
) -> dict[str, dict[str, Any]]:
  """How whole, how different and about which days each teacher's dreams are."""
  days = [day_ngrams(night, i) for i in range(night.episode + 1)]
  out = {}
  for name, drawn in dreamt.items():
    rows = [r[:n] for r, n in zip(drawn.tokens, drawn.lengths, strict=True)]
    # Past its beginning, which a frame gives.
    ended = [night.stop in r[s:] for r, s in zip(rows, drawn.starts)]
    said = set().union(*map(ngrams, rows))
    out[name] = {
      'ended': float(np.mean(ended)),
      'distinct': len({r.tobytes() for r in rows}) / len(rows),
      'of the days': [len(day & said) / len(day) for day in days],
    }
  return out


def audit(
  night: Night, dreamt: dict[str, generation.Documents]
) -> dict[str, dict[str, float]]:
  """What each teacher's dreams say, and whether it is believed in the morning.

  Empty for a task that is not `Audited`.
  """
  task = night.task
  if not isinstance(task, task_lib.Audited):
    return {}
  student = student_lib.Student(night.learner, night.after)
  return {
    name: task.audit(
      student,
      night.episode,
      [
        row[:length].tolist()
        for row, length in zip(drawn.tokens, drawn.lengths, strict=True)
      ],
    )
    for name, drawn in dreamt.items()
  }


def seeding_left(night: Night, rng: at.Key) -> dict[str, dict[str, float]]:
  """KL(teacher || student) and gates on fresh dreams, by whose tokens.

  `without` is the student before its new expert was seeded, `with` after it;
  `gate` is the new expert's, on tokens of which the teachers disagree if they
  are the day's.

  Raises:
    ConfigError: that night transferred nothing.
  """
  due = night.learner.due(night.awake)
  if not due:
    raise config.ConfigError('No level was due in the last night.')
  receiver = due[-1].receiver
  teachers = night.teachers()
  replay = replay_lib.sample_replay(
    night.cfg, teachers, night.task.tokenizer,
    int(night.awake.clock.nights), rng, night.awake.frames,
  )  # fmt: skip
  labels = teacher_labels.label_all(night.cfg, teachers, replay)
  replay, labels = rehearsal.splice(
    night.cfg, night.task.tokenizer, teachers, order_lib.numpy_rng(rng),
    replay, labels,
  )  # fmt: skip
  after = night.after.model.merged()
  slot = int(np.argmax(np.asarray(after.bank(receiver).created_night)))
  locked = after.bank(receiver).set_status(slot, memory_lib.LOCKED)
  without = after.with_level(receiver, bank=locked)
  measure = functools.partial(
    _measure, night.cfg, job_lib.SlotId(receiver, slot)
  )
  sums: dict[str, list[float]] = {}
  rows = np.arange(len(replay.tokens))
  for index in np.split(rows, rows[night.cfg.batch :: night.cfg.batch]):
    batch = labels.rows(index)
    for name, values in measure(without, after, batch).items():
      total = sums.setdefault(name, [0.0, 0.0])
      total[0] += float(values[0])
      total[1] += float(values[1])
  means = {name: x / max(weight, 1e-9) for name, (x, weight) in sums.items()}
  return {
    whose: {
      what: means[f'{what}, {whose}'] for what in ('without', 'with', 'gate')
    }
    for whose in ('day', 'past')
  }


@functools.partial(jax.jit, static_argnums=0)
def _measure(
  cfg: consolidation_config.SeedingConfig,
  target: job_lib.SlotId,
  without: model_lib.Model,
  after: model_lib.Model,
  labels: teacher_labels.LabeledBatch,
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Weighted sums of a batch, and the sums of their weights."""
  inputs = labels.tokens if labels.prefix is None else labels.prefix
  outs = {
    name: model.forward(inputs, positions=labels.positions)
    for name, model in (('without', without), ('with', after))
  }
  gates = outs['with'].router_logits(target.level)
  gate = jax.nn.sigmoid(jnp.take(gates, target.slot, axis=-1)).mean(0)
  sums = {}
  for whose, is_theirs in (
    ('day', labels.gate > 0.5),
    ('past', labels.gate <= 0.5),
  ):
    weight = (labels.weight > 0) & is_theirs
    for name, out in outs.items():
      if isinstance(labels.teacher, divergences.TopK):
        kl = divergences.from_hidden(
          divergences.forward_kl, labels.teacher,
          (out.hidden, after.unembedding()), chunk=cfg.tokens_in_flight,
        )  # fmt: skip
      else:
        kl = divergences.forward_kl(labels.teacher, out.logits)
      sums[f'{name}, {whose}'] = (kl * weight).sum(), weight.sum()
    routed = weight & (labels.gate_weight > 0)
    sums[f'gate, {whose}'] = (gate * routed).sum(), routed.sum()
  return sums


def report(
  results: dict[str, experience_lib.EvalResult],
  covered: dict[str, dict[str, Any]],
  said: dict[str, dict[str, float]],
  left: dict[str, dict[str, float]],
) -> str:
  """The tables as Markdown."""

  def row(values: list[float]) -> list[str]:
    return [f'{x:.3f}' for x in values]

  first = next(iter(results.values()))
  num_days = len(first.by_episode)
  size = -(-num_days // _MOST_COLUMNS)
  spans = [(i, min(i + size, num_days)) for i in range(0, num_days, size)]
  days = [f'day {a + 1}' + f' to {b}' * (b > a + 1) for a, b in spans]

  def by_day(values: Sequence[float]) -> list[str]:
    return row([float(np.mean(values[a:b])) for a, b in spans])

  text = 'What is answered:\n\n' + tables.markdown(
    ['model', *days, *first.metrics],
    [
      [name, *by_day(x.by_episode), *row(list(x.metrics.values()))]
      for name, x in results.items()
    ],
  )
  text += f'\nDreams ({_NGRAM}-grams of a day that occur in them):\n\n'
  text += tables.markdown(
    ['by the model', 'ended', 'distinct', *days],
    [
      [name, *row([x['ended'], x['distinct']]), *by_day(x['of the days'])]
      for name, x in covered.items()
    ],
  )
  if said:
    kinds = list(next(iter(said.values())))
    text += '\nStatements in the dreams, and wrong ones believed after:\n\n'
    text += tables.markdown(
      ['by the model', *kinds],
      [[name, *row(list(shares.values()))] for name, shares in said.items()],
    )
  text += '\nSeeding, on fresh dreams (KL in nats per token):\n\n'
  return text + tables.markdown(
    ['tokens of', 'KL without the expert', 'KL with it', 'gate'],
    [[whose, *row(list(x.values()))] for whose, x in left.items()],
  )


def diagnose(c: dict[str, Any], life: str, workdir: pathlib.Path) -> str:
  """The report of the life named `life`, `ARM_SEED`."""
  arm, _, seed = life.rpartition('_')
  if arm not in c['arms'] or not seed.isdigit():
    raise config.ConfigError(
      f'--life={life!r} is not ARM_SEED; arms are {", ".join(c["arms"])}.'
    )
  night = load(c, arm, int(seed), workdir / 'lives' / life)
  key = jax.random.key(int(seed))
  dreamt = dream(night, jax.random.fold_in(key, 1))
  return report(
    marks(night),
    coverage(night, dreamt),
    audit(night, dreamt),
    seeding_left(night, jax.random.fold_in(key, 2)),
  )


def define_flags() -> None:
  """Called by `main` alone: other commands have flags of the same names."""
  flags.DEFINE_string('workdir', None, 'Of experiments.run.', required=True)
  flags.DEFINE_string('life', None, 'ARM_SEED.', required=True)
  flags.DEFINE_string('out', None, 'A folder.', required=True)


def main(_) -> None:
  values = flags.FLAGS
  workdir, out = pathlib.Path(values.workdir), pathlib.Path(values.out)
  try:
    compilation.enable_cache()
    text = diagnose(report_lib.read_config(workdir), values.life, workdir)
  except config.ConfigError as e:
    sys.exit(f'error: {e}')
  out.mkdir(parents=True, exist_ok=True)
  (out / 'table.md').write_text(f'{values.life}, its last night.\n\n{text}')
  print(text)


if __name__ == '__main__':
  define_flags()
  app.run(main, flags_parser=command_line.parse)
