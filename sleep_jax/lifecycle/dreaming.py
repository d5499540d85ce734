"""Dreaming: the model improves on what it makes up (Sleep section 6).

A night's dreaming, for every context C of the day, each with an evaluation tau:

  1. dream    sample m dreams ~ LM(. | C), one random expert mixed in
  2. weigh    omega of every dream; keep the k largest and b others
  3. try      fine-tune an isolated LoRA instance on each dream that is kept
  4. reward   1 if the instance does better under tau than untuned, Eq. 5
  5. learn    ReST^EM: supervised fine-tuning on the rewarded dreams; repeat

It follows consolidation in the same night, and like a transfer it is undone as
a whole if what the life knew before suffers.
"""

import collections
import dataclasses
import functools

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import config
from sleep_jax import sampling
from sleep_jax import typing as t
from sleep_jax.data import contexts
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import dreams
from sleep_jax.lifecycle import importance
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle import restem
from sleep_jax.lifecycle import trials
from sleep_jax.models import lora
from sleep_jax.models import transformer
from sleep_jax.objectives import losses
from sleep_jax.runtime import accounts
from sleep_jax.runtime import sharding

_MULTIPLE = 16  # Rows of prompt and dream are padded to it: few shapes.


@dataclasses.dataclass(frozen=True)
class Dreamer:
  """What dreaming is made of; `how.enabled` false leaves a life as it is."""

  cfg: config.ModelConfig
  how: config.DreamingConfig
  lora: config.LoraConfig
  trial: config.TrialConfig
  retention: config.SeedingConfig  # How documents of the old self are drawn.
  reader: contexts.Reader
  tokenizer: tokenizers.Tokenizer
  ledger: accounts.Ledger

  def lab(self, life: life_lib.Life) -> trials.Lab:
    """Where instances of `life` are tried."""
    return trials.Lab(
      self.cfg,
      life.backbone(),
      life.memory,
      self.lora,
      self.trial,
      self.reader,
      self.tokenizer.pad,
      self.ledger,
    )


@dataclasses.dataclass(frozen=True)
class Dream:
  """One dream about one context.

  tokens: as it was sampled, without a stop token.
  edit: what it asks for, or why it was rejected.
  """

  context: contexts.Context
  tokens: contexts.Ids
  edit: contexts.Edit | contexts.Rejected

  @property
  def usable(self) -> bool:
    return isinstance(self.edit, contexts.Edit)


@dataclasses.dataclass(frozen=True)
class Tried:
  """A dream that was tried: its importance, marks under tau, and reward."""

  dream: Dream
  omega: float
  mark: float  # Mean over the repeats, and over tau's questions.
  untuned: float
  rejected: str = ''  # `diverged`: its instance did not stay finite.

  @property
  def reward(self) -> bool:
    """Eq. 5, strictly better."""
    return not self.rejected and self.mark > self.untuned


@dataclasses.dataclass
class Report:
  """What a night's dreaming did.

  rejected: how many dreams for which reason.
  tried, rewarded: dreams that went through a trial, and that passed it.
  mark, untuned: mean marks with and without a dream.
  retention: nats per token that documents of the self before dreaming lost.
  rolled_back: whether that was too much.
  """

  dreamt: int = 0
  rejected: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  tried: int = 0
  rewarded: int = 0
  mark: float = 0.0
  untuned: float = 0.0
  retention: float = 0.0
  rolled_back: bool = False

  def metrics(self) -> dict[str, float]:
    """Figures by name."""
    reasons = ('empty', 'unreadable', 'too long', 'diverged')
    return {
      'dreams': float(self.dreamt),
      'tried': float(self.tried),
      'reward_rate': self.rewarded / max(self.tried, 1),
      'mark': self.mark,
      'untuned': self.untuned,
      'retention_loss': self.retention,
      'rolled_back': float(self.rolled_back),
    } | {
      f'rejected_{r.replace(" ", "_")}': float(self.rejected[r])
      for r in reasons
    }


def dream(
  dreamer: Dreamer,
  life: life_lib.Life,
  about: tuple[contexts.Context, ...],
  each: int,
  rng: t.Key,
) -> list[list[Dream]]:
  """Step 1: `each` dreams about every context, in one batched rollout."""
  how, reader = dreamer.how, dreamer.reader
  prompts = [c.prompt for c in about for _ in range(each)]
  with dreamer.ledger.phase('rollout') as account:
    said = sampling.complete(
      dreamer.cfg,
      life.backbone(),
      life.memory,
      prompts,
      rng,
      sampling.Sampling(
        max_new=reader.max_dream,
        temperature=how.temperature,
        top_p=how.top_p,
        stop=reader.stop,
        pad=dreamer.tokenizer.pad,
        random_expert=how.random_expert,
      ),
    )
    account.forward(sum(map(len, prompts)) + len(said) * reader.max_dream)

  def read(context: contexts.Context, tokens: contexts.Ids) -> Dream:
    if tokens and tokens[-1] == reader.stop:
      tokens = tokens[:-1]
    edit = contexts.Rejected('empty')
    if tokens:
      edit = reader.edit(context, tokens)
    if isinstance(edit, contexts.Edit) and (
      trials.steps_of(dreamer.trial, edit) > dreamer.trial.max_steps
    ):
      edit = contexts.Rejected('too long')
    return Dream(context, tokens, edit)

  return [
    [read(c, tokens) for tokens in said[i * each : (i + 1) * each]]
    for i, c in enumerate(about)
  ]


