"""What of the installing shell's environment a service needs too: models, proxies, time zone.

A service manager starts with an environment of its own. A unit can be read by everybody on the
computer, so a password or token goes into a file that its owner alone may read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

FILE = "service.env"
CACHES = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")
"""Where base models are, which may be fetched there."""
PATHS = (*CACHES, "XDG_DATA_HOME", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
"""These, and where the owner's policy and the certificates for downloads are."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
"""In small letters or capitals."""
OTHERS = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TZ")
"""Where models come from, whether they may, and what time the owner's hours are in."""
SECRETS = ("HF_TOKEN",)
_WITH_PASSWORD = re.compile(r"//[^/]*@|^[^/]*@")
"""A proxy's address that names a user, say http://me:secret@proxy:3128."""


def surroundings(environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the variables that a service is to have: for all to see, and for its owner alone."""
    open_ones: dict[str, str] = {}
    secret: dict[str, str] = {}
    proxies = [*PROXIES, *map(str.upper, PROXIES)]
    for name in (*PATHS, *proxies, *OTHERS, *SECRETS):
        value = environment.get(name, "")
        if not value or not value.isprintable():
            continue
        if name in PATHS:
            value = str(Path(value).absolute())
        hidden = name in SECRETS or (name in proxies and _WITH_PASSWORD.search(value))
        (secret if hidden else open_ones)[name] = value
    return open_ones, secret


def as_file(variables: Mapping[str, str]) -> bytes:
    """Return variables as systemd reads them from an EnvironmentFile (systemd.exec(5))."""

    def within_quotes(value: str) -> str:
        return re.sub(r'([\\"$`])', r"\\\1", value)

    lines = (f'{name}="{within_quotes(value)}"\n' for name, value in variables.items())
    return "".join(lines).encode()
