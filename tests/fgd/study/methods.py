"""Methods that exist for the length of a test."""

from contextlib import contextmanager

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
