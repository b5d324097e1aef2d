"""One Python program as several ranks of a process group on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def needs(backend: str) -> None:
    """Skip the test where ``backend`` is not compiled into torch."""
    known = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    if not dist.is_available() or not known[backend]():
        pytest.skip(f"this torch has no {backend}")


def run_ranks(program: Path, folder: Path, *arguments: str, count: int = 2, seconds: float = 150.0) -> list[dict[str, Any]]:
    """What each rank's last line of output holds, as JSON. All are stopped when one fails or ``seconds`` have passed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = lambda name: name.startswith(("INDUCTOR_EXT_", "TORCH_LOGS")) and name != "INDUCTOR_EXT_PREBUILT_DIR"  # noqa: E731
    kept = {name: value for name, value in os.environ.items() if not own(name)}  # conftest keeps the latter on a GPU only
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    # Ranks share what they compile, but each runs the rules on its own graphs.
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
    caches["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
    searched = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # packages may be there only
    ranks = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = {**kept, **shared, **own, **caches, "OMP_NUM_THREADS": "1", "PYTHONPATH": searched}
        with (folder / f"rank{rank}.txt").open("w") as output:
            command = [sys.executable, str(program), *arguments]
            ranks.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + seconds
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
    texts = [(folder / f"rank{rank}.txt").read_text() for rank in range(count)]
    codes = [rank.returncode for rank in ranks]
    ends = [f"rank {rank} ended with {code}:\n{text[-3000:]}" for rank, (code, text) in enumerate(zip(codes, texts))]
    assert codes == [0] * count, "\n".join(ends)
    return [json.loads(text.splitlines()[-1]) for text in texts]
