"""The layout keeps its promises: who imports whom, what scripts offer, what no file may hold."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("common", "pretrain", "detection", "pipeline", "tools", "benchmarks", "tests")
TEXT_SUFFIXES = {".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".html", ".css", ".js", ".j2", ""}
MAX_LINES = 700
# A test module mirrors one module: it grows with the cases of that module, and splitting it would
# hide which cases are covered. It is read case by case, not as a whole.
MAX_TEST_LINES = 900


def sources(*folders: str, suffix: str = ".py") -> list[Path]:
    """Files below `folders`, as paths relative to the repository."""
    found = (path for folder in folders for path in (ROOT / folder).rglob(f"*{suffix}"))
    return sorted(path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts)


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full module name of every import in a file."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def house(name: str) -> str:
    """The first part of a module name."""
    return name.split(".")[0]


WALK = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(" ".join(sorted({name.split(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize(
    ("package", "strangers"),
    [
        ("common", {"pretrain", "detection", "detectron2", "tools", "pipeline", "benchmarks"}),
        ("pretrain", {"detection", "detectron2", "pipeline", "tools"}),
        ("detection", {"pretrain", "pipeline", "tools"}),
        ("pipeline", {"pretrain", "detection", "detectron2", "torch", "tools"}),
    ],
)
def test_house_does_not_import_strangers(package: str, strangers: set[str]) -> None:
    command = [sys.executable, "-c", WALK, package]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert strangers.isdisjoint(done.stdout.split())


def test_common_needs_torch_for_checkpoints_only() -> None:
    guests = {
        str(path)
        for path in sources("common")
        for _, name in imported_names(path)
        if house(name) in ("torch", "torchvision")
    }
    assert guests == {"common/checkpoints.py"}
    modules = [".".join(path.with_suffix("").parts) for path in sources("common")]
    light = [name for name in modules if name != "common.checkpoints" and "__init__" not in name]
    code = f"import sys, {', '.join(light)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_user_error_is_defined_once() -> None:
    places = [
        str(path)
        for path in sources(*CODE)
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.ClassDef) and node.name == "UserError"
    ]
    assert places == ["common/errors.py"]


def test_only_detection_imports_detectron2() -> None:
    guests = [
        f"{path}:{line}"
        for path in sources("common", "pretrain", "pipeline", "tools", "benchmarks")
        for line, name in imported_names(path)
        if house(name) == "detectron2"
    ]
    assert guests == []


def test_detection_enters_detectron2_through_compat() -> None:
    """A module that names detectron2 imports detection.compat, or a module that does, before it."""
    for path in sources("detection"):
        lines = [line for line, name in imported_names(path) if house(name) == "detectron2"]
        doors = [line for line, name in imported_names(path) if name.startswith("detection.compat")]
        if lines and path.name != "compat.py":
            assert doors, f"{path} imports detectron2 without detection.compat"
            assert min(doors) < min(lines), f"{path} imports detectron2 before detection.compat"


def test_nobody_imports_model_zoo() -> None:
    """It needs pkg_resources, which setuptools 82 removed."""
    for path in sources(*CODE):
        assert not [name for _, name in imported_names(path) if "model_zoo" in name], path


def scripts() -> list[Path]:
    """Every file a user calls."""
    shell = [*sources("tools", suffix=".sh"), *sources("benchmarks", suffix=".sh")]
    python = [
        path
        for path in (*sources("tools"), *sources("benchmarks"))
        if path.parent in (Path("tools"), Path("benchmarks"))
        and '__name__ == "__main__"' in (ROOT / path).read_text()
    ]
    return shell + python


@pytest.mark.parametrize("script", scripts(), ids=str)
def test_script_explains_itself_with_an_example(script: Path) -> None:
    interpreter = "bash" if script.suffix == ".sh" else sys.executable
    command = [interpreter, str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout.lower()


@pytest.mark.parametrize("script", sources("tools", "benchmarks", ".ci", suffix=".sh"), ids=str)
def test_shell_script_is_sound(script: Path) -> None:
    text = (ROOT / script).read_text()
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0
    assert not re.search(r"^\s*eval\b", text, re.MULTILINE), "eval runs what it is given"
    assert "set -euo pipefail" in text


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
    found = [
        f"{path}: {match.group()}"
        for path in files
        if (ROOT / path).is_file() and os.path.basename(path) != "test_architecture.py"
        for match in place.finditer((ROOT / path).read_text())
    ]
    assert found == []
