"""Methods that exist for the length of a test."""

import importlib
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from fgd.methods import METHOD_REGISTRY, Method

DOCS = Path(__file__).parents[3] / "docs" / "methods.md"


@contextmanager
def method(name, needs=("teacher", "maps")):
    """A registered class of that name with one term; its configs, read inside, have its node."""
    made = type(name, (Method,), {"terms": ("distance",), "needs": frozenset(needs)})
    METHOD_REGISTRY.register(made)
    try:
        yield made
    finally:
        METHOD_REGISTRY._obj_map.pop(name)


@contextmanager
def toy_installed(site):
    """The method of docs/methods.md, from a package in this folder, for this process and its
    children.
    """
    (code,) = re.findall(r"```python\n(.*?class Toy.*?)```", DOCS.read_text(), re.DOTALL)
    (site / "toy_method.py").write_text(code)
    info = site / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fgd.methods]\ntoy = toy_method\n")
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.syspath_prepend(str(site))
        yield importlib.import_module("toy_method").Toy
    METHOD_REGISTRY._obj_map.pop("Toy")
    sys.modules.pop("toy_method")
