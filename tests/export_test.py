"""What leaves as a Hugging Face folder computes what the model computed."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.data import untrusted
from sleep_jax.data.tokenizers import huggingface as hf_tokenizer
from sleep_jax.inference import sampling
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer
from sleep_jax.weights import add_levels
from sleep_jax.weights import architectures
from sleep_jax.weights import convert
from sleep_jax.weights import expert_bank
from sleep_jax.weights import export
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import huggingface
from tests import checkpoints
from tests import conftest
from tests import exported_folders

pytest.importorskip('safetensors')
tokenizers = pytest.importorskip('tokenizers')

PLACES = {
  'partition': dict(partition=(2, 1)),
  'stack': {},
}
FAMILIES = ('llama3_2', 'qwen2_5', 'qwen3')
CASES = [(family, place) for family in FAMILIES for place in PLACES]
MERGE = export.MergeConfig(steps=150, enough=0.0, batch=16, learning_rate=0.03)
MERGED = [('llama3_2', 'partition'), ('qwen3', 'stack')]


def base_folder(path: pathlib.Path, family: str) -> tuple[dict, dict]:
  """A base with a tokenizer of 257 bytes and an end: config and tensors."""
  c = checkpoints.settings(family, False, vocab_size=258, eos_token_id=257)
  checkpoints.write(path, c, w := checkpoints.tensors(c))
  characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {char: i for i, char in enumerate(characters)} | {'he': 256}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab=vocab, merges=[('h', 'e')])
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(['<end>'])
  tokenizer.save(str(path / 'tokenizer.json'))
  (path / 'tokenizer_config.json').write_text('{"eos_token": "<end>"}')
  (path / 'LICENSE').write_text('free')
  return c, w


def slept_model(folder: pathlib.Path, family: str, place: str):
  """A model with fast changes, and with experts locked and in use."""
  base_folder(folder, family)
  plain = architectures.model_config(
    untrusted.read_json(folder / 'config.json')
  )
  hidden = plain.levels[0].hidden
  levels = (
    config.LevelConfig(
      hidden, chunk=4, sleep_every=2, slots=2, rank=3, top_k=1
    ),
    config.LevelConfig(hidden, chunk=8, slots=5, rank=4, top_k=2),
  )
  cfg = dataclasses.replace(plain, levels=levels, **PLACES[place])
  params = add_levels.add_levels(
    plain, huggingface.load(folder, plain), cfg, jax.random.key(0)
  )
  params = jax.tree.map(jnp.asarray, params)
  return model_lib.Model(cfg, params, slept_memory(cfg))


def slept_memory(cfg: config.ModelConfig) -> memory_lib.Memory:
  """Fast changes and experts of a size that clearly moves the logits."""
  keys = iter(jax.random.split(jax.random.key(7), 200))

  def noise(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return 0.1 * jax.random.normal(next(keys), x.shape)

  memory = jax.tree.map(noise, memory_init.init_memory(cfg))
  for i, status in enumerate(([2, 0], [2, 0, 2, 1, 2])):
    bank = memory.bank(i)
    experts = jax.tree.map(lambda x: 3 * x, bank.experts)
    experts = experts.replace(router=6 * experts.router)
    memory = memory.with_level(
      i, bank=bank.replace(experts=experts, status=jnp.array(status))
    )
  return memory


def ask(folder: pathlib.Path, model: model_lib.Model) -> None:
  """Writes the request that `exported_folders` answers."""
  rng = np.random.default_rng(3)
  np.savez(
    folder / 'request.npz',
    tokens=rng.integers(0, model.cfg.vocab, (2, 40)),
    prompt=rng.integers(0, model.cfg.vocab, 7),
  )


def dreams(model: model_lib.Model, rows: int = 128) -> np.ndarray:
  """Rows that the model samples after token 3, `[N, 24]`."""
  prompts = np.full((rows, 1), 3)
  sampler = sampling.SamplerConfig(max_new=23)
  out = sampling.generate(
    model, prompts, np.ones(rows, int), jax.random.key(0), sampler
  )
  return np.concatenate([prompts, out.tokens], axis=1)


@pytest.fixture(name='merges', scope='module')
def _merges(tmp_path_factory):
  """Per case: the model, its dreams, the folder and the report of the merge."""
  root, out = tmp_path_factory.mktemp('merges'), {}
  for family, place in MERGED:
    folder = root / f'{family}_{place}'
    model = slept_model(folder / 'source', family, place)
    rows = dreams(model)
    report = export.merged(
      model, folder / 'hf', folder / 'source', dreams=rows, cfg=MERGE
    )
    out[family, place] = model, rows, folder, report
  return out


@pytest.fixture(name='exports', scope='module')
def _exports(tmp_path_factory, merges):
  """Per case: the folder, our model and transformers' answers, if it is there.

  All folders are loaded by one process, since its imports take ten seconds.
  """
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  root = tmp_path_factory.mktemp('exports')
  models = {}
  for family, place in CASES:
    folder = root / f'{family}_{place}'
    model = slept_model(folder / 'source', family, place)
    export.custom(model, folder / 'hf', folder / 'source')
    models[family, place] = folder, model
  for case, (_, _, folder, _) in merges.items():
    models['merged', *case] = folder, read_plain(folder / 'hf')
  folder = root / 'fast_only'
  model = without_experts(
    slept_model(folder / 'source', 'qwen2_5', 'partition')
  )
  export.merged(model, folder / 'hf', folder / 'source')
  models['fast_only'] = folder, model
  for folder, model in models.values():
    ask(folder, model)
  request = root / 'request.json'
  request.write_text(json.dumps([str(f) for f, _ in models.values()]))
  subprocess.run(
    [sys.executable, '-m', 'tests.exported_folders', str(request)],
    check=True,
    env=os.environ | {'HF_MODULES_CACHE': str(root / 'code')},
    timeout=300,
  )
  return {
    case: (folder, model, np.load(folder / 'answer.npz'))
    for case, (folder, model) in models.items()
  }


def read_plain(folder: pathlib.Path) -> model_lib.Model:
  """Our model of a plain checkpoint."""
  cfg = architectures.model_config(untrusted.read_json(folder / 'config.json'))
  params = jax.tree.map(jnp.asarray, huggingface.load(folder, cfg))
  return model_lib.Model(cfg, params)


def without_experts(model: model_lib.Model) -> model_lib.Model:
  """The same model with every slot locked."""
  memory = model.required_memory()
  for i in range(len(model.cfg.levels)):
    memory = memory.with_level(i, bank=memory.bank(i).prune())
  return model.with_memory(memory)


@pytest.mark.parametrize(
  'case',
  [
    pytest.param(x, marks=pytest.mark.slow if x in MERGED else ())
    for x in CASES
  ],
  ids='-'.join,
)
def test_custom_code_gives_our_logits(exports, case):
  folder, model, theirs = exports[case]
  tokens = np.load(folder / 'request.npz')['tokens']
  ours = model.forward(tokens).logits
  base = transformer.forward(model.cfg, model.params, tokens).logits
  np.testing.assert_allclose(theirs['logits'], ours, rtol=0, atol=1e-4)
  assert np.abs(theirs['logits'] - base).max() > 1e-2
  assert str(theirs['kind']).startswith('Sleep')


@pytest.mark.parametrize('case', CASES, ids='-'.join)
def test_custom_code_generates_with_its_cache_what_we_sample(exports, case):
  folder, model, theirs = exports[case]
  prompt = np.load(folder / 'request.npz')['prompt'].tolist()
  sampler = sampling.SamplerConfig(exported_folders.MAX_NEW, temperature=0.0)
  (ours,) = sampling.complete(model, [prompt], jax.random.key(0), sampler)
  assert theirs['said'].tolist() == ours
  assert len(set(ours)) > 2


@pytest.mark.parametrize('case', CASES, ids='-'.join)
def test_the_tokenizer_and_the_end_of_a_text_travel(exports, case):
  folder, _, theirs = exports[case]
  ours = hf_tokenizer.HuggingFaceTokenizer(folder / 'source')
  assert theirs['text'].tolist() == ours.encode(exported_folders.TEXT)
  assert theirs['text'][0] == 256  # The merge of the tokenizer, not bytes.
  assert theirs['eos'] == ours.stop == 257


@pytest.mark.parametrize('case', MERGED, ids='-'.join)
def test_a_merged_checkpoint_is_plain_and_gives_our_logits(exports, case):
  folder, model, theirs = exports['merged', *case]
  tokens = np.load(folder / 'request.npz')['tokens']
  np.testing.assert_allclose(
    theirs['logits'], model.forward(tokens).logits, rtol=0, atol=1e-4
  )
  assert not str(theirs['kind']).startswith('Sleep')
  assert not list((folder / 'hf').glob('*.py'))


def test_merging_the_fast_change_alone_is_exact(exports):
  folder, model, theirs = exports['fast_only']
  tokens = np.load(folder / 'request.npz')['tokens']
  base = transformer.forward(model.cfg, model.params, tokens).logits
  np.testing.assert_allclose(
    theirs['logits'], model.forward(tokens).logits, rtol=0, atol=1e-4
  )
  assert np.abs(theirs['logits'] - base).max() > 1e-2
  assert str(theirs['kind']) == 'Qwen2ForCausalLM'


def kl(full: np.ndarray, other: np.ndarray) -> float:
  """Mean KL(full || other) in nats a token, of logits `[..., V]`."""
  log_p, log_q = (
    x - np.log(np.exp(x).sum(-1, keepdims=True))
    for x in (np.asarray(x, np.float64) for x in (full, other))
  )
  return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize('case', MERGED, ids='-'.join)
def test_merging_experts_costs_far_less_than_leaving_them_out(merges, case):
  model, rows, folder, report = merges[case]
  held_out = rows[3::4]
  merged = read_plain(folder / 'hf')
  full, base, ours = (
    m.forward(held_out).logits[:, :-1]
    for m in (model, model.with_memory(None), merged)
  )
  assert kl(full, ours) < 0.25 * kl(full, base)
  # The report says what is true.
  assert report.final.kl == pytest.approx(kl(full, ours), rel=0.01)
  assert report.base.kl == pytest.approx(kl(full, base), rel=0.01)
  same = np.asarray(full.argmax(-1) == ours.argmax(-1)).mean()
  assert report.final.agreement == pytest.approx(same, abs=1e-6)
  assert report.tokens == held_out[:, 1:].size
  # Distillation has made it better, and `str` says what it cost.
  assert report.final.kl < report.fitted.kl < report.base.kl
  assert f'{report.final.kl:.4f}' in str(report)
  assert f'{report.final.kl:.4f}' in (folder / 'hf/README.md').read_text()


@pytest.mark.parametrize('case', MERGED, ids='-'.join)
def test_merging_only_adds_columns_and_their_number_suits_formats(merges, case):
  model, _, folder, report = merges[case]
  merged = read_plain(folder / 'hf')
  width = model.cfg.levels[-1].hidden
  assert report.hidden == (merged.cfg.levels[0].hidden, width)
  assert report.hidden[0] % 32 == 0
  changed = expert_bank.with_fast_change(model.cfg, model.params, model.memory)[
    'blocks'
  ][f'level_{len(model.cfg.levels_per_block)}']
  mlp = merged.params['blocks']['level_1']
  for i in range(model.cfg.layers):
    assert np.array_equal(mlp['gate'][i, :, :width], changed['gate'][i])
    assert np.array_equal(mlp['up'][i, :, :width], changed['up'][i])
    assert np.array_equal(mlp['down'][i, :width], changed['down'][i])
  if not model.cfg.partition:
    return
  for name in ('embed', 'norm', 'head'):
    assert equal(merged.params[name], model.params[name])


def equal(a, b) -> bool:
  return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.slow
def test_padding_counts_neither_in_the_fit_nor_in_the_measure(tmp_path):
  model = slept_model(tmp_path / 'source', 'llama3_2', 'partition')
  rows = dreams(model, 16)
  cfg = export.MergeConfig(steps=2)
  reports = []
  for i, filler in enumerate((0, 7)):
    padded = np.concatenate([rows, np.full((16, 5), filler)], axis=1)
    lengths = np.full(16, rows.shape[1])
    out = tmp_path / str(i)
    reports.append(
      export.merged(model, out, None, dreams=padded, lengths=lengths, cfg=cfg)
    )
  assert equal(
    read_plain(tmp_path / '0').params, read_plain(tmp_path / '1').params
  )
  assert reports[0].final == reports[1].final
  assert reports[0].tokens == 4 * (rows.shape[1] - 1)


@pytest.mark.parametrize(
  'changes',
  [dict(enough=1e9), dict(enough=0.0, learning_rate=30.0)],
  ids=['enough', 'no better'],
)
def test_columns_are_kept_where_distillation_gains_nothing(tmp_path, changes):
  model = slept_model(tmp_path / 'source', 'llama3_2', 'partition')
  rows, cfg = dreams(model, 16), export.MergeConfig(steps=2)
  changed = dataclasses.replace(cfg, **changes)
  report, fitted = (
    export.merged(model, tmp_path / name, None, dreams=rows, cfg=x)
    for name, x in (
      ('out', changed),
      ('fitted', dataclasses.replace(cfg, steps=0)),
    )
  )
  assert report.final == report.fitted == fitted.final
  out, other = (read_plain(tmp_path / n).params for n in ('out', 'fitted'))
  assert equal(out, other)


def test_an_adapter_is_merged_before_anything_else(tmp_path):
  model = without_experts(
    slept_model(tmp_path / 'source', 'llama3_2', 'partition')
  )
  adapter = lora.init_adapter(
    model.cfg, lora.LoraConfig(rank=2), model.params, jax.random.key(0)
  )
  adapter = jax.tree.map(lambda x: x + 0.05, adapter)
  model = model.replace(adapter=adapter)
  export.merged(model, tmp_path / 'out', None)
  tokens = np.arange(20)[None]
  np.testing.assert_allclose(
    read_plain(tmp_path / 'out').forward(tokens).logits,
    model.forward(tokens).logits,
    rtol=0,
    atol=1e-4,
  )


@pytest.mark.parametrize('form', ['custom', 'merged'])
def test_everybody_can_read_what_was_exported(tmp_path, form):
  model = without_experts(
    slept_model(tmp_path / 'source', 'llama3_2', 'partition')
  )
  old = os.umask(0o077)
  try:
    getattr(export, form)(model, tmp_path / 'out', tmp_path / 'source')
  finally:
    os.umask(old)
  files = list((tmp_path / 'out').rglob('*'))
  names = {file.name for file in files}
  assert {
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'tokenizer.json',
    'tokenizer_config.json',
    'LICENSE',
    'README.md',
  } <= names
  assert (tmp_path / 'out').stat().st_mode & 0o777 == 0o755
  assert {file.stat().st_mode & 0o777 for file in files} == {0o644}


def test_a_missing_tokenizer_is_said_aloud(tmp_path):
  model = slept_model(tmp_path / 'source', 'llama3_2', 'partition')
  assert 'WARNING' not in export.custom(
    model, tmp_path / 'with', tmp_path / 'source'
  )
  for name, source in (('none', None), ('bare', tmp_path)):
    said = export.custom(model, tmp_path / name, source)
    assert 'WARNING: no tokenizer' in said
    assert 'no tokenizer' in (tmp_path / name / 'README.md').read_text()


_FULL_DISK = """
import pathlib, resource, signal, sys
from sleep_jax import config
from sleep_jax.weights import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
convert.main(sys.argv[1:])
"""


@pytest.mark.parametrize('form', ['custom', 'ours'])
def test_a_disk_without_room_leaves_one_line_and_no_folder(tmp_path, form):
  """A limit on the size of files stands in for a full disk."""
  model = slept_model(tmp_path / 'source', 'llama3_2', 'partition')
  if form == 'custom':
    folder_lib.save(tmp_path / 'in', model.cfg, model.params, model.memory)
  else:
    export.custom(model, tmp_path / 'in', tmp_path / 'source')
  done = subprocess.run(
    [sys.executable, '-c', _FULL_DISK, tmp_path / 'in', tmp_path / 'out'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  (line,) = [x for x in done.stderr.splitlines() if 'error' in x]
  assert 'out could not be written' in line and 'Traceback' not in done.stderr
  assert {p.name for p in tmp_path.iterdir()} == {'source', 'in'}


@pytest.mark.parametrize(
  'tokens, words',
  [
    (None, 'needs dreams'),
    (np.zeros((3, 9), int), 'at least 4 rows'),
    (np.zeros((8, 1), int), '2 columns'),
    (np.zeros((8, 99), int), 'shorten them'),
  ],
)
def test_dreams_that_will_not_do_are_refused(tmp_path, tokens, words):
  model = slept_model(tmp_path / 'source', 'llama3_2', 'partition')
  with pytest.raises(config.ConfigError, match=words):
    export.merged(model, tmp_path / 'out', None, dreams=tokens)
  assert not (tmp_path / 'out').exists()


def test_the_command_merges_with_dreams_from_a_file(tmp_path, capsys):
  model = slept_model(tmp_path / 'source', 'llama3_2', 'partition')
  folder_lib.save(tmp_path / 'in', model.cfg, model.params, model.memory)
  np.save(tmp_path / 'wrong.npy', np.full((8, 9), 999))
  arguments = [str(tmp_path / 'in'), str(tmp_path / 'out'), '--form=merged']
  for more, words in (
    (['--form=folded'], '--form'),
    ([], 'needs dreams'),
    ([f'--dreams={tmp_path}/wrong.npy'], 'below 258'),
    ([f'--dreams={tmp_path}/none.npy'], 'cannot be read'),
  ):
    with pytest.raises(SystemExit, match=words):
      convert.main([*arguments, *more])
  rows = dreams(model, 16)
  rows[:, 20:] = -1
  np.save(tmp_path / 'dreams.npy', rows)
  more = [f'--dreams={tmp_path}/dreams.npy', f'--source={tmp_path}/source']
  convert.main([*arguments, *more])
  said = capsys.readouterr().out
  assert f'on {4 * 19} held-out tokens' in said and 'WARNING' not in said


def test_a_hybrid_is_refused_before_any_work(tmp_path):
  cfg = conftest.tiny(
    levels=(config.LevelConfig(16),), mixers=('attention', 'gdn')
  )
  model = model_lib.init(cfg, jax.random.key(0))
  with pytest.raises(config.ConfigError, match='no counterpart'):
    export.custom(model, tmp_path / 'out', None)
