"""What the benchmarks make of their figures; nothing is measured."""

from __future__ import annotations

import importlib
import json
import platform
from pathlib import Path
from typing import Any

import pytest

from benchmarks import guard, steal
from benchmarks.coldstart import nearest
from benchmarks.figures import Figure
from benchmarks.hotpath import BESIDE_IDLE, Point, missed_bars, ratios
from benchmarks.peer_servers import PEERS, Counts, absence, peer_spec
from benchmarks.peers import able_to, against_the_best, judged_memory
from benchmarks.servers import BATCH_1, BATCH_32, BEHIND_NGINX, FLOOR, PROXY

GOOD = [
    Point(name, connections, cpu, 1.0, 100.0, 200.0)
    for name, connections, cpu in (
        (FLOOR.name, 1, 50.0),
        (BATCH_32.name, 1, 90.0),
        (BATCH_1.name, 1, 90.0),
        (FLOOR.name, 64, 10.0),
        (BATCH_32.name, 64, 20.0),
        (BESIDE_IDLE, 64, 21.0),
        (BATCH_1.name, 64, 39.0),
        (PROXY.name, 64, 30.0),
        (BEHIND_NGINX.name, 64, 54.0),
        (BATCH_32.name, 256, 23.0),
    )
]


def changed(server: str, connections: int, cpu: float) -> list[Point]:
    return [
        Point(server, connections, cpu, 1.0, 100.0, 200.0) if (point.server, point.connections) == (server, connections)
        else point
        for point in GOOD
    ]  # fmt: skip


def test_no_bar_is_missed_when_all_are_met() -> None:
    assert not missed_bars(GOOD)


@pytest.mark.parametrize(
    ("server", "connections", "cpu", "said"),
    [
        (BATCH_32.name, 64, 22.5, "2.25 x, the bar is 2.2 x"),
        (BATCH_1.name, 64, 41.0, "4.10 x, the bar is 4 x"),
        (BEHIND_NGINX.name, 64, 56.0, "1.20 x, the bar is 1.15 x"),
        (BATCH_32.name, 256, 25.0, "1.25 x, the bar is 1.2 x"),
        (BESIDE_IDLE, 64, 23.0, "1.15 x, the bar is 1.1 x"),
    ],
)
def test_a_missed_bar_is_named(server: str, connections: int, cpu: float, said: str) -> None:
    (line,) = missed_bars(changed(server, connections, cpu))
    assert server in line and line.endswith(said)


def test_what_was_not_measured_is_no_bar_that_is_met() -> None:
    assert len(missed_bars([])) == 6 and all("not measured" in line for line in missed_bars([]))


