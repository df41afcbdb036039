"""What tests of commands need."""

import logging

import pytest
from detectron2.utils.logger import setup_logger


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
