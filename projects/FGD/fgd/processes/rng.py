"""State of all random number generators as plain tensors and numbers, and scoped seeding."""

import random
from contextlib import contextmanager

import numpy as np
import torch


def get_state() -> dict:
    """States of python, numpy, torch and, if in use, the current CUDA device.

    Holds only tensors and numbers: a checkpoint with numpy arrays in it cannot be loaded with
    ``weights_only=True``.
    """
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached_gauss = np.random.get_state()
    state = {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached_gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_state(state: dict) -> None:
    """Restore what `get_state` returned. A CUDA state is ignored on a machine without CUDA."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    keys, position, has_gauss, cached_gauss = state["numpy"]
    np.random.set_state(
        ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached_gauss)
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved():
    """Whatever is drawn inside leaves the generators as they were before."""
    state = get_state()
    try:
        yield
    finally:
        set_state(state)


@contextmanager
def seeded(*key: int):
    """Inside, python, numpy and torch (CPU) draw from a seed made of ``key`` (integers >= 0).

    Outside, nothing has changed. Different keys give independent streams.
    """
    state = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])  # 32 bit, all that numpy takes
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which would also reseed the GPUs.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
