"""Values that another thread changes between an op's passes, as a mapped file that is cut short does, give a wrong result and no crash."""

from __future__ import annotations

import subprocess
import sys

_HAMMER = """
import threading, time, torch, taskloom
torch.set_num_threads(1)
tied = torch.ones(1 << 19)
tied[::3], tied[1::7] = 2.0, 0.5
values, other, running = tied.clone(), torch.zeros_like(tied), [True]
def change():
    while running[0]:
        values.copy_(other)
        values.copy_(tied)
thread = threading.Thread(target=change)
thread.start()
end = time.monotonic() + 1.5
rounds = 0
while time.monotonic() < end or rounds < 3:
    taskloom.magnitude_threshold(values, density=0.2)
    taskloom.magnitude_mask(values, density=0.45)
    taskloom.magnitude_mask(values.view(4, -1), density=0.45, scope="row")
    taskloom.magnitude_threshold([values[:300000], values[300000:]], density=0.2)
    taskloom.sparse_merge(None, [values, values], select="magnitude", density=0.3, elect="sign_sum", combine="disjoint_mean", rescale="l1")
    rounds += 1
running[0] = False
thread.join()
"""


def test_searches_end_with_their_range() -> None:
    done = subprocess.run([sys.executable, "-c", _HAMMER], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
