"""Accuracies of the same configurations, quantized by others and by us.

  python -m benchmarks.peers --workload=mobilenet_v2 --data=TRAIN \
    --validation=VALIDATION

prints top-1 accuracies on the same validation images, with the same weights,
the same calibration images and the same quantized operands: the weight and the
input of every convolution and dense layer, with the first and the last. Batch
norms are not folded, which changes no range of weights that have one for each
channel.

`torch` is PyTorch's fake quantization with a `HistogramObserver` for inputs and
a `PerChannelMinMaxObserver` for weights. `qwix` is Qwix's static quantization
by its `PtqProvider`, after a pass of its `QtProvider`. Weights are symmetric
with a range for each channel. Ranges of inputs go from the mean minimum to the
mean maximum of an image; at widths other than 4 and 8, for which Qwix has no
zero points, they are symmetric. Weight and input of a convolution must have the
same width.
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import qwix
import torch
import tqdm
from absl import flags

from benchmarks import measure, torch_quantization
from experiments import flags as shared
from experiments.launch import launch
from nemo_jax import pipeline, workloads
from nemo_jax.config import Config
from nemo_jax.core.types import Array, InputError
from nemo_jax.models import weights
from nemo_jax.quantization.numerics import widths as widths_lib
from nemo_jax.quantization.trace.operations import Operation
from nemo_jax.tasks import objectives, scoring
from nemo_jax.workloads import _pretrained

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(shared)

Widths = dict[str, tuple[int, int]]  # of weight and input, by layer
Logits = Callable[[np.ndarray], Array]  # of uint8 images
# From widths, or None for float, to a network; None if a peer cannot do it.
Peer = Callable[[Widths | None], Logits | None]

CONFIGURATIONS = {
  'float': 'float',
  '8': 'W8A8',
  '6': 'W6A6',
  '4': 'W4A4',
  'w4a8': 'W4A8; W8A8 in the first and last layer',
  'mixed': 'W5A5; W8A8 in depthwise layers, the first and the last',
}


def widths_of(word: str, layers: Sequence[Operation]) -> Widths | None:
  """Widths of a key of CONFIGURATIONS; None for float."""
  if word == 'float':
    return None
  if word.isdecimal():
    return {layer.name: (int(word), int(word)) for layer in layers}
  wide = {layers[0].name, layers[-1].name}
  if word == 'mixed':
    wide |= {layer.name for layer in layers if layer.kind == 'depthwise'}
  rest = (5, 5) if word == 'mixed' else (4, 8)
  return {x.name: (8, 8) if x.name in wide else rest for x in layers}


def bits_of(
  widths: Widths | None, layers: Sequence[Operation], quantizers
) -> np.ndarray:
  """int32[N]: widths by quantizer; layers with a shared input agree on it."""
  bits = widths_lib.float_bits(len(quantizers))
  if widths is not None:
    for layer in layers:
      source, weight = layer.operands
      bits[weight], bits[source] = widths[layer.name]
  return bits


def batches(images: np.ndarray, name: str):
  """Yields batches of normalised calibration images, with a progress bar."""
  starts = range(0, len(images), FLAGS.batch)
  for start in tqdm.tqdm(starts, f'{name}: calibration', disable=None):
    yield _pretrained.normalise(images[start : start + FLAGS.batch])


def torch_peer(workload: workloads.Workload) -> Peer:
  """Peer with PyTorch's observers and fake quantization."""
  path = FLAGS.weights
  if not path:
    path = weights.download(measure.recipe(workload.name).url, FLAGS.cache)
  tensors = {k: torch.from_numpy(x) for k, x in weights.read(path).items()}
  plain = torch_quantization.NETWORKS[workload.name]().eval()
  # Some files lack the counters of batches, which are not used here.
  missing, extra = plain.load_state_dict(tensors, strict=False)
  missing = [n for n in missing if not n.endswith('num_batches_tracked')]
  if missing or extra:
    raise InputError(f'{path} does not fit: {", ".join([*missing, *extra])}')
  plain = plain.to(memory_format=torch.channels_last)
  model = torch_quantization.fake_quantized(copy.deepcopy(plain))
  as_tensor = lambda images: torch.tensor(np.asarray(images)).permute(
    0, 3, 1, 2
  )
  parts = batches(workload.calibration.images, 'torch')
  torch_quantization.calibrate(model, map(as_tensor, parts))
  layers = torch_quantization.layers(model)

  def configured(widths):
    if widths is not None:
      assert set(widths) == set(layers)
      for name, pair in widths.items():
        layers[name].set_bits(*pair)
    chosen = plain if widths is None else model

    @torch.inference_mode()
    def logits(images):
      return chosen(as_tensor(_pretrained.normalise(images))).numpy()

    return logits

  return configured


