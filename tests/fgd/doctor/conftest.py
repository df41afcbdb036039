"""The trained teacher, once per session."""

import shutil

import pytest
import torch

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
