"""Labelled images in memory."""

from typing import NamedTuple

import numpy as np

from nemo_jax.core.types import PyTree


class Images(NamedTuple):
  """Labelled images, or other inputs of a network."""

  # [B, height, width, channels]; a pytree of arrays [B, ...] for other inputs.
  images: PyTree
  labels: np.ndarray  # [B] int32
