"""The trained teacher, once per session, and what tests of the command need."""

import logging
import shutil

import pytest
import torch
from detectron2.utils.logger import setup_logger

from .clinic import train_teacher


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A teacher that finds the rectangles; do not write to it."""
    return train_teacher(tmp_path_factory.mktemp("clinic"))


@pytest.fixture
def teacher(teacher_file, tmp_path):
    """A copy, its content and its path, for tests to spoil."""
    path = tmp_path / "teacher.pth"
    shutil.copy(teacher_file, path)
    return torch.load(path, weights_only=True), path


@pytest.fixture
def forget_loggers():
    """Detectron2 sets loggers up once per process, on the stdout of that moment."""
    yield
    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "fgd"):
        logger = logging.getLogger(name)
        logger.propagate = True
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
