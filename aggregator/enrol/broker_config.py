"""What Mosquitto is told: its configuration and who may do what on which topic.

The user's name is the common name of the client certificate, and the client id is that name too,
so that nobody can take over another one's session. Checked with Mosquitto 2.0.11: it reads
certificates, CRL and rules again on SIGHUP, and looks at the CRL when somebody connects.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from protocol import topics

AGGREGATOR = "_aggregator"
"""The aggregator's name at the broker; no device can have it, for names have no underscore."""

PACKET_BYTES = 1 << 20
"""A message has at most 512 KiB, a chunk 128 KiB."""
QUEUED_MESSAGES = 10_000
QUEUED_BYTES = 1 << 30
"""Of each client, while it is away or slow: more than a version of the shared adapter."""


def configuration(folder: Path, user: str, *, bind: str, port: int, memory_bytes: int) -> str:
    """Return mosquitto.conf for a fleet's folder, whose broker takes up to so much memory.

    At that limit Mosquitto 2.0.11 hangs up on who sends and on who would be sent something, and
    goes on so after a restart; docs/security.md says what helps.

    `message_size_limit` is left out on purpose: Mosquitto 2.0.11 answers a message over it with a
    reason code that MQTT 5 has not there, and clients hang up. It tells `max_packet_size` on
    connecting.
    """
    broker = folder / "broker"
    listener = f"listener {port} {bind}".rstrip()
    start = f"mosquitto -c {quote(str(folder / 'mosquitto.conf'))}"
    return f"""# Written by `aggregator init`. Start: {start}
user {user}
pid_file {broker}/mosquitto.pid
log_dest stderr
log_type error
log_type warning
log_type notice
connection_messages true

allow_anonymous false
acl_file {folder}/acl

# Messages for who is away survive a restart, and a crash but for the last seconds.
persistence true
persistence_location {broker}/
autosave_interval 5
persistent_client_expiration 14d

# Bounds: a misbehaving client costs this much and no more.
max_packet_size {PACKET_BYTES}
max_inflight_messages 32
max_queued_messages {QUEUED_MESSAGES}
max_queued_bytes {QUEUED_BYTES}
memory_limit {memory_bytes}

{listener}
cafile {folder}/ca.pem
certfile {folder}/server.pem
keyfile {folder}/server.key
crlfile {folder}/crl.pem
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
use_username_as_clientid true
"""


def access_rules() -> str:
    """Return the ACL file: the table of topics, with %u for the name in a certificate.

    Patterns hold for everybody, the aggregator too. Mosquitto warns of those without %u; there is
    no other way to let every user read a topic. The aggregator may read and write every topic: no
    rule keeps retained messages from a device's, so it clears them there (it can't sign for a
    device), and it has to find what the broker keeps to take a job off.
    """
    levels = ("job", "version", "number", "band", "index", "upload", "artifact", "file")
    mine = dict.fromkeys(levels, "+")
    rules = [f"user {AGGREGATOR}"]
    rules += [f"topic readwrite {topics.subscription(kind)}" for kind in topics.TABLE]
    rules.append("")
    for row in topics.TABLE.values():
        may = "write" if row.publisher == "device" else "read"
        rules.append(f"pattern {may} {row.pattern.format(device='%u', **mine)}")
    return "# Written by `aggregator init`: each device has its own topics.\n" + "\n".join(
        [*rules, ""]
    )
