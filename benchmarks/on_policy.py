"""A step of grpo and of opsd against trl's GRPOTrainer and SDFTTrainer.

Ours is a day of the learners themselves with one step's problems: rollouts,
rewards or teacher, update, accounts. trl's is its `training_step`, and the
optimizer's.
"""

import contextlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import llama
from benchmarks import timing
from sleep_jax import config
from sleep_jax import learners
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import problems as problems_lib
from sleep_jax.data import tokenizers
from sleep_jax.inference import sampling
from sleep_jax.learners import base
from sleep_jax.learners import grpo
from sleep_jax.learners import on_policy
from sleep_jax.learners import opsd
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import model as model_lib

_LEARNING_RATE = 1e-4
_GROUP = 4  # Completions of a problem, of grpo.


def run(plan: timing.Plan) -> list[dict[str, Any]]:
  """8 completions of 32 tokens after prompts of 32, teacher's of 96."""
  vocab, rows, width, new = plan.choose((8192, 8, 32, 32), (64, 4, 4, 3))
  tiny = (16, 2, 4, 2, 24, vocab)
  cfg = llama.ours(*plan.choose((128, 2, 4, 2, 352, vocab), tiny))
  rng = np.random.default_rng(0)
  prompts = rng.integers(1, vocab - 2, (rows, width))
  solutions = rng.integers(1, vocab - 2, (rows, 2 * width))
  entries = []
  for kind in (_GRPO, _OPSD):
    ours = _Ours(kind, cfg, prompts, solutions, new)
    with tempfile.TemporaryDirectory() as scratch:
      theirs = kind(cfg, prompts, solutions, new, scratch)
      parity = _parity(ours, theirs)
      seconds = timing.interleave(
        {'sleep_jax': ours.step, 'trl': theirs.step}, plan
      )
    entries.append(
      {
        'bench': 'on_policy',
        'learner': kind.learner,
        'rows': rows,
        'prompt': width,
        'new': new,
        'vocab': vocab,
        'parity': parity,
        'seconds': seconds,
        'speedup': timing.speedup(seconds),
      }
    )
  return entries


def _parity(ours: '_Ours', theirs: '_Theirs') -> dict[str, float]:
  """Loss and gradient norm of both on trl's own rollout.

  Raises:
    AssertionError: they differ by more than 1e-5 and 1e-4.
  """
  batch, loss, norm = theirs.probe()
  value, gradient = ours.probe(batch)
  # The loss of grpo is a sum that cancels.
  apart = {
    'loss': abs(value - loss) / max(1.0, abs(loss)),
    'gradient norm': abs(gradient / norm - 1),
  }
  if apart['loss'] > 1e-5 or apart['gradient norm'] > 1e-4:
    raise AssertionError(f'{theirs.learner}: the sides differ by {apart}.')
  return apart


class _Ours:
  """The learner, on a model that trains all its weights."""

  def __init__(
    self,
    kind: type['_Theirs'],
    cfg: config.ModelConfig,
    prompts: np.ndarray,
    solutions: np.ndarray,
    new: int,
  ):
    model = model_lib.Model(cfg, llama.params(cfg, llama.theirs(cfg, seed=1)))
    words = [f'w{i}' for i in range(cfg.vocab - 3)]
    tokenizer = tokenizers.WordTokenizer([*words, '.'], separator='.', stop='.')
    setup = base.Setup(model, tokenizer, costs_lib.CostTracker(cfg, 64))
    group = kind.settings.get('group', 1)
    finetune = dict(batch=len(prompts), learning_rate=_LEARNING_RATE)
    self._model = model
    self._learner = learners.build(
      kind.learner,
      dict(finetune=finetune, learner_config=kind.settings | {'alarm': False}),
      setup,
    )
    self._kind = kind
    self._life = self._learner.init(jax.random.key(0))
    prompts, solutions = prompts[::group].tolist(), solutions[::group].tolist()
    pairs = zip(prompts, solutions, strict=True)
    problems = problems_lib.Problems(
      prompts=prompts,
      privileged=[prompt + solution for prompt, solution in pairs],
      solutions=solutions,
      answers=[True] * len(prompts),
      read=_is_even,
      max_new=new,
      stop=tokenizer.stop,
    )
    rows = np.zeros((1, 2), np.int32)
    self._day = experience_lib.Experience(
      rows, np.ones((1, 2), np.float32), problems=problems
    )

  def probe(self, batch: dict[str, np.ndarray]) -> tuple[float, float]:
    """Loss and gradient norm on trl's rollout."""
    model = self._model
    rollouts, seen = _rollouts(model, batch)
    if self._kind is _GRPO:
      rows = grpo.Batch(rollouts, jnp.asarray(batch['advantages']), None)
    else:
      rows = opsd.Batch(rollouts, on_policy.predict(model, *seen).hidden)

    def loss(params):
      value, _ = self._learner.loss(
        model.replace(params=params), rows, model.unembedding()
      )
      return value

    value, grads = jax.jit(jax.value_and_grad(loss))(model.params)
    return float(value), float(optax.global_norm(grads))

  def step(self) -> None:
    self._life, _ = self._learner.wake(self._life, self._day)
    jax.block_until_ready(self._life.model.params)


def _is_even(completion: list[int]) -> bool | None:
  """The reward: about half of all completions are right."""
  return (completion[0] % 2 == 0) or None