def weigh(
  dreamer: Dreamer,
  life: life_lib.Life,
  dreamt: list[list[Dream]],
  rng: t.Key,
  rules: tuple[str, ...],
) -> dict[str, list[np.ndarray]]:
  """Step 2: omega of every dream by each rule, `{rule: [context][m]}`.

  What cannot be used has omega -inf. Tau's gradient is that of its questions
  and answers.
  """
  lab = dreamer.lab(life)
  leaves = dataclasses.replace(
    dreamer.lora, targets=dreamer.how.importance_targets
  )
  adapter = lora.fresh(lab.cfg, leaves, lab.params, rng)

  def sketch(sets: list[contexts.Edit]) -> tuple[np.ndarray, np.ndarray]:
    rows = trials.stacked(sets, len(sets), lab.pad)
    with dreamer.ledger.phase('teacher') as account:
      grads = sharding.fetch(
        importance.gradients(
          lab.cfg, lab.params, lab.memory, adapter, *map(jnp.asarray, rows)
        )
      )
      account.partial(rows[0].size, steps=0)
    return grads

  flat = [d for of_one in dreamt for d in of_one]
  length = next((d.edit.tokens.shape[1] for d in flat if d.usable), 1)
  none = contexts.Edit(
    np.zeros((1, length), np.int32), np.zeros((1, length), np.float32)
  )
  most = dreamer.how.importance_rows
  grads, surprise = sketch(
    [_thinned(d.edit, most) if d.usable else none for d in flat]
  )
  references, _ = sketch(
    [_tau(of_one[0].context, lab.pad) for of_one in dreamt]
  )
  omega, start = {rule: [] for rule in rules}, 0
  for i, of_one in enumerate(dreamt):
    own = slice(start, start + len(of_one))
    start += len(of_one)
    usable = np.array([d.usable for d in of_one])
    for rule in rules:
      found = importance.scores(
        rule,
        grads[own],
        surprise[own],
        references[i],
        dreamer.how.keep,
        dreams.host_rng(jax.random.fold_in(rng, i)),
      )
      omega[rule].append(np.where(usable, found, -np.inf))
  return omega


def _thinned(edit: contexts.Edit, most: int) -> contexts.Edit:
  """At most so many of an edit's rows, evenly spaced."""
  n = len(edit.tokens)
  rows = np.linspace(0, n - 1, min(n, most)).astype(int)
  return contexts.Edit(edit.tokens[rows], edit.weight[rows])


def _tau(context: contexts.Context, pad: int) -> contexts.Edit:
  """The evaluation as rows: the questions, with the answers as targets."""
  pairs = zip(context.questions, context.answers, strict=True)
  return _rows(list(pairs), pad)


