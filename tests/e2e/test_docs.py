"""The documentation is true: its commands are run as a reader would run them, its tables hold what the code has."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest

from mms.config import Config
from mms.errors import MMSError
from mms.metrics import Collector, FrontEndFacts
from mms.model_settings import ModelSettings
from mms.setting import show_setting
from tests.servers import environment, free_ports, is_free, processes_in, scratch
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
OTHER_PAGES = [
    ROOT / name
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "archiver/README.md", "handlers/README.md")
] + sorted(ROOT.glob("examples/*/README.md"))  # fmt: skip
COMMAND_TIMEOUT = 30
PORTS = {"8080": "INFERENCE", "8081": "MANAGEMENT", "8082": "METRICS"}

# Pages whose commands need the archive and the running server of this page.
FIRST_PAGE = "getting-started.md"
START = "mms start"
AFTER_FIRST_PAGE = ("inference-api.md", "management-api.md", "metrics.md", "errors.md", "scheduling.md")

# Commands that are shown but not run here, each with its reason; they stand in `sh` blocks, the others in `console`.
NOT_RUN = {
    "make ": "continuous integration runs the targets, and they run these tests",
    "pip install ": "the package is installed already, and tests do not change their environment",
    "apt-get install ": "tests do not change the machine",
    "sudo ": "tests do not change the machine",
    "python -m benchmarks.": "takes minutes, and other tests would disturb its figures",
}


@dataclass(frozen=True)
class Block:
    """One fenced block; `file` is the name in the line before it, as in: in a file `handler.py`:"""

    language: str
    text: str
    file: str


@dataclass(frozen=True)
class Command:
    """One `$ ` line, continued after a backslash, and the output that the page shows; `...` is any text."""

    text: str
    output: str


def blocks(page: Path) -> list[Block]:
    found = []
    text = page.read_text()
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()].rstrip()
        file = re.search(r"`([\w-]+\.\w+)`:$", before)
        found.append(Block(match[1], match[2], file[1] if file else ""))
    return found


def commands(block: Block) -> list[Command]:
    found: list[Command] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            text = line[2:]
            while text.endswith("\\"):
                text += "\n" + next(lines)
            found.append(Command(text, ""))
        else:
            assert found, f"a console block begins with {line!r}, not with a command"
            found[-1] = dataclasses.replace(found[-1], output=found[-1].output + line + "\n")
    return found


def every_command(page: Path) -> list[Command]:
    return [command for block in blocks(page) if block.language == "console" for command in commands(block)]


class Reader:
    """Follows pages in a scratch folder, on ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
        addresses = {f"MMS_{name}_ADDRESS": f"127.0.0.1:{self.ports[port]}" for port, name in PORTS.items()}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        (folder / ".curlrc").write_text("silent\nshow-error\nmax-time = 20\n")
        self._environment = environment(
            PATH=path,
            CURL_HOME=str(folder),
            COLUMNS="120",
            MMS_RUN_DIR=str(folder / "run"),
            MMS_CACHE_DIR=str(folder / "cache"),
            **addresses,
        )

    def follow(self, page: Path, *, until: str = "") -> None:
        """Write the page's files and run its commands, up to the one that begins with `until`, which is left out."""
        for block in blocks(page):
            if block.language == "console":
                for command in commands(block):
                    if until and command.text.startswith(until):
                        return
                    self.run(command)
            elif block.file:
                (self.folder / block.file).write_text(block.text)

    def run(self, command: Command) -> None:
        text = command.text
        for port, own in self.ports.items():
            text = text.replace(port, own)
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, env=self._environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_TIMEOUT,
        )  # fmt: skip
        output = done.stdout
        for port, own in self.ports.items():
            output = output.replace(own, port)
        report = f"$ {command.text}\n{output}"
        assert (done.returncode == 0) is (": error: " not in command.output), f"exit code {done.returncode}: {report}"
        if command.output:
            pattern = ".*".join(map(re.escape, command.output.strip().split("...")))
            assert re.fullmatch(pattern, output.strip(), re.DOTALL), f"{report}\nthe page shows:\n{command.output}"

    def close(self) -> None:
        """Stop the server if a page left it running, and see that nothing is left."""
        try:
            self.run(Command("mms stop", ""))
            eventually(lambda: not processes_in(self.folder))
            assert all(is_free(f"127.0.0.1:{port}") for port in self.ports.values())
        finally:
            for process in processes_in(self.folder):
                process.kill()


