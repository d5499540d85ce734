"""`symbolic`: modular arithmetic over variables assigned in any order.

In the manner of GSM-Infinite's symbolic problems, as arXiv 2605.26099 uses its
stories: the question precedes the context, most of the context is irrelevant,
and the answer follows at once, without a chain of thought. The generator is
new. Each statement assigns a different variable, modulo a small number:

  x7 = 4 .    x3 = x7 - 2 .    x5 = x1 + x3 .

The queried variable ends a chain of `ops` operations. The first one's operand
is an assigned number; that of every other one is the result before. The other
operand is a number, or a variable that is assigned a number. Each operation
maps the previous result one to one, so all answers are equally likely, whatever
`ops` is.

The irrelevant statements have the same forms: they assign numbers, continue
from an earlier irrelevant statement, or from a variable of the chain, the
queried one included; no needed variable depends on them.
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

  max_ops: int = 8  # Largest number of operations that an answer needs.
  statements: int = 24  # Of every problem, the needed ones among them.
  modulus: int = 7
  window: int = 50
  windows: int = 3
  # False: the question is in the prediction window alone, so that the context
  # is read before the question is known.
  question_first: bool = True
  episodes: int = 10  # Evaluations.
  eval_rows: int = 512  # Sequences of an evaluation; of the last 4 times more.
  eval_passes: tuple[int, ...] = ()  # Further N of the last evaluation.

  def __post_init__(self):
    algorithmic.check_evaluation(self)
    # Problems of an evaluation have 2, 4, ... operations; with a modulus below
    # 3 there is no multiplier but 1.
    algorithmic.require_at_least(self, max_ops=2, modulus=3)
    if self.statements < 2 * self.max_ops + 1:
      raise config.ConfigError(
        f'task.statements={self.statements}, but task.max_ops='
        f'{self.max_ops} can need {2 * self.max_ops + 1}; raise the first '
        'or lower the second.'
      )
    longest = 6 * self.statements + 3 * self.question_first
    algorithmic.check_fits(
      longest, self.windows, self.window, 'task.statements'
    )


class Symbolic(algorithmic.WindowTask):
  """The task; see the module's docstring.

  The prediction window is `ask x =`, its target the number. With
  `question_first` the context begins with `ask x .`; nothing else differs. The
  context ends at the end of the last window and is padded at its beginning.
  """

  name = 'symbolic'
  Config = SymbolicConfig
  prediction = 3

  def __init__(self, cfg: SymbolicConfig, seed: int):
    self._first_name = _FIRST_NUMBER + cfg.modulus
    vocab = self._first_name + cfg.statements
    self._eval_ops = range(2, cfg.max_ops + 1, 2)
    headline = ('exact', *(f'exact_op{op}' for op in self._eval_ops))
    super().__init__(cfg, seed, vocab=vocab, bos=_ASK, headline=headline)
    self.windows, self.window = cfg.windows, cfg.window
    numbers = np.arange(2, cfg.modulus)
    # Multiplication by these is invertible.
    self._units = numbers[np.gcd(numbers, cfg.modulus) == 1]

  def batch(
    self, rng: np.random.Generator, rows: int, *, for_eval: bool = False
  ) -> windows.WindowBatch:
    """See `WindowTask.batch`.

    `ops` is uniform from 1 to `max_ops`; in an evaluation among the even ones.
    """
    cfg = self.cfg
    ops = rng.integers(1, cfg.max_ops + 1, (rows, 1))
    if for_eval:
      ops = 2 * rng.integers(1, cfg.max_ops // 2 + 1, (rows, 1))
    # Operands are numbers below `modulus`, or `modulus` + a statement's slot.
    # Slots: the chain's statements, the variables that are its other operands,
    # and the rest, each with its largest possible number.
    chain, chain_used, answer = self._chain(rng, ops)
    rest = self._rest(rng, ops)
    needed = chain_used.sum(1, keepdims=True)
    rest_used = np.arange(rest.shape[1]) < cfg.statements - needed
    parts = np.concatenate([chain, rest], axis=1)
    used = np.concatenate([chain_used, rest_used], axis=1)
    tokens, keep, query = self._write(rng, parts, used, ops)
    context, token_mask = windows.pack(
      tokens, keep, self.windows * self.window, at_end=True
    )
    is_ = np.full_like(query, _IS)
    inputs = np.concatenate([np.full_like(query, _ASK), query, is_], axis=1)
    targets = np.concatenate([query, is_, answer + _FIRST_NUMBER], axis=1)
    last = np.broadcast_to(np.arange(3) == 2, inputs.shape)
    return windows.WindowBatch(
      context=context.reshape(rows, self.windows, self.window),
      token_mask=token_mask.reshape(rows, self.windows, self.window),
      inputs=inputs.astype(np.int32),
      input_mask=np.ones(inputs.shape, bool),
      targets=targets.astype(np.int32),
      weight=last.astype(np.float32),
      depth=np.where(last, ops, 0).astype(np.int32),
    )

  def metrics(
    self, batch: windows.WindowBatch, argmax: np.ndarray, nll: np.ndarray
  ) -> dict[str, float]:
    """`exact`, over all problems and as `exact_op2`, ...; `loss` in nats."""
    right = (argmax == batch.targets)[:, -1]
    ops = batch.depth[:, -1]
    metrics = {'exact': float(right.mean()), 'loss': float(nll[:, -1].mean())}
    for op in self._eval_ops:
      if (ops == op).any():
        metrics[f'exact_op{op}'] = float(right[ops == op].mean())
    return metrics

  def chance_level(self) -> dict[str, float]:
    """Of a uniform guess among all numbers."""
    chance = 1 / self.cfg.modulus
    by_ops = {f'exact_op{op}': chance for op in self._eval_ops}
    return {'exact': chance, 'loss': float(np.log(self.cfg.modulus))} | by_ops

  def _chain(
    self, rng: np.random.Generator, ops: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The statements that the answer needs.

    Returns:
      parts: `[B, 2 * max_ops + 1, 3]` operand, operator (-1: none), operand.
      used: `[B, 2 * max_ops + 1]` bool, those that the problem has.
      answer: `[B, 1]` the chain's value at `ops`.
    """
    cfg, shape = self.cfg, (len(ops), self.cfg.max_ops)
    operator = rng.integers(0, _OPERATORS, shape)
    # Multiplication by a variable is not always invertible.
    named = (rng.random(shape) < 0.5) & (operator != _TIMES)
    first = rng.integers(0, cfg.modulus, (len(ops), 1))
    number = np.where(
      named,
      rng.integers(0, cfg.modulus, shape),
      self._literal(rng, operator),
    )
    step = np.arange(cfg.max_ops)
    previous = np.broadcast_to(cfg.modulus + step, shape)
    variable = cfg.modulus + cfg.max_ops + 1 + step
    swap = rng.random(shape) < 0.5
    steps = _statement(
      previous, operator, np.where(named, variable, number), swap
    )
    parts = np.concatenate([_assigned(first), steps, _assigned(number)], axis=1)
    needed = step < ops
    used = np.concatenate(
      [np.ones_like(first, bool), needed, named & needed], axis=1
    )
    values = [first[:, 0]]
    for i in step:
      a, b = values[-1], number[:, i]
      a, b = np.where(swap[:, i], b, a), np.where(swap[:, i], a, b)
      value = np.choose(operator[:, i], [a + b, a - b, a * b])
      values.append(value % cfg.modulus)
    return parts, used, np.take_along_axis(np.stack(values, 1), ops, axis=1)

  def _rest(self, rng: np.random.Generator, ops: np.ndarray) -> np.ndarray:
    """The irrelevant statements, `[B, statements - 2, 3]` as `_chain`'s."""
    cfg = self.cfg
    shape = (len(ops), cfg.statements - 2)  # One operation needs 2 others.
    first_slot = cfg.modulus + 2 * cfg.max_ops + 1
    place = np.arange(shape[1])
    operator = rng.integers(0, _OPERATORS, shape)

    def earlier() -> np.ndarray:
      """The statement before, one further back, or one of the chain."""
      back = rng.integers(0, np.maximum(place, 1), shape)
      back = np.where(rng.random(shape) < 0.5, place - 1, back)
      chain = cfg.modulus + rng.integers(0, ops + 1, shape)
      in_chain = (rng.random(shape) < 0.3) | (place == 0)
      return np.where(in_chain, chain, first_slot + back)

    named = (rng.random(shape) < 0.5) & (operator != _TIMES)
    literal = self._literal(rng, operator)
    parts = _statement(
      earlier(),
      operator,
      np.where(named, earlier(), literal),
      rng.random(shape) < 0.5,
    )
    # Numbers are assigned about as often as in the chain.
    leaf = (rng.random(shape) < 0.3) | (place == 0)
    numbers = rng.integers(0, cfg.modulus, shape)
    return np.where(leaf[:, :, None], _assigned(numbers), parts)

  def _literal(
    self, rng: np.random.Generator, operator: np.ndarray
  ) -> np.ndarray:
    """Numbers other than 0, and for a multiplication invertible, not 1."""
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
    query: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The question and the used statements, in random order and names.

    Args:
      rng: randomness.
      parts: `[B, slots, 3]`, as in `_chain`.
      used: `[B, slots]` bool, `statements` in every row.
      query: `[B, 1]` slot of the queried variable.

    Returns:
      Tokens `[B, T]`, their mask, and the queried variable's token `[B, 1]`.
    """
    count = self.cfg.statements
    slot = algorithmic.shuffled_columns(rng, used)[:, :count]
    # An independent order, so that a name does not give a position away.
    name = np.zeros(used.shape, np.int64)
    order = rng.permuted(np.tile(np.arange(count), (len(used), 1)), axis=1)
    np.put_along_axis(name, slot, order + self._first_name, axis=1)

    def operand(code: np.ndarray) -> np.ndarray:
      slot_of = np.maximum(code - self.cfg.modulus, 0)
      number = code < self.cfg.modulus
      named = np.take_along_axis(name, slot_of, axis=1)
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
    query_name = np.take_along_axis(name, query, axis=1)
    tokens, keep = lines.reshape(len(used), -1), keep.reshape(len(used), -1)
    if self.cfg.question_first:
      ask = np.full_like(query_name, _ASK)
      question = [ask, query_name, np.full_like(ask, _STOP)]
      tokens = np.concatenate([*question, tokens], axis=1)
      keep = np.pad(keep, ((0, 0), (3, 0)), constant_values=True)
    return tokens, keep, query_name


def _statement(
  left: np.ndarray, operator: np.ndarray, right: np.ndarray, swap: np.ndarray
) -> np.ndarray:
  """Parts `[B, T, 3]`, the operands exchanged where `swap` is True."""
  sides = np.where(swap, right, left), np.where(swap, left, right)
  return np.stack([sides[0], operator, sides[1]], axis=2)


def _assigned(numbers: np.ndarray) -> np.ndarray:
  """Parts `[B, T, 3]` of statements that assign a number."""
  none = np.full_like(numbers, -1)
  return np.stack([numbers, none, none], axis=2)
