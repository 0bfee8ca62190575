"""`strop report --watch`: one page on this computer, made anew when the run has written something, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from strop.cli.entry import main
from strop.errors import ConfigError
from strop.report.serve import LOOPBACK, PageServer


@pytest.fixture
def pages() -> list[bytes | Exception | None]:
    return [b"one"]


@pytest.fixture
def server(pages: list[bytes | Exception | None]) -> Iterator[PageServer]:
    def make() -> bytes | None:
        found = pages.pop(0) if pages else None
        if isinstance(found, Exception):
            raise found
        return found

    with PageServer(make) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: PageServer, path: str = "/", method: str = "GET", host: str | None = None) -> tuple[int, bytes]:
    connection = HTTPConnection(LOOPBACK, server.server_address[1], timeout=10)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_page_is_the_newest_that_could_be_made(server: PageServer, pages: list[bytes | Exception | None]) -> None:
    assert get(server) == (200, b"one")
    pages += [None, b"two", ValueError("half-written"), b"three"]
    assert [get(server)[1] for _ in range(4)] == [b"one", b"two", b"two", b"three"]
    assert get(server, method="HEAD") == (200, b"")


@pytest.mark.share(3)
@pytest.mark.parametrize("path", ["/metrics.jsonl", "/../config.yaml", "/..%2fconfig.yaml", "//etc/passwd", "/?x", "*"])
def test_nothing_else_is_served(path: str, server: PageServer) -> None:
    assert get(server, path)[0] == 404


def test_other_hosts_and_methods_are_refused(server: PageServer) -> None:
    assert get(server, host="evil.example")[0] == 403
    assert get(server, host=f"evil.example:{server.server_address[1]}")[0] == 403
    assert get(server, host=f"localhost:{server.server_address[1]}")[0] == 200
    assert get(server, method="POST")[0] == 501
    assert server.server_address[0] == LOOPBACK


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot be taken"):
            PageServer(lambda: b"", taken.getsockname()[1])


def test_the_command_serves_a_run_that_goes_on(make: Callable[..., Any], tmp_path: Path) -> None:
    made = make()
    lines, made.lines = made.lines, made.lines[:10]
    path = made.write()
    before = sorted(p.name for p in path.iterdir())
    command = [sys.executable, "-m", "strop", "report", str(path), "--watch"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        port = int(address.rstrip("/").rpartition(":")[2])

        def page() -> str:
            connection = HTTPConnection(LOOPBACK, port, timeout=30)
            connection.request("GET", "/")
            return connection.getresponse().read().decode()

        first = page()
        assert '<meta http-equiv="refresh" content="10">' in first
        with (path / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines[10:]))
        assert page() != first
        assert sorted(p.name for p in path.iterdir()) == before  # nothing is written
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_only_the_watched_page_loads_itself_again(make: Callable[..., Any], capsys: Any) -> None:
    path = make().write()
    assert main(["report", str(path)]) == 0
    assert "refresh" not in (path / "report.html").read_text()
    assert main(["report", str(path), "--watch", "--output", "x"]) == 1
    assert main(["report", str(path), "--port", "80"]) == 1
    assert main(["report", str(path.parent / "none"), "--watch"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
