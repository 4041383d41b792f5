"""What the systemd units of devices and the aggregator have in common."""

from __future__ import annotations

ADDRESS_FAMILIES = "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX"
SYSTEM_CALLS = "SystemCallFilter=@system-service"
SANDBOX = f"""NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
ProtectProc=invisible
{ADDRESS_FAMILIES}
{SYSTEM_CALLS}
UMask=0077"""
"""For system services: what is not named in ReadWritePaths is read-only."""

EVERYWHERE = """LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM"""
"""For services of a user too, whose manager may not make mount namespaces."""
OF_THE_SYSTEM = """AmbientCapabilities=
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RemoveIPC=yes
KeyringMode=private"""
"""For system services, beside SANDBOX."""


def quoted(word: object) -> str:
    """Return a path as systemd reads it back."""
    text = str(word).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"'


def argument(word: object) -> str:
    """Return an argument of a command as systemd reads it back, where variables are replaced."""
    return quoted(word).replace("$", "$$")
