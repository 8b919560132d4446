"""NEMO: multi-objective neuroevolution for mixed-precision quantization."""

from nemo_jax import pareto
from nemo_jax.core.types import InputError
from nemo_jax.quantization.transform import Quantized, quantize
from nemo_jax.search import nemo
from nemo_jax.search.problem import Feedback, Population, Problem, Species

__version__ = '0.2.0'

__all__ = [
  'Feedback',
  'InputError',
  'Population',
  'Problem',
  'Quantized',
  'Species',
  'nemo',
  'pareto',
  'quantize',
]
