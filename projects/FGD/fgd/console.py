"""What a command says on the console, which a user reads, and what in OUTPUT_DIR/log.txt alone.

Detectron2 logs environment, config and model, some 650 lines, before it logs a first step.
"""

import logging
import re
import sys

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

FILE_ONLY = {"file_only": True}  # of our own records: logger.info(text, extra=FILE_ONLY)
NAMES = ("fgd", "fvcore", "detectron2")
_FORMAT = logging.Formatter("[%(asctime)s %(name)s]: %(message)s", datefmt="%m/%d %H:%M:%S")
_LEVELLED = logging.Formatter(f"%(levelname)s {_FORMAT._fmt}", datefmt=_FORMAT.datefmt)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Detectron2's: what each set has, which ours say too, and how it is held in memory.
_DATA = ("detectron2.data", "d2.data")


class ForConsole(logging.Filter):
    """Passes warnings, and information that is not for the file alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno > logging.INFO:
            return True
        setting = record.name in ("detectron2", "detectron2.engine.defaults")
        details = setting and "Evaluation results" not in record.getMessage()
        return not (hasattr(record, "file_only") or details or record.name.startswith(_DATA))


class WithoutColour(logging.Filter):
    """Takes the colours out of the config as Detectron2 logs it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _COLOUR.sub("", record.getMessage()), None
        return True


class Plain(logging.Formatter):
    """Detectron2's console format without its colours."""

    def format(self, record: logging.LogRecord) -> str:
        return (_LEVELLED if record.levelno > logging.INFO else _FORMAT).format(record)


def set_up_loggers(folder: str) -> None:
    """Log to ``folder``/log.txt and, in the main process, to the console; colours on a terminal.

    Detectron2's own set-up then finds its loggers as they are.
    """
    for name in NAMES:
        # The words must be Detectron2's, which remembers by them what is set up already.
        words = {} if name == "detectron2" else {"name": name}
        logger = setup_logger(folder, distributed_rank=comm.get_rank(), **words)
        if name == "detectron2":
            logger.addFilter(WithoutColour())
        for handler in logger.handlers:
            if handler.stream is sys.stdout:  # the other writes the file
                handler.addFilter(ForConsole())
                if not sys.stdout.isatty():
                    handler.setFormatter(Plain())
