"""Hypothesis strategies for damaged and hostile inputs: safetensors files, JSON, and whole model folders."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from header_corners import CORNERS, TOKENS
from hypothesis import strategies as st

from taskloom.merge.header import BITS, MAX_HEADER_BYTES, tensor_bytes

SECRET = b"what no merge may copy"

_NAMES = ("w", "v", "model.layers.0.w", "model.layers.99999999999.w", "größe", "", "a b", "lm_head.weight", "__metadata__", "a\0", "../x")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[-+.\w]+|[][{},:]')
_FAR = (0, 1, 7, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 2**31, 2**32, 2**63, 2**64 - 1)

_Edit = Callable[[bytes], bytes]
_ANYWHERE = st.integers(0, 1 << 16)


def _replace_token(number: int, token: str) -> _Edit:
    def edit(raw: bytes) -> bytes:
        found = list(_TOKEN.finditer(raw))
        if not found:
            return token.encode()
        match = found[number % len(found)]
        return raw[: match.start()] + token.encode() + raw[match.end() :]

    return edit


def _splice(position: int, removed: int, put: bytes) -> _Edit:
    def edit(raw: bytes) -> bytes:
        at = position % (len(raw) + 1)
        return raw[:at] + put + raw[at + removed :]

    return edit


def _repeat(position: int, length: int) -> _Edit:
    def edit(raw: bytes) -> bytes:
        at = position % (len(raw) + 1)
        return raw[: at + length] + raw[at:]

    return edit


EDITS: st.SearchStrategy[list[_Edit]] = st.lists(
    st.one_of(
        st.builds(_replace_token, st.integers(0, 60), st.sampled_from(TOKENS)),
        st.builds(_splice, _ANYWHERE, st.just(1), st.binary(min_size=1, max_size=1)),
        st.builds(_splice, _ANYWHERE, st.integers(0, 40), st.sampled_from((b"", b"\xff", b"\0\0", b"\xed\xa0\x80", b" " * 9))),
        st.builds(_repeat, _ANYWHERE, st.integers(1, 60)),
    ),
    max_size=3,
)


def edited(raw: bytes, edits: list[_Edit]) -> bytes:
    """``raw`` after one edit and the next."""
    for edit in edits:
        raw = edit(raw)
    return raw


_TENSORS = st.lists(
    st.tuples(st.sampled_from(_NAMES), st.sampled_from(list(BITS)), st.lists(st.sampled_from((0, 1, 2, 3, 8)), max_size=3)), max_size=3
)


def _laid_out(tensors: list[tuple[str, str, list[int]]]) -> tuple[bytes, int]:
    """A good header (where every tensor fills whole bytes and names differ), and the size of the body."""
    header: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + tensor_bytes(dtype, tuple(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return json.dumps(header, ensure_ascii=False).encode(), end


_HEADERS = st.one_of(_TENSORS.map(_laid_out), st.sampled_from(list(CORNERS.values())))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """The bytes of a file that is, or nearly is, or once was, a safetensors file."""
    header, body = draw(_HEADERS)
    damage = draw(st.sampled_from(("none", "header", "header", "header", "header", "length", "body", "cut")))
    if damage == "header":
        header = edited(header, draw(EDITS))
    length = len(header)
    if damage == "length":
        length = draw(st.one_of(st.sampled_from(_FAR), st.integers(-9, 9).map(lambda by: max(0, len(header) + by))))
    if damage == "body":
        body = max(0, body + draw(st.integers(-9, 9)))
    raw = struct.pack("<Q", length) + header + bytes(body)
    return raw[: draw(_ANYWHERE) % (len(raw) + 1)] if damage == "cut" else raw


_LEAVES = st.sampled_from(
    (
        *('"w"', '""', '"model.safetensors"', '"../secret"', '"/etc/passwd"', '"a\\\\b"', '"a\\u0000b"', '"\\ud800"', '".."', '"."'),
        *("null", "true", "false", "0", "-0", "-1", "1e999", "NaN", "-Infinity", "9" * 25, "1" * 5000, "[" * 130 + "]" * 130),
        *('"one.safetensors"', '"two.safetensors"', '"float32"', '"' + "x" * 5000 + '"', '"\\u00e9"', "nul", "'a'", "\ufeff", "[" * 9999),
    )
)
_KEYS = st.sampled_from(
    (
        *('"weight_map"', '"metadata"', '"w"', '"v"', '"torch_dtype"', '"dtype"', '"tie_word_embeddings"', '"text_config"', '""'),
        *('"total_size"', '"\\ud800"', '"model_type"', '"quantization_config"'),
    )
)


def _object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"


JSON = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(st.tuples(_KEYS, inner), max_size=3).map(_object),
        st.lists(inner, max_size=3).map(lambda items: "[" + ",".join(items) + "]"),
    ),
    max_leaves=6,
)
_WEIGHT_MAPS = st.lists(st.tuples(_KEYS, _LEAVES), max_size=4).map(lambda pairs: '{"weight_map":' + _object(pairs) + "}")


@dataclass(frozen=True)
class Link:
    """A symbolic link; ``{outside}`` and ``{folder}`` in its target stand for folders of the test."""

    target: str


@dataclass(frozen=True)
class Special:
    """A named pipe or a folder where a file should be."""

    kind: str


Content = bytes | Link | Special

_TARGETS = (
    *("{outside}/secret", "{outside}/secret.safetensors", "../outside/secret", "nowhere", "config.json", "{folder}/model.safetensors"),
    *("/dev/zero", "/proc/self/mem", ".", "..", "/", "a" * 300, "{folder}/loop"),
)
_NOT_FILES = st.one_of(st.sampled_from(_TARGETS).map(Link), st.sampled_from(("pipe", "folder", "socket")).map(Special))


def _model(*tensors: tuple[str, str, list[int]]) -> bytes:
    header, size = _laid_out(list(tensors))
    return struct.pack("<Q", len(header)) + header + bytes(size)


_W, _V = ("w", "F32", [2, 3]), ("v", "BF16", [4])
_MODELS = (_model(_W), _model(_V), _model(_W, ("v", "BF16", [5])), _model(("w", "I8", [2, 3])), _model(_W, _V, ("x", "F32", [])))
_SIDE: dict[str, Content] = {"config.json": b'{"model_type":"toy","torch_dtype":"float32"}', "tokenizer.json": b"{}"}
GOOD: dict[str, Content] = {"model.safetensors": _model(_W, _V), **_SIDE}
SHARDED: dict[str, Content] = {
    "one.safetensors": _model(_W),
    "two.safetensors": _model(_V),
    "model.safetensors.index.json": b'{"metadata":{},"weight_map":{"w":"one.safetensors","v":"two.safetensors"}}',
    **_SIDE,
}
_OTHERS = (
    *("model.safetensors", "model.safetensors.index.json", "other.safetensors", "adapter_model.safetensors", "adapter_config.json", "x.py"),
    *("pytorch_model.bin", "tokenizer.json", "merges.txt", "1_Pooling", "LICENSE", "größe.json", "loop", "merge_report.json", "README.md"),
)


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Content]:
    """A model folder, whole or in shards, of which a few files are damaged, removed, replaced or added."""
    content = dict(draw(st.sampled_from((GOOD, SHARDED))))
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from((*content, *_OTHERS)))
        old = content.get(name, b"")
        change = draw(st.sampled_from(("edit", "edit", "edit", "replace", "replace", "file", "json", "remove", "other")))
        if change == "remove":
            content.pop(name, None)
        elif change == "replace":
            content[name] = draw(_NOT_FILES)
        elif change == "other":
            content[name] = draw(st.sampled_from(_MODELS))
        elif change == "json" or (change == "file" and name.endswith(".json")):
            maps = _WEIGHT_MAPS if name.endswith("index.json") else JSON
            content[name] = draw(st.one_of(maps, JSON)).encode("utf-8", "surrogatepass")
        elif change == "file":
            content[name] = draw(files())
        elif isinstance(old, bytes):
            content[name] = edited(old, draw(EDITS))
    return content


def write_folder(folder: Path, content: dict[str, Content], outside: Path) -> Path:
    """Make the folder on disk."""
    import socket

    folder.mkdir()
    for name, what in content.items():
        path = folder / name
        if isinstance(what, bytes):
            path.write_bytes(what)
        elif isinstance(what, Link):
            path.symlink_to(what.target.format(outside=outside, folder=folder))
        elif what.kind == "pipe":
            os.mkfifo(path)
        elif what.kind == "folder":
            path.mkdir()
        else:
            # A socket's path has 107 bytes at most, the folder's own may have more.
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(f"/proc/self/fd/{descriptor}/{name}")
            finally:
                os.close(descriptor)
    return folder


def write_outside(folder: Path) -> Path:
    """A folder of files that belong to no model."""
    folder.mkdir()
    (folder / "secret").write_bytes(SECRET)
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(SECRET)], "data_offsets": [0, len(SECRET)]}}).encode()
    (folder / "secret.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + SECRET)
    return folder
