"""From the sections of an experiment's config to a task and a learner."""

import functools
import hashlib
import json
import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax import learners
from sleep_jax import tasks
from sleep_jax.data import tokenizers
from sleep_jax.learners import base as learner_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.runtime import sharding
from sleep_jax.tasks import base as task_lib
from sleep_jax.weights import dimensions
from sleep_jax.weights import load as load_lib
from sleep_jax.weights import pretrained

Settings = dict[str, Any]

# Settings of how lives are run; the result of a life does not depend on them.
_RUN_SETTINGS = ('workers', 'writers', 'profile', 'mesh', 'export')
# JAX's keys have 32 bits.
_Seed = Annotated[int, config.Bounds(most=2**32 - 1)]
_REQUIRED = (
  'name',
  'seeds',
  'arms',
  'reference',
  'task',
  'base',
  'model',
  'workers',
)


def check_sections(c: Settings) -> None:
  """Refuses a config that lacks a section that every experiment has.

  And one whose lives nobody could run.

  Raises:
    ConfigError: naming the first of them.
  """
  for section in _REQUIRED:
    if section not in c:
      raise config.ConfigError(
        f'the config has no {section!r}; every experiment has '
        f'{", ".join(_REQUIRED)} (see experiments/configs/quickstart.py).'
      )
  config.check_value(config.Count, c['workers'], 'workers')
  config.check_value(tuple[_Seed, ...], c['seeds'], 'seeds')
  if len(set(c['seeds'])) < len(c['seeds']):
    raise config.ConfigError(
      f'seeds={c["seeds"]!r} names one seed twice; it would be one life.'
    )
  for several in ('seeds', 'arms'):
    if not c[several]:
      raise config.ConfigError(
        f'{several}={c[several]!r} has no entry, so there is nothing to live.'
      )
  for arm, changes in c['arms'].items():
    _check_section(changes, f'arms.{arm}')
  for i, level in enumerate(c['model'].get('levels', ())):
    _check_section(level, f'model.levels[{i}]')


def _check_section(value: Any, where: str) -> None:
  if not isinstance(value, dict):
    raise config.ConfigError(
      f'{where}={value!r} must be a section of settings.'
    )


def arm_config(c: Settings, arm: str) -> Settings:
  """The config of one arm: the common sections with the arm's changes.

  `learner` is the arm's own, else the config's, else the arm's name.

  Raises:
    ConfigError: if an arm changes what is no section.
  """
  check_sections(c)
  changes = dict(config.lookup(arm, c['arms'], 'arm'))
  out = {k: v for k, v in c.items() if k != 'arms'}
  out['learner'] = changes.pop('learner', c.get('learner', arm))
  out.setdefault(learners.OWN_SECTION, {})
  for section, values in changes.items():
    if section not in out:
      raise config.ConfigError(
        f'arms.{arm}.{section}: there is no section {section!r} to change; '
        f'known are {", ".join(sorted(out))}.'
      )
    _check_section(values, f'arms.{arm}.{section}')
    out[section] = {**out[section], **values}
  return out


def build(
  c: Settings, seed: int, *, absent: bool = False
) -> tuple[task_lib.Task, learner_lib.Learner, costs_lib.CostTracker]:
  """The task, the learner and the cost tracker of one life.

  Args:
    c: of one arm, see `arm_config`.
    seed: of the life.
    absent: whether the model is made of shapes (`jax.ShapeDtypeStruct`), so
      that settings are checked and no weights are read.

  Raises:
    ConfigError: for the first setting that cannot work.
  """
  settings = dict(c['task'])
  data_dir = settings.get('data_dir')
  if 'name' not in settings:
    raise config.ConfigError('task.name is missing; it names the task.')
  if settings.get('tokenizer') == '':
    settings['tokenizer'] = _own_tokenizer(c['base'])
  cfg = model_config(c, absent=absent)
  task = tasks.build(settings.pop('name'), settings, seed)
  tokenizers.check_fits(task.tokenizer, cfg.vocab)  # Before weights are read.
  costs = costs_lib.CostTracker(cfg, task.row_length)
  if absent:
    params = memory_init.weight_shapes(cfg)
    memory = jax.eval_shape(lambda: memory_init.init_memory(cfg))
    sharding.check_leaves(params)
  else:
    params, memory = _weights(c['base'], cfg, seed, data_dir), None
  setup = learner_lib.Setup(
    model=model_lib.Model(cfg, params, memory),
    tokenizer=task.tokenizer,
    costs=costs,
    episodes=task.episodes,
    row_length=task.row_length,
    seed=seed,
    format=task.format,
  )
  return task, learners.build(c['learner'], c, setup), costs


def model_config(c: Settings, *, absent: bool = False) -> config.ModelConfig:
  """The model of an experiment, with the base's dimensions where it has none.

  Args:
    c: the config.
    absent: whether the base is not here: its model is then that of the config's
      section `base_model`, which a config with a public base has.

  Raises:
    ConfigError: if dimensions are missing, and there is no base to ask.
  """
  if dimensions.are_complete(c['model']):
    return config.ModelConfig.from_mapping(c['model'])
  if absent and c.get('base_model'):
    base = config.ModelConfig.from_mapping(c['base_model'])
  elif c['base']:
    base = load_lib.model_config(c['base'], c['task'].get('data_dir'))
  else:
    raise config.ConfigError(
      "the section 'model' lacks dimensions (one of vocab, dim, layers, heads "
      "and the levels' hidden), and base='' has none; give them, or a base."
    )
  return dimensions.complete(c['model'], base)


def _own_tokenizer(base: str) -> str:
  """The tokenizer that came with a base; '' if it has none."""
  if not base or pathlib.Path(base).suffix in ('.npz', '.bin'):
    return ''
  return str(pretrained.locate(base))


def _weights(
  base: str, cfg: config.ModelConfig, seed: int, data_dir: str | None
) -> at.Params:
  """The pretrained weights `base`, or fresh ones if it is ''; on the devices.

  Arrays of the host would be sent to the device by every program anew.
  """
  if not base:
    init = functools.partial(transformer.init, cfg)
    # One program with a mesh and without, so that both draw the same bits.
    return sharding.init(jax.jit(init), jax.random.key(seed))
  params = load_lib.load(base, cfg, data_dir)
  if sharding.current() is None:
    return jax.tree.map(jnp.asarray, params)
  return sharding.shard_params(params)


def config_identity(c: Settings) -> Settings:
  """The settings that determine a life, without those of how it is run."""
  return {k: v for k, v in c.items() if k not in _RUN_SETTINGS}


def life_digest(c: Settings, seed: int) -> str:
  """SHA-256 of what determines one life: an arm's config and a seed."""
  text = json.dumps([config_identity(c), seed], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
