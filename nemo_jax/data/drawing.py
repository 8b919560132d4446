"""Random samples of a source that share no image, compared by content."""

import collections
import concurrent.futures
import math
import os
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from nemo_jax.core.types import InputError
from nemo_jax.data.source import Example, Source

# Examples that are decoded ahead of the check for copies. A constant, so that a
# draw does not depend on the number of processors.
_AHEAD = 256


class Drawn(NamedTuple):
  """An example of a sample, or a copy that is left out."""

  sample: int | None  # index of its sample; None for a copy that is left out
  example: Example
  value: Any  # the first result of `look`
  first: tuple[str, int]  # key and label of the first image with this content


class _Places:
  """The free places of each sample; in sample 0 each is for one class."""

  def __init__(
    self, source: Source, even: int, others: Sequence[int | None], seed: int
  ):
    each, more = divmod(even, len(source.classes))
    labels = np.random.default_rng(seed).permutation(sorted(source.classes))
    self.asked = {int(x): each + (i < more) for i, x in enumerate(labels)}
    self.even = collections.Counter(self.asked)
    self.others = [math.inf if n is None else n for n in others]
    self.held = [0] * len(others)
    self.given_back = 0

  def take(self, label: int, only: int | None = None) -> int | None:
    """Takes a free place; returns its sample, or None if there is none.

    Args:
      label: of the image.
      only: the only sample that is considered; None for all.
    """
    if self.even[label] and only in (None, 0):
      self.even[label] -= 1
      return 0
    for i, free in enumerate(self.others):
      if free and only in (None, 1 + i):
        self.others[i] -= 1
        self.held[i] += 1
        return 1 + i
    return None

  def is_rest(self, sample: int) -> bool:
    """Whether a sample takes all images that are left."""
    return sample > 0 and self.others[sample - 1] == math.inf

  def give_back(self, sample: int, label: int) -> None:
    """Frees a place of a sample that an image of this label has taken."""
    self.given_back += 1
    if sample:
      self.others[sample - 1] += 1
      self.held[sample - 1] -= 1
    else:
      self.even[label] += 1

  def are_taken(self) -> bool:
    """Whether no place is free."""
    return not any(self.others) and not any(self.even.values())


def _check(source: Source, places: _Places, distinct: int) -> None:
  """Raises `InputError` if a sample has too few images."""
  for label, missing in places.even.items():
    if missing:
      asked = places.asked[label]
      rest = ', copies of others left out' if places.given_back else ''
      raise InputError(
        f'{source.name} has {asked - missing} images of class '
        f'{source.classes[label]}{rest}; {asked} are asked for'
      )
  # A sample of all images that are left needs one image at least.
  least = [
    max(held, 1) if free == math.inf else held + free
    for held, free in zip(places.held, places.others, strict=True)
  ]
  if least != places.held:
    rest = f', {distinct} of them distinct' if places.given_back else ''
    raise InputError(
      f'{source.name} has {source.size} images{rest}; '
      f'{sum(places.asked.values()) + sum(least)} are asked for'
    )


def draw(
  source: Source,
  even: int,
  others: Sequence[int | None],
  seed: int,
  look: Callable[[Example], tuple[Any, Hashable]],
) -> Generator[Drawn]:
  """Yields the examples of random samples that share no image.

  A copy of an image goes into the sample of the first image with its content,
  or is left out if that sample is full.

  Args:
    source: of the examples.
    even: size of sample 0, whose classes have equal numbers of images, up to
      one.
    others: sizes of the samples after it, which take images of any class; None
      for all images that are left.
    seed: of the order of the images, and of the classes that have one more.
    look: (example) -> (value, digest of the content); runs in several threads.

  Raises:
    InputError: there are not enough images, of a class or in total.
  """
  places = _Places(source, even, others, seed)
  homes, tried, running = {}, set(), collections.deque()

  def finish() -> Drawn:
    # Waits for the oldest example, and corrects its sample if it is a copy.
    sample, example, future = running.popleft()
    value, digest = future.result()
    first = example.key, example.label
    home, first = homes.setdefault(digest, (sample, first))
    if home != sample:
      places.give_back(sample, example.label)
      sample = places.take(example.label, only=home)
    return Drawn(sample, example, value, first)

  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
  try:
    again = not places.are_taken()
    while again:
      given_back, passed_over = places.given_back, False
      for number, example in enumerate(source.examples(seed)):
        if number in tried:
          continue
        sample = places.take(example.label)
        if sample is not None and places.is_rest(sample):
          # Earlier examples may turn out as copies and free a place in a
          # sample of fixed size, which comes first.
          unsure = [s for s, _, _ in running if not places.is_rest(s)]
          while unsure and running:
            yield finish()
          if unsure:
            places.give_back(sample, example.label)
            places.given_back -= 1
            sample = places.take(example.label)
        if sample is None:
          passed_over = True
          continue
        tried.add(number)
        running.append((sample, example, pool.submit(look, example)))
        while running and (len(running) > _AHEAD or places.are_taken()):
          yield finish()
        if places.are_taken():
          return
      while running:
        yield finish()
      # Places that copies freed may fit images that were passed over.
      again = passed_over and places.given_back > given_back
    _check(source, places, len(homes))
  finally:
    pool.shutdown(cancel_futures=True)
