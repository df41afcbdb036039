"""Build a wheel named ``detectron2`` 0.6 from the source archive on the package index.

The archive's ``detectron2/`` folder is byte-identical to upstream's tag v0.6 without the C++
sources. It is fetched from whatever index pip is configured with, checked against its hash and
patched; the result is pure Python. Users with a Detectron2 of their own do not need this folder.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # PEP 517 builds do not put it there
from patches import apply_patches  # noqa: E402

ARCHIVE = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
SOURCE = HERE / "build" / "source"


def fetch(folder: Path) -> Path:
    """Download the archive into ``folder``; RuntimeError if it is not the one we know."""
    command = [sys.executable, "-m", "unearth", ARCHIVE, "--no-binary", "--download", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tar.gz")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise RuntimeError(f"{archive.name}: SHA-256 is {digest}, expected {SHA256}")
    return archive


def unpack() -> None:
    """Put the patched ``detectron2`` package under SOURCE, from scratch."""
    shutil.rmtree(SOURCE.parent, ignore_errors=True)
    download = SOURCE.parent / "download"
    download.mkdir(parents=True)
    with tarfile.open(fetch(download)) as archive:
        top = archive.getnames()[0].split("/")[0]
        wanted = [m for m in archive.getmembers() if m.name.startswith(f"{top}/detectron2/")]
        archive.extractall(download, members=wanted, filter="data")
    apply_patches(download / top / "detectron2")
    SOURCE.mkdir()
    shutil.move(download / top / "detectron2", SOURCE)
    shutil.copy(HERE / "_C.py", SOURCE / "detectron2" / "_C.py")


unpack()
setup(
    name="detectron2",
    version="0.6",
    description="Detectron2 v0.6, pure Python, patched to run with current libraries",
    url="https://github.com/facebookresearch/detectron2",
    license="Apache-2.0",
    python_requires=">=3.9",
    packages=find_packages(str(SOURCE)),
    package_dir={"": str(SOURCE.relative_to(HERE))},
    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]},
    install_requires=[
        "torch",
        "torchvision",
        "numpy",
        "Pillow>=12.2",
        "matplotlib",
        "pycocotools>=2.0.2",
        "termcolor>=1.1",
        "yacs>=0.1.8",
        "tabulate",
        "cloudpickle",
        "tqdm>4.29.0",
        "tensorboard",
        "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.7,<0.1.10",
        "omegaconf>=2.1",
        "hydra-core>=1.1",
    ],
)
