"""No op keeps memory from one call to the next."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from contract import Case, Contract
from test_contract import CONTRACTS

_CALLS = 300
# The allocator's own count varies by what other threads do; a leak of one small object a call is far above this.
_SLACK = 16 * _CALLS


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")] + [
        (name, ctypes.c_size_t) for name in ("fordblks", "keepcost")
    ]


def _in_use() -> int:
    """Bytes that malloc has given out, mapped blocks included."""
    gc.collect()
    info = ctypes.CDLL(None).mallinfo2
    info.restype = _Mallinfo2
    found = info()
    return int(found.uordblks + found.hblkhd)


def _small(contract: Contract) -> Case:
    """The case whose tensors are smallest without being empty."""

    def entries(case: Case) -> int:
        leaves = torch.utils._pytree.tree_leaves((case.args, dict(case.kwargs)))
        return sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)) or 2**62

    return min(contract.cases(), key=entries)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33, whose allocator can be asked")
@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.op)
def test_repeated_calls_keep_nothing(contract: Contract) -> None:
    case = _small(contract)
    for _ in range(20):
        contract.run(case)
    before = _in_use()
    for _ in range(_CALLS):
        contract.run(case)
    assert _in_use() - before < _SLACK
