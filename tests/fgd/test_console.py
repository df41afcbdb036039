"""What reaches the console of a run, and what log.txt."""

import logging
import re

from fgd.console import FILE_ONLY, set_up_loggers


def test_details_are_in_the_file_alone(tmp_path, capsys):
    set_up_loggers(str(tmp_path))
    logging.getLogger("fgd.x").info("a figure")
    logging.getLogger("fgd.x").info("details", extra=FILE_ONLY)
    logging.getLogger("fgd.x").warning("a warning", extra=FILE_ONLY)
    logging.getLogger("detectron2").info("\x1b[38;5;28mconfig\x1b[39m %s", "100%")
    logging.getLogger("detectron2.engine.defaults").info("Model:\nRetinaNet")
    logging.getLogger("detectron2.engine.defaults").info("Evaluation results for x in csv format:")
    logging.getLogger("detectron2.data.build").info("Distribution")
    logging.getLogger("detectron2.data.build").warning("no boxes")
    logging.getLogger("detectron2.engine.train_loop").info("Starting")
    console, log = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    lines = [re.sub(r"\[\S+ \S+ ", "[", line) for line in console.splitlines()]
    assert lines == [
        "[fgd.x]: a figure",
        "WARNING [fgd.x]: a warning",
        "[detectron2.engine.defaults]: Evaluation results for x in csv format:",
        "WARNING [detectron2.data.build]: no boxes",
        "[detectron2.engine.train_loop]: Starting",
    ]
    for text in ("details", "config 100%", "Model:\nRetinaNet", "Distribution", "a figure"):
        assert text in log
    assert "\x1b" not in console + log


def test_a_terminal_has_detectron2s_colours(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    set_up_loggers(str(tmp_path))
    found = [type(x.formatter).__name__ for x in logging.getLogger("fgd").handlers]
    assert found == ["_ColorfulFormatter", "Formatter"]  # the file's has none
