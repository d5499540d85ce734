"""The figures of `experiments.dream_value`, on cases that can be counted."""

import numpy as np
import pytest

from experiments import dream_value
from sleep_jax.data import contexts
from sleep_jax.lifecycle.dreaming import propose as propose_lib


def test_auc_counts_pairs_and_half_of_ties():
  rewarded = np.array([True, False, True, False])
  assert dream_value.auc(np.array([4.0, 1.0, 3.0, 2.0]), rewarded) == 1.0
  assert dream_value.auc(np.array([1.0, 2.0, 1.0, 3.0]), rewarded) == 0.0
  assert dream_value.auc(np.array([2.0, 2.0, 3.0, 2.0]), rewarded) == 0.75
  assert np.isnan(dream_value.auc(np.ones(2), np.array([True, True])))


def test_by_rank_begins_with_the_most_important():
  omega = np.arange(8.0)
  assert dream_value.by_rank(omega, omega >= 6) == [1.0, 0.0, 0.0, 0.0]


def test_diversity_of_equal_and_of_different_dreams():
  about = contexts.Context('', [1], [], [])

  def of(*dreams):
    return [
      propose_lib.Dream(about, d, contexts.Rejected('unreadable'))
      for d in dreams
    ]

  same = dream_value.diversity(of([5, 6], [5, 6]), pad=0)
  assert same == {'distinct': 0.5, 'distance': 0.0}
  apart = dream_value.diversity(of([5, 6], [7, 8, 9, 9]), pad=0)
  assert apart == {'distinct': 1.0, 'distance': 1.0}
  half = dream_value.diversity(of([5, 6, 7, 8], [5, 6, 9, 9]), pad=0)
  assert half['distance'] == pytest.approx(0.5)
