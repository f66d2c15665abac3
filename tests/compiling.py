"""Python in a process of its own where Triton compiles: the interpreter cannot be switched off once it is in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(code: str, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in the repository's root, with environment variables of its own."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
