"""Commands of the README and of docs/: each option exists, each file that they name is there."""

import re
import shlex
from pathlib import Path

import pytest

from deploy import (
    benchmark,
    evaluate,
    export,
    label,
    matrix,
    predict,
    triton_repository,
    trt_lint,
    verify,
)
from fgd import cli
from fgd.adversarial import __main__ as adversarial
from fgd.bench import __main__ as bench
from fgd.start import __main__ as start
from fgd.study import __main__ as study
from fgd.visualize import __main__ as visualize
from tools import versions

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
PARSERS = {
    "train_net.py": cli.build_parser,
    "python -m fgd.adversarial": adversarial.build_parser,
    "python -m fgd.start": start.build_parser,
    "python -m fgd.study": study.build_parser,
    "python -m fgd.visualize": visualize.build_parser,
    "python -m fgd.bench": bench.build_parser,
    "python deploy/export.py": export.build_parser,
    "python deploy/verify.py": verify.build_parser,
    "python -m deploy.matrix": matrix.build_parser,
    "python -m deploy.trt_lint": trt_lint.build_parser,
    "python deploy/predict.py": predict.build_parser,
    "python deploy/evaluate.py": evaluate.build_parser,
    "python deploy/label.py": label.build_parser,
    "python deploy/benchmark.py": benchmark.build_parser,
    "python deploy/triton_repository.py": triton_repository.build_parser,
    "python -m tools.versions": versions.build_parser,
}


def commands():
    """Every command line of the pages' bash blocks, continuation lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield " ".join(shlex.split(line, comments=True))


COMMANDS = list(commands())
RECIPE = [command for command in COMMANDS if command.startswith(("python3 -m venv", "pip"))]


def test_the_recipe_for_main_is_the_one_that_is_tested():
    """By `make test-main`, which adds what tests need and is told where Detectron2 is."""
    text = (ROOT / "Makefile").read_text()
    (rule,) = re.findall(r"^\$\(MAIN_INSTALLED\):.*?^\ttouch", text, re.MULTILINE | re.DOTALL)
    rule = rule.replace("$(IN_MAIN) ", "").replace(" -q", "").replace(",dev", "")
    rule = rule.replace(" --clear $(MAIN)", " .venv")
    address = "git+https://github.com/facebookresearch/detectron2"
    rule = re.sub(r"'\$\(or .*\)'", address, rule)
    lines = [" ".join(shlex.split(line)) for line in rule.splitlines() if line.startswith("\tp")]
    assert lines == RECIPE and len(lines) == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_parses(command):
    if command in RECIPE:
        return
    if command.startswith(("make ", "source ")):
        target = command.split()[1]
        makefile = (ROOT / "Makefile").read_text()
        assert f"\n{target}:" in makefile or target == ".venv/bin/activate"
        return
    (name,) = [name for name in PARSERS if command.startswith(name + " ")]
    words = command[len(name) :].split()
    args = vars(PARSERS[name]().parse_args(words))
    for key in ("config_file", "teacher"):
        if args.get(key):
            assert (ROOT / args[key]).is_file()


def test_every_tool_is_shown():
    for name in PARSERS:
        assert any(command.startswith(name) for command in COMMANDS), name


def test_the_files_it_lists_exist_and_none_is_left_out():
    text = "\n".join(PAGES.values())
    listed = set(re.findall(r"^\| `([\w./{}-]+\.(?:py|yaml))` \|", text, re.MULTILINE))
    assert listed, "no layout table"
    missing = [name for name in listed if not (ROOT / name).is_file()]
    assert not missing
    packages = [ROOT / "deploy", ROOT / "projects" / "FGD" / "fgd", ROOT / "tools"]
    files = [path for folder in packages for path in folder.rglob("[!_]*.py")]
    assert {str(path.relative_to(ROOT)) for path in files} - listed == set()


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), (page, target)
