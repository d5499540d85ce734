"""Pictures and the page of a report, as a reader's browser shows them."""

import json
import pathlib
import shutil
import subprocess
import sys

import html5lib
from matplotlib import colors
from matplotlib import ticker
import numpy as np
import pytest

from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import page as page_lib
from sleep_jax.harness import plots
from sleep_jax.harness import report as report_lib
from sleep_jax.harness import style
from sleep_jax.harness import tables
from tests import run_test

ROOT = pathlib.Path(__file__).parent.parent
_BAD = '<script>document.title="ran"</script> & <b>"x"</b> \u2028 \U0001f634'


def life(arm, seed, nights=3, metric='accuracy', **changes):
  """The summary of a life that forgets, made up."""
  matrix = [
    [0.9 - 0.1 * (n - e) - 0.01 * seed for e in range(n + 1)]
    for n in range(nights)
  ]
  value = {'accuracy': lambda row: float(np.mean(row))}
  of_night = value.get(metric, lambda row: 10.0 * len(row))
  curve = [
    {'steps': 1, 'tokens': 9.0, 'flops': 9.0, metric: of_night(row)}
    for row in matrix
  ]
  cost = {'tokens': 10.0, 'flops': 1e9, 'seconds': 1.0, 'steps': 2}
  return {
    'task': 'made_up',
    'columns': [metric],
    'headline': [metric],
    'chance_level': {},
    'final': {metric: curve[-1][metric]},
    'matrix': matrix,
    'curve': curve,
    'costs': {'wake': cost, 'update': cost | {'steps': 0}, 'eval': cost},
    'learner': arm,
    'seed': seed,
  } | changes


def lives(*arms, **changes):
  return [life(arm, seed, **changes) for arm in arms for seed in (1, 2)]


def write_page(out, arms=('sft', 'frozen', 'sleep')):
  """A report whose names, dreams and settings are hostile."""
  dreams = [{'kind': 'rewarded', 'text': _BAD}, {'kind': _BAD, 'text': 'so'}]
  arms = (*arms, _BAD)
  report_lib.write_report(
    lives(*arms),
    'sleep',
    out,
    c={'name': _BAD, 'task': {_BAD: '"><img src="https://example.com/x">'}},
    dreams={'sleep': {0: dreams, 1: dreams, 2: dreams}},
  )
  return out / 'report.html'


@pytest.fixture(name='page', scope='module')
def _page(tmp_path_factory):
  return write_page(tmp_path_factory.mktemp('page'))


def parsed(page):
  parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
  return parser.parse(page.read_text('utf-8'))


def test_a_page_is_valid_and_needs_nothing_else(page):
  tree = parsed(page)
  ids = {element.get('id') for element in tree.iter()}
  for element in tree.iter():
    assert element.tag not in ('script', 'link', 'iframe', 'object', 'base')
    for name in element.keys():
      assert not name.startswith('on')
    if 'src' in element.keys():
      assert element.get('src').startswith('data:image/png;base64,')
    if 'href' in element.keys():
      assert element.get('href')[0] == '#' and element.get('href')[1:] in ids
  assert len(tree.findall('.//img')) == 3
  assert '@import' not in page.read_text() and 'url(' not in page.read_text()


def test_text_in_a_page_is_text(page):
  tree = parsed(page)
  assert tree.find('.//title').text == _BAD
  quotes = [q.text for q in tree.findall('.//blockquote')]
  assert quotes.count(_BAD) == 3 and quotes.count('so') == 3
  assert _BAD in [th.text for th in tree.findall('.//tbody//th')]
  cells = [td.text for td in tree.findall('.//td')]
  assert '"><img src="https://example.com/x">' in cells


def test_lives_without_stored_dreams_have_a_page(tmp_path):
  old = ROOT / 'results/smollm2_placement'
  report_lib.write_report(
    json.loads((old / 'lives.json').read_text()), 'output', tmp_path
  )
  assert 'None were stored' in (tmp_path / 'report.html').read_text()
  assert parsed(tmp_path / 'report.html') is not None
  for name in ('table.md', 'lives.json'):
    assert (tmp_path / name).read_bytes() == (old / name).read_bytes()


_WITH_SLEEP = (
  *('clinc', 'clinc_one_seed', 'facts_hard', 'smollm2', 'smollm2_archive'),
  *('smollm2_clinc', 'smollm2_squad', 'smollm2_trial'),
)


def _over_days(arm, scores, seconds, seed=1, metric='accuracy'):
  curve = [
    {metric: score, 'spent': {'tokens': 1.0, 'flops': 1e12 * s, 'seconds': s}}
    for score, s in zip(scores, np.cumsum(seconds))
  ]
  return life(arm, seed, metric=metric) | {'curve': curve, 'matrix': []}


def _equal_scores(found):
  table = tables.equal_scores(found, 'sleep')
  assert table is not None
  return table.rows


