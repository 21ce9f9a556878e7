"""The layout: who may import whom, what commands offer, what no file may hold."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = ("common", "pretrain", "detection", "pipeline", "tools", "benchmarks")
CODE = (*PROGRAM, "tests")
TEXT_SUFFIXES = {".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".html", ".css", ".js", ".j2", ""}
MAX_LINES = 700
# A test module mirrors one module: it grows with the cases of that module, and splitting it would
# hide which cases are covered. It is read case by case, not as a whole.
MAX_TEST_LINES = 900
MAX_SHARED_CLASS_NAMES = 5
FORBIDDEN = {  # folder -> what no file in it imports, at any place in the file
    "common": ("pretrain", "detection", "pipeline", "tools", "benchmarks", "detectron2"),
    "pretrain": ("detection", "pipeline", "tools", "benchmarks", "detectron2"),
    "detection": ("pretrain", "pipeline", "tools", "benchmarks"),
    # An evaluation computes from records, and reads only files that it wrote in canonical form.
    "detection/evaluation": (
        *("common.annotations.formats", "common.annotations.record.read_set", "common.files"),
        *("json", "xml", "detection.training"),
    ),
    "pipeline": ("pretrain", "detection", "tools", "benchmarks", "detectron2", "torch"),
    "tools": ("benchmarks", "tests", "detectron2"),
    "benchmarks": ("tests",),  # detectron2 through detection.compat, which a test below checks
    "pretrain/engine": ("pretrain.evaluation",),
    "pretrain/model": ("pretrain.engine",),
    "pretrain/objectives": ("pretrain.engine",),
    "pretrain/features": ("pretrain.engine",),
}
SLOW_TO_IMPORT = {"torch", "torchvision", "cv2", "detectron2", "matplotlib", "scipy"}


def sources(*folders: str, suffix: str = ".py") -> list[Path]:
    """Files below `folders`, as paths relative to the repository."""
    found = (path for folder in folders for path in (ROOT / folder).rglob(f"*{suffix}"))
    return sorted(path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


@functools.cache
def imported_names(path: Path) -> list[tuple[int, str]]:
    """Line and full module name of every import in a file, in functions too."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@functools.cache
def import_graph() -> dict[Path, set[Path]]:
    """File of the program -> files of the program that it imports."""
    modules = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources(*PROGRAM)
    }
    graph: dict[Path, set[Path]] = {path: set() for path in modules.values()}
    for path in graph:
        for _, name in imported_names(path):
            while name and name not in modules:  # the last part may be a name in the module
                name = name.rpartition(".")[0]
            if name and modules[name] != path:
                graph[path].add(modules[name])
    return graph


