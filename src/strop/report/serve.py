"""The page of a run that goes on, served to a browser on this computer. Floor 2, no torch.

In: a function that makes the page. Out: a server on 127.0.0.1, with the page at `/`. Every other address is not found,
and no request names a file. A request for another host is refused: a page of another site whose name leads to this
computer gets nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from strop.errors import ConfigError

log = logging.getLogger("strop")

LOOPBACK = "127.0.0.1"


class PageServer(ThreadingHTTPServer):
    """Serves one page at `/`.

    Args:
        make: makes the page anew; returns None where it is the same as the last time.
        port: 0: a free one.

    Raises:
        ConfigError: the port cannot be taken.
    """

    daemon_threads = True

    def __init__(self, make: Callable[[], bytes | None], port: int = 0) -> None:
        self._make, self._lock, self._page = make, Lock(), b""
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"port {port} cannot be taken: {getattr(error, 'strerror', None) or error}",
                where="--port",
                expected="a free port, 1024 to 65535",
                fix="name another one, or leave --port out: a free one is found",
            ) from error

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}/"

    @property
    def hosts(self) -> frozenset[str]:
        """What the `Host` of a request may be."""
        port = self.server_address[1]
        return frozenset({f"{LOOPBACK}:{port}", f"localhost:{port}"})

    def page(self) -> bytes:
        """The page as it is now. If it cannot be made, such as from a file that is half-written, the last one."""
        with self._lock:
            try:
                self._page = self._make() or self._page
            except Exception as error:
                if not self._page:
                    raise
                log.warning("the page could not be made anew: %s: %s", type(error).__name__, error)
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "strop", ""

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self._answer(HTTPStatus.FORBIDDEN, b"this page is for this computer alone\n", "text/plain")
        elif self.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, b"there is one page, at /\n", "text/plain")
        else:
            self._answer(HTTPStatus.OK, self.server.page(), "text/html")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the terminal is not for every reload."""
