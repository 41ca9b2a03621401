"""The same Wide ResNet in plain Keras and in plain PyTorch, as their users would write it.

`python -m benchmark --peer` times a training step of these against ours. Each `..._step` returns
`step()`, which makes one update on a fixed random batch and waits for it: cross entropy plus
weight decay, SGD with momentum 0.9. PyTorch is optional (tested: torch 2.13, CPU).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import rundir
from cifar100 import IMAGE_SIZE, NUM_CLASSES
from utils import surroundings

LEARNING_RATE, MOMENTUM, L2_WEIGHT = 0.1, 0.9, 1e-4


def random_batch(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Standardized images float32 `[B, H, W, 3]` and labels int32 `[B]`, the same every time."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
    return images, rng.integers(0, NUM_CLASSES, batch_size).astype(np.int32)


def keras_step(k: float, batch_size: int, precision: str) -> Callable[[], None]:
    """`keras.layers`, `model.compile`, `train_on_batch`: WRN-16-k."""
    with surroundings():  # with oneDNN, as ours; Keras on TensorFlow
        import keras
        from keras import layers

    dtype = "float32" if precision == "float32" else f"mixed_{precision}"
    keras.config.set_dtype_policy(dtype)
    decay = keras.regularizers.L2(L2_WEIGHT / 2)  # Keras's L2 lacks the factor of 1/2

    def conv(x, filters, size, stride=1):
        return layers.Conv2D(
            filters, size, stride, padding="same", use_bias=False, kernel_regularizer=decay
        )(x)

    def bn_relu(x):
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))

    def block(x, filters, stride, first):
        h = bn_relu(x)
        y = conv(bn_relu(conv(h, filters, 3, stride)), filters, 3)
        if first and (stride > 1 or x.shape[-1] != filters):
            return y + conv(h, filters, 1, stride)
        return y + (h if first else x)

    inputs = keras.Input([IMAGE_SIZE, IMAGE_SIZE, 3])
    x = conv(inputs, 16, 3)
    for stage in range(3):
        x = block(x, int(16 * k) * 2**stage, 2 if stage else 1, first=True)
        x = block(x, int(16 * k) * 2**stage, 1, first=False)
    x = layers.GlobalAveragePooling2D()(bn_relu(x))
    outputs = layers.Dense(NUM_CLASSES, dtype="float32", kernel_regularizer=decay)(x)
    model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.SGD(LEARNING_RATE, MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    images, labels = random_batch(batch_size)

    def step():
        model.train_on_batch(images, labels)

    return step


def torch_network(k: float, device: str):
    """WRN-16-k of `torch.nn` in channels_last."""
    from torch import channels_last, nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self, inputs, filters, stride, first):
            super().__init__()
            self.first = first
            self.bn_1, self.bn_2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(filters)
            self.conv_1 = nn.Conv2d(inputs, filters, 3, stride, padding=1, bias=False)
            self.conv_2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
            self.shortcut = None
            if first and (stride > 1 or inputs != filters):
                self.shortcut = nn.Conv2d(inputs, filters, 1, stride, bias=False)

        def forward(self, x):
            h = F.relu(self.bn_1(x))
            y = self.conv_2(F.relu(self.bn_2(self.conv_1(h))))
            if self.shortcut is not None:
                return y + self.shortcut(h)
            return y + (h if self.first else x)

    blocks, inputs = [], 16
    for stage in range(3):
        filters = int(16 * k) * 2**stage
        blocks += [Block(inputs, filters, 2 if stage else 1, True)]
        blocks += [Block(filters, filters, 1, False)]
        inputs = filters
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        *blocks,
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, NUM_CLASSES),
    ).to(device, memory_format=channels_last)


def torch_images(batch_size: int, device: str):
    """The images and labels of `random_batch`, in channels_last."""
    import torch

    images, labels = random_batch(batch_size)
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last)
    return images.to(device), torch.from_numpy(labels).long().to(device)


def torch_device() -> str:
    """cuda where there is one; on a CPU all cores that this process may use."""
    import torch

    torch.set_num_threads(rundir.num_cores())
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_step(k: float, batch_size: int, precision: str) -> Callable[[], None]:
    """A step of training, eager, autocast where the precision is bfloat16."""
    import torch
    from torch.nn import functional as F

    device = torch_device()
    net = torch_network(k, device)
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=L2_WEIGHT)
    images, labels = torch_images(batch_size, device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = net(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


STEPS = {"keras": keras_step, "torch": torch_step}


def make(name: str, k: float, precision: str, batch_size: int) -> tuple[Callable[[], None], dict]:
    """The step of a framework, and nothing to tell, for `timing.TimedProcess`."""
    return STEPS[name](k, batch_size, precision), {}
