"""Packaging of nemo_jax; requirements.txt pins the versions tested."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
INIT = (HERE / 'nemo_jax' / '__init__.py').read_text()

COMMANDS = (
  'search',
  'evaluate',
  'knapsack',
  'compare',
  'sensitivity',
  'transfer',
  'workloads',
  'prepare',
)

setuptools.setup(
  name='nemo_jax',
  version=re.search(r"__version__ = '(.+)'", INIT).group(1),
  description=(
    'Mixed-precision quantization in JAX by multi-objective neuroevolution'
  ),
  long_description=(HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=setuptools.find_packages(
    include=['nemo_jax', 'nemo_jax.*', 'experiments']
  ),
  package_data={'nemo_jax': ['py.typed']},
  entry_points={
    'console_scripts': [
      f'nemo-{name} = experiments.{name}:main' for name in COMMANDS
    ]
  },
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'evosax>=0.3',
    'flax>=0.12',
    # Kernels for GPUs are in Pallas's language for Triton, which 0.12 may lack.
    'jax>=0.10,<0.12',
    'jaxtyping>=0.3',
    'jraph>=0.0.6.dev0',
    'matplotlib>=3.9',
    'numpy>=2.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.20',
    'pillow>=11',
    'psutil>=6',
    'safetensors>=0.5',
    'scikit-learn>=1.5',
    'scipy>=1.14',
    'tensorflow-datasets>=4.9.8',
    'threadpoolctl>=3.1',
    'tqdm>=4.66',
  ],
  extras_require={
    'cuda': ['jax[cuda12]'],
    'tpu': ['jax[tpu]'],
    # To read .pth files.
    'torch': ['torch>=2.6'],
    # To prepare TFDS data, and to read what was prepared as TFRecord. TFDS
    # wants importlib_resources as well, and does not say so.
    'tensorflow': ['importlib_resources', 'tensorflow>=2.18'],
    'test': [
      'beartype>=0.22',
      'hypothesis>=6.100',
      'moocore>=0.2',
      'pymoo>=0.6.1',
      'pytest>=8',
      'pytest-xdist>=3.6',
      'qwix>=0.1.8',
      'ruff>=0.12',
      'ty>=0.0.108',
    ],
  },
)
