"""Methods that exist for the length of a test."""

import importlib
import os
import sys
from contextlib import contextmanager

import pytest

from fgd.methods import METHOD_REGISTRY, Method


@contextmanager
def method(name, needs=("teacher", "maps")):
    """A registered class of that name with one term; its configs, read inside, have its node."""
    made = type(name, (Method,), {"terms": ("distance",), "needs": frozenset(needs)})
    METHOD_REGISTRY.register(made)
    try:
        yield made
    finally:
        METHOD_REGISTRY._obj_map.pop(name)


CODE = """
from fgd.methods import METHOD_REGISTRY, Method


@METHOD_REGISTRY.register()
class Planted(Method):
    terms = ("distance",)

    def forward(self, batch):
        pairs = {k: (batch.student[k], batch.teacher[k]) for k in batch.student}
        return {k: self.weigh({"distance": (s - t).abs().mean()}) for k, (s, t) in pairs.items()}
"""


@contextmanager
def installed(site):
    """The method `Planted` in a package of its own, for this process and its children."""
    (site / "planted_method.py").write_text(CODE)
    info = site / "planted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fgd.methods]\nplanted = planted_method\n")
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.syspath_prepend(str(site))
        importlib.import_module("planted_method")
        yield
    METHOD_REGISTRY._obj_map.pop("Planted")
    sys.modules.pop("planted_method")
