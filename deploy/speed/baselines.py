"""What a graph is compared with: the same student in PyTorch, run in three ways, and traced.

Imports PyTorch and Detectron2.
"""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision  # noqa: F401  registers the operators that a traced file names
from detectron2.export import TracingAdapter

from deploy.eager import EagerDetector
from deploy.errors import UserError
from deploy.files import write_atomically
from deploy.serving.preprocess import prepare
from deploy.spec import ModelSpec
from deploy.speed.bench_rows import COMPILE, LEGACY, SCRIPT, Runner

_LEGACY_OPSET = 16  # the first with RoiAlign's half-pixel mode


class EagerRunner(Runner):
    """Detectron2's own inference: resized pixels to Instances on the CPU."""

    def __init__(self, eager: EagerDetector, spec: ModelSpec):
        self.eager, self.spec = eager, spec

    def call(self, images):
        inputs = self.eager.as_inputs([prepare(image, self.spec) for image in images])
        return lambda: self.eager.run(inputs)

    def count(self, result):
        return sum(len(instances) for instances in result)


class ScriptRunner(Runner):
    """What `torch.jit.trace` made of Detectron2's tracing adapter, for one image."""

    max_batch = 1

    def __init__(self, path, spec: ModelSpec, device: str):
        self.spec, self.device = spec, device
        self.model = torch.jit.load(str(path), map_location=device)

    def call(self, images):
        (inputs,) = EagerDetector.as_inputs([prepare(images[0], self.spec)])

        def run():
            with torch.no_grad():
                return [output.to("cpu") for output in self.model(inputs["image"].to(self.device))]

        return run

    def count(self, result):
        return len(result[0])


def load_baseline(kind: str, path, spec: ModelSpec, provider: str, threads: int) -> Runner:
    """An `EAGER`, `COMPILE` or `SCRIPT` contender. Compiling itself is left to the first call.

    Raises:
        UserError: no checkpoint of ours, or no CUDA device for a CUDA provider.
    """
    torch.set_num_threads(threads)
    device = _device(provider)
    if kind == SCRIPT:
        return ScriptRunner(path, spec, device)
    eager = EagerDetector(path, spec.score_threshold, device, spec.proposals)
    if eager.classes != spec.classes:
        raise UserError(f"{path} has classes {eager.classes}, the graph has {spec.classes}")
    if kind == COMPILE:
        eager.model = torch.compile(eager.model)
    return EagerRunner(eager, spec)


def trace(kind: str, checkpoint, spec: ModelSpec, image: np.ndarray, folder, provider: str) -> Path:
    """Trace a checkpoint for one image as Detectron2's tools/deploy/export_model.py does.

    Args:
        kind: `SCRIPT` or `LEGACY`.  image: (H, W, 3) uint8 BGR; its resized size is baked in.
    Returns:
        The file written into `folder`, model.ts or legacy.onnx.
    Raises:
        UserError: no checkpoint of ours. Whatever the tracer raises passes through.
    """
    # loaded for this alone: the older exporter leaves the model in training mode
    eager = EagerDetector(checkpoint, spec.score_threshold, _device(provider), spec.proposals)
    inputs = eager.as_inputs([prepare(image, spec)])
    whole = hasattr(eager.model, "roi_heads")
    adapter = TracingAdapter(eager.model, inputs, _without_pasting if whole else None).eval()
    content, pixels = io.BytesIO(), (inputs[0]["image"],)
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of both tracers, about branches that they bake in
        if kind == LEGACY:
            torch.onnx.export(adapter, pixels, content, opset_version=_LEGACY_OPSET, dynamo=False)
        else:
            torch.jit.save(torch.jit.trace(adapter, pixels), content)
    path = Path(folder) / {SCRIPT: "model.ts", LEGACY: "legacy.onnx"}[kind]
    write_atomically(path, content.getvalue())
    return path


def _without_pasting(model, inputs):
    """Inference up to masks over their boxes, as Detectron2 traces R-CNN."""
    return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]


def _device(provider: str) -> str:
    return "cpu" if provider.lower().startswith("cpu") else "cuda"
