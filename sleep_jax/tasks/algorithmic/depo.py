"""Depo: walk so many edges along a directed cycle that has gone by.

After the format of "Physics of Language Models: Part 4.1" (PhysicsLM4), in the
sizes of arXiv 2605.26099. A node's name is a word of one or more tokens, the
last of which is from a set of its own. The context is BOS and the cycle's edges
in random order, `word(u) word(succ(u))`, nothing between; it ends at the end of
the last window, and what is left before it is padding. Then come questions,
each `QUERY_k word(u) ANS word(v)`, v being k edges after u; u is another node
in each, and k any number.

As in PhysicsLM4, ANS counts as a target besides the answer's tokens. It takes
no reasoning: its depth is 0, and the marks leave it out. QUERY_k and word(u)
are never targets.
"""

import dataclasses

import numpy as np

from sleep_jax import config
from sleep_jax.data import windows
from sleep_jax.tasks.algorithmic import base as algorithmic

_BOS, _ANS = 1, 2  # After PAD. Then QUERY_1, ..., QUERY_K and the names.


@dataclasses.dataclass(frozen=True)
class DepoConfig:
  """Depo1's words; `nodes`, `hops` and the windows of arXiv 2605.26099."""

  nodes: int = 75  # Of the largest cycle, and of every cycle of an exam.
  smallest: int = 3  # Nodes of the smallest cycle.
  vocab: int = 50  # Tokens that words are made of; their last ones, as many.
  word_min: int = 1  # Tokens of a name.
  word_max: int = 2
  hops: int = 16  # Largest k.
  queries: int = 10  # At most; a smaller cycle has one per node.
  window: int = 75
  windows: int = 4

  def __post_init__(self):
    least = ('smallest', 'vocab', 'word_min', 'hops', 'queries')
    algorithmic.require_at_least(
      self,
      **dict.fromkeys(least, 1),
      nodes=self.smallest,
      word_max=self.word_min,
    )
    words = sum(self.vocab**n for n in range(self.word_min, self.word_max + 1))
    if words < self.nodes:
      raise config.ConfigError(
        f'puzzle: {self.nodes} nodes need as many names, but puzzle.vocab='
        f'{self.vocab} makes only {words}; raise it or puzzle.word_max.'
      )
    # Without BOS: the paper's own 75 edges of 4 tokens fill its 300 tokens. If
    # ever all words have the full length there, it is BOS that falls off.
    algorithmic.check_fits(
      2 * self.nodes * self.word_max, self.windows, self.window, 'puzzle.nodes'
    )


