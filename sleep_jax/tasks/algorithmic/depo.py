"""`depo`: the node k edges further along a directed cycle in the context.

The format is that of "Physics of Language Models: Part 4.1" (PhysicsLM4), the
sizes are those of arXiv 2605.26099. A node's name is a word of one or more
tokens, the last of which is from a separate set. The context is BOS and the
cycle's edges in random order, `word(u) word(succ(u))` without separators; it
ends at the end of the last window and is padded at its beginning. The
prediction window holds questions `QUERY_k word(u) ANS word(v)`, v being k edges
after u; nodes u are distinct, k is drawn for each.

As in PhysicsLM4, ANS is a target besides the answer's tokens. Its depth is 0,
and the metrics leave it out. QUERY_k and word(u) are never targets.
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

  nodes: int = 75  # Of the largest cycle; of every cycle of an evaluation.
  smallest: int = 3  # Nodes of the smallest cycle.
  vocab: int = 50  # Tokens that words are made of; their last ones, as many.
  word_min: int = 1  # Tokens of a name.
  word_max: int = 2
  hops: int = 16  # Largest k.
  queries: int = 10  # At most; a smaller cycle has one per node.
  window: int = 75
  windows: int = 4
  episodes: int = 10  # Evaluations.
  eval_rows: int = 512  # Sequences of an evaluation; of the last 4 times more.
  eval_passes: tuple[int, ...] = ()  # Further N of the last evaluation.

  def __post_init__(self):
    algorithmic.check_evaluation(self)
    at_least_1 = ('smallest', 'vocab', 'word_min', 'hops', 'queries')
    algorithmic.require_at_least(
      self,
      **dict.fromkeys(at_least_1, 1),
      nodes=self.smallest,
      word_max=self.word_min,
    )
    words = sum(self.vocab**n for n in range(self.word_min, self.word_max + 1))
    if words < self.nodes:
      raise config.ConfigError(
        f'task: {self.nodes} nodes need as many names, but task.vocab='
        f'{self.vocab} makes only {words}; raise it or task.word_max.'
      )
    # Without BOS: the paper's 75 edges of up to 4 tokens fill its 300 tokens.
    # If all words have the full length, BOS is cut off.
    algorithmic.check_fits(
      2 * self.nodes * self.word_max, self.windows, self.window, 'task.nodes'
    )


class Depo(algorithmic.WindowTask):
  """The task; see the module's docstring."""

  name = 'depo'
  Config = DepoConfig

  def __init__(self, cfg: DepoConfig, seed: int):
    self._first_name = _ANS + cfg.hops + 1
    vocab = self._first_name + 2 * cfg.vocab
    self._powers = 2 ** np.arange(cfg.hops.bit_length())
    headline = ('exact', *(f'exact_k{k}' for k in self._powers))
    super().__init__(cfg, seed, vocab=vocab, bos=_BOS, headline=headline)
    self.windows, self.window = cfg.windows, cfg.window
    self.prediction = cfg.queries * (2 + 2 * cfg.word_max)
    self._sizes = np.arange(cfg.smallest, cfg.nodes + 1)
    size_probs = 1 / (self._sizes + np.sqrt(cfg.nodes))
    self._size_probs = size_probs / size_probs.sum()

  def batch(
    self, rng: np.random.Generator, rows: int, *, for_eval: bool = False
  ) -> windows.WindowBatch:
    """See `WindowTask.batch`.

    A cycle has n nodes with a probability proportional to 1 / (n +
    sqrt(nodes)), and k is uniform from 1 to `hops`. In an evaluation n is
    `nodes`, and k a power of 2.
    """
    cfg = self.cfg
    if for_eval:
      n = np.full((rows, 1), cfg.nodes)
      hops = rng.choice(self._powers, (rows, cfg.queries))
    else:
      n = rng.choice(self._sizes, (rows, 1), p=self._size_probs)
      hops = rng.integers(1, cfg.hops + 1, (rows, cfg.queries))
    # Names are random, so the nodes can be in order along the cycle.
    words = self._words(rng, rows)
    valid = np.arange(cfg.nodes) < n
    context, token_mask = self._context(
      words, algorithmic.shuffled_columns(rng, valid), n
    )
    start = algorithmic.shuffled_columns(rng, valid)[:, : cfg.queries]
    return windows.WindowBatch(
      context=context.reshape(rows, cfg.windows, cfg.window),
      token_mask=token_mask.reshape(rows, cfg.windows, cfg.window),
      **self._questions(words, start, hops, n),
    )

  def metrics(
    self, batch: windows.WindowBatch, argmax: np.ndarray, nll: np.ndarray
  ) -> dict[str, float]:
    """Of answers alone, over all k and for each k that is a power of 2.

    `loss`, `loss_k1`, ...: nats per token. `exact`, `exact_k1`, ...: answers
    every token of which is right.
    """
    answer = batch.depth > 0
    # Answers are numbered by the ANS before them, counted along the row.
    number = np.cumsum((batch.targets == _ANS) & (batch.weight > 0), axis=1)
    number += np.arange(len(number))[:, None] * (self.cfg.queries + 1)
    _, first, answer_of = np.unique(
      number[answer], return_index=True, return_inverse=True
    )
    wrong = (argmax != batch.targets)[answer]
    exact = np.bincount(answer_of, wrong, len(first)) == 0
    losses, by_token = nll[answer], batch.depth[answer]
    by_answer = by_token[first]
    metrics = {'loss': float(losses.mean()), 'exact': float(exact.mean())}
    for k in self._powers:
      if (by_answer == k).any():
        metrics[f'loss_k{k}'] = float(losses[by_token == k].mean())
        metrics[f'exact_k{k}'] = float(exact[by_answer == k].mean())
    return metrics

  def chance_level(self) -> dict[str, float]:
    """Of a uniform guess among the nodes of an evaluation's cycle.

    `loss` is log(nodes) nats per word over the mean tokens of a sample of
    words.
    """
    lengths = (self._words(np.random.default_rng(75), 256) >= 0).sum(2)
    chances = {
      'loss': float(np.log(self.cfg.nodes) / lengths.mean()),
      'exact': 1 / self.cfg.nodes,
    }
    by_hops = {
      f'{name}_k{k}': p for name, p in chances.items() for k in self._powers
    }
    return chances | by_hops

  def _words(self, rng: np.random.Generator, rows: int) -> np.ndarray:
    """Distinct names: tokens `[rows, nodes, word_max]`, -1 after a word's end.

    Length and tokens of each are uniform, given that no name occurs twice.
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
      code = words @ (self.tokenizer.vocab + 1) ** place
      order = np.argsort(code, axis=1, kind='stable')
      code = np.take_along_axis(code, order, axis=1)
      distinct = np.ones(code.shape, bool)
      changes = np.diff(code, axis=1) != 0
      np.put_along_axis(distinct, order[:, 1:], changes, axis=1)
      if (distinct.sum(1) >= cfg.nodes).all():
        keep = np.argsort(~distinct, axis=1, kind='stable')[:, : cfg.nodes]
        return np.take_along_axis(words, keep[:, :, None], axis=1)

  def _context(
    self, words: np.ndarray, order: np.ndarray, n: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """BOS and the edges from `order`'s first n nodes: tokens and mask."""
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
    """The prediction window's fields of a `WindowBatch`.

    A row has min(n, queries) questions.
    """
    used = np.arange(start.shape[1]) < n
    hops = hops[:, : start.shape[1]]

    def word(node: np.ndarray) -> np.ndarray:
      return np.take_along_axis(words, node[:, :, None], axis=1)

    query = (_ANS + hops)[:, :, None]
    answer = word((start + hops) % n)
    tokens = np.concatenate(
      [query, word(start), np.full_like(query, _ANS), answer], axis=2
    )
    keep = (tokens >= 0) & used[:, :, None]
    # ANS and the answer are targets; the answer's tokens have depth k.
    place = np.arange(tokens.shape[2]) - (1 + words.shape[2])
    is_target = np.broadcast_to(place >= 0, tokens.shape)
    depth = np.where(place > 0, hops[:, :, None], 0)

    def packed(values: np.ndarray, shift: int = 0) -> np.ndarray:
      flat = (len(keep), -1)
      row, _ = windows.pack(
        values.reshape(flat),
        keep.reshape(flat),
        self.prediction + shift,
        at_end=False,
      )
      return row[:, shift:]

    return dict(
      inputs=packed(tokens),
      input_mask=packed(keep).astype(bool),
      targets=packed(tokens, 1),
      weight=packed(is_target, 1).astype(np.float32),
      depth=packed(depth, 1),
    )
