"""Every op once, on small odd sizes, against the reference: what compute-sanitizer watches, and the first thing that must work.

``python smoke.py --device cuda [--few]``: ``--few`` leaves the set that the slow tools can take.
"""

from __future__ import annotations

import argparse

import torch
from attempt import Attempt
from contest import gate
from measure import BACKENDS, ROWS, obstacle

ENTRIES, FEW_ENTRIES = 1 << 15, 1 << 11
_FEW = ("pack_mask", "masked_update_", "magnitude_threshold", "magnitude_mask", "masked_compress", "sparse_merge", "masked_adamw_")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every op once and compare it with the reference.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--few", action="store_true")
    given = parser.parse_args()
    device = torch.device(given.device)
    failed = ran = 0
    for row in ROWS:
        if given.few and row.op not in _FEW:
            continue
        for backend in BACKENDS:
            reason = obstacle(row.op, backend, device)
            name = f"{row.op}{', ' if row.use else ''}{row.use} ({backend})"
            if reason is not None:
                print(f"not served: {name}: {reason}", flush=True)
                continue
            # The set goes on, so that one run tells of every op that is wrong.
            with Attempt() as attempt:
                gate(row.make(device, row.dtypes[0], FEW_ENTRIES if given.few else ENTRIES), backend)
            if attempt.error is not None:
                failed += 1
                print(f"FAILED: {name}: {attempt.reason}", flush=True)
                continue
            ran += 1
            print(f"right: {name}", flush=True)
    print(f"{ran} right, {failed} FAILED")
    raise SystemExit(1 if failed or not ran else 0)


if __name__ == "__main__":
    main()
