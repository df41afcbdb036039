"""A checkout of Detectron2 in the layout of upstream main, made of an installed v0.6.

    python tools/checkout.py output/checkout

for `make test-main` where upstream's source cannot be had. Like main's, its setup.py imports torch,
compiles an extension and installs a package named tools as well; configs/ is at the top, and the
package links to it; model_zoo imports pkg_resources. The extension has no operations.
"""

import argparse
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Sequence

ZOO = Path("model_zoo") / "model_zoo.py"
# What third_party/detectron2 gives v0.6's model_zoo in place of what main still has.
MENDED = {
    "from importlib import resources\n": "import pkg_resources\n",
    'str(resources.files("detectron2.model_zoo").joinpath("configs", config_path))': (
        'pkg_resources.resource_filename("detectron2.model_zoo", f"configs/{config_path}")'
    ),
}
SETUP = """\
import os
from pathlib import Path

import torch  # as main's does: it cannot be built in isolation
from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

HERE = Path(__file__).resolve().parent
LINK = HERE / "detectron2" / "model_zoo" / "configs"
if not LINK.exists():
    os.symlink(HERE / "configs", LINK)
assert torch.__version__ >= "1.8"
setup(
    name="detectron2",
    version="0.6",
    packages=find_packages(),
    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]},
    install_requires=[
        "Pillow>=7.1",
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
    ext_modules=[CppExtension("detectron2._compiled", ["detectron2/layers/csrc/vision.cpp"])],
    cmdclass={"build_ext": BuildExtension},
)
"""
# In C, as torch/extension.h alone takes a minute to compile.
SOURCE = """\
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_compiled"};
PyMODINIT_FUNC PyInit__compiled() { return PyModule_Create(&module); }
"""


def make_checkout(package: Path, checkout: Path) -> None:
    """Make a checkout of an installed ``detectron2`` folder.

    Raises:
        ValueError: that is not the one of third_party/detectron2, or there is a checkout.
    """
    if checkout.exists():
        raise ValueError(f"{checkout}: is there already; remove it, or name another folder")
    text = (package / ZOO).read_text()
    for mended, original in MENDED.items():
        if text.count(mended) != 1:
            raise ValueError(f"{package}: is not third_party/detectron2's; {ZOO} lacks {mended!r}")
        text = text.replace(mended, original)
    copy = checkout / "detectron2"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.move(copy / "model_zoo" / "configs", checkout / "configs")
    (copy / ZOO).write_text(text)
    csrc = copy / "layers" / "csrc"
    csrc.mkdir(parents=True, exist_ok=True)
    (csrc / "vision.cpp").write_text(SOURCE)
    (checkout / "tools").mkdir()
    (checkout / "tools" / "__init__.py").touch()
    (checkout / "setup.py").write_text(SETUP)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/checkout.py", description=__doc__)
    parser.add_argument("checkout", type=Path, help="folder to make")
    checkout = parser.parse_args(argv).checkout
    try:
        make_checkout(Path(find_spec("detectron2").origin).parent, checkout)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{checkout}: Detectron2 v0.6 in the layout of main")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