def test_what_arms_spend_until_they_score_the_same():
  found = [
    _over_days('sft', (0.2, 0.5, 0.4), (1, 1, 1)),
    _over_days('sleep', (0.1, 0.4, 0.9), (5, 5, 5), seed=1),
    _over_days('sleep', (0.1, 0.4, 0.7), (7, 7, 7), seed=2),
    _over_days('grpo', (0.1, 0.9, 0.9), (9, 9, 9)),
  ]
  sft, grpo = _equal_scores(found)
  # What was reached on the way counts, and means over seeds.
  assert sft == ['sft', '0.400', '2s 2.00T', '12s 12.00T', 'never']
  assert grpo == ['grpo', '0.900', '18s 18.00T', 'never', '18s 18.00T']
  # Of a perplexity less is better.
  found = [
    _over_days('sft', (9.0, 5.0), (1, 1), metric='ppl'),
    _over_days('sleep', (4.0, 3.0), (2, 2), metric='ppl'),
  ]
  (row,) = _equal_scores(found)
  assert row == ['sft', '5.000', '2s 2.00T', '2s 2.00T', 'never']


def test_lives_of_an_earlier_version_have_no_such_table():
  assert tables.equal_scores(lives('sft', 'sleep'), 'sleep') is None


@pytest.mark.parametrize(
  'name, reference',
  [*((name, 'sleep') for name in _WITH_SLEEP), ('facts_hundred', 'fold')],
)
def test_the_tables_of_the_results_are_those_of_their_lives(name, reference):
  folder = ROOT / 'results' / name
  found = json.loads((folder / 'lives.json').read_text())
  text = report_lib.table(found, reference)
  assert text == (folder / 'table.md').read_text()
  pictures = [path.name for path in report_lib.pictures(folder)]
  assert pictures == ['retention.png', 'cost.png', 'recall.png']


# Of `joint` no life has ended; the first arm that has some takes its place.
@pytest.mark.parametrize('reference', ['sleep', 'joint'])
def test_the_command_writes_a_page_with_dreams(tmp_path, reference):
  workdir, out = tmp_path / 'w', tmp_path / 'out'
  c = {
    'name': 'made up',
    'arms': {'sleep': {}, 'sft': {}, 'joint': {}},
    'reference': reference,
    'seeds': [1, 2],
    'task': {},
    'base': '',
    'model': {},
    'workers': 1,
  }
  for of_life in lives('sft', 'sleep'):
    settings = build_lib.arm_config(c, of_life['learner'])
    digest = build_lib.life_digest(settings, of_life['seed'])
    of_life = of_life | {'identity': digest}
    folder = workdir / 'lives' / f'{of_life["learner"]}_{of_life["seed"]}'
    folder.mkdir(parents=True)
    (folder / 'summary.json').write_text(json.dumps(of_life))
    dreams = [{'kind': 'rewarded', 'text': f'of {folder.name}'}]
    if of_life['learner'] == 'sleep':
      records = [{'night': 0, 'dreams': dreams}, {'night': 1}]
      lines = ''.join(json.dumps(r) + '\n' for r in records)
      (folder / 'metrics.jsonl').write_text(lines)
  (workdir / 'config.json').write_text(json.dumps(c))
  command = [sys.executable, '-m', 'experiments.report', f'--workdir={workdir}']
  done = subprocess.run(
    [*command, f'--out={out}'], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert str(out / 'report.html') in done.stdout
  text = (out / 'report.html').read_text()
  assert 'of sleep_1' in text and 'of sleep_2' not in text
  assert '| sleep minus |' in (out / 'table.md').read_text()
  done = subprocess.run(
    [*command, f'--out={tmp_path / "sft"}', '--reference=sft'], cwd=ROOT
  )
  assert done.returncode == 0
  assert '| sft minus |' in (tmp_path / 'sft/table.md').read_text()
  with pytest.raises(config.ConfigError, match="--reference='ewc' is unknown"):
    report_lib.report_workdir(workdir, out, 'ewc')
  (workdir / 'lives/sft_1/summary.json').write_text('{"headline')
  with pytest.raises(config.ConfigError, match='summary.json cannot be read'):
    report_lib.report_workdir(workdir, out)


@pytest.fixture(name='browser', scope='module')
def _browser():
  """A headless browser of this machine, without a network."""
  names = ('chromium', 'chromium-browser', 'google-chrome')
  path = next(filter(None, map(shutil.which, names)), None)
  if path is None:
    pytest.skip('no chromium is installed')
  sync_api = pytest.importorskip(
    'playwright.sync_api', reason='playwright is not installed'
  )
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=path,
      args=['--no-sandbox', '--host-resolver-rules=MAP * ~NOTFOUND'],
    )
    yield browser
    browser.close()


