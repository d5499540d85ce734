"""MkDocs hook: pages that stand outside docs/, and links to other files.

A page links to other files of the repository relative to itself, so that the
link works where the repository is browsed. In the site, a link to a page leads
to that page, and a link to any other file leads to the repository.
"""

import os
import pathlib
import posixpath
import re
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
_LINK = re.compile(r'\]\(([^)\s]+)\)')
# Of the repository -> of the site.
_PAGES = {
  'CHANGELOG.md': 'changelog.md',
  'CODE_OF_CONDUCT.md': 'code_of_conduct.md',
  'CONTRIBUTING.md': 'contributing.md',
  'README.md': 'index.md',
  'SECURITY.md': 'security_policy.md',
  'results/README.md': 'results/index.md',
}


def pages() -> dict[str, str]:
  """Files outside docs/ that the site has: path in each of the two."""
  found = dict(_PAGES)
  for file in sorted((ROOT / 'results').rglob('*')):
    path = file.relative_to(ROOT).as_posix()
    if path.endswith(('.md', '.png')) or path.count('/') == 1:
      found.setdefault(path, path)
  return {k: v for k, v in found.items() if (ROOT / k).is_file()}


def site_link(link: str, source: str, uri: str, repo_url: str) -> str:
  """The link of a page, as it must be in the site.

  Args:
    link: as it is written in the page.
    source: path of the page in the repository.
    uri: path of the page in the site.
    repo_url: where the repository is browsed.
  """
  if re.match(r'[a-z]+:|#|/', link):
    return link
  target, hash_sign, anchor = link.partition('#')
  path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
  if (ROOT / path / 'README.md').is_file():
    path = f'{path}/README.md'
  if path.startswith('docs/'):
    page = path.removeprefix('docs/')
  elif path in (known := pages()):
    page = known[path]
  else:
    kind = 'tree' if (ROOT / path).is_dir() else 'blob'
    return f'{repo_url.rstrip("/")}/{kind}/main/{path}{hash_sign}{anchor}'
  return os.path.relpath(page, posixpath.dirname(uri)) + hash_sign + anchor


def on_files(files: Any, config: Any) -> Any:
  """Adds the pages to the files of docs/."""
  # Here, because the tests read this file without MkDocs.
  from mkdocs.structure import files as files_lib

  for path, uri in pages().items():
    files.append(
      files_lib.File.generated(config, uri, abs_src_path=str(ROOT / path))
    )
  return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
  """Turns the links of a page into those of the site."""
  source = pathlib.Path(page.file.abs_src_path).relative_to(ROOT).as_posix()

  def replace(match: re.Match[str]) -> str:
    link = site_link(match[1], source, page.file.src_uri, config.repo_url)
    return f']({link})'

  return _LINK.sub(replace, markdown)
