"""Published checkpoints as variables of the networks in `models`.

The modules of a network have the names that its checkpoint uses. A conversion
therefore only transposes kernels and folds batch norms.
"""

from nemo_jax.models.weights.checkpoints import read
from nemo_jax.models.weights.downloads import download
from nemo_jax.models.weights.variables import NORM_EPSILON, convert

__all__ = ['NORM_EPSILON', 'convert', 'download', 'read']
