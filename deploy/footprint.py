"""Load time and peak memory of a detector, in a process of its own."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Dict, Optional, Sequence

import numpy as np

from deploy.preprocess import prepare
from deploy.runtime import OrtDetector
from deploy.spec import ModelSpec
from deploy.timing import peak_memory


def measure_alone(
    model,
    checkpoint,
    spec: ModelSpec,
    provider: str,
    threads: int,
    images: Sequence[np.ndarray],
) -> Dict[str, Optional[float]]:
    """Load a detector in a new process and run it once on all images as one batch.

    Args:
        checkpoint: this student in PyTorch; None measures the graph `model`.
    Returns:
        "load_seconds" without importing libraries; "peak_mib" of the whole process and
        "libraries_mib", its peak before anything was loaded (both None outside Linux).
    """
    arguments = (str(model), checkpoint, spec, provider, threads, list(images))
    # spawned, not forked: a fork would start with our memory and with PyTorch's locks
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_load_and_run, *arguments).result()


def _load_and_run(model, checkpoint, spec, provider, threads, images):
    if checkpoint:
        import deploy.eager  # noqa: F401  what it takes to import is not part of loading
    libraries, start = peak_memory(), time.perf_counter()
    if checkpoint:
        eager = load_eager(checkpoint, spec, provider, threads)
        seconds = time.perf_counter() - start
        eager.run(eager.as_inputs([prepare(image, spec) for image in images]))
    else:
        detector = OrtDetector(model, [provider], threads)
        seconds = time.perf_counter() - start
        detector.detect(images, len(images))
    peak = peak_memory()
    return {
        "load_seconds": seconds,
        "peak_mib": peak and peak / 2**20,
        "libraries_mib": libraries and libraries / 2**20,
    }


def load_eager(checkpoint, spec: ModelSpec, provider: str, threads: int):
    """The student in PyTorch (deploy.eager.EagerDetector), on the provider's device.

    Raises:
        UserError: no checkpoint of ours, or no CUDA device for a CUDA provider.
    """
    import torch

    from deploy.eager import EagerDetector

    torch.set_num_threads(threads)
    device = "cpu" if provider.lower().startswith("cpu") else "cuda"
    return EagerDetector(checkpoint, spec.score_threshold, device)
