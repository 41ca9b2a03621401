"""Largest relative differences of `resnet.Conv` from float64, as JSON: tests/test_surroundings.py.

A process of its own, as oneDNN reads its instruction set once, and a kernel that writes beyond its
memory may end it.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import utils  # noqa: E402, F401, it loads TensorFlow
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import resnet  # noqa: E402

SHAPES = [(size, stride) for size in (1, 3) for stride in (1, 2)]
# Known to have gone wrong with a strided 1x1 kernel: batch, resolution, inputs, outputs.
KNOWN = [(30, 32, 4, 13), (23, 16, 6, 5), (45, 16, 6, 38), (83, 16, 5, 8), (64, 16, 6, 15)]
RANDOM = 12


def difference(size, stride, batch, resolution, inputs, outputs, rng) -> dict[str, float]:
    """Of the output, the gradient of the input and that of the kernel."""
    layer = resnet.Conv("conv", size, range(inputs), range(outputs), resolution, stride)
    x = rng.normal(size=(batch, resolution, resolution, inputs)).astype(np.float32)
    side = -(-resolution // stride)
    dy = rng.normal(size=(batch, side, side, outputs)).astype(np.float32)

    def both(convolve, x, kernel, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = convolve(x)
        return [y, *tape.gradient(y, [x, kernel], output_gradients=dy)]

    ours = both(lambda x: layer(x)[..., :outputs], tf.constant(x), layer.kernel, dy)
    kernel = tf.Variable(tf.cast(layer.kernel, tf.float64))

    def exact(x):
        return tf.nn.conv2d(x, kernel, stride, "SAME")

    theirs = both(exact, tf.constant(x, tf.float64), kernel, dy.astype(np.float64))
    name = f"{size}x{size}/{stride} batch {batch}, {resolution} pixels, {inputs} to {outputs}"
    return {
        f"{name}: {part}": float(np.abs(a - b.numpy()).max() / np.abs(b.numpy()).max())
        for part, a, b in zip(("y", "dx", "dw"), (t.numpy() for t in ours), theirs, strict=True)
    }


def main() -> None:
    rng, found = np.random.default_rng(0), {}
    for size, stride in SHAPES:
        drawn = [
            (rng.integers(1, 101), rng.choice([8, 16, 32]), *rng.integers(1, 41, 2))
            for _ in range(RANDOM)
        ]
        for case in KNOWN + drawn:
            found |= difference(size, stride, *map(int, case), rng)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
