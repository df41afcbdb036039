"""Who may import what: readers and clients of a graph need no torch, fgd needs no deploy."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FGD, DEPLOY = ROOT / "projects" / "FGD" / "fgd", ROOT / "deploy"
TRAINING = {"torch", "torchvision", "detectron2", "fvcore", "fgd", "timm"}
ENGINES = {"onnxruntime", "openvino"}
STDLIB_ONLY = TRAINING | ENGINES | {"numpy", "PIL", "onnx", "pycocotools"}
FORBIDDEN = {
    "fgd_inputs.coco": TRAINING | {"onnx", "onnxruntime", "deploy"},
    "fgd_inputs.image_files": TRAINING | {"onnx", "onnxruntime", "deploy"},
    "fgd_inputs.image_contents": STDLIB_ONLY | {"deploy"},
    "fgd_inputs.names": STDLIB_ONLY | {"deploy"},
    "fgd_inputs.folder_lock": STDLIB_ONLY | {"deploy"},
    "deploy.errors": STDLIB_ONLY,
    "deploy.spec": STDLIB_ONLY,
    "deploy.files": STDLIB_ONLY,
    "deploy.serving.journal": STDLIB_ONLY,
    "deploy.serving.progress": STDLIB_ONLY,
    "deploy.serving.coco_results": STDLIB_ONLY,
    "deploy.serving.preprocess": TRAINING | {"onnx", "onnxruntime", "pycocotools"},
    "deploy.serving.detector": TRAINING | {"onnx", "onnxruntime", "pycocotools"},
    "deploy.client": TRAINING | {"onnx", "onnxruntime", "pycocotools", "tritonclient"},
    "deploy.triton_repository": TRAINING | {"onnx", "pycocotools"},
    "deploy.serving.paste": TRAINING | {"PIL", "onnx", "onnxruntime", "pycocotools"},
    "deploy.serving.draw": TRAINING | {"onnx", "onnxruntime", "pycocotools"},
    "deploy.runtime": TRAINING | ENGINES | {"onnx", "pycocotools"},  # imported when a graph is
    "deploy.serving.ort_session": TRAINING | {"onnx", "openvino", "pycocotools"},
    "deploy.serving.openvino_session": TRAINING
    | {"onnx", "onnxruntime", "pycocotools", "openvino_telemetry"},
    "deploy.predict": TRAINING | ENGINES | {"onnx", "pycocotools"},
    "deploy.evaluate": TRAINING | ENGINES | {"onnx"},
    "deploy.label": TRAINING | ENGINES | {"onnx"},
    "deploy.benchmark": TRAINING | ENGINES,
    "deploy.trt_lint": TRAINING | {"onnxruntime"},
}


@pytest.mark.parametrize("module", FORBIDDEN)
def test_importing_in_a_fresh_process_stays_light(module):
    """In a new interpreter, so that imports made by other tests do not count."""
    code = f"import sys, {module}; print(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    assert module.split(".")[0] in loaded
    assert FORBIDDEN[module] & set(loaded) == set()


def imported_packages(path):
    """Top-level names of every import statement in a file, nested ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_fgd_never_imports_deploy():
    files = sorted((ROOT / "projects" / "FGD").rglob("*.py"))
    assert files
    assert [path.name for path in files if "deploy" in set(imported_packages(path))] == []


def test_deploy_never_imports_tests_or_tools():
    for path in sorted(DEPLOY.rglob("*.py")):
        assert not {"tests", "tools"} & set(imported_packages(path)), path


def test_no_deploy_file_hides_a_module_that_others_import():
    """`python deploy/export.py` puts deploy/ first on the path of imports."""
    hidden = (
        TRAINING
        | STDLIB_ONLY
        | set(sys.stdlib_module_names)
        | {"onnxscript", "hypothesis", "triton"}
    )
    names = {path.stem for path in DEPLOY.iterdir() if path.name != "__pycache__"}
    assert "runtime" in names and names & hidden == set()


ORDER = "each imports only those before it"


def order_of_rooms(root):
    """The folders from the ground up, as fgd/__init__.py and docs/layout.md state them."""
    text = ast.get_docstring(ast.parse((FGD / "__init__.py").read_text()))
    if root == DEPLOY:
        text = (ROOT / "docs" / "layout.md").read_text()
    assert ORDER in text
    return re.findall(r"\w+", text.split(ORDER)[1].split("):")[1].split(".")[0])


def imported_modules(path, root=FGD):
    """Dotted names below the package of everything that a file imports from it, nested imports
    included."""
    package, inside = path.relative_to(root).parent.parts, f"{root.name}."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [x.name for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (root.name, *package)[: len(package) + 2 - node.level] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else ())))
            names = [f"{module}.{x.name}" for x in node.names]
        else:
            continue
        yield from (name.removeprefix(inside) for name in names if name.startswith(inside))


def imports_by_file(root):
    """Every module of a package -> the modules of it that its file imports."""
    files = {".".join(x.relative_to(root).with_suffix("").parts): x for x in root.rglob("*.py")}
    found = {}
    for module, path in files.items():
        names = set(imported_modules(path, root))
        names |= {name.rpartition(".")[0] for name in names}  # of a function in a module
        names |= {f"{name}.__init__" for name in names}
        found[module] = names & files.keys()
    return found


def reached(module, imports, known):
    """All modules that a module imports, and these import, and so on; into `known`."""
    for name in imports[module] - known:
        known.add(name)
        reached(name, imports, known)
    return known


@pytest.mark.parametrize("root", [FGD, DEPLOY], ids=lambda root: root.name)
def test_no_import_runs_back_up(root):
    """Each folder imports lower ones, be it through files that lie beside the folders."""
    order, imports, count = order_of_rooms(root), imports_by_file(root), 0
    assert sorted(order) == sorted(x.name for x in root.iterdir() if (x / "__init__.py").exists())
    for module in imports:
        room = module.split(".")[0]
        for name in reached(module, imports, set()) if room in order else ():
            target = name.split(".")[0]
            assert target not in ("cli", "job", "__init__"), (module, name)
            if target in order:
                assert order.index(target) <= order.index(room), (module, name)
                count += target != room
    assert count > 50, "vacuous: the imports were not found"


def test_no_files_of_deploy_import_each_other():
    imports = imports_by_file(DEPLOY)
    assert [x for x in imports if x in reached(x, imports, set())] == []


def test_what_lies_beside_the_folders_imports_none_of_them():
    for path in FGD.glob("*.py"):
        if path.stem not in ("__init__", "cli", "job"):
            rooms = {name.split(".")[0] for name in imported_modules(path)} & set(
                order_of_rooms(FGD)
            )
            assert not rooms, path


def test_nothing_knows_a_method_by_name():
    """But its own file or folder, and what exists for it: FGD's bench of its loss."""
    own = {FGD / "__init__.py", *(FGD / "bench").glob("*.py")}
    for path in sorted(FGD.rglob("*.py")):
        if "methods" in path.parts or path in own:
            continue
        for name in imported_modules(path):
            assert not re.match(r"methods\.(?!method|batch)", name), (path, name)


def test_every_package_is_installed():
    text = (ROOT / "setup.cfg").read_text()
    listed = re.search(r"^packages =\n((?:    .*\n)+)", text, re.MULTILINE)[1].split()
    places = (FGD.parent, "fgd_inputs"), (FGD.parent, "fgd"), (ROOT, "deploy")
    found = [
        ".".join(path.parent.relative_to(root).parts)
        for root, name in places
        for path in (root / name).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(found)
