"""What is registered outlives the server: restored after a kill, a damaged file, a store that lacks something."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.asking import fetch
from tests.conftest import MakeArchive
from tests.servers import Server, free_ports, mms, server, start_arguments
from tests.waiting import eventually


@contextlib.contextmanager
def restarted(folder: Path, *words: str, **settings: Any) -> Iterator[Server]:
    """A server on what an earlier one has left in `folder`."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
    running = Server(folder, [*start_arguments(folder, addresses, **settings), *words], addresses)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


def state_file(folder: Path) -> Path:
    (file,) = (folder / "cache" / "state").glob("*.json")
    return file


def refused(folder: Path) -> str:
    """What a start says that must fail."""
    words = start_arguments(folder, [f"127.0.0.1:{port}" for port in free_ports(3)])
    done = mms(*words[4:])
    assert done.returncode == 1
    return done.stderr


def test_what_was_registered_is_restored_after_a_kill(make_archive: MakeArchive, folder: Path) -> None:
    spare = make_archive("echo"), make_archive("echo", version="2.0"), make_archive("rows")
    with server(make_archive("gate"), spare=spare, folder=folder) as first:
        for words in ("url=echo-1.0.mar&queue_size=7", "url=echo-2.0.mar&initial_workers=0", "url=rows-1.0.mar"):
            assert first.manage("POST", f"/models?{words}").status == 200
        assert first.manage("PUT", "/models/echo/1.0?min_worker=2&batch_size=4&synchronous=true").status == 200
        assert first.manage("PUT", "/models/echo/2.0/set-default").status == 200
        assert first.manage("DELETE", "/models/rows").status == 200
        first.kill()
    with restarted(folder) as second:
        assert {model["modelName"] for model in second.manage("GET", "/models").json()["models"]} == {"echo", "gate"}
        described = second.describe("echo/1.0")
        changed = {key: described[key] for key in ("queueSize", "batchSize", "minWorkers", "defaultVersion")}
        assert changed == {"queueSize": 7, "batchSize": 4, "minWorkers": 2, "defaultVersion": False}
        assert (second.describe("echo")["versions"], second.describe("echo")["modelVersion"]) == (["1.0", "2.0"], "2.0")
        assert second.predict("echo/1.0", b"x").status == 200


def test_a_fresh_start_forgets(make_archive: MakeArchive, folder: Path) -> None:
    with server(make_archive("echo"), folder=folder) as first:
        first.kill()
    with restarted(folder, "--fresh") as second:
        assert second.manage("GET", "/models").json() == {"models": []}
        assert json.loads(state_file(folder).read_bytes())["models"] == []


def test_what_models_names_decides_what_it_named_before(make_archive: MakeArchive, folder: Path) -> None:
    echo, rows = make_archive("echo"), make_archive("rows")
    with server(echo, spare=(rows, make_archive("gate")), folder=folder) as first:
        assert first.manage("POST", "/models?url=gate-1.0.mar").status == 200
        assert first.manage("PUT", "/models/echo?queue_size=9").status == 200
    shutil.copy(rows, folder / "store" / "other.mar")
    with restarted(folder, "--models", "rows=other.mar") as second:
        names = [model["modelName"] for model in second.manage("GET", "/models").json()["models"]]
        assert names == ["gate", "rows"]


def test_f100_an_archive_that_is_missing_or_changed_is_named_and_the_others_serve(
    make_archive: MakeArchive, folder: Path
) -> None:
    with server(spare=(make_archive("echo"), make_archive("rows"), make_archive("gate")), folder=folder) as first:
        for name in ("echo", "rows", "gate"):
            assert first.manage("POST", f"/models?url={name}-1.0.mar").status == 200
    store = folder / "store"
    (store / "echo-1.0.mar").rename(folder / "away.mar")
    (store / "rows-1.0.mar").unlink()
    shutil.copy(make_archive("rows", model_name="rows", queue_size=5), store / "rows-1.0.mar")
    with restarted(folder) as second:
        changed = "rows 1.0 is not restored: rows-1.0.mar has changed since it was registered; register it again"
        assert "echo 1.0 is not restored: echo-1.0.mar is not in the model store" in second.ready_line
        assert (
            changed in second.ready_line and "ready in " in second.ready_line and "1 of 3 models" in second.ready_line
        )
        missing = {line["model"]: line for line in second.manage("GET", "/readyz").json()["missing"]}
        assert set(missing) == {"echo", "rows"} and "has changed" in missing["rows"]["reason"]
        assert "could not be restored" in second.predict("echo").message
        assert fetch(second.url, "GET", "/ping").json() == {"status": "Partial Healthy"}

        (folder / "away.mar").rename(store / "echo-1.0.mar")
        done = mms("retry", "echo", "--run-dir", str(second.run_dir))
        assert (done.returncode, done.stdout) == (0, 'Model "echo" Version: 1.0 has 1 workers\n')
        assert second.predict("echo", b"x").status == 200
        done = mms("retry", "rows", "1.0", "--run-dir", str(second.run_dir))
        assert (done.returncode, "has changed" in done.stderr) == (1, True)
        assert second.manage("DELETE", "/models/rows").status == 200
        assert second.manage("GET", "/readyz").status == 200
    assert [model["name"] for model in json.loads(state_file(folder).read_text())["models"]] == ["gate", "echo"]


