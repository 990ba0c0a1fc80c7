"""Holds this library's reader of headers against the safetensors library's."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, deserialize

from taskloom.merge.errors import CheckpointError
from taskloom.merge.header import read_header

Verdict = Literal["accepted", "refused", "name twice"]

# Longer messages do not help whoever reads them.
_LONGEST_MESSAGE = 2000


def file_of(header: bytes, body: int) -> bytes:
    """A safetensors file with that header and ``body`` bytes of tensors."""
    return struct.pack("<Q", len(header)) + header + bytes(body)


def compare(path: Path, raw: bytes) -> Verdict:
    """Read ``raw``, written to ``path``, with both readers; raises AssertionError where they differ in verdict or content.

    The one difference that is meant: a tensor name given twice, of which safetensors keeps the last in silence.
    """
    path.write_bytes(raw)
    try:
        theirs = {name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in deserialize(raw)}
        fault = None
    except SafetensorError as error:
        theirs, fault = {}, str(error)
    try:
        entries = read_header(path)
    except CheckpointError as error:
        message = str(error)
        assert message.startswith(f"{path}: "), f"the message does not begin with the file: {message}"
        assert len(message) < _LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:200]}"
        if message.startswith(f"{path}: header names "):
            return "name twice"
        assert fault is not None, f"safetensors accepts what we refuse: {message}"
        return "refused"
    assert fault is None, f"safetensors refuses what we accept: {fault}"
    ours = {name: (entry.dtype, entry.shape, raw[entry.offset : entry.offset + entry.nbytes]) for name, entry in entries.items()}
    assert ours == theirs, f"read differently: {ours} here, {theirs} there"
    return "accepted"