def circle_in(graph: dict[Path, set[Path]]) -> str:
    """One circle, as "a -> b -> a"; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(map(str, reversed(error.args[1])))
    return ""


def test_no_circle_of_files() -> None:
    assert circle_in(import_graph()) == ""


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_circle_of_folders(depth: int) -> None:
    """Folders deeper than `depth` count as part of the one at that depth.

    A folder and the folder it lies in may import each other: pretrain/engine reads
    pretrain/config.py, and pretrain/__main__.py starts pretrain/engine.
    """
    graph: dict[Path, set[Path]] = defaultdict(set)
    for path, targets in import_graph().items():
        start = Path(*path.parent.parts[:depth])
        for target in targets:
            end = Path(*target.parent.parts[:depth])
            if not start.is_relative_to(end) and not end.is_relative_to(start):
                graph[start].add(end)
    assert circle_in(graph) == ""


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_forbidden_imports(folder: str) -> None:
    found = [
        f"{path}:{line} imports {name}"
        for path in sources(folder)
        for line, name in imported_names(path)
        if any(f"{name}.".startswith(f"{forbidden}.") for forbidden in FORBIDDEN[folder])
    ]
    assert found == []


def test_few_class_names_are_used_twice() -> None:
    places = defaultdict(list)
    for path in sources(*PROGRAM):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path))
    shared = {name: files for name, files in places.items() if len(files) > 1}
    listed = "\n".join(f"{name}: {', '.join(files)}" for name, files in sorted(shared.items()))
    assert len(shared) <= MAX_SHARED_CLASS_NAMES, listed
    assert places["UserError"] == ["common/errors.py"]


def test_package_files_hold_at_most_a_docstring() -> None:
    for path in sources(*CODE):
        if path.name == "__init__.py":
            tree = tree_of(path)
            assert len(tree.body) == (ast.get_docstring(tree) is not None), path


def test_no_program_changes_where_modules_are_found() -> None:
    """The project is installed (editable), so nothing has to be added to sys.path."""
    found = [str(path) for path in sources(*PROGRAM) if "sys.path" in (ROOT / path).read_text()]
    assert found == []


WALK = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(" ".join(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_pipeline_does_not_load_torch_or_detectron2() -> None:
    """Through another package neither; what it imports itself is forbidden above."""
    command = [sys.executable, "-c", WALK, "pipeline"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {"torch", "detectron2"}.isdisjoint(done.stdout.split())


def test_common_needs_torch_for_checkpoints_and_networks_only() -> None:
    """And common/lazy.py imports it on first use."""
    found = {
        str(path)
        for path in sources("common")
        for _, name in imported_names(path)
        if name.split(".")[0] in ("torch", "torchvision")
    }
    # lazy.py names them for type checkers only.
    names = ("backbone", "checkpoints", "network", "pickles", "startup")
    reading = {f"common/{name}.py" for name in names}
    assert found == {*reading, "common/lazy.py"}


def test_detection_enters_detectron2_through_compat() -> None:
    """A module that imports detectron2 imports detection.compat first."""
    for path in sources("detection", "benchmarks"):
        names = list(imported_names(path))
        lines = [line for line, name in names if name.split(".")[0] == "detectron2"]
        compat = [line for line, name in names if name.startswith("detection.compat")]
        assert not [name for _, name in names if "model_zoo" in name], "needs old setuptools"
        if lines and path.name != "compat.py":
            assert compat, f"{path} imports detectron2 without detection.compat"
            assert min(compat) < min(lines), f"{path} imports detectron2 before detection.compat"


PROGRAMS = [
    path
    for path in (*sources("tools"), *sources("benchmarks"))
    if len(path.parts) == 2 and '__name__ == "__main__"' in (ROOT / path).read_text()
]


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_program_explains_itself_with_an_example(program, capsys):
    module = importlib.import_module(".".join(program.with_suffix("").parts))
    with pytest.raises(SystemExit, match=r"^0$"):
        module.main(["--help"])
    assert "example" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("script", sources("tools", ".ci", suffix=".sh"), ids=str)
def test_shell_script_is_sound_and_explains_itself(script: Path) -> None:
    text = (ROOT / script).read_text()
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0
    assert not re.search(r"^\s*eval\b", text, re.MULTILINE), "eval runs what it is given"
    assert "set -euo pipefail" in text
    command = ["bash", str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout.lower()


HELP = """
import importlib, os, sys
module, function, sys.argv = sys.argv[1], sys.argv[2], [sys.argv[3], "--help"]
try:
    status = getattr(importlib.import_module(module), function)()
except SystemExit as stop:
    status = stop.code
print(*sorted({name.split(".")[0] for name in sys.modules} | {*os.environ}), file=sys.stderr)
sys.exit(status)
"""


# Name, module and function of the console commands.
COMMANDS = re.findall(r'"(fa-[a-z-]+) = ([\w.]+):(\w+)"', (ROOT / "setup.py").read_text())


@pytest.mark.parametrize(("name", "module", "function"), COMMANDS)
def test_console_command_helps_without_slow_imports(name: str, module: str, function: str) -> None:
    command = [sys.executable, "-c", HELP, module, function, name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert SLOW_TO_IMPORT.isdisjoint(done.stderr.split())
    if name in ("fa-pretrain", "fa-train-voc"):
        assert "MALLOC_TOP_PAD_" in done.stderr.split(), "see common/memory.py"


def test_no_file_is_too_long() -> None:
    files = [*sources(*CODE), *sources("tools", "benchmarks", suffix=".sh")]
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in files}
    limits = {path: MAX_TEST_LINES if path.parts[0] == "tests" else MAX_LINES for path in files}
    assert {str(path): n for path, n in lengths.items() if n > limits[path]} == {}


def test_no_file_names_a_place_on_one_machine() -> None:
    """Neither home folders nor folders of one workplace; example paths like /media are fine."""
    place = re.compile(r"(?<![\w.}])/(?:home|Users|root|work|workspace|mnt/[a-z]+disk)/\w")
    folders = (*CODE, "configs", "docs", ".ci")
    files = [path for path in sources(*folders, suffix="") if path.suffix in TEXT_SUFFIXES]
    files += [path.relative_to(ROOT) for path in ROOT.iterdir() if path.suffix in TEXT_SUFFIXES]
    files = [path for path in files if path.name != ".git"]  # a file in a worktree of git
    found = [
        f"{path}: {match.group()}"
        for path in files
        if (ROOT / path).is_file() and path.name != "test_architecture.py"
        for match in place.finditer((ROOT / path).read_text())
    ]
    assert found == []
