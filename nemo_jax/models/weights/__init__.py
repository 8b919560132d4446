"""Published checkpoints as variables of the networks in `models`.

A network's modules carry the names that its checkpoint uses, so that what is
left to do is to turn kernels round and to fold batch norms.
"""

from nemo_jax.models.weights.checkpoints import read
from nemo_jax.models.weights.downloads import download
from nemo_jax.models.weights.variables import NORM_EPSILON, convert

__all__ = ['NORM_EPSILON', 'convert', 'download', 'read']