def qwix_rule(width: int, method: str, layer: str = '.*'):
  """Rule for weight and input at one width, with static ranges."""
  return qwix.QuantizationRule(
    module_path=layer,
    weight_qtype=f'int{width}',
    act_qtype=f'int{width}',
    act_static_scale=True,
    act_calibration_method=method,
  )


def qwix_statistics(module, params, images: np.ndarray, method: str) -> dict:
  """Qwix's statistics of every layer's input, for a method of ranges."""
  provider = qwix.QtProvider([qwix_rule(8, method)])
  model = qwix.quantize_model(module, provider)

  @jax.jit
  def observe(params, seen, images):
    def run(params):
      variables = {'params': params, **seen}
      return model.apply(variables, images, mutable=['quant_stats'])

    # Inside a derivative, as in training: in a plain call Qwix's functions with
    # custom derivatives would leak tracers.
    return jax.vjp(run, params, has_aux=True)[2]

  shapes = jax.eval_shape(
    observe, params, {}, _pretrained.normalise(images[:1])
  )
  seen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  for part in batches(images, f'qwix, {method}'):
    seen = observe(params, seen, part)
  return seen['quant_stats']


def in_float(operation):
  """A product of Qwix's arrays in float, since CPUs have no 4-bit products."""

  def product(left, right, *arguments, **others):
    left, right = qwix.dequantize(left), qwix.dequantize(right)
    return operation(left, right, *arguments, **others)

  return product


def qwix_peer(workload: workloads.Workload) -> Peer:
  """Peer with Qwix, on the Flax module."""
  module = measure.recipe(workload.name).model
  params = jax.tree.map(jnp.asarray, workload.variables['params'])
  images = workload.calibration.images
  # Qwix has zero points for these widths only.
  method = lambda width: 'minmax' if width in (4, 8) else 'absmax'
  statistics = functools.cache(
    functools.partial(qwix_statistics, module, params, images)
  )

  def configured(widths):
    if widths is None:
      run = jax.jit(lambda images: module.apply({'params': params}, images))
      return lambda images: run(_pretrained.normalise(images))
    if any(weight != source for weight, source in widths.values()):
      return None
    methods = {name: method(width) for name, (width, _) in widths.items()}
    rules = [
      qwix_rule(width, methods[name], re.escape(name))
      for name, (width, _) in widths.items()
    ]
    provider = qwix.PtqProvider(
      rules,
      _conv_general_dilated_fn=in_float(jax.lax.conv_general_dilated),
      _dot_general_fn=in_float(jax.lax.dot_general),
    )
    model = qwix.quantize_model(module, provider)
    sample = _pretrained.normalise(images[:1])
    shapes = jax.eval_shape(model.init, jax.random.key(0), sample)
    assert not provider.get_unused_rules()
    seen = {name: statistics(methods[name])[name] for name in widths}
    held = qwix.quantize_params(params, shapes['params'], seen)
    run = jax.jit(lambda held, images: model.apply({'params': held}, images))
    return lambda images: run(held, _pretrained.normalise(images))

  return configured


