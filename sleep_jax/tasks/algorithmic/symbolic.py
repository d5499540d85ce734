"""Arithmetic over variables whose assignments have gone by, in any order.

In the manner of GSM-Infinite's symbolic problems, as arXiv 2605.26099 uses its
stories: the question stands before the context, most of the context does not
matter, and the answer comes at once, with no chain of thought. The generator is
our own. A statement assigns to a variable that no other one assigns to:

  x7 = 4 .    x3 = x7 - 2 .    x5 = x1 + x3 .

all modulo a small number. The asked variable ends a chain of `ops` operations.
The first is on an assigned number; every other is on the result before. The
other operand is a number, or a variable with an assigned number of its own.
Each step turns the one result into the other one to one, so all answers are as
likely as each other, whatever `ops`.

The statements that are not needed look like the others: they assign numbers, go
on with what an earlier one assigned, or begin at a needed variable, the asked
one among them; but nothing needed depends on them.
"""

import dataclasses

import numpy as np

from sleep_jax import config
from sleep_jax.data import windows
from sleep_jax.tasks.algorithmic import base as algorithmic

_ASK, _IS, _STOP, _PLUS = 1, 2, 3, 4  # After PAD.
_OPERATORS = 3  # Plus, minus and times, in this order.
_FIRST_NUMBER = _PLUS + _OPERATORS
_TIMES = 2


@dataclasses.dataclass(frozen=True)
class SymbolicConfig:
  """Sizes of a problem. The paper's have 1 to 8 operations."""

  max_ops: int = 8  # Operations that the answer needs, at most.
  statements: int = 24  # Of every problem, the needed ones among them.
  modulus: int = 7
  window: int = 50
  windows: int = 3
  # False: the question stands in the prediction window alone, so that the
  # context is read without knowing what for.
  question_first: bool = True

  def __post_init__(self):
    # An exam's problems have 2, 4, ... operations; below 3, times is trivial.
    algorithmic.require_at_least(self, max_ops=2, modulus=3)
    if self.statements < 2 * self.max_ops + 1:
      raise config.ConfigError(
        f'puzzle.statements={self.statements}, but puzzle.max_ops='
        f'{self.max_ops} can need {2 * self.max_ops + 1}; raise the one or '
        'lower the other.'
      )
    longest = 6 * self.statements + 3 * self.question_first
    algorithmic.check_fits(
      longest, self.windows, self.window, 'puzzle.statements'
    )


