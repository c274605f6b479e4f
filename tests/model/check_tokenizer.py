#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tokenises 100 kB of mixed text with `engine tokens` and compares every id with the Python package `tokenizers`.

  check_tokenizer.py ENGINE --model DIR      exit code 0, 1, or 77 where DIR has no model
  check_tokenizer.py --write --model DIR     writes the ids that are compared with; needs `pip install tokenizers`

tests/data/mixed_text.txt holds English, code, numbers, Japanese and eleven other languages, emoji with joiners, runs of blanks of every kind, control
characters that the vocabulary lacks, random characters and special tokens; mixed_text.ids its ids, u16 little-endian.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile
from array import array

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"
TEXT, IDS = DATA / "mixed_text.txt", DATA / "mixed_text.ids"


def numbers(data, code):
    a = array(code)
    a.frombytes(data)
    if sys.byteorder == "big":
        a.byteswap()
    return list(a)


def run(engine, model, text, out):
    return subprocess.run([engine, "tokens", "--model", str(model), "--text", str(text), "--out", str(out)], capture_output=True, text=True, check=False)


def write(model):
    from tokenizers import Tokenizer
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT.read_bytes().decode("utf-8")).ids
    IDS.write_bytes(b"".join(i.to_bytes(2, "little") for i in ids))
    print(f"{IDS}: {len(ids)} ids of {TEXT.stat().st_size} bytes")


def check(engine, model, scratch):
    """-> sentences, empty if all is well."""
    want, out = numbers(IDS.read_bytes(), "H"), scratch / "ids.bin"
    done = run(engine, model, TEXT, out)
    if done.returncode:
        return [f"engine tokens failed with {done.returncode}: {done.stderr.strip()}"]
    got = numbers(out.read_bytes(), "I")
    if got != want:
        at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
        return [f"{len(got)} ids, wanted {len(want)}; the first difference is at {at}: {got[at:at + 5]}, wanted {want[at:at + 5]}"]
    faults = []
    broken = scratch / "broken.txt"
    broken.write_bytes(b"caf\xe9 \xf0\x9f\x98 \xed\xa0\x80 end\xe2\x82")  # read as Python's errors="replace" does, but a mark for each byte
    plain = scratch / "plain.txt"
    plain.write_text("caf\ufffd \ufffd\ufffd\ufffd \ufffd\ufffd\ufffd end\ufffd\ufffd", encoding="utf-8")
    for name in (broken, plain):
        done = run(engine, model, name, name.with_suffix(".bin"))
        if done.returncode:
            faults.append(f"{name.name}: {done.stderr.strip()}")
    if not faults and broken.with_suffix(".bin").read_bytes() != plain.with_suffix(".bin").read_bytes():
        faults.append("bytes that are no UTF-8 are not read as U+FFFD")
    bad = scratch / "bad"
    bad.mkdir()
    for text, wanted in (("{}", "tokenizer.json"), ('{"model": {"type": "Unigram"}}', "BPE"), ("[1", "tokenizer.json")):
        (bad / "tokenizer.json").write_text(text)
        done = run(engine, bad, TEXT, out)
        if done.returncode != 2 or wanted not in done.stderr or done.stderr.count("\n") != 1:
            faults.append(f"tokenizer.json {text!r}: exit code {done.returncode}, {done.stderr.strip()!r}; wanted 2 and one line with {wanted!r}")
    return faults


def main():
    parser = argparse.ArgumentParser(description="compares the engine's tokeniser with the reference")
    parser.add_argument("engine", nargs="?")
    parser.add_argument("--model", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if not (args.model / "tokenizer.json").is_file():
        print(f"skipped: {args.model} holds no model (tools/export_model.py writes one)")
        return 77
    if args.write:
        return write(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        faults = check(args.engine, args.model, pathlib.Path(scratch))
    for fault in faults:
        print(f"check_tokenizer: {fault}")
    print("all ids are equal" if not faults else f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
