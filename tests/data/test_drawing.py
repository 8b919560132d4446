"""Samples of a source: disjoint, and by content."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jax import InputError
from nemo_jax.data import Example, Source, drawing, images
from tests.pictures import (
  refused,
)


def source_of(counts, contents=None):
  """Of so many examples of each class, a, b and so on; no two are alike."""
  labels = np.repeat(np.arange(len(counts)), counts).tolist()
  contents = contents or [str(i) for i in range(len(labels))]

  def examples(seed):
    for i in np.random.default_rng(seed).permutation(len(labels)):
      yield Example(str(i), labels[i], contents[i].encode)

  names = {i: 'abcdefgh'[i] for i in range(len(counts))}
  return Source('letters', 'letters', len(labels), names, examples)


def draw(source, even, others, seed=0):
  look = lambda example: (None, example.content())
  return list(images.draw(source, even, others, seed, look))


def drawn(source, even, others, seed=0):
  """The keys of each sample, and the labels of sample 0."""
  keys, labels = [[] for _ in range(1 + len(others))], []
  for found in draw(source, even, others, seed):
    if found.sample is not None:
      keys[found.sample].append(found.example.key)
    if found.sample == 0:
      labels.append(found.example.label)
  return keys, labels


@st.composite
def requests(draw):
  """Counts of the classes, and of samples that there are enough images for."""
  counts = draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
  even = draw(st.integers(0, len(counts) * min(counts)))
  first = draw(st.integers(0, sum(counts) - even))
  second = draw(st.integers(0, sum(counts) - even - first))
  return counts, even, [first, second]


@given(requests(), st.integers(0, 2**32))
def test_samples_are_disjoint_and_the_first_is_even(request, seed):
  counts, even, others = request
  source = source_of(counts)
  keys, labels = drawn(source, even, others, seed)
  assert [len(sample) for sample in keys] == [even, *others]
  every = [key for sample in keys for key in sample]
  assert len(set(every)) == len(every)
  of_class = np.bincount(labels, minlength=len(counts))
  assert of_class.max() - of_class.min() <= 1
  assert (keys, labels) == drawn(source, even, others, seed)


@given(requests(), st.integers(0, 2**32))
def test_all_images_are_taken_when_all_are_asked_for(request, seed):
  counts, even, (first, _) = request
  rest = sum(counts) - even - first
  keys, _ = drawn(source_of(counts), even, [first, rest], seed)
  every = [int(key) for sample in keys for key in sample]
  assert sorted(every) == list(range(sum(counts)))


@given(
  st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(0, 2**32)
)
def test_a_class_with_too_few_images_is_named(counts, seed):
  fewest = min(counts)
  names = [n for n, x in zip('abcdef', counts, strict=False) if x == fewest]
  words = f'^letters has {fewest} images of class [{"".join(names)}]; '
  with refused(f'{words}{fewest + 1} are asked for$'):
    drawn(source_of(counts), len(counts) * (fewest + 1), [1], seed)


def test_the_class_with_one_more_has_too_few_images():
  with refused('^letters has 2 images of class [abc]; 3 are asked for$'):
    drawn(source_of([2, 2, 2]), 7, [])


@pytest.mark.parametrize(
  ('even', 'others'), [(2, [5]), (6, [1]), (0, [7]), (0, [3, 4])]
)
def test_more_images_than_there_are(even, others):
  with refused('^letters has 6 images; 7 are asked for$'):
    drawn(source_of([3, 3]), even, others)


def test_the_seed_decides_which_images_and_which_classes():
  source = source_of([10] * 6)
  found = [drawn(source, 9, [20], seed) for seed in range(5)]
  assert len({frozenset(keys[0]) for keys, _ in found}) == 5
  assert len({frozenset(keys[1]) for keys, _ in found}) == 5
  twice = [np.bincount(labels, minlength=6) == 2 for _, labels in found]
  assert len({tuple(x) for x in twice}) > 1


def test_nothing_more_is_read_than_is_asked_for():
  read = collections.Counter()

  def examples(seed):
    for example in source_of([5, 5]).examples(seed):
      read['examples'] += 1
      yield example

  drawn(source_of([5, 5])._replace(examples=examples), 0, [4])
  assert read['examples'] == 4


def one_by_one(source, even, others, seed):
  """The keys of each sample of a source without copies, by the plain rule."""
  each, more = divmod(even, len(source.classes))
  order = np.random.default_rng(seed).permutation(sorted(source.classes))
  quotas = {int(x): each + (i < more) for i, x in enumerate(order)}
  keys = [[] for _ in range(1 + len(others))]
  for example in source.examples(seed):
    if quotas[example.label]:
      quotas[example.label] -= 1
      keys[0].append(example.key)
      continue
    for sample, count in zip(keys[1:], others, strict=True):
      if len(sample) < count:
        sample.append(example.key)
        break
  return keys


@given(requests(), st.integers(0, 2**32))
def test_without_copies_images_are_taken_in_their_order(request, seed):
  counts, even, others = request
  source = source_of(counts)
  expected = one_by_one(source, even, others, seed)
  assert drawn(source, even, others, seed)[0] == expected


@st.composite
def copies(draw):
  """Counts of the classes, the content of each image, and a request."""
  counts = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
  content = st.sampled_from('pqrstuvwxyz')
  contents = draw(st.lists(content, min_size=sum(counts), max_size=sum(counts)))
  return counts, contents, draw(st.integers(0, 6)), draw(st.integers(0, 9))


@pytest.mark.parametrize('ahead', [0, 3, 256])
@given(copies(), st.integers(0, 2**32))
def test_no_content_is_in_two_samples(ahead, request, seed):
  counts, contents, even, first = request
  source = source_of(counts, contents)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(drawing, '_AHEAD', ahead)
    try:
      found = draw(source, even, [first, None], seed)
    except InputError:
      return
  held = [
    [contents[int(x.example.key)] for x in found if x.sample == i]
    for i in range(3)
  ]
  assert [len(x) for x in held[:2]] == [even, first]
  assert len(held[2]) >= 1
  assert sum(len(set(x)) for x in held) == len(set().union(*held))
  # What is left out has its content in a sample that is full.
  for x in found:
    content = contents[int(x.example.key)]
    assert (x.sample is None) <= (content in {*held[0], *held[1]})
    assert contents[int(x.first[0])] == content


@given(st.lists(st.sampled_from('pqrs'), min_size=1, max_size=30))
def test_one_sample_may_hold_all_copies(contents):
  source = source_of([len(contents)], contents)
  keys, _ = drawn(source, 0, [len(contents)])
  assert len(set(keys[1])) == len(contents)


@pytest.mark.parametrize('seed', range(5))
def test_too_few_distinct_images_are_counted(seed):
  source = source_of([30], list('abcdefghij') * 3)
  words = '^letters has 30 images, 10 of them distinct; 30 are asked for$'
  with refused(words):
    draw(source, 10, [10, 10], seed)


def test_the_rest_holds_an_image_or_more():
  assert [len(x) for x in drawn(source_of([3]), 1, [None])[0]] == [1, 2]
  with refused('^letters has 3 images, 1 of them distinct; 2 are asked for$'):
    draw(source_of([3], ['p', 'p', 'p']), 1, [None])


def test_images_passed_over_take_the_places_of_copies():
  # While the only b is awaited there is no place for r and s. The second p,
  # which had the last place, then proves to be a copy of the first.
  order = [('p', 0), ('p', 0), ('r', 0), ('s', 0), ('q', 1)]

  def examples(seed):
    for i, (content, label) in enumerate(order):
      yield Example(str(i), label, content.encode)

  source = source_of([4, 1])._replace(examples=examples)
  assert drawn(source, 2, [1])[0] == [['0', '4'], ['2']]


def test_a_copy_with_another_label_is_told():
  source = source_of([1, 1], ['p', 'p'])
  (one, other) = draw(source, 0, [2])
  assert one.first == other.first == (one.example.key, one.example.label)
  assert {one.example.label, other.example.label} == {0, 1}


@pytest.mark.parametrize('seed', range(20))
def test_places_that_copies_give_back_are_filled_before_the_rest(seed):
  contents = [str(i) for i in range(200)]
  source = source_of([100, 101], [*contents, contents[-1]])
  keys, labels = drawn(source, 50, [100, None], seed)
  assert [len(x) for x in keys[:2]] == [50, 100]
  assert collections.Counter(labels) == {0: 25, 1: 25}
  assert len(keys[2]) in (50, 51)
