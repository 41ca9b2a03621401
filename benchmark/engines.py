"""Inference by engines of other makers, from the files that export.py writes.

Loads no TensorFlow, so that each engine is alone in its process. Images go in as uint8 and logits
come out, as they do in ours (`cases.make_exported`).
"""

from __future__ import annotations

import numpy as np

import cifar100
import rundir
from benchmark import frameworks
from formats import files

# The engine, the format that it reads, its package, what runs it.
ENGINES = {
    "ONNX Runtime": ("onnx", "onnxruntime", files.run_onnx),
    "OpenVINO": ("onnx", "openvino", files.run_openvino),
    "LiteRT": ("litert", "ai_edge_litert", files.run_litert),
}


def random_images(batch_size: int) -> np.ndarray:
    """Images uint8 `[B, H, W, 3]`, the same every time."""
    shape = (batch_size, cifar100.IMAGE_SIZE, cifar100.IMAGE_SIZE, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def make_engine(engine: str, path: str, batch_size: int, calls: int):
    """`calls` batches by an engine."""
    run, images = ENGINES[engine][2](path), random_images(batch_size)

    def step():
        for _ in range(calls):
            run(images)

    return step, {}


def make_torch(k: float, batch_size: int, calls: int):
    """`calls` batches of the dense network in PyTorch, eager, of images standardized before."""
    import torch

    torch.set_num_threads(rundir.num_cores())
    device = "cpu"
    of = frameworks.config(k)
    net = frameworks.torch_network(of, device).eval()
    images, _ = frameworks.torch_images(of, batch_size, device)

    def step():
        with torch.inference_mode():
            for _ in range(calls):
                net(images).cpu()

    return step, {}
