"""Python programs in processes of their own, with a cache directory of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` from a file in ``folder`` (Dynamo needs a source file); Inductor's cache is ``folder/cache``."""
    script = folder / "program.py"
    script.write_text(textwrap.dedent(code))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("INDUCTOR_EXT_", "TORCH_LOGS"))}
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**kept, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done
