"""The structure of the code base: which package may import which, and the size of files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. A module imports from its own floor or from lower ones.
FLOORS = [
    {"core"},
    {"models", "data"},
    {"selection"},
    {"memory"},
    {"training", "export"},
    {"run"},
    {"train", "memory_utils", "scripts", "benchmarks"},
    {"main"},
]
FLOOR_OF = {package: number for number, packages in enumerate(FLOORS) for package in packages}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0].removesuffix(".py") in FLOOR_OF]


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_the_floors(path):
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    above = {name for name in imported_packages(path) if FLOOR_OF.get(name, -1) > FLOOR_OF[package]}
    assert not above
    if package == "core":
        assert not {name for name in imported_packages(path) if name in FLOOR_OF} - {"core"}


def test_no_file_is_longer_than_400_lines():
    assert not {str(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}


def test_the_root_holds_three_modules():
    assert {path.name for path in ROOT.glob("*.py")} == {"main.py", "train.py", "memory_utils.py"}


@pytest.mark.slow
def test_importing_the_entry_points_starts_no_framework():
    code = "import sys, main; assert not {'tensorflow', 'keras', 'gudhi', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
