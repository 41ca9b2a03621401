"""A network as a graph of ONNX, node by node: explicit padding, every engine's plain operations."""

from __future__ import annotations

import json

import numpy as np

import resnet
from formats.models import Model, way_to


class OnnxGraph:
    """A graph of ONNX under construction; every method returns the name of what it computes.

    Features are `[N, C, H, W]` there.
    """

    def __init__(self):
        import onnx

        self.onnx, self.nodes, self.constants = onnx, [], []

    def constant(self, value, dtype=np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, kind: str, *inputs: str, number: int = 1, **attributes):
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(number)]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if number == 1 else names

    def nchw(self, x: str) -> str:
        return self.add("Transpose", x, perm=[0, 3, 1, 2])

    def nhwc(self, x: str) -> str:
        return self.add("Transpose", x, perm=[0, 2, 3, 1])

    def standardize(self, images: str, size: int) -> str:
        """`cifar100.standardize` of images of a size."""
        x = self.nchw(self.add("Cast", images, to=self.onnx.TensorProto.FLOAT))
        x = self.add("Sub", x, self.add("ReduceMean", x, axes=[2, 3]))
        variance = self.add("ReduceMean", self.add("Mul", x, x), axes=[2, 3])
        deviation = self.add("Sqrt", variance)
        floor = self.constant(1 / size)
        return self.add("Div", x, self.add("Max", deviation, floor))

    def conv(self, x: str, layer, outputs=slice(None), side=0, pads=None) -> str:
        """A `resnet.Conv`, of its listed outputs alone; SAME padding as TensorFlow has it.

        `side` is that of the inputs, where it is no multiple of the stride.
        """
        kernel = np.asarray(layer.kernel)[..., outputs].transpose(3, 2, 0, 1)
        missing = max(kernel.shape[-1] - (side % layer.stride or layer.stride), 0)
        pads = pads or [missing // 2] * 2 + [missing - missing // 2] * 2
        strides = [layer.stride] * 2
        values = [kernel] if layer.bias is None else [kernel, layer.bias[outputs]]
        return self.add("Conv", x, *map(self.constant, values), pads=pads, strides=strides)

    def batch_norm(self, x: str, layer) -> str:
        if layer.folded:
            return x
        values = [self.constant(v) for v in (layer.gamma, layer.beta, layer.mu, layer.sigma)]
        return self.add("BatchNormalization", x, *values, epsilon=resnet.BN_EPSILON)

    def relu(self, x: str) -> str:
        return self.add("Relu", x)

    def max_pool(self, x: str, pads: list[int]) -> str:
        """The largest of each 3x3 places, of every other."""
        return self.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=pads)

    def stem(self, branch, x: str) -> str:
        x = self.conv(x, branch.init_conv)
        return self.max_pool(x, pads=[0, 0, 1, 1]) if branch.config.stem[-1] else x

    def block(self, x: str, block, outputs=None) -> str:
        """A `resnet.Block`; of its `outputs`, a slice of the channels, alone."""
        if not isinstance(block, resnet.Block):
            return block.draw(self, x, outputs)
        h = self.relu(self.batch_norm(x, block.bn_1))
        y = self.relu(self.batch_norm(self.conv(h, block.conv_1), block.bn_2))
        y = self.conv(y, block.conv_2, outputs or slice(None))
        if block.shortcut is not None:
            return self.add("Add", y, self.conv(h, block.shortcut, outputs or slice(None)))
        skipped = h if block.first else x
        return self.add("Add", y, self.part(skipped, outputs) if outputs else skipped)

    def part(self, x: str, channels: slice) -> str:
        ends = [self.constant([value], np.int64) for value in (channels.start, channels.stop, 1)]
        return self.add("Slice", x, *ends)

    def features(self, branch, x: str, outputs=None) -> str:
        if branch.first_level == 1 and branch.config.stem:
            x = self.stem(branch, x)
        for block in branch.blocks:
            x = self.block(x, block, outputs if block is branch.blocks[-1] else None)
        return x

    def fork(self, branch, x: str) -> list[str]:
        sizes = self.constant(branch.fork_sizes, np.int64)
        return self.add("Split", x, sizes, number=branch.num_branches, axis=1)

    def head(self, branch, x: str) -> str:
        if hasattr(branch, "unit_last"):
            x = self.relu(self.batch_norm(x, branch.unit_last.bn))
        x = self.add("Flatten", self.add("GlobalAveragePool", x))
        fc = branch.logits.fc
        return self.add("Gemm", x, self.constant(fc.weights), self.constant(fc.biases))

    def leaf_logits(self, branch, x: str, leaf=None) -> list[str]:
        """As `Branch.leaf_logits`; with `leaf`, its alone, without what only others read."""
        if not branch.num_branches:
            return [self.head(branch, self.features(branch, x))]
        if leaf is None:
            shares = self.fork(branch, self.features(branch, x))
            behind = zip(branch.branches, shares, strict=True)
            return [logits for child, share in behind for logits in self.leaf_logits(child, share)]
        child, channels = way_to(branch, leaf)
        return self.leaf_logits(child, self.features(branch, x, channels), leaf)

    def concat(self, logits: list[str]) -> str:
        return self.add("Concat", *logits, axis=1) if len(logits) > 1 else logits[0]

    def gather(self, logits: str, order: np.ndarray) -> str:
        return self.add("Gather", logits, self.constant(order, np.int64), axis=1)

    def model(self, model: Model):
        """The finished model, its input and outputs named."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        name, dtype, shape = model.inputs
        kind = types.UINT8 if dtype == "uint8" else types.FLOAT
        inputs = [helper.make_tensor_value_info(name, kind, ["N", *shape[1:]])]
        for own, wanted in zip(model.draw(self, name), model.outputs, strict=True):
            self.nodes.append(helper.make_node("Identity", [own], [wanted]))
        outputs = [helper.make_tensor_value_info(n, types.FLOAT, None) for n in model.outputs]
        graph = helper.make_graph(self.nodes, "splitnet", inputs, outputs, self.constants)
        opset = [helper.make_opsetid("", 17)]
        made = helper.make_model(graph, opset_imports=opset, ir_version=8)
        helper.set_model_props(made, {k: json.dumps(v) for k, v in model.metadata.items()})
        return self.onnx.shape_inference.infer_shapes(made)