PEERS = {'torch': torch_peer, 'qwix': qwix_peer}
flags.DEFINE_list('peers', list(PEERS), f'of {", ".join(PEERS)}')
flags.DEFINE_list(
  'configurations',
  list(CONFIGURATIONS),
  'rows of the table: '
  + '; '.join(f'{word} is {what}' for word, what in CONFIGURATIONS.items()),
)
for flag, known in {'peers': PEERS, 'configurations': CONFIGURATIONS}.items():
  flags.register_validator(
    flag,
    lambda words, known=known: words and set(words) <= set(known),
    f'the choices are {", ".join(known)}',
  )
flags.DEFINE_integer('batch', 32, 'images that peers are run on at once', 1)


def top1(logits: Logits | None, images, labels, name: str) -> float | None:
  """Top-1 accuracy, counted as in `scoring`; None if there are no logits."""
  if logits is None:
    return None
  right, count = 0, len(images)
  with tqdm.tqdm(total=count, desc=name, unit='image', disable=None) as bar:
    for start in range(0, count, FLAGS.batch):
      # The last batch is filled with copies, so that all have one program.
      rows = np.minimum(np.arange(start, start + FLAGS.batch), count - 1)
      found = jnp.asarray(logits(images[rows]))
      hits = objectives.in_top_k(found, jnp.asarray(labels[rows]), 1)
      hits = np.asarray(hits)[: count - start]
      right += int(hits.sum())
      bar.update(len(hits))
  return right / count


def own_top1(
  workload: workloads.Workload, bits: np.ndarray, config: Config
) -> list[float]:
  """Top-1 accuracies of this project's quantization."""
  quantized = pipeline.quantize_network(workload, config, shared.cache())
  scores = scoring.accuracy(
    quantized,
    workload.variables,
    *workload.test,
    bits,
    images_at_once=pipeline.images_at_once(quantized.structure, config),
  )
  return scores[:, 0].tolist()


def table(columns: dict[str, list[float | None]]) -> str:
  """Markdown of accuracies in per cent, with a row for each configuration."""
  lines = [f'| | {" | ".join(columns)} |', f'|{"---|" * (len(columns) + 1)}']
  cell = lambda share: '-' if share is None else f'{100 * share:.2f}'
  for i, word in enumerate(FLAGS.configurations):
    cells = [cell(shares[i]) for shares in columns.values()]
    lines.append(f'| {CONFIGURATIONS[word]} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def run() -> None:
  """Measures and prints the table."""
  if FLAGS.workload not in torch_quantization.NETWORKS:
    known = ', '.join(torch_quantization.NETWORKS)
    raise InputError(f'--workload is {FLAGS.workload}; the choices are {known}')
  if FLAGS.extra_ops:
    raise InputError('the peers do not quantize --extra_ops; leave them out')
  config = shared.config()
  structure = shared.inspect_network()
  layers = structure.operations
  configurations = {w: widths_of(w, layers) for w in FLAGS.configurations}
  workload = shared.load_workload(search_images=0)
  columns = {}
  for name in FLAGS.peers:
    peer = PEERS[name](workload)
    columns[name] = [
      top1(peer(widths), *workload.test, f'{name}, {word}')
      for word, widths in configurations.items()
    ]
  bits = [
    bits_of(widths, layers, structure.quantizers)
    for widths in configurations.values()
  ]
  plain = dataclasses.replace(config, reconstruct=())
  columns['ours, ranges alone'] = own_top1(workload, np.stack(bits), plain)
  if config.reconstruct:
    columns['ours'] = own_top1(workload, np.stack(bits), config)
  print(
    f'{workload.name}: top-1 accuracy in % on {len(workload.test.labels)} '
    f'images; PyTorch {torch.__version__}, Qwix {qwix.__version__}'
  )
  print(table(columns))


if __name__ == '__main__':
  launch(run)
