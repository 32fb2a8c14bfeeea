"""Programs that tests need and pip does not always bring."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

_REQUIRED = "MODELCACHE_REQUIRE_SERVERS"


def find_program(name: str, remedy: str) -> str:
    """Return the path of a program; without it the test is skipped, or fails where all servers are required.

    ``remedy`` says how to install it. Looked for beside the interpreter, on the path, and where Debian puts daemons.
    """
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is not None:
        return found
    lacking = f"{name} is not installed: {remedy}"
    if os.environ.get(_REQUIRED) == "1":
        pytest.fail(f"{lacking} ({_REQUIRED}=1)", pytrace=False)
    pytest.skip(lacking)
