"""Every rule's own examples on the GPU: the graph before and after the rule, run eagerly on the same inputs, byte for byte.

python -m benchmarks.kernels.verify_examples [--out FILE.json]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import timing

import inductor_ext
from inductor_ext import registry


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="verify_examples.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for rule in registry.rules():
        modes = {other.name: "off" for other in registry.rules()}
        for example in rule.matches:
            torch._dynamo.reset()
            torch.manual_seed(0)
            row: dict[str, Any] = {"rule": rule.name, "example": example.name}
            try:
                found = inductor_ext.verify(
                    example.fn, *example.inputs("cuda"), rules={**modes, **example.modes(rule.name)}, end_to_end=False,
                    dynamic=example.dynamic or None,
                )  # fmt: skip
                check = next((check for check in found.checks if check.rule == rule.name), None)
                row.update(ok=found.ok and check is not None and check.rewrites == example.count)
                if check is not None:
                    row.update(
                        elements=check.elements, differing=check.differing, max_abs=check.max_abs, where=check.where
                    )
            except Exception as error:
                row.update(ok=False, error=f"{type(error).__name__}: {error}"[:500])
            rows.append(row)
            print(row, flush=True)
    timing.write_json(options.out, {"what": "rule examples on the GPU, bytes against eager nodes", "rows": rows})
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} equal")


if __name__ == "__main__":
    main()
