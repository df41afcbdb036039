"""The Triton sweeps without a GPU: their numbers in the interpreter, and what they compile to.

What this leaves open, only a GPU can show.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="optional: PyTorch brings it for GPUs only")

from triton.backends.compiler import GPUTarget  # noqa: E402

from fgd.errors import UserError  # noqa: E402
from fgd.methods.fgd import sweep, sweep_kernels, sweep_triton  # noqa: E402

from . import plain_sweep  # noqa: E402

ROOT = Path(__file__).parents[4]
CASES = Path(__file__).with_name("sweep_triton_cases.py")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def passed_cases(**environment):
    """How many there are; all have passed, none was skipped."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, **environment}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout + result.stderr
    return int(re.search(r"^(\d+) passed", result.stdout, re.MULTILINE).group(1))


def test_numbers_in_the_interpreter():
    assert passed_cases(TRITON_INTERPRET="1") >= 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_numbers_on_a_gpu():
    assert passed_cases(TRITON_INTERPRET="0") >= 50


def test_asks_for_a_gpu():
    arguments, _ = plain_sweep.inputs(1, 2, 1, 1)
    with pytest.raises(UserError, match="NVIDIA GPU .* on cpu: set .*IMPLEMENTATION to 'torch'"):
        sweep_triton.forward_sweep(*arguments, 0.5)


class Launches:
    """Takes the place of `fgd.methods.fgd.sweep_kernels`: compiles every launch and runs none."""

    BY_CELL, BY_CHANNEL = sweep_kernels.BY_CELL, sweep_kernels.BY_CHANNEL

    def __init__(self):
        self.compiled = {}

    def __getattr__(self, name):
        return Kernel(self.compiled, name)


class Kernel:
    def __init__(self, compiled, name):
        self.compiled, self.name = compiled, name

    def __getitem__(self, grid):
        assert all(isinstance(size, int) and size > 0 for size in grid)
        assert all(size < 2**16 for size in grid[1:])  # CUDA's limit

        def launch(*args, **kwargs):
            kernel = getattr(sweep_kernels, self.name)
            self.compiled[self.name] = kernel.warmup(*args, grid=grid, **kwargs)

        return launch


@pytest.fixture
def compile_sweeps(tmp_path, monkeypatch):
    """Factory: both sweeps of two maps → kernel's name → PTX and the resources that it needs.

    Arguments are bound and specialised as in a launch, for a pretended GPU.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sweep_triton, "_processors", lambda device: 132)
    monkeypatch.setattr(sweep_triton, "usable", lambda student: True)

    def build(student, teacher, arch):
        driver = SimpleNamespace(
            get_current_device=lambda: arch,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
        )
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        launches = Launches()
        monkeypatch.setattr(sweep_triton, "kernels", launches)
        n, channels, height, width = student.shape
        by_image, by_channel = student.new_empty(n), student.new_empty(n, channels)
        by_cell, mask = student.new_empty(n, height * width), student.new_empty(channels)
        slopes = sweep.Slopes(
            *(by_cell, by_channel, by_image, by_channel, by_cell, by_channel),
            *(by_cell, by_cell, by_channel, by_channel, by_image, by_image),
        )
        sweep_triton.forward_sweep(student, teacher, mask, mask, by_cell, by_cell, 0.5)
        sweep_triton.backward_sweep(student, teacher, mask, mask, slopes)
        found = {name: resources(kernel, tmp_path) for name, kernel in launches.compiled.items()}
        print(student.dtype, student.stride(), f"sm_{arch}", found)  # for choosing a tile
        return found, {name: kernel.asm["ptx"] for name, kernel in launches.compiled.items()}

    return build


def resources(kernel, folder):
    """Registers and bytes of stack per thread, bytes of shared memory per program."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.check_output([CUOBJDUMP, "-res-usage", cubin], text=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {"registers": registers, "stack": stack, "shared": kernel.metadata.shared}


def maps(*shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    """Student and teacher without memory: nothing reads them."""
    empty = torch.empty(shape, dtype=dtype, memory_format=memory_format, device="meta")
    return [empty, empty.clone()]


@pytest.mark.parametrize(
    "arch, dtype",
    [(80, torch.float32), (90, torch.float32), (90, torch.float16), (90, torch.bfloat16)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_256_channels_compile_for_gpus(arch, dtype, layout, compile_sweeps):
    """3800 cells: multiples of 16, which Triton looks for by itself, are no harder."""
    found, ptx = compile_sweeps(*maps(2, 256, 50, 76, dtype=dtype, memory_format=layout), arch)
    assert found.keys() == {"forward", "merge", "backward"}
    for name in ("forward", "backward"):
        # Two programs share a multiprocessor: its 64 Ki registers, and the 99 KiB of shared
        # memory that the smallest GPUs of these generations have.
        assert found[name]["registers"] * 32 * sweep_triton._WARPS * 2 <= 2**16
        assert found[name]["shared"] * 2 <= 99 * 1024
        assert found[name]["stack"] <= 512, "spilled registers cost time"
        # A thread reads 16 bytes at a time: the compiler understood how the maps lie in memory.
        loads = re.findall(r"ld\.global\.v4\.b32|ld\.global\.v2\.b64", ptx[name])
        assert len(loads) >= 4


OTHERS = {
    "float64": maps(1, 48, 7, 10, dtype=torch.float64),
    "more channels than a tile holds": maps(2, 2048, 25, 38),
    "odd numbers": maps(3, 300, 7, 11),
    "one cell, one channel": maps(1, 1, 1, 1),
    "different dtypes and layouts": [
        maps(2, 64, 8, 9)[0],
        maps(2, 64, 8, 9, dtype=torch.bfloat16, memory_format=torch.channels_last)[0],
    ],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_maps_compile(name, compile_sweeps):
    """Arguments that are 1 or multiples of 16 are compiled in, so that each is a program apart."""
    student, teacher = OTHERS[name]
    found, _ = compile_sweeps(student, teacher, arch=80)
    assert ("cell_sums" in found) == (student.shape[1] > sweep_triton._MOST_CHANNELS)
    assert all(used["shared"] <= 99 * 1024 for used in found.values())


def test_a_batch_beyond_32_bits_compiles(compile_sweeps):
    """A launch passes strides above 2**31 as another type."""
    student, teacher = maps(40, 256, 3000, 3008)
    assert student.stride(0) > 2**31
    compile_sweeps(student, teacher, arch=90)


@pytest.mark.parametrize("images, channels, cells", [(1, 2, 1), (2, 256, 15200), (16, 300, 221)])
@pytest.mark.parametrize("processors", [1, 132, 10**6])
def test_a_plan_covers_every_cell_once(images, channels, cells, processors):
    plan = sweep_triton._plan(images, channels, cells, processors)
    assert plan.channels * plan.blocks >= channels > plan.channels * (plan.blocks - 1)
    assert plan.run * plan.runs >= cells > plan.run * (plan.runs - 1)
    assert plan.run % plan.cells == 0 and plan.runs <= sweep_triton._MOST_RUNS
    programs = plan.runs * plan.blocks * images
    assert programs <= max(sweep_triton._PROGRAMS_PER_PROCESSOR * processors, plan.blocks * images)
    assert plan.channels & (plan.channels - 1) == plan.cells & (plan.cells - 1) == 0
