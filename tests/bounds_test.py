"""No setting takes a number that means nothing, or a value of another type."""

import dataclasses
import math
import typing

import pytest

from sleep_jax import config
from sleep_jax.config import registry

_NEEDED = {
  config.LevelConfig: dict(hidden=8),
  config.ModelConfig: dict(
    vocab=8, dim=8, layers=1, heads=1, levels=(config.LevelConfig(8),)
  ),
  config.RopeScaling: dict(
    factor=2.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_len=8
  ),
}
# What 0 means where it is allowed, by `Class.field`.
_ZERO = {
  'as the checkpoint, or as other settings, say': (
    'LevelConfig.hidden ModelConfig.kv_heads ModelConfig.head_dim '
    'ReplayConfig.documents InContextConfig.context WakeConfig.window '
    'TrialConfig.window TrialConfig.joint_epochs '
    'TrialConfig.joint_learning_rate SeedingConfig.question_temperature '
    'ClassIncrementalConfig.episodes ClassIncrementalConfig.train_examples '
    'ClassIncrementalConfig.test_examples FinetuneConfig.warmup_cosine_steps '
    'CartridgeConfig.joint_passes'
  ),
  'none of them': (
    'LevelConfig.slots LevelConfig.rank LevelConfig.weight_decay '
    'ModelConfig.norm_eps ReplayConfig.archive FactsConfig.context '
    'FactsConfig.changes ArcConfig.permutations ArcConfig.probes '
    'BulletinsConfig.joint SquadConfig.joint WakeConfig.rehearsed '
    'SeedingConfig.archive SeedingConfig.archive_base '
    'SeedingConfig.teacher_top_k ReplayConfig.archive_base '
    'DreamingConfig.keep DreamingConfig.keep_random DreamingConfig.rehearsed '
    'Rule110Config.steps '
    'InventedFactsConfig.held_out_rows '
    'ClassIncrementalConfig.late ClassIncrementalConfig.text_weight '
    'TrainingConfig.weight_decay TrainingConfig.warmup TrainingConfig.decay '
    'FinetuneConfig.weight_decay RecurrenceConfig.ponder '
    'RecallConfig.rewritten ChainsConfig.distractors '
    'ChainsConfig.contexts ChainsBaseConfig.contexts '
    'ChainsBaseConfig.distractors ChainsBaseConfig.deep_share '
    'TranslationConfig.false_friends '
    'GRPOConfig.resample PrivilegedSleepConfig.beta '
    'PrivilegedSleepConfig.teacher_rate '
    'PrivilegedSleepConfig.prompt_weight'
  ),
  'never': 'LevelConfig.chunk LevelConfig.sleep_every',
  'nothing is learnt: a control': (
    'LevelConfig.learning_rate FinetuneConfig.learning_rate '
    'TrainingConfig.muon_learning_rate TrainingConfig.adam_learning_rate '
    'TrialConfig.learning_rate DreamingConfig.learning_rate '
    'SeedingConfig.learning_rate'
  ),
  'the likeliest token': (
    'SeedingConfig.temperature DreamingConfig.temperature '
    'DreamingConfig.top_p ReplayConfig.temperature'
  ),
  'this part has no weight, or no share': (
    'SeedingConfig.question_weight SeedingConfig.min_p ReplayConfig.min_p '
    'SeedingConfig.chat_dreams SeedingConfig.day_dreams SeedingConfig.lam '
    'SeedingConfig.alpha SeedingConfig.gamma SeedingConfig.z0 '
    'SeedingConfig.router_weight SeedingConfig.beta '
    'SeedingConfig.least_fresh '
    'DreamingConfig.random_expert FinetuneConfig.ewc_lambda '
    'FinetuneConfig.ewc_decay GRPOConfig.kl OPSDConfig.beta '
    'OPSDConfig.teacher_rate'
  ),
  'every difference counts': (
    'SeedingConfig.contradicted WakeConfig.contradicted '
    'SeedingConfig.router_margin SeedingConfig.semantic_threshold '
    'DreamingConfig.retention_margin'
  ),
  'a seed': (
    'FactsConfig.world_seed BulletinsConfig.world_seed NiahConfig.sample_seed '
    'BabilongConfig.sample_seed TranslationConfig.world_seed'
  ),
}
_ZERO_ALLOWED = set(' '.join(_ZERO.values()).split())


