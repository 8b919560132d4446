"""A network of two layers that knows its classes without being trained."""

import jax
import numpy as np

CLASSES, FEATURES = 6, 16


def apply(variables, inputs):
  """Logits [B, 6]: the products of inputs [B, 16] with each centre."""
  hidden = jax.nn.relu(inputs @ variables['hidden'])
  return hidden @ variables['out']


def centres() -> np.ndarray:
  """float32[6, 16], of length 1."""
  drawn = np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
  return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def variables() -> dict[str, np.ndarray]:
  """Weights, of which the second half has the other sign."""
  both = np.concatenate([centres(), -centres()])
  signs = np.repeat([1.0, -1.0], CLASSES)
  out = np.tile(np.eye(CLASSES), (2, 1)) * signs[:, None]
  return {
    'hidden': both.T.astype(np.float32),
    'out': out.astype(np.float32),
  }


def examples(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Inputs around the centres, and their classes."""
  draw = np.random.default_rng(seed)
  labels = draw.integers(0, CLASSES, count)
  noise = draw.normal(scale=0.1, size=(count, FEATURES))
  return (centres()[labels] + noise).astype(np.float32), labels


def other(variables, inputs):
  """Logits by another network of the same weights."""
  return inputs @ variables['hidden'][:, :CLASSES]