def _rows(
  pairs: list[tuple[contexts.Ids, contexts.Ids]], pad: int
) -> contexts.Edit:
  """(what is read, what is learnt) as rows."""
  longest = max(len(a) + len(b) for a, b in pairs)
  tokens = np.full((len(pairs), -(-longest // _MULTIPLE) * _MULTIPLE), pad)
  weight = np.zeros(tokens.shape, np.float32)
  for i, (read, learnt) in enumerate(pairs):
    tokens[i, : len(read) + len(learnt)] = read + learnt
    weight[i, len(read) : len(read) + len(learnt)] = 1.0
  return contexts.Edit(tokens.astype(np.int32), weight)


def attempt(
  dreamer: Dreamer,
  life: life_lib.Life,
  chosen: list[tuple[Dream, float]],
  rng: t.Key,
) -> list[Tried]:
  """Steps 3 and 4: every (dream, omega) is tried, and marked against tau."""
  if not chosen:
    return []
  about = list({id(d.context): d.context for d, _ in chosen}.values())
  lab, repeats = dreamer.lab(life), dreamer.trial.repeats
  jobs = [(d.edit, d.context) for d, _ in chosen for _ in range(repeats)]
  jobs += [(None, context) for context in about]
  said, finite = trials.run(
    lab, [edit for edit, _ in jobs], [c.questions for _, c in jobs], rng
  )
  marks = np.array(
    [
      np.mean(dreamer.reader.grade(c, answers))
      for (_, c), answers in zip(jobs, said, strict=True)
    ]
  )
  untuned = {id(c): m for c, m in zip(about, marks[len(jobs) - len(about) :])}
  tried = []
  for i, (one, omega) in enumerate(chosen):
    own = slice(i * repeats, (i + 1) * repeats)
    tried.append(
      Tried(
        one,
        omega,
        float(marks[own].mean()),
        float(untuned[id(one.context)]),
        '' if finite[own].all() else 'diverged',
      )
    )
  return tried


def worth_learning(
  how: config.DreamingConfig, tried: list[Tried]
) -> list[Dream]:
  """Step 5, E: all rewarded dreams, or the best of each context's."""
  rewarded = [x for x in tried if x.reward]
  if how.learn_from == 'all':
    return [x.dream for x in rewarded]
  best = {}
  for x in rewarded:
    now = best.get(id(x.dream.context))
    if now is None or x.mark > now.mark:
      best[id(x.dream.context)] = x
  return [x.dream for x in best.values()]


def _lessons(dreamer: Dreamer, worth: list[Dream]) -> contexts.Edit:
  """Prompt and dream as rows to be learnt."""
  end = [dreamer.reader.stop] if dreamer.reader.stop >= 0 else []
  pairs = [(d.context.prompt, d.tokens + end) for d in worth]
  return _rows(pairs, dreamer.tokenizer.pad)


@functools.partial(jax.jit, static_argnums=0)
def _surprise(cfg, params, memory, tokens, weight) -> jax.Array:
  out = transformer.forward(cfg, params, tokens, memory)
  return losses.next_token_loss(out.logits, tokens, weight)


def retention(
  dreamer: Dreamer, before: life_lib.Life, after: life_lib.Life, rng: t.Key
) -> float:
  """Nats per token by which documents of `before` surprise `after` more."""
  how = dreamer.how
  drawing = dataclasses.replace(
    dreamer.retention, dream_length=how.retention_length
  )
  with dreamer.ledger.phase('exam') as account:
    tokens, lengths = dreams.sample(
      dreamer.cfg,
      drawing,
      before.backbone(),
      before.memory,
      dreamer.tokenizer,
      how.retention_rows,
      rng,
    )
    weight = np.arange(tokens.shape[1]) < lengths[:, None]
    weight = jnp.asarray(weight, jnp.float32)
    old, new = (
      float(_surprise(dreamer.cfg, x.backbone(), x.memory, tokens, weight))
      for x in (before, after)
    )
    account.forward(tokens.size, times=3)
  return new - old


def night(
  dreamer: Dreamer, life: life_lib.Life, rng: t.Key
) -> tuple[life_lib.Life, Report, list[Tried]]:
  """A night's dreaming about the contexts of the day.

  Returns:
    The life after it, what it did, and the trials of its last round.
  """
  how, before, report, tried = dreamer.how, life, Report(), []
  if not how.enabled or not life.contexts:
    return life, report, tried
  room_key, gate_key, *keys = jax.random.split(rng, 2 + how.rounds)
  life, place, start = restem.room(
    dreamer.cfg, how, dreamer.lora, life, room_key
  )
  learnt, changed, marks = start, False, []
  for key in keys:
    dream_key, weigh_key, try_key, learn_key = jax.random.split(key, 4)
    now = restem.put(how, life, place, learnt) if changed else before
    dreamt = dream(dreamer, now, life.contexts, how.dreams, dream_key)
    (omega,) = weigh(
      dreamer, now, dreamt, weigh_key, (how.importance,)
    ).values()
    host, chosen = dreams.host_rng(weigh_key), []
    for of_one, scored in zip(dreamt, omega, strict=True):
      usable = np.array([d.usable for d in of_one])
      kept = importance.select(scored, usable, how.keep, how.keep_random, host)
      chosen += [(of_one[i], float(scored[i])) for i in kept]
    tried = attempt(dreamer, now, chosen, try_key)
    worth = worth_learning(how, tried)
    _count(report, dreamt, tried, marks)
    if not worth:
      logging.warning(
        'Night %d: none of %d tried dreams was rewarded; the dreamer stays as '
        'it is. Raise dreaming.dreams, or look at trial.learning_rate.',
        int(life.clock.nights),
        len(tried),
      )
      continue
    begin = start if how.restart else learnt
    learnt = restem.learn(
      dreamer.cfg, how, life, place, begin, _lessons(dreamer, worth), learn_key,
      dreamer.ledger,
    )  # fmt: skip
    changed = True
  if marks:
    report.mark, report.untuned = np.mean(marks, axis=0).tolist()
  if not changed:
    return before, report, tried
  life = restem.put(how, life, place, learnt)
  report.retention = retention(dreamer, before, life, gate_key)
  # `not <=`, so that a dreamer that is no longer finite is undone too.
  if not report.retention <= how.retention_margin:
    report.rolled_back = True
    logging.warning(
      "Night %d: after dreaming, the self's own documents lost %.3f nats per "
      'token, more than dreaming.retention_margin=%.3f; the night is rolled '
      'back. Lower dreaming.learning_rate or dreaming.epochs.',
      int(life.clock.nights),
      report.retention,
      how.retention_margin,
    )
    life = before
  return life, report, tried


def _count(report, dreamt, tried, marks) -> None:
  """Adds one round to the night's report."""
  for one in (d for of_one in dreamt for d in of_one):
    report.dreamt += 1
    if not one.usable:
      report.rejected[one.edit.reason] += 1
  for x in tried:
    report.tried += 1
    report.rewarded += x.reward
    marks.append((x.mark, x.untuned))
    if x.rejected:
      report.rejected[x.rejected] += 1