@pytest.mark.parametrize('width', [400, 1280])
def test_a_browser_shows_all_of_the_page(width, page, browser, tmp_path):
  context = browser.new_context(
    viewport={'width': width, 'height': 900}, java_script_enabled=False
  )
  tab, requests = context.new_page(), []
  tab.on('request', lambda request: requests.append(request.url))
  tab.goto(page.as_uri())
  assert [url for url in requests if not url.startswith('data:')] == [
    page.as_uri()
  ]
  assert tab.title().startswith('<script>')  # Its text, and not what it does.
  # Tables scroll by themselves; nothing widens the page.
  assert tab.evaluate('document.documentElement.scrollWidth') <= width
  for image in tab.locator('img').all():
    assert image.evaluate('x => x.complete && x.naturalWidth') > 400
    assert 200 < image.bounding_box()['width'] <= width
  for element in tab.locator('h2, th, figcaption').all():
    assert element.is_visible() or element.evaluate(
      'x => !!x.closest("details")'
    )
  first, second, last = tab.locator('#dreams details').all()
  assert first.locator('blockquote').first.is_visible()
  assert not second.locator('blockquote').first.is_visible()
  second.locator('summary').click()
  assert second.locator('blockquote').first.is_visible()
  assert last.locator('blockquote').first.is_visible()
  tab.locator('nav a', has_text='Settings').click()
  assert tab.locator('#settings').bounding_box()['y'] < 900
  tab.screenshot(path=tmp_path / 'page.png', full_page=True)
  assert (tmp_path / 'page.png').stat().st_size > 20_000
  context.close()


@pytest.fixture(name='drawn')
def _drawn(monkeypatch):
  """The figures that are drawn, in place of their files."""
  figures = []
  monkeypatch.setattr(
    style, 'save', lambda figure, path: figures.append(figure)
  )
  return figures


def test_heat_maps_have_whole_nights_and_numbers(drawn):
  plots.recall_matrices(lives('sleep', 'sft'), pathlib.Path('x'))
  *axes, _ = drawn[0].axes
  assert [a.get_title() for a in axes] == ['sft', 'sleep']
  assert axes[1].title.get_fontweight() == 'bold'
  for axis in axes:
    assert list(axis.xaxis.get_major_locator()()) == [1, 2, 3]
    numbers = [t.get_text() for t in axis.texts]
    assert numbers == ['88', '78', '88', '68', '78', '88']


def test_lines_over_nights_have_chance_and_base(drawn):
  chance = {'accuracy': 0.25}
  found = lives('sleep', 'frozen', 'sft', nights=20, chance_level=chance)
  plots.retention(found, pathlib.Path('x'))
  first, every = drawn[0].axes
  assert [first.get_title(), every.get_title()] == [
    'the first episode',
    'all episodes so far',
  ]
  ticks = first.xaxis.get_major_locator()()
  assert all(float(t).is_integer() for t in ticks)
  *lines, guess = every.get_lines()
  assert guess.get_label() == 'chance' and guess.get_ydata()[0] == 0.25
  by_name = {line.get_label(): line for line in lines}
  assert list(by_name)[-1] == 'sleep'
  others = set(by_name) - {'sleep'}
  assert 'frozen (the base model)' in others
  for name in others:
    assert by_name[name].get_linewidth() < by_name['sleep'].get_linewidth()
    assert by_name[name].get_zorder() < by_name['sleep'].get_zorder()


def test_perplexity_has_a_panel_of_its_own(drawn):
  plots.retention(lives('sleep', metric='held_out_ppl'), pathlib.Path('x'))
  *_, text, legend = drawn[0].axes
  assert text.get_title() == 'held_out_ppl' and text.get_yscale() == 'log'
  assert 'lower is better' in text.get_ylabel()
  assert [t.get_text() for t in legend.get_legend().get_texts()] == ['sleep']


def test_cost_leaves_evaluations_out(drawn):
  free = {'eval': life('icl', 1)['costs']['eval']}
  found = [*lives('sleep'), *lives('icl', costs=free)]
  plots.cost(found, pathlib.Path('x'))
  (axis,) = drawn[0].axes
  points = {c.get_label(): c.lines[0].get_xdata()[0] for c in axis.containers}
  assert points['sleep'] == 2e9 and 'icl, no training' in points
  assert not isinstance(axis.xaxis.get_minor_formatter(), ticker.LogFormatter)


def test_no_two_learners_of_a_config_look_alike():
  for name, variants in run_test.VARIANTS.items():
    for variant in variants:
      c = run_test.load(name, variant)
      looks = style.styles(list(c['arms']), c['reference'])
      assert set(looks) == set(c['arms'])
      shown = {(x.color, x.marker, x.linestyle) for x in looks.values()}
      assert len(shown) == len(looks)
      if 'sleep' in looks:
        assert list(looks)[-1] == 'sleep'


def test_colours_are_told_apart():
  looks = style.styles(['sleep', 'frozen', *'abcdefg'])
  rgb = np.array([colors.to_rgb(look.color) for look in looks.values()])
  apart = np.linalg.norm(rgb[:, None] - rgb, axis=-1) + np.eye(len(rgb))
  assert apart.min() > 0.25


def test_a_usual_arm_looks_the_same_everywhere():
  few, many = style.styles(['ewc']), style.styles(['a', 'sft', 'b', 'ewc'])
  assert few['ewc'] == many['ewc']


def test_every_picture_has_a_caption():
  assert set(report_lib.PICTURES) == set(page_lib.CAPTIONS)
