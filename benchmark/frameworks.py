"""The same networks in plain Keras, and the Wide ResNet in plain PyTorch, as their users would
write them.

`python -m benchmark --peer` times a training step of these against ours. Each `..._step` returns
`step()`, which makes one update on a fixed random batch and waits for it: cross entropy plus
weight decay, SGD with momentum 0.9. PyTorch is optional (tested: torch 2.13, CPU).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import networks
import rundir
from utils import surroundings

LEARNING_RATE, MOMENTUM, L2_WEIGHT = 0.1, 0.9, 1e-4


def config(k: float, network: str = "wrn", **settings) -> networks.Config:
    """The network that is timed, not split."""
    return networks.config_class(network)(k=k, **settings)


def random_batch(batch_size: int, of: networks.Config) -> tuple[np.ndarray, np.ndarray]:
    """Standardized images float32 `[B, H, W, 3]` for a network and labels int32 `[B]`, the same
    every time."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, of.image_size, of.image_size, 3)).astype(np.float32)
    return images, rng.integers(0, of.num_classes, batch_size).astype(np.int32)


def keras_model(of: networks.Config, precision: str):
    """`keras.layers` and `model.compile`."""
    with surroundings():  # with oneDNN, as ours; Keras on TensorFlow
        import keras
        from keras import layers

    dtype = "float32" if precision == "float32" else f"mixed_{precision}"
    keras.config.set_dtype_policy(dtype)
    decay = keras.regularizers.L2(L2_WEIGHT / 2)  # Keras's L2 lacks the factor of 1/2

    def conv(x, filters, size, stride=1, **settings):
        settings = {"padding": "same", "use_bias": False} | settings
        return layers.Conv2D(filters, size, stride, kernel_regularizer=decay, **settings)(x)

    def bn_relu(x):
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))

    def block(x, filters, stride, first):
        h = bn_relu(x)
        y = conv(bn_relu(conv(h, filters, 3, stride)), filters, 3)
        if first and (stride > 1 or x.shape[-1] != filters):
            return y + conv(h, filters, 1, stride)
        return y + (h if first else x)

    def residual(x):
        """The Wide ResNet and ResNet-18: a stem, stages of two blocks."""
        size, stride, pools = of.stem
        x = conv(x, of.features(0), size, stride)
        if pools:
            x = layers.MaxPooling2D(3, 2, padding="same")(x)
        for level in range(1, len(of.levels)):
            x = block(x, of.features(level), 1 if level == 1 else 2, first=True)
            x = block(x, of.features(level), 1, first=False)
        return layers.GlobalAveragePooling2D()(bn_relu(x))

    def alexnet(x):
        def layer(x, level, size, stride=1, **settings):
            x = conv(x, of.features(level), size, stride, use_bias=True, **settings)
            return layers.ReLU()(x)

        def pool(x):
            return layers.MaxPooling2D(3, 2)(x)

        x = pool(layer(x, 1, 11, 4))
        x = pool(layer(x, 2, 5))
        x = pool(layer(layer(layer(x, 3, 3), 4, 3), 5, 3))
        x = layers.Flatten()(x)
        for level in (6, 7):
            x = layers.Dropout(1 - of.fc_keep_prob)(x)
            x = layers.Dense(of.features(level), "relu", kernel_regularizer=decay)(x)
        return x

    inputs = keras.Input([of.image_size, of.image_size, 3])
    x = (alexnet if of.network == "alexnet" else residual)(inputs)
    outputs = layers.Dense(of.num_classes, dtype="float32", kernel_regularizer=decay)(x)
    model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.SGD(LEARNING_RATE, MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def keras_step(of: networks.Config, batch_size: int, precision: str) -> Callable[[], None]:
    """A step of training: `train_on_batch`."""
    model = keras_model(of, precision)
    images, labels = random_batch(batch_size, of)

    def step():
        model.train_on_batch(images, labels)

    return step


def torch_network(of: networks.Config, device: str):
    """A Wide ResNet of `torch.nn` in channels_last."""
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

    blocks, inputs = [], of.features(0)
    for level in (1, 2, 3):
        filters = of.features(level)
        blocks += [Block(inputs, filters, 1 if level == 1 else 2, True)]
        blocks += [Block(filters, filters, 1, False)]
        inputs = filters
    return nn.Sequential(
        nn.Conv2d(3, of.features(0), 3, padding=1, bias=False),
        *blocks,
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, of.num_classes),
    ).to(device, memory_format=channels_last)


def torch_images(of: networks.Config, batch_size: int, device: str):
    """The images and labels of `random_batch`, in channels_last."""
    import torch

    images, labels = random_batch(batch_size, of)
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last)
    return images.to(device), torch.from_numpy(labels).long().to(device)


def torch_device() -> str:
    """cuda where there is one; on a CPU all cores that this process may use."""
    import torch

    torch.set_num_threads(rundir.num_cores())
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_step(of: networks.Config, batch_size: int, precision: str) -> Callable[[], None]:
    """A step of training, eager, autocast where the precision is bfloat16."""
    import torch
    from torch.nn import functional as F

    device = torch_device()
    net = torch_network(of, device)
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=L2_WEIGHT)
    images, labels = torch_images(of, batch_size, device)

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


def make(
    name: str, k: float, precision: str, batch_size: int, of: dict | None = None
) -> tuple[Callable[[], None], dict]:
    """The step of a framework, and nothing to tell, for `timing.TimedProcess`.

    `of` is what tells another network than the WRN, or other images: `config`.
    """
    return STEPS[name](config(k, **of or {}), batch_size, precision), {}
