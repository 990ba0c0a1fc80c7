"""Coverage-guided fuzzing of the header reader against the safetensors library: ``make fuzz``, or

    python tests/robustness/fuzz_header.py CORPUS_FOLDER -max_total_time=300

An input's first byte says how the rest is read: even, as a whole file; odd, as a header, to which length and tensors are added.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["taskloom.merge.header", "taskloom.merge.strict_json", "taskloom.merge.input_files"]):
    from agreement import compare, file_of

from header_corners import CORNERS, TOKENS

_OFFSETS = re.compile(rb"data_offsets\"\s*:\s*\[\s*\d+\s*,\s*(\d{1,4})\s*\]")
_WHOLE_FILE, _HEADER = b"\0", b"\1"


def as_file(data: bytes) -> bytes:
    """The safetensors file that an input of the fuzzer stands for."""
    if not data or data[0] % 2 == 0:
        return data[1:]
    return file_of(data[1:], max((int(end) for end in _OFFSETS.findall(data[1:])), default=0))


def _write_seeds(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (header, body) in enumerate(CORNERS.values()):
        (folder / f"corner-{number:03d}").write_bytes(_HEADER + header)
        (folder / f"file-{number:03d}").write_bytes(_WHOLE_FILE + file_of(header, body))


def _write_dictionary(path: Path) -> None:
    path.write_text("\n".join('"' + "".join(f"\\x{byte:02x}" for byte in token.encode()) + '"' for token in TOKENS) + "\n")


def main() -> None:
    """Fuzz until the limit given on the command line; the first difference ends it with a traceback and a saved input."""
    corpus = Path(sys.argv[1])
    _write_seeds(corpus)
    _write_dictionary(corpus.with_name(corpus.name + ".dict"))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        path = Path(folder) / "fuzzed.safetensors"
        arguments = [sys.argv[0], f"-dict={corpus}.dict", "-timeout=10", "-rss_limit_mb=2048", "-max_len=4096", *sys.argv[1:]]
        atheris.Setup(arguments, lambda data: compare(path, as_file(data)) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
