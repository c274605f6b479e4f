# SPDX-License-Identifier: MIT
"""The program `attend` as a Python function, and safetensors files in 20 lines of numpy.

    from fovea_attend import attend
    y = attend({"mechanism": "softmax", "causal": True}, q=q, k=k, v=v)        # numpy arrays [B, H, n, d]
    y["o"], y["lse"]

The program is looked for in $FOVEA_ATTEND, then in build/release/bin of this repository. Needs numpy and nothing else.
"""
import json
import os
import pathlib
import struct
import subprocess
import tempfile

import numpy as np

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
         "I32": np.int32, "I64": np.int64, "U32": np.uint32}
NAMES = {np.dtype(t): name for name, t in TYPES.items() if name != "BF16"}


class Refused(Exception):
    """attend ended with exit code 2; the text is its one line."""


class bfloat16(np.ndarray):
    """Marks a uint16 array as the bits of bf16 numbers; `bfloat16.of(x)` rounds to nearest even."""

    @staticmethod
    def of(x):
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(bfloat16)

    def to_float(self):
        return (np.asarray(self).astype(np.uint32) << 16).view(np.float32)


def read_safetensors(path):
    """{name: array} of a file."""
    raw = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    header.pop("__metadata__", None)
    out = {}
    for name, t in header.items():
        begin, end = t["data_offsets"]
        x = np.frombuffer(raw[8 + size + begin:8 + size + end], TYPES[t["dtype"]]).reshape(t["shape"])
        out[name] = x.view(bfloat16) if t["dtype"] == "BF16" else x
    return out


def write_safetensors(path, tensors):
    """Writes {name: array} to a file."""
    header, at, parts = {}, 0, []
    for name, x in tensors.items():
        dtype = "BF16" if isinstance(x, bfloat16) else NAMES[np.asarray(x).dtype]
        x = np.ascontiguousarray(x)
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
        parts.append(x.tobytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def program():
    found = os.environ.get("FOVEA_ATTEND")
    return found or str(pathlib.Path(__file__).resolve().parent.parent / "build" / "release" / "bin" / "attend")


def attend(config, *, threads=None, decode=None, binary=None, **tensors):
    """Runs one configured mechanism on numpy arrays; returns {"o": ..., "lse": ...}. Raises Refused with attend's own sentence."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f) for f in ("in.safetensors", "config.json", "out.safetensors")]
        write_safetensors(paths[0], tensors)
        pathlib.Path(paths[1]).write_text(json.dumps(config))
        command = [binary or program(), *paths]
        if threads is not None:
            command += ["--threads", str(threads)]
        if decode is not None:
            command += ["--decode", str(decode)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        written = sorted(os.listdir(folder))
        if run.returncode == 2:
            if len(written) != 2 or run.stderr.count("\n") != 1:
                raise AssertionError(f"a refusal must be one line and leave no file: {run.stderr!r}, {written}")
            raise Refused(run.stderr.strip().replace(folder + os.sep, ""))
        if run.returncode != 0 or len(written) != 3:
            raise RuntimeError(f"attend ended with {run.returncode}: {run.stderr.strip()}")
        return read_safetensors(paths[2])
