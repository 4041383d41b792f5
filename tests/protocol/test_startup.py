"""The three commands answer --help without loading what only their work needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "numpy", "torch", "transformers", "onnxruntime", "pydantic", "pydantic_settings", "paho",
    "structlog", "cryptography", "psutil", "sqlite3", "asyncio", "fastapi", "rich",
)  # fmt: skip
PROGRAM = """
import json, sys
sys.argv = [sys.argv[1], *sys.argv[3:]]
from {module} import main
try:
    main()
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.mark.parametrize("module", ["aggregator.cli", "edge_client.cli", "device_profiles.cli"])
def test_help_loads_nothing_heavy(module: str) -> None:
    program = PROGRAM.format(module=module)
    command = [sys.executable, "-c", program, "x", "-", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    code, loaded = json.loads(ended.stderr.splitlines()[-1])
    assert code == 0 and "Usage:" in ended.stdout, ended.stderr
    assert [name for name in HEAVY if name in loaded] == []
