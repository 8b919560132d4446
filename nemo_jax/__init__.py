"""NEMO: multi-objective neuroevolution for mixed-precision quantization.

  front = nemo_jax.search(apply, variables, inputs, labels)
  point = front.select(max_size_mb=1.5)
  logits = front.apply(point)(inputs)

`quantize` makes the bit-widths of any function an argument, `nemo` searches any
`Problem`, and `pareto` has the primitives of multi-objective optimization.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nemo_jax import pareto
from nemo_jax.core.types import InputError
from nemo_jax.quantization.quantized import Quantized
from nemo_jax.quantization.transform import quantize
from nemo_jax.search import nemo
from nemo_jax.search.problem import (
  Feedback,
  Population,
  Prior,
  Problem,
  Species,
  SpeciesBuilder,
)

from nemo_jax.one_call import search  # isort: skip (after its namesake)

if TYPE_CHECKING:
  from nemo_jax.runs.front import Front, Point

__version__ = '0.3.0.dev0'

__all__ = [
  'Feedback',
  'Front',
  'InputError',
  'Point',
  'Population',
  'Prior',
  'Problem',
  'Quantized',
  'Species',
  'SpeciesBuilder',
  'nemo',
  'pareto',
  'quantize',
  'search',
]


def __getattr__(name: str) -> Any:
  """`Front` and `Point`, whose module is imported at their first use."""
  if name in ('Front', 'Point'):
    return getattr(importlib.import_module('nemo_jax.runs.front'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
