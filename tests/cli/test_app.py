"""The command itself: what it answers without a subcommand."""

import re
import subprocess
import sys
from importlib.metadata import version


def test_version() -> None:
    asked = subprocess.run([sys.executable, "-m", "gradstore", "--version"], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == version("gradstore")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", asked.stdout.strip())
