#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs the Python blocks of docs/attend.md, one after the other in one namespace: run_document.py ATTEND"""
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
try:
    import fovea_attend  # noqa: F401, the blocks import it
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

os.environ["FOVEA_ATTEND"] = os.path.abspath(sys.argv[1])
text = (ROOT / "docs" / "attend.md").read_text()
blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M)
assert len(blocks) >= 6, f"{len(blocks)} Python blocks in docs/attend.md"
names = {}
for number, block in enumerate(blocks, 1):
    print(f"--- block {number}")
    exec(compile(block, f"docs/attend.md, Python block {number}", "exec"), names)
print(f"{len(blocks)} blocks ran")