def test_f78_a_damaged_file_is_refused_and_the_one_before_can_be_taken(make_archive: MakeArchive, folder: Path) -> None:
    with server(make_archive("gate"), spare=(make_archive("echo"),), folder=folder) as first:
        assert first.manage("POST", "/models?url=echo-1.0.mar").status == 200
    file = state_file(folder)
    previous = file.with_name(f"{file.name}.previous")
    file.write_bytes(file.read_bytes()[:-10])
    text = f"mms: error: cannot restore what was registered from {file}: it is damaged: Input data was truncated"
    assert refused(folder) == f"{text}; start with --state {previous} (the copy before), or with --fresh\n"
    with restarted(folder, "--state", str(previous)) as second:
        assert [model["modelName"] for model in second.manage("GET", "/models").json()["models"]] == ["gate"]
    assert [model["name"] for model in json.loads(file.read_bytes())["models"]] == ["gate"]


def test_f72_a_state_that_cannot_be_saved_is_told_and_serving_goes_on(make_archive: MakeArchive, folder: Path) -> None:
    blocked = folder / "blocked"
    blocked.touch()
    with server(spare=(make_archive("echo"),), folder=folder, state=blocked / "state.json") as running:
        assert running.manage("POST", "/models?url=echo-1.0.mar").status == 200
        assert running.manage("PUT", "/models/echo?queue_size=9").status == 200
        assert running.output.count("cannot save what is registered") == 1
        assert running.metric("mms_state_unsaved") == 1
        assert running.predict("echo", b"x").status == 200
        blocked.unlink()
        assert running.manage("PUT", "/models/echo?queue_size=8").status == 200
        assert running.metric("mms_state_unsaved") == 0
        saved = json.loads((blocked / "state.json").read_text())["models"][0]["versions"][0]
        assert saved["settings"] == {"queue_size": "8"}


def test_f77_a_kill_during_a_save_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process that does nothing but save is killed at any time; what it leaves can be read."""
    program = (
        "import itertools, pathlib, sys\n"
        "from mms.state import *\n"
        "for n in itertools.count():\n"
        "    state = State(models=[SavedModel(name=f'm{n}', default='1', versions=[])])\n"
        "    write(pathlib.Path(sys.argv[1]), encode(state))\n"
    )
    file = tmp_path / "state.json"
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", program, str(file)], env=dict(os.environ)) as saving:
            eventually(file.exists)
            seen: set[str] = set()
            while len(seen) < 30:
                seen.add(json.loads(file.read_bytes())["models"][0]["name"])
            saving.send_signal(signal.SIGKILL)
        assert json.loads(file.read_bytes())["schema"] == 1


def test_a_failed_version_is_tried_again_at_once(make_archive: MakeArchive, folder: Path) -> None:
    mended = folder / "mended"
    archive = make_archive("mends", mended=str(mended))
    with server(make_archive("echo"), spare=(archive,), folder=folder) as running:
        assert running.manage("POST", "/models?url=mends-1.0.mar").status == 500
        assert running.describe("mends")["state"] == "FAILED"
        done = mms("retry", "mends", "--run-dir", str(running.run_dir))
        assert done.returncode == 1 and "not mended yet" in done.stderr
        assert running.manage("GET", "/models/mends/ready").status == 503
        assert running.manage("GET", "/readyz").status == 200  # it has never served: nothing has become worse
        mended.touch()
        assert running.manage("POST", "/models/mends/1.0/retry").json() == {
            "status": 'Model "mends" Version: 1.0 has 1 workers'
        }
        assert running.manage("GET", "/models/mends/1.0/ready").json() == {"status": "ready", "missing": []}
        assert running.manage("POST", "/models/cat/retry").status == 404