def _sections(cls: type) -> set[type]:
  """A dataclass and those that its fields are."""
  found = {cls}
  for hint in typing.get_type_hints(cls).values():
    if dataclasses.is_dataclass(hint):
      found |= _sections(hint)
  return found


def _classes() -> list[type]:
  """Every dataclass of settings."""
  found = set(_NEEDED) | {config.RecurrentConfig}
  for package in ('sleep_jax.tasks', 'sleep_jax.learners'):
    for name in registry.names(package):
      found |= _sections(registry.find(name, package, 'name')[1])
  return sorted(found, key=lambda cls: cls.__name__)


def _numbers() -> list[tuple[type, str, type]]:
  """Every numeric field of every class, and its type."""
  out = []
  for cls in _classes():
    for name, hint in typing.get_type_hints(cls).items():
      kinds = {hint, *typing.get_args(hint)} & {int, float}
      if kinds and typing.get_origin(hint) is not tuple:
        out.append((cls, name, kinds.pop()))
  return out


def _build(cls: type, **values):
  return config.from_mapping(cls, _NEEDED.get(cls, {}) | values, 'here')


@pytest.mark.parametrize(
  'cls, name, kind',
  [pytest.param(*x, id=f'{x[0].__name__}.{x[1]}') for x in _numbers()],
)
def test_a_number_that_means_nothing_is_refused(cls, name, kind):
  """In a line that names the setting, as is a value of another type."""
  wrong = [10**12] if kind is int else []
  wrong += [-1, math.nan, -math.inf, 'x', True, [1]]
  if (cls.__name__, name) != ('DreamingConfig', 'retention_margin'):
    wrong.append(math.inf)
  if f'{cls.__name__}.{name}' not in _ZERO_ALLOWED:
    wrong.append(0)
  if kind is int:
    wrong.append(2.5)
  for value in wrong:
    with pytest.raises(config.ConfigError) as error:
      _build(cls, **{name: value})
    message = str(error.value)
    assert name in message and str(value) in message, message
    assert '\n' not in message


def test_a_zero_that_means_something_is_taken():
  """By its field's type; other settings may still refuse it."""
  fields = {
    f'{cls.__name__}.{name}': typing.get_type_hints(cls, include_extras=True)[
      name
    ]
    for cls, name, _ in _numbers()
  }
  assert _ZERO_ALLOWED <= set(fields), _ZERO_ALLOWED - set(fields)
  for name in _ZERO_ALLOWED:
    config.check_value(fields[name], 0, name)
  config.check_value(config.Margin, math.inf, 'margin')


@dataclasses.dataclass(frozen=True)
class _Every:
  """A field of each kind."""

  text: str = ''
  switch: bool = False
  maybe: float | None = None
  pair: tuple[float, float] = (0.0, 1.0)
  names: tuple[str, ...] = ()
  share: config.Fraction = 0.5
  scale: config.Positive = 1.0


@pytest.mark.parametrize(
  'values, words',
  [
    (dict(text=3), 'here.text=3 must be a string'),
    (dict(switch=1), 'here.switch=1 must be True or False'),
    (dict(maybe='x'), "here.maybe='x' must be a number"),
    (dict(pair=(1.0,)), r'here.pair=\(1.0,\) must have 2 entries'),
    (dict(pair=(1.0, -1.0)), r'here.pair\[1\]=-1.0 must be at least 0'),
    (dict(names='ab'), "here.names='ab' must be a sequence"),
    (dict(names=['a', 3]), r'here.names\[1\]=3 must be a string'),
    (dict(share=1.5), 'here.share=1.5 must be at most 1'),
    (dict(scale=0), 'here.scale=0 must be above 0'),
    (dict(shape=1), "here: unknown setting 'shape'; known are maybe, names"),
  ],
)
def test_values_of_another_type_are_refused(values, words):
  with pytest.raises(config.ConfigError, match=words):
    config.from_mapping(_Every, values, 'here')


def test_what_is_right_is_taken_as_it_is():
  got = config.from_mapping(
    _Every, dict(maybe=None, pair=[1, 2], names=['a'], scale=2), 'here'
  )
  assert got == _Every(pair=(1, 2), names=('a',), scale=2)