def _rollouts(
  model: model_lib.Model, batch: dict[str, np.ndarray]
) -> tuple[on_policy.Rollouts, tuple[on_policy.Prompts, jax.Array]]:
  """trl's rollout as ours, and the teacher's prompts with its completions."""

  def prompts(tokens: np.ndarray) -> on_policy.Prompts:
    lengths = np.full(len(tokens), tokens.shape[1])
    return on_policy.Prompts(jnp.asarray(tokens), jnp.asarray(lengths))

  tokens, mask = (
    jnp.asarray(batch[name]) for name in ('completion_ids', 'completion_mask')
  )
  new = tokens.shape[1]
  rollouts = on_policy.Rollouts(
    prompts(batch['prompt_ids']),
    sampling.Completions(tokens, jnp.zeros(tokens.shape), mask.sum(axis=1)),
    mask.astype(jnp.float32),
  )
  # It was just drawn: the old log-probabilities are those of the model.
  logp = on_policy.logprobs(model, rollouts, 1.0)
  completions = rollouts.completions.replace(logprobs=logp)
  teacher = batch.get('teacher_input_ids', batch['prompt_ids'])
  width = teacher.shape[1] - new * ('teacher_input_ids' in batch)
  return (
    rollouts.replace(completions=completions),
    (prompts(teacher[:, :width]), tokens),
  )


class _Theirs:
  """trl's trainer, its own `training_step`; what it is made of, a subclass."""

  learner: str
  settings: dict[str, Any]  # Of our learner.

  def __init__(
    self,
    cfg: config.ModelConfig,
    prompts: np.ndarray,
    solutions: np.ndarray,
    new: int,
    scratch: str,
  ):
    import torch

    self._data = [
      {'prompt': _text(prompt), 'privileged_context': _text(solution)}
      for prompt, solution in zip(prompts, solutions, strict=True)
    ]
    common = dict(
      output_dir=scratch,
      per_device_train_batch_size=len(prompts),
      max_completion_length=new,
      temperature=1.0,
      learning_rate=_LEARNING_RATE,
      use_cpu=True,
      bf16=False,
      gradient_checkpointing=False,
      report_to=[],
      disable_tqdm=True,
    )
    with contextlib.redirect_stdout(None):
      trainer = self.trainer(llama.theirs(cfg, seed=1), common)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # As its loop would set it.
    self._trainer = trainer
    self._optimizer = torch.optim.AdamW(
      trainer.model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0
    )

  def trainer(self, model: Any, common: dict[str, Any]) -> Any:
    """The trainer."""
    raise NotImplementedError

  def inputs(self) -> list[dict[str, str]]:
    """What trl's sampler would give a step."""
    return self._data

  def probe(self) -> tuple[dict[str, np.ndarray], float, float]:
    """A rollout, and loss and gradient norm on it."""
    import torch

    trainer = self._trainer
    inputs = trainer._prepare_inputs(self.inputs())
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(
      trainer.model.parameters(), float('inf')
    )
    self._optimizer.zero_grad()
    batch = {
      name: x.numpy() for name, x in inputs.items() if torch.is_tensor(x)
    }
    trainer._buffered_inputs = None
    return batch, float(loss.detach()), float(norm)

  def step(self) -> None:
    """One step."""
    import torch

    self._trainer.training_step(self._trainer.model, self.inputs(), None)
    torch.nn.utils.clip_grad_norm_(self._trainer.model.parameters(), 1.0)
    self._optimizer.step()
    self._optimizer.zero_grad()


class _GRPO(_Theirs):
  """Groups of equal prompts; no KL to a reference."""

  learner = 'grpo'
  settings = dict(group=_GROUP, loss='grpo')

  def trainer(self, model: Any, common: dict[str, Any]) -> Any:
    import datasets
    from trl import GRPOConfig
    from trl import GRPOTrainer

    def reward(completion_ids, **_):
      return [float(ids[0] % 2 == 0) for ids in completion_ids]

    return GRPOTrainer(
      model=model,
      reward_funcs=reward,
      args=GRPOConfig(
        **common, num_generations=_GROUP, beta=0.0, loss_type='grpo'
      ),
      train_dataset=datasets.Dataset.from_list(self._data),
      processing_class=_tokenizer(model.config.vocab_size),
    )

  def inputs(self) -> list[dict[str, str]]:
    different = self._data[::_GROUP]
    return [row for row in different for _ in range(_GROUP)]


class _OPSD(_Theirs):
  """A frozen teacher that has the solution in its prompt; reverse KL."""

  learner = 'opsd'
  settings = dict(teacher='base', divergence='reverse_kl')

  def trainer(self, model: Any, common: dict[str, Any]) -> Any:
    import datasets
    from trl.experimental.sdft import SDFTConfig
    from trl.experimental.sdft import SDFTTrainer

    # The teacher is loaded from where the model says it comes from.
    folder = f'{common["output_dir"]}/model'
    model.save_pretrained(folder)
    model.config._name_or_path = folder
    return SDFTTrainer(
      model=model,
      args=SDFTConfig(
        **common,
        num_generations=1,
        teacher_model_kind='base',
        distillation_mode='full_logits',
        distillation_alpha=1.0,
        distillation_is_clip=None,
        teacher_prompt_template='{prompt} {privileged_context}',
        disable_dropout=True,
      ),
      train_dataset=datasets.Dataset.from_list(self._data),
      processing_class=_tokenizer(model.config.vocab_size),
    )


def _text(tokens: np.ndarray) -> str:
  return ' '.join(f'w{i}' for i in tokens)


def _tokenizer(vocab: int) -> Any:
  """Words w0, w1, and so on, of these ids."""
  import tokenizers as hf_tokenizers
  import transformers

  words = {f'w{i}': i for i in range(vocab)}
  core = hf_tokenizers.Tokenizer(
    hf_tokenizers.models.WordLevel(words, unk_token='w0')
  )
  core.pre_tokenizer = hf_tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=core,
    pad_token='w0',
    unk_token='w0',
    eos_token=f'w{vocab - 1}',
  )
