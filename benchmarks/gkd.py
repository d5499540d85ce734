"""One step of on-policy distillation against trl's GKDTrainer, by parts."""

import contextlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import llama
from benchmarks import timing
from sleep_jax.inference import sampling
from sleep_jax.models import model as model_lib
from sleep_jax.objectives import divergences

_BETA, _LEARNING_RATE = 0.5, 1e-4
PARTS = ('rollout', 'teacher', 'update')


def run(plan: timing.Plan) -> list[dict[str, Any]]:
  """Student and teacher of two sizes, 8 rows of 32 + 32 tokens."""
  vocab, rows, width, new = plan.choose((8192, 8, 32, 32), (64, 2, 4, 3))
  tiny = (16, 2, 4, 2, 24, vocab)
  small = llama.ours(*plan.choose((128, 2, 4, 2, 352, vocab), tiny))
  large = llama.ours(*plan.choose((256, 4, 8, 4, 688, vocab), tiny))
  student, teacher = llama.theirs(small, seed=1), llama.theirs(large, seed=2)
  prompts = np.random.default_rng(0).integers(1, vocab, (rows, width))
  ours = Ours(
    model_lib.Model(small, llama.params(small, student)),
    model_lib.Model(large, llama.params(large, teacher)),
  )
  with tempfile.TemporaryDirectory() as scratch:
    trl = Theirs(student, teacher, prompts, new, scratch)
    parity = _parity(ours, trl)
    spent = {'sleep_jax': [], 'trl': []}
    for i in range(plan.repeats + 1):  # The first round compiles.
      sides = [
        ('sleep_jax', lambda: ours.step(jnp.array(prompts), new)),
        ('trl', trl.step),
      ]
      for name, side in sides[:: 1 - 2 * (i % 2)]:
        spent[name].append(side())
  seconds = {
    name: {part: timing.spread([r[part] for r in rounds[1:]]) for part in PARTS}
    | {'step': timing.spread([sum(r.values()) for r in rounds[1:]])}
    for name, rounds in spent.items()
  }
  of_ours, of_trl = seconds['sleep_jax'], seconds['trl']
  return [
    {
      'bench': 'gkd',
      'rows': rows,
      'prompt': width,
      'new': new,
      'vocab': vocab,
      'parity': parity,
      'seconds': seconds,
      'speedup': {
        k: of_trl[k]['median'] / x['median'] for k, x in of_ours.items()
      },
    }
  ]


def _parity(ours: 'Ours', trl: 'Theirs') -> dict[str, float]:
  """Loss and gradient norm of both on trl's own rollout.

  Raises:
    AssertionError: they differ by more than 1e-5 and 1e-4.
  """
  tokens, loss, norm = trl.probe()
  value, gradient = ours.probe(jnp.array(tokens), trl.width)
  apart = {
    'loss': abs(value / loss - 1),
    'gradient norm': abs(gradient / norm - 1),
  }
  if apart['loss'] > 1e-5 or apart['gradient norm'] > 1e-4:
    raise AssertionError(f'gkd: the sides differ by {apart}.')
  return apart


class Ours:
  """A student that trains all its weights, as trl's does."""

  def __init__(self, student, teacher):
    self._student = jax.tree.map(jnp.array, student)
    self._teacher = jax.tree.map(jnp.array, teacher)
    self._optimizer = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(_LEARNING_RATE, weight_decay=0.0),
    )
    self._opt_state = self._optimizer.init(self._student)
    self._steps = 0
    self._label = jax.jit(lambda model, tokens: model.forward(tokens).hidden)
    self._grads = jax.jit(jax.value_and_grad(self._loss), static_argnums=4)
    self._update = jax.jit(self._apply, static_argnums=5)

  def _loss(self, student, teacher, labels, tokens, width):
    hidden = student.forward(tokens).hidden
    columns = slice(width - 1, -1)  # They predict the completion's tokens.
    per_token = divergences.from_hidden(
      divergences.divergence('jsd', _BETA),
      (labels[:, columns], teacher.unembedding()),
      (hidden[:, columns], student.unembedding()),
    )
    return per_token.mean()

  def _apply(self, student, opt_state, teacher, labels, tokens, width):
    _, grads = jax.value_and_grad(self._loss)(
      student, teacher, labels, tokens, width
    )
    update, opt_state = self._optimizer.update(grads, opt_state, student)
    return optax.apply_updates(student, update), opt_state

  def probe(self, tokens, width) -> tuple[float, float]:
    """Loss and gradient norm on given tokens."""
    labels = self._label(self._teacher, tokens)
    value, grads = self._grads(
      self._student, self._teacher, labels, tokens, width
    )
    return float(value), float(optax.global_norm(grads))

  def step(self, prompts, new) -> dict[str, float]:
    """One step; seconds of each part."""
    times = [time.perf_counter()]

    def done(x):
      jax.block_until_ready(x)
      times.append(time.perf_counter())
      return x

    rows, width = prompts.shape
    self._steps += 1
    completions = done(
      sampling.generate(
        self._student,
        prompts,
        jnp.full((rows,), width),
        jax.random.key(self._steps),
        sampling.SamplerConfig(max_new=new),
      )
    )
    tokens = jnp.concatenate([prompts, completions.tokens], axis=1)
    labels = done(self._label(self._teacher, tokens))
    self._student, self._opt_state = done(
      self._update(
        self._student, self._opt_state, self._teacher, labels, tokens, width
      )
    )
    return dict(zip(PARTS, np.diff(times).tolist(), strict=True))