def test_a_figure_is_compared_with_the_committed_one(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert guard.load("here", file)[0] == {}
    guard.save(ratios(GOOD), "here", file)
    before, origin = guard.load("here", file)
    assert origin == "here"
    assert before[f"{BATCH_32.name}, 64 connections"] == 2.0 and not any(FLOOR.name in name for name in before)
    assert not guard.changes_for_the_worse(ratios(changed(BATCH_32.name, 64, 22.9)), before)
    (line,) = guard.changes_for_the_worse(ratios(changed(BATCH_32.name, 64, 23.2)), before)
    assert line == f"{BATCH_32.name}, 64 connections: 2.32 x the floor, committed are 2.00 (+16%)"


def test_what_was_not_measured_stays_committed(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    guard.save({"a": 1.0, "b": 2.0}, "here", file)
    guard.save({"b": 3.0}, "here", file)
    assert guard.load("here", file) == ({"a": 1.0, "b": 3.0}, "here")


def test_each_kind_of_processor_has_its_figures_and_others_the_largest(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    guard.save({"a": 1.0, "b": 2.0}, "here", file)
    guard.save({"b": 3.0, "c": 4.0}, "there", file)
    assert guard.load("here", file) == ({"a": 1.0, "b": 2.0}, "here")
    assert guard.load("elsewhere", file) == ({"a": 1.0, "b": 3.0, "c": 4.0}, "other processors")


def test_a_processor_is_told_by_name_family_and_model(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n")
    assert guard.processor(file) == "AMD EPYC, family 25, model 17"
    file.write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert guard.processor(file) == platform.machine()


def test_a_bar_is_at_least_or_at_most() -> None:
    assert Figure("", "", 1.0, 0.9).met and not Figure("", "", 1.0, 0.9, least=False).met


def test_the_round_that_is_shown_is_the_one_at_the_median() -> None:
    assert nearest([9.0, 1.0, 2.0, 2.6]) == 2.0


def test_we_are_held_against_the_best_peer_in_each_round() -> None:
    points = [
        Point(name, 64, cpu, rate, 1.0, 1.0)
        for name, rounds in (
            ("mms", [(10.0, 300.0), (30.0, 100.0), (10.0, 300.0)]),
            ("quick", [(20.0, 100.0), (60.0, 50.0), (20.0, 100.0)]),
            ("slow", [(90.0, 10.0), (90.0, 10.0), (90.0, 10.0)]),
        )
        for cpu, rate in rounds
    ]
    rate, cpu = (against_the_best("", points, 64, figure, 1.0) for figure in ("rate", "cpu"))
    assert (rate.ratio, rate.least, rate.detail) == (3.0, True, "300/s, quick 100/s")
    assert (cpu.ratio, cpu.least) == (0.5, False)


def test_memory_is_held_against_the_least_of_servers_for_python_alone() -> None:
    sizes = {"mms": 90 << 20, "triton": 70 << 20, "litserve": 200 << 20, "mosec": 100 << 20}
    (figure,) = judged_memory(sizes)
    assert figure.ratio == 0.9 and not figure.least and "mosec" in figure.what
    assert figure.detail == "mms 90, triton 70, litserve 200, mosec 100 MiB"
    assert not list(judged_memory({"mms": 1, "triton": 1}))


def test_each_peer_gets_the_body_in_the_form_that_it_takes() -> None:
    assert len(json.loads(PEERS["litserve"].body("noop"))["body"]) == 1024
    assert len(json.loads(PEERS["litserve"].body("mlp"))["body"]) == 64
    (numbers,), (text,) = (json.loads(PEERS["triton"].body(work))["inputs"] for work in ("mlp", "noop"))
    assert (numbers["datatype"], numbers["shape"], len(numbers["data"])) == ("FP32", [1, 64], 64)
    assert (text["datatype"], text["shape"], len(text["data"][0])) == ("BYTES", [1, 1], 1024)
    assert PEERS["mosec"].body("mlp") == PEERS["torchserve"].body("mlp") == PEERS["mosec"].body("mlp-json")


def test_only_servers_with_json_of_their_own_are_compared_in_it() -> None:
    assert able_to("mlp-json", ["torchserve", "mosec"]) == ["mosec"] and able_to("mlp-json", ["torchserve"]) == []
    assert able_to("mlp", ["torchserve", "mosec"]) == ["torchserve", "mosec"]


def test_every_peer_has_what_starts_it(tmp_path: Path) -> None:
    for name in PEERS:
        (command,) = peer_spec(tmp_path, name, "noop", 1, tmp_path / "counts").commands(tmp_path, 1)
        at = command.index(str(tmp_path / name / "bin" / "python"))
        assert Path(command[at + 1]).is_file()


def test_a_peer_that_cannot_be_measured_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert absence(tmp_path, "torchserve").startswith(f"torchserve is not installed in {tmp_path}: make peers")
    packages = tmp_path / "torchserve" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "torch.pth").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "openjdk-17" in absence(tmp_path, "torchserve")
    java = tmp_path / "java"
    java.touch(0o755)
    assert not absence(tmp_path, "torchserve")


def test_the_work_of_peers_counts_its_batches(tmp_path: Path) -> None:
    counts = Counts(tmp_path / "counts")
    work: Any = importlib.import_module("benchmarks.handlers.work")
    noop = work.make("noop", counts.path)
    assert counts.read() == (0, 0) and noop.forward([b"a"]) == ["ok"] and len(noop.forward([b"a", b"b", b"c"])) == 3
    assert counts.read() == (2, 4)


@pytest.mark.parametrize(
    ("stolen", "limits", "expected", "runs"),
    [
        pytest.param([0.0], {}, 1, 1, id="quiet"),
        pytest.param([0.2, 0.1, 0.01], {}, 3, 3, id="until-quiet"),
        pytest.param([0.2, 0.1, 0.3, 0.4], {}, 2, 4, id="never-quiet"),
        pytest.param([0.01, 0.0], {"bearable": 0.0}, 2, 2, id="nothing-bearable"),
        pytest.param([0.2, 0.1], {"tries": 2}, 2, 2, id="few-tries"),
    ],
)
def test_what_is_measured_while_others_have_the_processors_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, stolen: list[float], limits: dict[str, Any], expected: int, runs: int
) -> None:
    shares, results = iter(stolen), iter(range(1, 10))
    monkeypatch.setattr(steal, "share", lambda before, after: next(shares))
    assert steal.quietly(lambda: next(results), **limits) == expected
    assert next(results) == runs + 1


def test_what_others_have_taken_is_read_from_the_system(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  10 1 20 60 1 0 3 5 7 7\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    before = steal.processor_times(stat)
    stat.write_text("cpu  50 1 40 60 1 0 3 45 9 9\n")
    assert before == (5, 100) and steal.share(before, steal.processor_times(stat)) == 0.4
    assert steal.share(before, before) == 0.0