class Symbolic:
  """The puzzle; see the module's docstring.

  The prediction window is `ask x =`, its target the number. With
  `question_first` the context begins with `ask x .`; otherwise all is the same.
  The context ends at the end of the last window, after padding.
  """

  prediction = 3

  def __init__(self, cfg: SymbolicConfig):
    self.cfg, self.windows, self.window = cfg, cfg.windows, cfg.window
    self._first_name = _FIRST_NUMBER + cfg.modulus
    self.vocab = self._first_name + cfg.statements
    numbers = np.arange(2, cfg.modulus)
    # To multiply by these can be undone.
    self._units = numbers[np.gcd(numbers, cfg.modulus) == 1]

  def batch(
    self, rng: np.random.Generator, rows: int, *, exam: bool = False
  ) -> windows.WindowBatch:
    """See `windows.Puzzle`.

    `ops` is uniform from 1 to `max_ops`, in an exam among its even numbers.
    """
    cfg = self.cfg
    ops = rng.integers(1, cfg.max_ops + 1, (rows, 1))
    if exam:
      ops = 2 * rng.integers(1, cfg.max_ops // 2 + 1, (rows, 1))
    # Operands are numbers, or from `modulus` on slots of statements. The slots:
    # the chain's statements, the variables that it has as other operands, and
    # the rest, of each as many as there can be.
    chain, chain_used, answer = self._chain(rng, ops)
    rest = self._rest(rng, ops)
    needed = chain_used.sum(1, keepdims=True)
    more = np.arange(rest.shape[1]) < cfg.statements - needed
    parts = np.concatenate([chain, rest], axis=1)
    used = np.concatenate([chain_used, more], axis=1)
    tokens, keep, asked = self._write(rng, parts, used, ops)
    context, present = windows.pack(
      tokens, keep, self.windows * self.window, at_end=True
    )
    is_ = np.full_like(asked, _IS)
    inputs = np.concatenate([np.full_like(asked, _ASK), asked, is_], axis=1)
    targets = np.concatenate([asked, is_, answer + _FIRST_NUMBER], axis=1)
    last = np.broadcast_to(np.arange(3) == 2, inputs.shape)
    return windows.WindowBatch(
      context=context.reshape(rows, self.windows, self.window),
      token_mask=present.reshape(rows, self.windows, self.window),
      inputs=inputs.astype(np.int32),
      input_mask=np.ones(inputs.shape, bool),
      targets=targets.astype(np.int32),
      weight=last.astype(np.float32),
      depth=np.where(last, ops, 0).astype(np.int32),
    )

  def metrics(
    self, batch: windows.WindowBatch, chosen: np.ndarray, nll: np.ndarray
  ) -> dict[str, float]:
    """`exact`, over all and as `exact_op2`, ...; `loss` in nats."""
    right = (chosen == batch.targets)[:, -1]
    ops = batch.depth[:, -1]
    marks = {'exact': float(right.mean()), 'loss': float(nll[:, -1].mean())}
    for op in self._exam_ops():
      if (ops == op).any():
        marks[f'exact_op{op}'] = float(right[ops == op].mean())
    return marks

  def chance_level(self) -> dict[str, float]:
    """Of one who guesses among all numbers; all are as likely."""
    chance = 1 / self.cfg.modulus
    each = {f'exact_op{op}': chance for op in self._exam_ops()}
    return {'exact': chance, 'loss': float(np.log(self.cfg.modulus))} | each

  def _exam_ops(self) -> range:
    return range(2, self.cfg.max_ops + 1, 2)

  def _chain(
    self, rng: np.random.Generator, ops: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is needed.

    Returns:
      parts: `[B, 2 * max_ops + 1, 3]` operand, operator (-1: none), operand.
      used: `[B, 2 * max_ops + 1]` bool, which of them there are.
      answer: `[B, 1]` the chain's value at `ops`.
    """
    cfg, shape = self.cfg, (len(ops), self.cfg.max_ops)
    operator = rng.integers(0, _OPERATORS, shape)
    # To multiply by a variable could not always be undone.
    named = (rng.random(shape) < 0.5) & (operator != _TIMES)
    first = rng.integers(0, cfg.modulus, (len(ops), 1))
    number = np.where(
      named,
      rng.integers(0, cfg.modulus, shape),
      self._literal(rng, operator),
    )
    step = np.arange(cfg.max_ops)
    before = np.broadcast_to(cfg.modulus + step, shape)
    own = cfg.modulus + cfg.max_ops + 1 + step
    swap = rng.random(shape) < 0.5
    steps = _statement(before, operator, np.where(named, own, number), swap)
    parts = np.concatenate([_assigned(first), steps, _assigned(number)], axis=1)
    there = step < ops
    used = np.concatenate(
      [np.ones_like(first, bool), there, named & there], axis=1
    )
    values = [first[:, 0]]
    for i in step:
      a, b = values[-1], number[:, i]
      a, b = np.where(swap[:, i], b, a), np.where(swap[:, i], a, b)
      value = np.choose(operator[:, i], [a + b, a - b, a * b])
      values.append(value % cfg.modulus)
    return parts, used, np.take_along_axis(np.stack(values, 1), ops, axis=1)

  def _rest(self, rng: np.random.Generator, ops: np.ndarray) -> np.ndarray:
    """What is not needed, `[B, statements - 2, 3]` like `_chain`'s parts."""
    cfg = self.cfg
    shape = (len(ops), cfg.statements - 2)  # One operation needs two.
    first_slot = cfg.modulus + 2 * cfg.max_ops + 1
    place = np.arange(shape[1])
    operator = rng.integers(0, _OPERATORS, shape)

    def earlier() -> np.ndarray:
      """The statement before, one further back, or one of the chain's."""
      back = rng.integers(0, np.maximum(place, 1), shape)
      back = np.where(rng.random(shape) < 0.5, place - 1, back)
      chain = cfg.modulus + rng.integers(0, ops + 1, shape)
      real = (rng.random(shape) < 0.3) | (place == 0)
      return np.where(real, chain, first_slot + back)

    named = (rng.random(shape) < 0.5) & (operator != _TIMES)
    literal = self._literal(rng, operator)
    parts = _statement(
      earlier(),
      operator,
      np.where(named, earlier(), literal),
      rng.random(shape) < 0.5,
    )
    # About as many of these as the chain has. The first begins a chain.
    leaf = (rng.random(shape) < 0.3) | (place == 0)
    numbers = rng.integers(0, cfg.modulus, shape)
    return np.where(leaf[:, :, None], _assigned(numbers), parts)

  def _literal(
    self, rng: np.random.Generator, operator: np.ndarray
  ) -> np.ndarray:
    """Numbers that do something: none is added 0 or multiplied by 0 or 1."""
    return np.where(
      operator == _TIMES,
      rng.choice(self._units, operator.shape),
      rng.integers(1, self.cfg.modulus, operator.shape),
    )

  def _write(
    self,
    rng: np.random.Generator,
    parts: np.ndarray,
    used: np.ndarray,
    asked: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The question and the used statements in random order, under random names.

    Args:
      rng: randomness.
      parts: `[B, slots, 3]`, as in `_chain`.
      used: `[B, slots]` bool, `statements` in every row.
      asked: `[B, 1]` slot that is asked for.

    Returns:
      Tokens `[B, T]`, where they are kept, and the asked name's token.
    """
    count = self.cfg.statements
    slot = algorithmic.shuffled_columns(rng, used)[:, :count]
    # In another random order, lest a name tell where its statement stands.
    name = np.zeros(used.shape, np.int64)
    order = rng.permuted(np.tile(np.arange(count), (len(used), 1)), axis=1)
    np.put_along_axis(name, slot, order + self._first_name, axis=1)

    def operand(code: np.ndarray) -> np.ndarray:
      of = np.maximum(code - self.cfg.modulus, 0)
      number = code < self.cfg.modulus
      named = np.take_along_axis(name, of, axis=1)
      return np.where(number, code + _FIRST_NUMBER, named)

    left, operator, right = np.moveaxis(
      np.take_along_axis(parts, slot[:, :, None], axis=1), 2, 0
    )
    is_, stop = np.full_like(slot, _IS), np.full_like(slot, _STOP)
    lines = np.stack(
      [
        np.take_along_axis(name, slot, axis=1),
        is_,
        operand(left),
        operator + _PLUS,
        operand(right),
        stop,
      ],
      axis=2,
    )
    keep = np.ones(lines.shape, bool)
    keep[:, :, 3:5] = operator[:, :, None] >= 0
    asked_name = np.take_along_axis(name, asked, axis=1)
    tokens, keep = lines.reshape(len(used), -1), keep.reshape(len(used), -1)
    if self.cfg.question_first:
      ask = np.full_like(asked_name, _ASK)
      question = [ask, asked_name, np.full_like(ask, _STOP)]
      tokens = np.concatenate([*question, tokens], axis=1)
      keep = np.pad(keep, ((0, 0), (3, 0)), constant_values=True)
    return tokens, keep, asked_name


def _statement(
  left: np.ndarray, operator: np.ndarray, right: np.ndarray, swap: np.ndarray
) -> np.ndarray:
  """Parts `[B, T, 3]`, the operands the other way round where `swap` is."""
  sides = np.where(swap, right, left), np.where(swap, left, right)
  return np.stack([sides[0], operator, sides[1]], axis=2)


def _assigned(numbers: np.ndarray) -> np.ndarray:
  """Parts `[B, T, 3]` of statements that assign a number."""
  none = np.full_like(numbers, -1)
  return np.stack([numbers, none, none], axis=2)
