"""Train the digits classifier and write it as ONNX, with the accuracy on images it never saw.

Deterministic: one seed fixes the split, the weights and the order of the images. About ten seconds.
"""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).parent
MODEL = HERE.parent / "models" / "digits" / "1" / "model.onnx"
SEED = 1998
HELD_OUT = 600
LAYERS = (64, 256, 128, 10)
EPOCHS = 300
BATCH = 64
BRIGHTEST = 16.0
MOVED = 0.3
"""Share of the training images that are moved, each time they are shown."""
NOISE = 1.5

Array = NDArray[np.float32]
Labels = NDArray[np.int64]
Layer = tuple[Array, Array]


def load() -> tuple[Array, Labels]:
    """All images, as float32 [n, 64] from 0 to 16, and their digits."""
    with gzip.open(HERE / "digits.csv.gz", "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.int64)
    return table[:, :64].astype(np.float32), table[:, 64]


def varied(images: Array, rng: np.random.Generator) -> Array:
    """The same digits, written a little differently: some moved by a pixel, all a little noisy."""
    padded = np.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    rows, columns = np.where(
        rng.random((len(images), 1, 1)) < MOVED, rng.integers(0, 3, (2, len(images), 1, 1)), 1
    )
    pixel = np.arange(8)
    image = np.arange(len(images))[:, None, None]
    moved = padded[image, rows + pixel[:, None], columns + pixel[None, :]].reshape(-1, 64)
    noisy: Array = moved + rng.normal(0, NOISE, moved.shape).astype(np.float32)
    return noisy


def forward(layers: list[Layer], images: Array) -> list[Array]:
    """The activations of every layer, input first, logits last."""
    activations = [images / np.float32(BRIGHTEST)]
    for index, (weights, bias) in enumerate(layers):
        out = activations[-1] @ weights + bias
        activations.append(out if index == len(layers) - 1 else np.maximum(out, 0))
    return activations


def gradients(layers: list[Layer], images: Array, labels: Labels) -> list[Layer]:
    """Of the mean cross-entropy, by backpropagation."""
    activations = forward(layers, images)
    logits = activations[-1] - activations[-1].max(axis=1, keepdims=True)
    delta = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    delta[np.arange(len(labels)), labels] -= 1
    delta /= len(labels)
    found: list[Layer] = []
    for (weights, _), inputs in zip(reversed(layers), reversed(activations[:-1]), strict=True):
        found.append((inputs.T @ delta, delta.sum(axis=0)))
        delta = (delta @ weights.T) * (inputs > 0)
    return found[::-1]


def train(images: Array, labels: Labels, rng: np.random.Generator) -> list[Layer]:
    """Adam with a step that falls to zero along a cosine."""
    layers: list[Layer] = [
        (
            rng.normal(0, np.sqrt(2 / fan_in), (fan_in, fan_out)).astype(np.float32),
            np.zeros(fan_out, np.float32),
        )
        for fan_in, fan_out in itertools.pairwise(LAYERS)
    ]
    flat = [array for layer in layers for array in layer]
    mean, square = ([np.zeros_like(array) for array in flat] for _ in range(2))
    steps = EPOCHS * -(-len(images) // BATCH)
    step = 0
    for _ in range(EPOCHS):
        order = rng.permutation(len(images))
        for start in range(0, len(images), BATCH):
            chosen = order[start : start + BATCH]
            step += 1
            rate = 1e-3 * (1 + np.cos(np.pi * step / steps))
            found = gradients(layers, varied(images[chosen], rng), labels[chosen])
            for i, gradient in enumerate(array for layer in found for array in layer):
                mean[i] += 0.1 * (gradient - mean[i])
                square[i] += 0.001 * (gradient**2 - square[i])
                scale = np.sqrt(square[i] / (1 - 0.999**step)) + 1e-8
                flat[i] -= (rate * mean[i] / (1 - 0.9**step) / scale).astype(np.float32)
    return layers


def to_onnx(layers: list[Layer]) -> onnx.ModelProto:
    """The network as `image` [n, 64] -> `label` [n, 1], `probabilities` [n, 10]."""
    weights = [numpy_helper.from_array(np.float32(BRIGHTEST), "brightest")]
    nodes = [helper.make_node("Div", ["image", "brightest"], ["x0"])]
    for i, (matrix, bias) in enumerate(layers):
        weights += [
            numpy_helper.from_array(matrix, f"w{i}"),
            numpy_helper.from_array(bias, f"b{i}"),
        ]
        nodes.append(helper.make_node("Gemm", [f"x{i}", f"w{i}", f"b{i}"], [f"y{i}"]))
        if i < len(layers) - 1:
            nodes.append(helper.make_node("Relu", [f"y{i}"], [f"x{i + 1}"]))
    logits = f"y{len(layers) - 1}"
    nodes.append(helper.make_node("Softmax", [logits], ["probabilities"], axis=1))
    nodes.append(helper.make_node("ArgMax", [logits], ["label"], axis=1, keepdims=1))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 64])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n", 1]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 10]),
        ],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    rng = np.random.default_rng(SEED)
    images, labels = load()
    order = rng.permutation(len(images))
    held_out, known = np.sort(order[:HELD_OUT]), order[HELD_OUT:]
    layers = train(images[known], labels[known], rng)
    answers = forward(layers, images[held_out])[-1].argmax(axis=1)
    accuracy = float((answers == labels[held_out]).mean())
    MODEL.write_bytes(to_onnx(layers).SerializeToString())
    split = {"held_out": held_out.tolist(), "accuracy": round(accuracy, 4)}
    (HERE / "split.json").write_text(json.dumps(split) + "\n")
    print(f"{accuracy:.2%} of {HELD_OUT} held-out images")


if __name__ == "__main__":
    main()