class Depo:
  """The puzzle; see the module's docstring."""

  def __init__(self, cfg: DepoConfig):
    self.cfg, self.windows, self.window = cfg, cfg.windows, cfg.window
    self._first_name = _ANS + cfg.hops + 1
    self.vocab = self._first_name + 2 * cfg.vocab
    self.prediction = cfg.queries * (2 + 2 * cfg.word_max)
    self._powers = 2 ** np.arange(cfg.hops.bit_length())
    self._sizes = np.arange(cfg.smallest, cfg.nodes + 1)
    often = 1 / (self._sizes + np.sqrt(cfg.nodes))
    self._often = often / often.sum()

  def batch(
    self, rng: np.random.Generator, rows: int, *, exam: bool = False
  ) -> windows.WindowBatch:
    """See `windows.Puzzle`.

    Cycles are of n nodes with a probability as 1 / (n + sqrt(nodes)), and k is
    uniform from 1 to `hops`. In an exam n is `nodes`, and k a power of 2.
    """
    cfg = self.cfg
    if exam:
      n = np.full((rows, 1), cfg.nodes)
      hops = rng.choice(self._powers, (rows, cfg.queries))
    else:
      n = rng.choice(self._sizes, (rows, 1), p=self._often)
      hops = rng.integers(1, cfg.hops + 1, (rows, cfg.queries))
    # Names are random, so the nodes may stand on the cycle in their order.
    words = self._words(rng, rows)
    valid = np.arange(cfg.nodes) < n
    context, present = self._context(
      words, algorithmic.shuffled_columns(rng, valid), n
    )
    start = algorithmic.shuffled_columns(rng, valid)[:, : cfg.queries]
    return windows.WindowBatch(
      context=context.reshape(rows, cfg.windows, cfg.window),
      token_mask=present.reshape(rows, cfg.windows, cfg.window),
      **self._questions(words, start, hops, n),
    )

  def metrics(
    self, batch: windows.WindowBatch, chosen: np.ndarray, nll: np.ndarray
  ) -> dict[str, float]:
    """Of answers alone, over all k and for each k that is a power of 2.

    `loss`, `loss_k1`, ...: nats per token. `exact`, `exact_k1`, ...: answers
    every token of which is right.
    """
    answer = batch.depth > 0
    # An answer is what follows an ANS, and so bears its number in the row.
    number = np.cumsum((batch.targets == _ANS) & (batch.weight > 0), axis=1)
    number += np.arange(len(number))[:, None] * (self.cfg.queries + 1)
    _, first, of = np.unique(
      number[answer], return_index=True, return_inverse=True
    )
    wrong = (chosen != batch.targets)[answer]
    exact = np.bincount(of, wrong, len(first)) == 0
    losses, by_token = nll[answer], batch.depth[answer]
    by_answer = by_token[first]
    marks = {'loss': float(losses.mean()), 'exact': float(exact.mean())}
    for k in self._powers:
      if (by_answer == k).any():
        marks[f'loss_k{k}'] = float(losses[by_token == k].mean())
        marks[f'exact_k{k}'] = float(exact[by_answer == k].mean())
    return marks

  def chance_level(self) -> dict[str, float]:
    """At an exam, of one who guesses among the cycle's nodes evenly.

    That costs log(nodes) nats for a word, by a sample of so many tokens.
    """
    lengths = (self._words(np.random.default_rng(75), 256) >= 0).sum(2)
    chances = {
      'loss': float(np.log(self.cfg.nodes) / lengths.mean()),
      'exact': 1 / self.cfg.nodes,
    }
    each = {f'{m}_k{k}': p for m, p in chances.items() for k in self._powers}
    return chances | each

  def _words(self, rng: np.random.Generator, rows: int) -> np.ndarray:
    """Distinct names: tokens `[rows, nodes, word_max]`, -1 after a word's end.

    Length and tokens of each are uniform, except that no name comes twice.
    """
    cfg = self.cfg
    place = np.arange(cfg.word_max)
    words = np.empty((rows, 0, cfg.word_max), np.int64)
    while True:
      shape = (rows, 2 * cfg.nodes + words.shape[1])
      length = rng.integers(cfg.word_min, cfg.word_max + 1, (*shape, 1))
      drawn = rng.integers(0, cfg.vocab, (*shape, cfg.word_max))
      drawn += self._first_name + cfg.vocab * (place == length - 1)
      drawn[place >= length] = -1
      words = np.concatenate([words, drawn], axis=1)
      code = words @ (self.vocab + 1) ** place
      order = np.argsort(code, axis=1, kind='stable')
      code = np.take_along_axis(code, order, axis=1)
      fresh = np.ones(code.shape, bool)
      put = np.diff(code, axis=1) != 0
      np.put_along_axis(fresh, order[:, 1:], put, axis=1)
      if (fresh.sum(1) >= cfg.nodes).all():
        keep = np.argsort(~fresh, axis=1, kind='stable')[:, : cfg.nodes]
        return np.take_along_axis(words, keep[:, :, None], axis=1)

  def _context(
    self, words: np.ndarray, order: np.ndarray, n: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """BOS and the edges from `order`'s first n nodes: tokens, and where."""
    rows, nodes = order.shape
    ends = np.stack([order, (order + 1) % n], axis=2).reshape(rows, -1, 1)
    tokens = np.take_along_axis(words, ends, axis=1).reshape(rows, nodes, -1)
    tokens[np.arange(nodes) >= n] = -1
    tokens = np.pad(
      tokens.reshape(rows, -1), ((0, 0), (1, 0)), constant_values=_BOS
    )
    length = self.windows * self.window
    return windows.pack(tokens, tokens >= 0, length, at_end=True)

  def _questions(
    self, words: np.ndarray, start: np.ndarray, hops: np.ndarray, n: np.ndarray
  ) -> dict[str, np.ndarray]:
    """The prediction window's part of `Windows`; one row asks min(n, Q)."""
    asked = np.arange(start.shape[1]) < n
    hops = hops[:, : start.shape[1]]

    def word(node: np.ndarray) -> np.ndarray:
      return np.take_along_axis(words, node[:, :, None], axis=1)

    query = (_ANS + hops)[:, :, None]
    answer = word((start + hops) % n)
    tokens = np.concatenate(
      [query, word(start), np.full_like(query, _ANS), answer], axis=2
    )
    keep = (tokens >= 0) & asked[:, :, None]
    # ANS and the answer are asked for; the answer's tokens have k's depth.
    place = np.arange(tokens.shape[2]) - (1 + words.shape[2])
    wanted = np.broadcast_to(place >= 0, tokens.shape)
    depth = np.where(place > 0, hops[:, :, None], 0)

    def packed(values: np.ndarray, ahead: int = 0) -> np.ndarray:
      flat = (len(keep), -1)
      row, _ = windows.pack(
        values.reshape(flat),
        keep.reshape(flat),
        self.prediction + ahead,
        at_end=False,
      )
      return row[:, ahead:]

    return dict(
      inputs=packed(tokens),
      input_mask=packed(keep).astype(bool),
      targets=packed(tokens, 1),
      weight=packed(wanted, 1).astype(np.float32),
      depth=packed(depth, 1),
    )