@pytest.fixture
def reader() -> Iterator[Reader]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with scratch() as folder:
        following = Reader(folder)
        try:
            yield following
        finally:
            following.close()


@pytest.fixture(scope="module")
def packed() -> Iterator[Path]:
    """What the first page has made before it starts its server."""
    with scratch() as folder:
        Reader(folder).follow(PAGES[FIRST_PAGE], until=START)
        yield folder


def has_commands(page: Path) -> bool:
    return any(block.language == "console" for block in blocks(page))


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if has_commands(page)])
def test_the_commands_do_what_the_page_says(name: str, reader: Reader, request: pytest.FixtureRequest) -> None:
    if name in AFTER_FIRST_PAGE:
        shutil.copytree(request.getfixturevalue("packed"), reader.folder, dirs_exist_ok=True)
        reader.run(next(command for command in every_command(PAGES[FIRST_PAGE]) if command.text.startswith(START)))
    reader.follow(PAGES[name])


@pytest.mark.parametrize("name", PAGES)
def test_commands_that_are_not_run_are_on_the_list(name: str) -> None:
    for block in blocks(PAGES[name]):
        assert block.language not in ("bash", "shell", ""), f"{name}: a block without language, or in {block.language}"
        if block.language == "sh":
            for line in filter(None, block.text.splitlines()):
                assert line.startswith(tuple(NOT_RUN)), f"{name}: {line!r} stands in a block that nobody runs"


@pytest.mark.parametrize("page", [*PAGES.values(), *OTHER_PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = page.parent / unquote(path) if path else page
            assert file.exists(), f"{page.name} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                assert anchor in {slug(heading) for heading in headings}, f"{page.name} links to {target}"


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_linked_from_the_readme() -> None:
    assert {f"docs/{path.name}" for path in DOCS.glob("*.md")} <= set(
        re.findall(r"\((docs/[\w-]+\.md)\)", PAGES["README.md"].read_text())
    )


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = PAGES[page].read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 2, f"{page} has no table under {heading}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize(("kind", "heading"), [(Config, "The server"), (ModelSettings, "A model")])
def test_every_setting_is_documented(kind: type, heading: str) -> None:
    expected = []
    for setting in dataclasses.fields(kind):
        default = show_setting(kind, setting.name, setting.default)
        expected.append([f"`{setting.name}`", f"`{default}`" if default else "", setting.metadata["help"]])
    assert rows("configuration.md", heading) == expected, "\n".join(f"| {' | '.join(row)} |" for row in expected)


def test_every_metric_is_documented() -> None:
    collector = Collector(lambda: (), lambda: (), lambda: FrontEndFacts(0, 0, 0), Counter())
    expected = []
    for family in collector.collect():
        labels = ", ".join(f"`{label}`" for label in getattr(family, "_labelnames", ()))
        name = family.name + "_total" * (family.type == "counter")
        expected.append([f"`{name}`", family.type, labels, family.documentation])
    assert rows("metrics.md", "Families") == expected, "\n".join(f"| {' | '.join(row)} |" for row in expected)


def tree(error: type[MMSError]) -> Iterator[type[MMSError]]:
    yield error
    for child in error.__subclasses__():
        yield from tree(child)


def test_every_error_type_is_documented() -> None:
    errors = [error for error in tree(MMSError) if error.__module__ == "mms.errors" and error.type]
    expected = {(f"`{error.type}`", str(error.status)) for error in errors}
    assert {(row[0], row[1]) for row in rows("errors.md", "Types")} == expected | {("`PredictionException`", "400")}


def test_every_unusual_status_is_documented() -> None:
    usual = {row[1] for row in rows("errors.md", "Types")}
    sources = "".join(path.read_text() for path in (ROOT / "mms").rglob("*.py"))
    unusual = set(re.findall(r"status=(4\d\d|5\d\d)\b", sources)) - usual
    assert {row[0] for row in rows("errors.md", "Other statuses")} == unusual
