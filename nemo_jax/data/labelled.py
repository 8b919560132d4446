"""Labelled images: what every use of a data set comes down to."""

from typing import NamedTuple

import numpy as np


class Images(NamedTuple):
  """Labelled images."""

  images: np.ndarray  # [B, height, width, channels]
  labels: np.ndarray  # [B] int32
