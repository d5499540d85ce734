"""Novels of Project Gutenberg, from the repositories of GITenberg."""

import re

from sleep_jax.data.datasets import download

_GITENBERG = 'https://raw.githubusercontent.com/GITenberg'
# Name: file in its GITenberg repository, commit, SHA-256 after `strip_header`.
_BOOKS = {
  'Anna-Karenina_1399': (
    '1399-0.txt',
    'cb3b12d5db852936e5a3abc05ef02939c9dcfd6e',
    'd04b71633d93fc804b182a70ee4a56dde251993d2f036525be31cebe945babb7',
  ),
  'Bleak-House_1023': (
    '1023.txt',
    '2fe2ed9f44a699aab35dfc84b69db6753a390c7f',
    '4afb56eccf68ecdf7bae5878de651277c115da48d811da346297e0fbaa182435',
  ),
  'Crime-and-Punishment_2554': (
    '2554-0.txt',
    'df32009e1d36b38bc4b010d6e19f8f529eeb4125',
    'a74afc6c57a505c5e069e61a89165e6ba8947ace0861265033fcf2a118671340',
  ),
  'David-Copperfield_766': (
    '766-0.txt',
    '1cfa9f937da3d37507885e00150ece32fb475da9',
    '00b7724166fa3363ed71d59c2c95522cec2df18d0e278e8bfab3a6c112fe83bb',
  ),
  'Emma_158': (
    '158-0.txt',
    '9943f6422b9246e7ad37625d6bd014b035fbfdea',
    'eeaa9e3711e1093f0212e3db9098eb3a31957609014b39a5dec0fdc0ed0e96eb',
  ),
  'Great-Expectations_1400': (
    '1400-0.txt',
    '889db0e100928a957f469bf834c564d04065c8e6',
    '2fbd1d4e2b98d8eb7a16adadbcfdf999b27bf6499a972d236a37d3af538277c3',
  ),
  'Jane-Eyre_1260': (
    '1260.txt',
    'd8976a3c05269fb2ecb83d4575d82c6c2abe0012',
    '1f283989f551718b76dcfdc1ecd6df2d3051fd8ae8be8afd6b9098cca8acb75e',
  ),
  'Little-Women_514': (
    '514-8.txt',
    '2b0c302d954a57cfa42c95d88ef053fd1b1aef55',
    '62f9b324fb7f13afb6ea0922aa965c3554ca7d3e8eff3a2a4e7314c76190f3a9',
  ),
  'Middlemarch_145': (
    '145-8.txt',
    '39add53d31f10ba5cecdcbe8c095f90b25fd4b3f',
    '24fee01e298e854cfefff4155f3fe1aa1531372cd2b1ab8ba9936233a12c7ab8',
  ),
  'Moby-Dick--Or-The-Whale_2701': (
    '2701-0.txt',
    'bdf1948e6cd00963730971e5624e764a35f238c3',
    'dcac694371fdeb859436f3e6babc926ca8d3e0dd9f8d3f36bda12271b56e288c',
  ),
  'Pride-and-Prejudice_1342': (
    '1342-0.txt',
    '81db45c9c48c592f0b77f01fc59e677ad0a5634e',
    'a004c764ba63ee337f7b7f6a7d58e2d8f8e216f2d94b4764c333ea443c316548',
  ),
  'The-Brothers-Karamazov_28054': (
    '28054-0.txt',
    '6a2b2e1e64fe3246e470b60459ba207e2872bd0e',
    '66ae6bd8afa1d895cdb2fd62749abb38d5a0fc570d3d7ba103e2afbc275ca31a',
  ),
  'Vanity-Fair_599': (
    '599.txt',
    'bcc3c8e2c447def9eb19cd74bf877617719b7ec4',
    'dbea654bb010bb44d4622a02026f58efe30f5f123590cac65013dfc06274a39d',
  ),
  'War-and-Peace_2600': (
    '2600-0.txt',
    'fa22ab90f00f627e83d14acabe32d91602d2365d',
    'ac586f72605194107d9180a45f301fd038fc4b4a6464e9479d9111294d32f4cc',
  ),
  'Wuthering-Heights_768': (
    '768.txt',
    '7f246b8eba2cf744e757f7425c90ad362ecb8a99',
    '14d056b048c7e095c86ab4cbf254140bf0781f14f03ad231410f46f295dbdf82',
  ),
}


def strip_header(raw: bytes) -> bytes:
  """A Project Gutenberg text without the licence around it, as UTF-8."""
  try:
    text = raw.decode('utf-8-sig')
  except UnicodeDecodeError:
    text = raw.decode('cp1252')  # Older files.
  text = re.sub(r'\r\n?', '\n', text)
  mark = r'^\*\*\* ?{} TH(?:IS|E) PROJECT GUTENBERG'
  start = re.search(
    mark.format('START OF') + r'.*?\*\*\*[^\n]*\n', text, re.M | re.S
  )
  end = re.search(mark.format('END OF'), text, re.M)
  if not start or not end:
    raise download.DataError('no START and END marks of Project Gutenberg.')
  text = text[start.end() : end.start()].strip()
  text = re.sub(r'\n*End of (?:the )?Project Gutenberg[^\n]*$', '', text)
  return (text.strip() + '\n').encode()


def _book(name: str, file: str, commit: str, sha256: str) -> download.RawFile:
  url = f'{_GITENBERG}/{name}/{commit}/{file}'
  return download.RawFile(f'gutenberg/{name}.txt', url, sha256, strip_header)


BOOKS = {name: _book(name, *origin) for name, origin in _BOOKS.items()}


def paragraphs(text: str) -> list[str]:
  """The paragraphs of a book, each on one line."""
  parts = (' '.join(p.split()) for p in re.split(r'\n\s*\n', text))
  return [p for p in parts if p]
