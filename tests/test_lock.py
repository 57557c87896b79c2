"""One writer per folder: a living one is named, a dead one's lock is taken over."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from fastdit import lock
from fastdit.lock import FolderLock


def write(folder, **holder):
    folder.mkdir(exist_ok=True)
    (folder / "lock").write_text(json.dumps({**lock.this_process(), "beat": 0, **holder}))


def test_a_living_holder_is_named_and_keeps_its_lock(tmp_path):
    with FolderLock(tmp_path / "run", "run_dir"):
        before = (tmp_path / "run" / "lock").read_text()
        with pytest.raises(
            ValueError, match=rf"run_dir=.*run is in use by process {os.getpid()} on {socket.gethostname()}"
        ):
            FolderLock(tmp_path / "run", "run_dir").__enter__()
        assert (tmp_path / "run" / "lock").read_text() == before
    assert not (tmp_path / "run").exists()  # nothing was written there


def test_the_lock_of_a_dead_process_is_taken_over_with_a_message(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    started = lock.started(done.pid)
    done.wait()
    for holder in ({"pid": done.pid, "started": started}, {"started": "another process of this number"}):
        heard = []
        write(tmp_path / "run", **holder)
        with FolderLock(tmp_path / "run", "run_dir", heard.append):
            assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
        assert len(heard) == 1 and "took over the lock of process" in heard[0]


@pytest.mark.parametrize("found", ["of a dead process", "empty"])
def test_a_process_that_died_while_it_took_over_keeps_nobody_waiting(tmp_path, monkeypatch, found):
    monkeypatch.setattr(lock, "TURN_S", 0.2 if found == "empty" else 600)
    write(tmp_path / "run", started="long ago")
    text = "" if found == "empty" else (tmp_path / "run" / "lock").read_text()
    (tmp_path / "run" / "lock.takeover").write_text(text)
    heard, start = [], time.monotonic()
    with FolderLock(tmp_path / "run", "run_dir", heard.append):
        assert len(heard) == 1 and time.monotonic() - start < 60
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "holder",
    [
        {"host": "elsewhere"},
        {"boot": "of a machine with the same name", "pid": 4_000_000},  # a number that no process has here
        {"processes": "pid:[1]", "pid": 4_000_000},  # another container
    ],
    ids=["host", "machine", "container"],
)
def test_on_another_machine_a_moving_counter_is_a_living_process(tmp_path, monkeypatch, holder):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.5)
    write(tmp_path / "run", **holder)
    heard, name = [], holder.get("host", socket.gethostname())
    with FolderLock(tmp_path / "run", "run_dir", heard.append):
        assert f"on {name}, which is gone" in heard[0]
    monkeypatch.setattr(lock, "PATIENCE_S", 60)
    write(tmp_path / "run", **holder)
    beat = threading.Timer(0.3, write, [tmp_path / "run"], {**holder, "beat": 1})
    beat.start()
    with pytest.raises(ValueError, match=f"in use by process .* on {name}"):
        FolderLock(tmp_path / "run", "run_dir").__enter__()
    beat.join()


def test_a_disk_that_is_full_for_a_moment_does_not_end_the_beat(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    failures, replace_text = iter([OSError(28, "No space left on device")] * 3), lock.replace_text

    def failing(path, text):
        for error in failures:
            raise error
        replace_text(path, text)

    monkeypatch.setattr(lock, "replace_text", failing)
    with FolderLock(tmp_path / "run", "run_dir") as held:
        end = time.monotonic() + 20
        while not held._read(held.path).get("beat") and time.monotonic() < end:
            time.sleep(0.02)
        assert held._read(held.path)["beat"] > 3 and held.thread.is_alive()


def test_a_file_system_that_is_away_for_a_moment_does_not_end_the_beat(tmp_path, monkeypatch):
    """Without it the lock would look like that of a dead process, and another machine would take it over."""
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    failures, read_json = iter([OSError(116, "Stale file handle")] * 3), lock.read_json

    def failing(path):
        for error in failures:
            raise error
        return read_json(path)

    monkeypatch.setattr(lock, "read_json", failing)
    with FolderLock(tmp_path / "run", "run_dir") as held:
        held.thread.join(1)
        assert held.thread.is_alive() and next(failures, None) is None and read_json(held.path)["beat"] > 3


SUSPENDED = """
import sys, time
from fastdit import lock

lock.BEAT_S = 0.05
with lock.FolderLock(lock.Path(sys.argv[1]), "run_dir") as held:
    held.path.write_text('{"host": "elsewhere", "pid": 7, "started": "1", "beat": 3}')
    time.sleep(60)
"""


def test_a_process_whose_lock_was_taken_over_ends_instead_of_writing_beside_the_other(tmp_path):
    done = subprocess.run([sys.executable, "-c", SUSPENDED, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: run_dir={tmp_path}/run was taken over by process 7 on elsewhere while this process")
    assert json.loads((tmp_path / "run" / "lock").read_text())["host"] == "elsewhere"  # it is the other's


def test_of_many_at_once_one_gets_the_lock(tmp_path):
    write(tmp_path / "run", started="long ago")  # stale, so that they also compete for taking it over
    held, refused, hold = [], [], threading.Event()

    def compete():
        try:
            with FolderLock(tmp_path / "run", "run_dir", lambda line: None):
                held.append(1)
                hold.wait(600)  # the others are refused long before, on a busy machine too
        except ValueError:
            refused.append(1)
        if len(refused) == 7:
            hold.set()

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 7
