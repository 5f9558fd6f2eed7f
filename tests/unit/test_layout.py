"""The tree as a whole: versions agree, what is built is complete, no module is unsafe or unexplained."""

from __future__ import annotations

import ast
import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mms

ROOT = Path(__file__).parents[2]
COMPONENTS = {
    "mms": ROOT,
    "mms_archiver": ROOT / "archiver",
    "mms_handlers": ROOT / "handlers",
    "mms_nginx": ROOT / "nginx",
}
UNSAFE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
DATA = {f"{name}/py.typed" for name in COMPONENTS} | {"mms_nginx/template.conf.j2"}


def modules() -> dict[str, Path]:
    """Every module of ours as it lies in the wheel."""
    return {
        path.relative_to(folder).as_posix(): path
        for name, folder in COMPONENTS.items()
        for path in sorted((folder / name).rglob("*.py"))
    }


def imported(tree: ast.AST) -> set[str]:
    """The top-level names that a module imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).partition(".")[0])
    return names


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the working tree."""
    folder = tmp_path_factory.mktemp("tree") / "mms"
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in ("mms", "archiver", "handlers", "nginx"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


def build(tree: Path, kind: str) -> Path:
    """The wheel or the source distribution, made by the configured backend with what is installed."""
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", f"--{kind}", str(tree)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (tree / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def test_the_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mms.__version__
    headings = re.findall(r"^## .*$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert any(mms.__version__ in heading for heading in headings)


def test_s21_runtime_dependencies_are_few_and_each_is_locked_with_hashes() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(wanted) <= 10
    lock = (ROOT / "requirements.lock").read_text().replace("\\\n", "")
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+) .*--hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE))
    assert len(locked) == lock.count("==")
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[requirement.name]), f"{requirement}: run make lock"


@pytest.mark.parametrize(
    ("name", "floor"), [("httptools", "0.9"), ("uvloop", "0.22"), ("aiohttp", "3.14.3"), ("jinja2", "3.1.6")]
)
def test_s21_known_holes_are_below_what_is_required(name: str, floor: str) -> None:
    wanted = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    (bounds,) = (requirement.specifier for requirement in wanted if requirement.name == name)
    assert floor in bounds and not bounds.contains(f"{floor}.dev0", prereleases=True)


def test_every_package_is_listed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    assert listed == sorted({Path(name).parent.as_posix().replace("/", ".") for name in modules()})


def test_every_folder_of_modules_is_a_package() -> None:
    for path in modules().values():
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def test_the_wheel_holds_every_module_and_data_file(tree: Path) -> None:
    wheel = build(tree, "wheel")
    assert wheel.name.startswith(f"mms_server-{mms.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        scripts = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert modules().keys() | DATA <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == set(COMPONENTS)
    assert "mms = mms.cli:main" in scripts and "model-archiver = mms_archiver.cli:main" in scripts


def test_the_source_distribution_holds_what_a_wheel_is_made_of(tree: Path) -> None:
    with tarfile.open(build(tree, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for path in modules().values()}
    wanted |= {"pyproject.toml", "setup.cfg", "setup.py", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"}
    wanted |= {"nginx/mms_nginx/template.conf.j2", "mms/py.typed"}
    assert wanted <= names


@pytest.mark.parametrize("name", modules())
def test_s6_no_module_reads_objects_from_bytes(name: str) -> None:
    unsafe = imported(ast.parse(modules()[name].read_text())) & UNSAFE
    assert not unsafe or name.startswith("mms_handlers/"), f"{name} imports {unsafe}"


@pytest.mark.parametrize("name", [name for name in modules() if not name.endswith("__init__.py")])
def test_every_module_says_what_it_is(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(modules()[name].read_text()))
    assert docstring and docstring.partition("\n")[0].strip()


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith("mms/")])
def test_the_server_imports_without_torch(name: str) -> None:
    tree = ast.parse(modules()[name].read_text())
    at_import = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not imported(at_import) & {"torch", "torchvision", "numpy", "PIL", "sklearn"}