class Theirs:
  """trl's trainer, its own `training_step`, with a clock on its parts."""

  def __init__(self, student, teacher, prompts, new, scratch):
    import torch

    self.width = prompts.shape[1]
    self._trainer = _trainer(student, teacher, new, scratch)
    self._model = self._trainer.model
    self._optimizer = torch.optim.AdamW(
      self._model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0
    )
    self._prompts = torch.tensor(prompts)
    self._spent = dict.fromkeys(PARTS, 0.0)
    trainer = self._trainer
    trainer.generate_on_policy_outputs = self._timed(
      trainer.generate_on_policy_outputs, 'rollout'
    )
    trainer.teacher_model.forward = self._timed(
      trainer.teacher_model.forward, 'teacher'
    )

  def _timed(self, call, part):
    def timed(*args, **kwargs):
      start = time.perf_counter()
      out = call(*args, **kwargs)
      self._spent[part] += time.perf_counter() - start
      return out

    return timed

  def _inputs(self):
    import torch

    mask = torch.ones_like(self._prompts)
    return {'prompts': self._prompts, 'prompt_attention_mask': mask}

  def probe(self) -> tuple[np.ndarray, float, float]:
    """Tokens of a rollout, and loss and gradient norm on them."""
    import torch

    trainer, model = self._trainer, self._model
    with torch.no_grad():
      tokens, mask, labels = trainer.generate_on_policy_outputs(
        model, self._inputs(), trainer.generation_config
      )
    loss = trainer.compute_loss(
      model, {'input_ids': tokens, 'attention_mask': mask, 'labels': labels}
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float('inf'))
    self._optimizer.zero_grad()
    return tokens.numpy(), float(loss.detach()), float(norm)

  def step(self) -> dict[str, float]:
    """One step; seconds of each part."""
    import torch

    self._spent = dict.fromkeys(PARTS, 0.0)
    start = time.perf_counter()
    self._trainer.training_step(self._model, self._inputs())
    torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
    self._optimizer.step()
    self._optimizer.zero_grad()
    rest = time.perf_counter() - start - sum(self._spent.values())
    return self._spent | {'update': rest}


def _trainer(student, teacher, new, scratch) -> Any:
  """A GKDTrainer whose data we bring ourselves."""
  import datasets
  import tokenizers
  import transformers
  from trl.experimental.gkd import GKDConfig
  from trl.experimental.gkd import GKDTrainer

  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({'<pad>': 0, '<unk>': 1}, unk_token='<unk>')
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token='<pad>', unk_token='<unk>'
  )
  settings = GKDConfig(
    output_dir=scratch,
    lmbda=1.0,
    beta=_BETA,
    temperature=1.0,
    max_new_tokens=new,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to=[],
    disable_tqdm=True,
  )
  with contextlib.redirect_stdout(None):
    trainer = GKDTrainer(
      model=student,
      teacher_model=teacher,
      args=settings,
      data_collator=lambda rows: rows,
      train_dataset=datasets.Dataset.from_dict({'messages': [[]]}),
      processing_class=tokenizer,
    )
  trainer.model.train()
  trainer.current_gradient_accumulation_steps = 1  # As its loop would set it.
  return trainer
