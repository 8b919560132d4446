"""NEMO: multi-objective neuroevolution for mixed-precision quantization."""

from nemo_jax import nemo, pareto
from nemo_jax.base import Feedback, InputError, Population, Problem, Species
from nemo_jax.quantization.transform import Quantized, quantize

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
