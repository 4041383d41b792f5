"""The page as a program sees it: served for real, asked over HTTP."""

from __future__ import annotations

import http.client
import io
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from aggregator.metrics import expose
from aggregator.page.app import Served
from aggregator.page.reader import Reader
from aggregator.page.server import PageServer, Where, names_of
from protocol.events import EventLog

ACTION = {"x-tunefleet": "action", "content-type": "application/json"}


class Said(NamedTuple):
    """An answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Site:
    """Ask a page that is served."""

    def __init__(
        self, port: int, events: io.StringIO | None = None, context: ssl.SSLContext | None = None
    ) -> None:
        self.port, self.events, self._context = port, events, context

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: object = None,
        **headers: str,
    ) -> Said:
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = None if body is None else json.dumps(body)
        if self._context is None:
            link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        else:
            link = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=60, context=self._context
            )
        try:
            link.request(method, path, sent, told)
            answer = link.getresponse()
            fields = {name.lower(): value for name, value in answer.getheaders()}
            return Said(answer.status, fields, answer.read())
        finally:
            link.close()

    def act(self, path: str, body: object = None, **headers: str) -> Said:
        return self.ask(path, "POST", body or {}, **{**ACTION, **headers})


@contextmanager
def running_page(root: Path, where: Where | None = None, **served: Any) -> Iterator[Site]:
    """Serve the page of the states below a folder."""
    told = io.StringIO()
    where = where or Where(port=0)
    with Reader(root) as reader:
        fields = {"metrics": expose, "hosts": names_of(where.host), **served}
        events = EventLog(as_json=True, stream=told)
        with PageServer(Served(reader, **fields), where, events) as server:
            yield Site(server.port, told)
        assert not told.getvalue(), "the page told of a mistake"
