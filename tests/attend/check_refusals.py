#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Gives `attend` bad files, keys, tensors and arguments: each must end with exit code 2, one line on stderr that says what is wrong,
and no output file; an older output file must stay as it was.

    check_refusals.py ATTEND [--verbose]
"""
import json
import os
import pathlib
import stat
import struct
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent / "tools"))
try:
    import numpy as np
    from fovea_attend import read_safetensors, write_safetensors
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

rng = np.random.default_rng(1)


def normal(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


Q, K, V = normal(1, 4, 6, 8), normal(1, 2, 6, 8), normal(1, 2, 6, 5)
GOOD = {"q": Q, "k": K, "v": V}
CAUSAL = {"mechanism": "softmax", "causal": True}
PAGED = {"q": Q, "k_pages": normal(2, 2, 6, 8), "v_pages": normal(2, 2, 6, 5), "table": np.array([[1, 0]], np.int32), "lengths": np.array([9], np.int32)}


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# what is wrong: (input: tensors or bytes, configuration: object or text, further arguments, words of the line)
CASES = {
    # the safetensors file
    "empty file": (b"", CAUSAL, [], ["in.safetensors", "0 bytes long"]),
    "header longer than file": (raw({}, length=99), CAUSAL, [], ["in.safetensors", "header of 99 bytes"]),
    "header of 2^63 bytes": (raw({}, length=1 << 63), CAUSAL, [], ["in.safetensors", "9223372036854775808"]),
    "header is no JSON": (raw(b"hello"), CAUSAL, [], ["in.safetensors", "'{'"]),
    "truncated data": (raw({"q": entry(shape=[4], offsets=[0, 16])}, b"1234"), CAUSAL, [], ["in.safetensors", '"q"', "outside the file"]),
    "offsets reversed": (raw({"q": entry(offsets=[4, 0])}, b"1234"), CAUSAL, [], ['"q"', "end before they begin"]),
    "overlapping tensors": (raw({"q": entry(), "k": entry()}, b"1234"), CAUSAL, [], ["shares bytes"]),
    "shape overflows": (raw({"q": entry(shape=[1 << 33, 1 << 33], offsets=[0, 4])}, b"1234"), CAUSAL, [], ['"q"', "too large"]),
    "shape and bytes differ": (raw({"q": entry(shape=[2])}, b"1234"), CAUSAL, [], ['"q"', "needs 8"]),
    "unknown dtype": (raw({"q": entry(dtype="F8_E5M2", offsets=[0, 1])}, b"1"), CAUSAL, [], ['"F8_E5M2"', "BF16"]),
    "input missing": (None, CAUSAL, [], ["in.safetensors", "no such file"]),
    # q, k, v
    "no v": ({"q": Q, "k": K}, CAUSAL, [], ["in.safetensors", "tensor v is missing"]),
    "q of whole numbers": (GOOD | {"q": Q.astype(np.int32)}, CAUSAL, [], ["q is stored as i32"]),
    "q of two dimensions": (GOOD | {"q": Q[0, 0]}, CAUSAL, [], ["q is [6, 8] f32", "[B, H, n, d]"]),
    "ranks differ": (GOOD | {"k": K[0]}, CAUSAL, [], ["dimensions"]),
    "types differ": (GOOD | {"k": K.astype(np.float64)}, CAUSAL, [], ["one type"]),
    "widths differ": (GOOD | {"k": normal(1, 2, 6, 7)}, CAUSAL, [], ["q is 8 wide and k is 7"]),
    "keys and values differ": (GOOD | {"v": normal(1, 2, 7, 5)}, CAUSAL, [], ["k holds 6 keys and v holds 7"]),
    "heads do not divide": (GOOD | {"q": normal(1, 3, 6, 8)}, CAUSAL, [], ["3 heads", "multiple"]),
    "batches differ": (GOOD | {"q": normal(2, 4, 6, 8)}, CAUSAL, [], ["batch sizes"]),
    "width 0": ({"q": normal(1, 4, 6, 0), "k": normal(1, 2, 6, 0), "v": V}, CAUSAL, [], ["widths must be positive"]),
    "mask does not fit": (GOOD | {"mask": np.ones((1, 1, 6, 5), np.uint8)}, CAUSAL, [], ["mask", "[1, 1, 6, 5]"]),
    "mask of floats": (GOOD | {"mask": normal(1, 1, 6, 6)}, CAUSAL, [], ["mask", "u8 or bool"]),
    "sinks do not fit": (GOOD | {"sinks": normal(3)}, CAUSAL, [], ["sinks holds 3"]),
    "gradients that do not fit": (GOOD | {"do": normal(1, 4, 5, 5)}, CAUSAL, [], ["dout is [1, 4, 5, 5] f32", "[1, 4, 6, 5]"]),
    "gradients of steps": (GOOD | {"do": normal(1, 4, 6, 5)}, CAUSAL, ["--decode", "2"], ["tensor do", "--decode"]),
    # of later versions
    "gradients": (GOOD | {"do": normal(1, 4, 6, 5)}, CAUSAL | {"precision": "int8"}, [], ["arithmetic is int8", "gradients"]),
    "pages besides keys": (GOOD | {"k_pages": K, "table": np.zeros((1, 1), np.int32)}, CAUSAL, [], ["k or v was given besides pages"]),
    "pages without a table": ({"q": Q, "k_pages": K, "v_pages": V}, CAUSAL, [], ["tensor table is missing"]),
    "a page that is not there": (PAGED | {"table": np.array([[0, 2]], np.int32)}, CAUSAL, [], ["table[0, 1] is 2", "2 pages"]),
    "more tokens than pages": (PAGED | {"lengths": np.array([13], np.int32)}, CAUSAL, [], ["lengths[0] is 13", "room for 12"]),
    "pages for linear": (PAGED, {"mechanism": "linear"}, [], ["offered by softmax"]),
    "precision": (GOOD, CAUSAL | {"precision": "int4"}, [], ["config.json", "precision", '"int4"']),
    "skip": (GOOD, CAUSAL | {"skip": 1.5}, [], ["in.safetensors", "skip is 1.5", "below 1"]),
    "tensor that nobody knows": (GOOD | {"weights": V}, CAUSAL, [], ["in.safetensors", '"weights"', "not supported"]),
    "a linear map's weight for softmax": (GOOD | {"W": V}, CAUSAL, [], ['"W"', "not supported"]),
    # the configuration
    "configuration is no JSON": (GOOD, "{", [], ["config.json", "line 1, column 2"]),
    "configuration is a list": (GOOD, "[]", [], ["config.json", "object"]),
    "no mechanism": (GOOD, {}, [], ["config.json", "mechanism"]),
    "unknown mechanism": (GOOD, {"mechanism": "sofmax"}, [], ["config.json", '"sofmax"', "softmax"]),
    "unknown key": (GOOD, CAUSAL | {"windw": 4}, [], ["config.json", '"windw"', "window"]),
    "key twice": (GOOD, '{"mechanism": "softmax", "scale": 1, "scale": 2}', [], ["config.json", '"scale"', "twice"]),
    "number is NaN": (GOOD, '{"mechanism": "softmax", "scale": NaN}', [], ["config.json", "line 1"]),
    "number is infinite": (GOOD, '{"mechanism": "softmax", "scale": 1e999}', [], ["config.json", "overflow"]),
    "negative scale": (GOOD, CAUSAL | {"scale": -1}, [], ["config.json", "scale is -1"]),
    "window 0": (GOOD, CAUSAL | {"window": 0}, [], ["window is 0"]),
    "chunk 0": (GOOD, CAUSAL | {"chunk": 0}, [], ["chunk is 0"]),
    "chunk without causal": (GOOD, {"mechanism": "softmax", "chunk": 4}, [], ["chunk was given", "causal"]),
    "prefix with a window": (GOOD, CAUSAL | {"prefix": 2, "window": 4}, [], ["prefix was given"]),
    "align and offset": (GOOD, CAUSAL | {"align": "top_left", "offset": 2}, [], ["wanted one of them"]),
    "lengths beyond the keys": (GOOD | {"lengths": np.array([7], np.int32)}, CAUSAL, [], ["key_lengths[0] is 7"]),
    "a parent that comes later": (GOOD | {"parents": np.array([-1, 2, 0, 1, 1, 1], np.int32)}, CAUSAL, [], ["parents[1] is 2"]),
    "a tree of another size": (GOOD | {"parents": np.array([-1, 0], np.int32)}, CAUSAL, [], ["2 draft tokens", "n = 6"]),
    "t5 and slopes": (GOOD | {"t5": normal(32, 4), "slopes": normal(4)}, CAUSAL, [], ["slopes and t5"]),
    "t5 of other heads": (GOOD | {"t5": normal(32, 3)}, CAUSAL, [], ["3 heads"]),
    "relative without a middle": (GOOD | {"relative": normal(4, 9)}, CAUSAL, [], ["relative_left"]),
    "odd rope_width": (GOOD, CAUSAL | {"rope_theta": 10000, "rope_width": 7}, [], ["rope width is 7"]),
    "wide rope_width": (GOOD, CAUSAL | {"rope_theta": 10000, "rope_width": 10}, [], ["rope width is 10", "d = 8"]),
    "rope without theta": (GOOD, CAUSAL | {"rope_scaling": "yarn"}, [], ["go with rope_theta"]),
    "unknown rope_scaling": (GOOD, CAUSAL | {"rope_theta": 10000, "rope_scaling": "long"}, [], ['rope_scaling is "long"', '"llama3"']),
    "yarn without original": (GOOD, CAUSAL | {"rope_theta": 10000, "rope_scaling": "yarn", "rope_factor": 2}, [], ["rope original is 0"]),
    "positions without rope": (GOOD | {"positions": np.arange(6, dtype=np.int32)}, CAUSAL, [], ["turns nothing"]),
    "positions of another length": (GOOD | {"positions": np.arange(5, dtype=np.int32)}, CAUSAL | {"rope_theta": 10000}, [], ["positions is [5]"]),
    "too few rope_positions": (GOOD, CAUSAL | {"rope_theta": 10000, "rope_positions": 3}, [], ["table of 3 positions"]),
    "a ring without a window": (GOOD, CAUSAL | {"store": "ring"}, ["--decode", "2"], ["ring", "window"]),
    "window 2.5": (GOOD, CAUSAL | {"window": 2.5}, [], ["window is 2.5", "whole number"]),
    "causal is a text": (GOOD, {"mechanism": "softmax", "causal": "yes"}, [], ['causal is "yes"', "true or false"]),
    "unknown choice": (GOOD, CAUSAL | {"align": "left"}, [], ['align is "left"', '"top_left"']),
    "value is null": (GOOD, '{"mechanism": "softmax", "scale": null}', [], ["config.json", '"scale"', "null"]),
    "value is an object": (GOOD, CAUSAL | {"scale": {"a": 1}}, [], ["config.json", '"scale"', "object"]),
    "nested deep": (GOOD, "[" * 100000, [], ["config.json", "nested"]),
    # arguments
    "threads 0": (GOOD, CAUSAL, ["--threads", "0"], ["--threads"]),
    "threads a word": (GOOD, CAUSAL, ["--threads", "many"], ["--threads"]),
    "decode negative": (GOOD, CAUSAL, ["--decode", "-1"], ["--decode"]),
    "decode beyond the tokens": (GOOD, CAUSAL, ["--decode", "7"], ["--decode 7", "6 tokens"]),
    "decode without causal": (GOOD, {"mechanism": "softmax"}, ["--decode", "2"], ["--decode 2", "causal"]),
    "unknown argument": (GOOD, CAUSAL, ["--fast"], ["--fast"]),
}


def ask(attend, folder, case):
    """The sentence that says what went wrong with a refusal, or None."""
    tensors, config, arguments, words = case
    source, settings, target = (folder / n for n in ("in.safetensors", "config.json", "out.safetensors"))
    if isinstance(tensors, bytes):
        source.write_bytes(tensors)
    elif tensors is not None:
        write_safetensors(source, tensors)
    settings.write_text(config if isinstance(config, str) else json.dumps(config))
    for old in (None, b"an older result"):
        if old is not None:
            target.write_bytes(old)
        run = subprocess.run([attend, source, settings, target, *arguments], capture_output=True, text=True, timeout=60)
        line = run.stderr
        if run.returncode != 2:
            return f"exit code {run.returncode}: {line or 'accepted'}", line
        if line.count("\n") != 1 or not line.endswith("\n") or run.stdout:
            return f"wanted one line on stderr and nothing else: {line!r} {run.stdout!r}", line
        missing = [w for w in words if w not in line]
        if missing:
            return f"the line does not say {missing}: {line}", line
        if target.exists() != (old is not None) or (old is not None and target.read_bytes() != old):
            return "the output file was touched", line
        left = {p.name for p in folder.iterdir()} - {"in.safetensors", "config.json", "out.safetensors"}
        if left:
            return f"files were left behind: {left}", line
    return None, line


def output_problems(attend, folder):
    """Targets that cannot be written."""
    source, settings = folder / "in.safetensors", folder / "config.json"
    write_safetensors(source, GOOD)
    settings.write_text(json.dumps(CAUSAL))
    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    targets = {"a folder": folder, "a missing folder": folder / "none" / "out", "a device": "/dev/null"}
    if os.geteuid() != 0:  # root may write anywhere
        targets["a closed folder"] = closed / "out"
    for what, target in targets.items():
        run = subprocess.run([attend, source, settings, target], capture_output=True, text=True, timeout=60)
        good = run.returncode == 2 and run.stderr.count("\n") == 1 and str(target) in run.stderr
        yield what, None if good else f"exit code {run.returncode}: {run.stderr!r}"
    run = subprocess.run([attend, source, settings, source], capture_output=True, text=True, timeout=60)
    good = run.returncode == 0 and set(read_safetensors(source)) == {"o", "lse"}
    yield "the input as the target (allowed: it is read whole first)", None if good else f"exit code {run.returncode}: {run.stderr!r}"
    run = subprocess.run([attend], capture_output=True, text=True, timeout=60)
    yield "no arguments", None if run.returncode == 2 and run.stderr.count("\n") == 1 else f"exit code {run.returncode}: {run.stderr!r}"


def main():
    attend, verbose = sys.argv[1], "--verbose" in sys.argv
    failed = 0
    for what, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            error, line = ask(attend, pathlib.Path(folder), case)
            if verbose and not error:
                print(f"ok    {what}: {line.replace(folder + os.sep, '').strip()}")
        if error:
            failed += 1
            print(f"FAIL  {what}: {error}")
    with tempfile.TemporaryDirectory() as folder:
        for what, error in output_problems(attend, pathlib.Path(folder)):
            failed += error is not None
            if error or verbose:
                print(f"{'FAIL' if error else 'ok'}    {what}: {error or 'as it should be'}")
    print(f"{len(CASES)} bad questions, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
