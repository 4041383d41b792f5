"""Who may read and act, before any page is asked: around the whole application.

Reading is for who has the token, where there is one; on loopback there need not be. Acting is never
done by GET, and what acts says so in a header that no other site's page can send: browsers ask
first (CORS), and are never told yes. The session's cookie is sent by this site's pages alone.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aggregator.errors import ConfigError

COOKIE = "tunefleet-session"
ACTION_HEADER, ACTION = "x-tunefleet", "action"
"""What everything that changes something is sent with, but for programs that send the token."""
SESSION_S = 12 * 3600.0
SESSIONS = 256
TOKEN_LENGTH = 16
BODY_BYTES = 64 << 10
SAFE = ("GET", "HEAD", "OPTIONS")
OPEN = ("/login", "/health/live", "/health/ready", "/api/v1/session")
"""Paths that need no token: they tell nothing of the fleet."""
STATIC = "/static/"
SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Say whether a host to listen on is this computer alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, *, token: str, encrypted: bool) -> None:
    """Refuse to show the page to others without a token and TLS.

    Raises:
        ConfigError: says what is missing.
    """
    if token and len(token) < TOKEN_LENGTH:
        raise ConfigError(
            f"the page's token has {len(token)} characters; it needs {TOKEN_LENGTH} at least: "
            "`aggregator page-token` makes one"
        )
    if is_loopback(host):
        return
    missing = [
        *(["a token (`aggregator page-token` makes one)"] if not token else []),
        *(["TLS (a fleet's folder has a certificate: --dir)"] if not encrypted else []),
    ]
    if missing:
        raise ConfigError(
            f"the page would be open to the network on {host}: it needs {' and '.join(missing)}; "
            "or leave it on 127.0.0.1"
        )


class Sessions:
    """Remember who has shown the token: random names of sessions, by their hashes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def begin(self) -> str:
        """Return the name of a new session; the oldest goes where there are too many."""
        now = self._clock()
        self._until = {name: until for name, until in self._until.items() if until > now}
        while len(self._until) >= SESSIONS:
            del self._until[next(iter(self._until))]
        name = secrets.token_urlsafe(32)
        self._until[_digest(name)] = now + SESSION_S
        return name

    def knows(self, name: str) -> bool:
        return self._until.get(_digest(name), 0.0) > self._clock()

    def end(self, name: str) -> None:
        self._until.pop(_digest(name), None)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


class Guard:
    """Answer in the application's place where a request may not pass."""

    def __init__(
        self, app: ASGIApp, *, token: str, sessions: Sessions, hosts: Iterable[str] | None
    ) -> None:
        """Guard an application; `hosts` are the names it is asked by, None: any.

        Without a token only names of this computer pass, so that no other site's page can have its
        own name lead here (DNS rebinding).
        """
        self._app = app
        self._token = token
        self._sessions = sessions
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        is_static = scope["path"].startswith(STATIC)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    out[name] = value
                out.setdefault("cache-control", "no-cache" if is_static else "no-store")
            await send(message)

        refusal = self._refusal(scope, headers)
        await (refusal or self._app)(scope, _limited(receive), send_safely)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Return what is said instead; None lets a request pass."""
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return _say(421, "this page is asked for by another name; use http://localhost")
        if headers.get("sec-fetch-site") == "cross-site" and not _opens_page(headers):
            return _say(403, "this was asked for by another site's page")
        path, by_token = scope["path"], self._has_token(headers)
        if scope["method"] not in SAFE and not by_token:
            if not self._is_own(headers, host, scope["scheme"]):
                return _say(403, "this came from another site's page: nothing was changed")
            if headers.get(ACTION_HEADER) != ACTION:
                return _say(403, f"what changes something is sent with {ACTION_HEADER}: {ACTION}")
        if not self._token or by_token or path in OPEN or path.startswith(STATIC):
            return None
        if self._sessions.knows(session_of(headers)):
            return None
        wants_page = "text/html" in headers.get("accept", "")
        if wants_page and scope["method"] in SAFE:
            return RedirectResponse("/login", 303)
        refused = _say(401, "the page's token is needed: Authorization: Bearer TOKEN")
        refused.headers["www-authenticate"] = "Bearer"
        return refused

    def _has_token(self, headers: Headers) -> bool:
        kind, _, told = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and self.is_token(told.strip())

    def is_token(self, told: str) -> bool:
        return is_token(self._token, told)

    @staticmethod
    def _is_own(headers: Headers, host: str, scheme: str) -> bool:
        """Say whether a request comes from a page of this site, or from a program."""
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return False
        origin = headers.get("origin")
        return origin is None or origin.lower() == f"{scheme}://{host}".lower()


def _limited(receive: Receive) -> Receive:
    """Return what receives a request, of which a bounded part alone is ever in memory.

    Whoever reaches the page may send one, to be let in: a body without end is no way to take the
    aggregator's memory.
    """
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > BODY_BYTES:
            raise HTTPException(413, f"what is sent has at most {BODY_BYTES} bytes")
        return message

    return limited


def is_token(token: str, told: str) -> bool:
    """Say whether a token is the right one, in a time that does not tell how much of it is."""
    return bool(token) and hmac.compare_digest(_digest(token), _digest(told))


def session_of(headers: Headers) -> str:
    """Return the session's name that a request brings; empty if none."""
    try:
        cookie = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookie[COOKIE].value if COOKIE in cookie else ""


def _opens_page(headers: Headers) -> bool:
    """Say whether somebody follows a link to here, and no page fetches or frames it by itself."""
    return headers.get("sec-fetch-dest") == "document"


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _say(status: int, text: str) -> Response:
    return JSONResponse({"detail": text}, status)
