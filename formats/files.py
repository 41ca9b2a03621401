"""Formats: how a model is written, and run again by the format's own engine."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable

import numpy as np

import rundir
import utils
from formats.models import Model
from utils import tf

# The package that writes a format and the one that runs it; TensorFlow does what has none.
ENGINES = {
    "savedmodel": (),
    "onnx": ("onnx", "onnxruntime"),
    "litert": ("ai_edge_litert",),
}
PACKAGES = {"ai_edge_litert": "ai-edge-litert"}  # where pip has another name
METADATA = "metadata.json"  # in a SavedModel's assets.extra, and in the zip at a LiteRT file's end


def write_savedmodel(model: Model, path: str) -> None:
    """A folder that `tf.saved_model.load` and TensorFlow Serving take."""
    module, call = tf.Module(), model.concrete()
    module.call = call
    tf.saved_model.save(module, path, signatures={"serving_default": call})
    os.makedirs(os.path.join(path, "assets.extra"), exist_ok=True)
    utils.write_json(os.path.join(path, "assets.extra", METADATA), model.metadata)


def run_savedmodel(path: str) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    # It holds constants only, and what reads variables takes `[` in a path for a pattern.
    options = tf.saved_model.LoadOptions(experimental_skip_checkpoint=True)
    loaded = tf.saved_model.load(path, options=options)

    def run(x):
        signature = loaded.signatures["serving_default"]  # which does not keep what it is of
        [name] = signature.structured_input_signature[1]
        return {n: value.numpy() for n, value in signature(**{name: tf.constant(x)}).items()}

    return run


def write_onnx(model: Model, path: str) -> None:
    """A file for ONNX Runtime, OpenVINO and others."""
    import onnx

    from formats.onnx_graph import OnnxGraph

    made = OnnxGraph().model(model)
    onnx.checker.check_model(made)
    with utils.writing(path), open(path, "wb") as file:
        file.write(made.SerializeToString())


def run_onnx(path: str) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = rundir.num_cores()  # else one for each physical core
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(x):
        values = session.run(names, {session.get_inputs()[0].name: x})
        return dict(zip(names, values, strict=True))

    return run


def write_litert(model: Model, path: str, int8: bool = False) -> None:
    """A file for LiteRT; its metadata is in a zip at the end, which the engine passes over."""
    module = tf.Module()
    call = model.concrete()
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [call.get_concrete_function()], module
    )
    if int8:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    content = converter.convert()
    with utils.writing(path):
        with open(path, "wb") as file:
            file.write(content)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(METADATA, json.dumps(model.metadata, indent=1))


def run_litert(path: str) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=rundir.num_cores())  # else one
    signature = interpreter.get_signature_runner()
    [name] = signature.get_input_details()
    return lambda x: signature(**{name: x})


def run_openvino(path: str) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """As `run_onnx`: OpenVINO reads files of ONNX too."""
    import openvino

    # By itself it computes in bfloat16 where the processor has AMX.
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(x):
        return {output.any_name: value for output, value in compiled(x).items()}

    return run


WRITERS = {"savedmodel": write_savedmodel, "onnx": write_onnx, "litert": write_litert}
RUNNERS = {"savedmodel": run_savedmodel, "onnx": run_onnx, "litert": run_litert}
