"""What tasks of problems with solutions have in common."""

import numpy as np

from sleep_jax.data import contexts
from sleep_jax.data import padding
from sleep_jax.data import problems as problems_lib
from sleep_jax.tasks import base as task_lib


def score(
  student: task_lib.Student,
  problems: problems_lib.Problems,
  samples: int,
  seed: int,
  prompts: list[contexts.TokenIds] | None = None,
) -> dict[str, float]:
  """Metrics of k samples of each problem at temperature 1.

  accuracy: avg@k, the share of k samples that are right.
  accuracy_se: its standard error over problems.
  pass: pass@k, the share of problems of which one sample is.
  tokens: mean length of a sample.
  truncated, unreadable: shares of samples without an end, and an answer.
  entropy: nats per token, estimated by the log-probability of the samples.

  Args:
    student: who is asked.
    problems: N problems.
    samples: k.
    seed: of the samples.
    prompts: by which they are asked; None = their own.
  """
  prompts = problems.prompts if prompts is None else prompts
  index = np.repeat(np.arange(len(problems)), samples)
  completions = student.complete(
    [prompts[i] for i in index], problems.max_new, seed=seed
  )
  grades = problems.grade(index, completions)
  right = grades.right.reshape(-1, samples)
  of_problems = right.mean(axis=1)
  first = completions[::samples]
  logprob = student.respond(prompts, first).answer_logprob
  return {
    'accuracy': float(right.mean()),
    'accuracy_se': float(
      of_problems.std(ddof=1) / np.sqrt(len(problems))
      if len(problems) > 1
      else 0.0
    ),
    'pass': float(right.any(axis=1).mean()),
    'tokens': float(np.mean([len(tokens) for tokens in completions])),
    'truncated': float(grades.truncated.mean()),
    'unreadable': float(grades.unreadable.mean()),
    'entropy': float(-logprob.sum() / max(1, sum(map(len, first)))),
  }


def rows(
  problems: problems_lib.Problems,
  pad: int,
  length: int,
  reads: int,
  rng: np.random.Generator,
) -> contexts.TrainingRows:
  """Problems with their solutions, each `reads` times; these are the targets.

  Args:
    problems: N problems.
    pad: the padding token.
    length: tokens of a row.
    reads: orders of all problems, one after the other.
    rng: of the orders.
  """
  once = padding.prompt_rows(
    list(zip(problems.prompts, problems.solutions, strict=True)),
    pad,
    width=length,
  )
  index = np.concatenate([rng.permutation(len(problems)) for _ in range(reads)])
  return contexts.TrainingRows(once.tokens[index], once.weight[index])
