"""The requirements files pin every package that the project imports, and no other."""
import ast
import sys

from conftest import ROOT

RUNS = (".", "data", "run")                             # folders of what a run needs: requirements.txt
REPORTS = ("report", "tests")                           # folders that also need requirements-dev.txt
PACKAGES = {"sklearn": "scikit-learn"}                  # import name: name of the package, if they differ
COMMANDS = {"ipykernel", "ruff", "tensorboard"}         # packages that no file imports by their name
OPTIONAL = {"wandb"}                                    # `--track wandb` asks its user to install it


def imported(folder: str) -> dict[str, str]:
    """{package in lower case: a file that imports it} of a folder's .py files, inside functions too."""
    found = {}
    for file in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                found[PACKAGES.get(top, top).lower()] = str(file.relative_to(ROOT))
    own = {path.stem.lower() for pattern in ("*", "tests/*.py") for path in ROOT.glob(pattern)}
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names and name not in own}


def pinned(name: str) -> set[str]:
    """The packages in lower case that a requirements file pins to one version."""
    lines = (ROOT / name).read_text().split("\n")
    return {line.split("==")[0].lower() for line in lines if "==" in line}


def test_requirements_pin_every_imported_package():
    for folder in RUNS + REPORTS:
        packages = pinned("requirements.txt")
        if folder in REPORTS:
            packages |= pinned("requirements-dev.txt")
        missing = {name: file for name, file in imported(folder).items() if name not in packages | OPTIONAL}
        assert missing == {}


def test_requirements_pin_no_package_that_is_not_needed():
    by_runs = set().union(*(imported(folder) for folder in RUNS))
    by_reports = set().union(*(imported(folder) for folder in REPORTS))
    assert pinned("requirements.txt") <= by_runs
    assert pinned("requirements-dev.txt") <= by_reports | COMMANDS


def test_every_line_of_the_requirements_pins_a_version():
    both = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-dev.txt").read_text()
    assert [line for line in both.splitlines() if "==" not in line] == ["-r requirements.txt"]
