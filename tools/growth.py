#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws how time and memory grow with the length, from what `long_context --growth` wrote.

    build/release/bin/long_context --growth growth.json
    python3 tools/growth.py growth.json docs/growth.svg

Left: prefill of one head, both axes logarithmic; a line of slope 1 is time proportional to the length. Right: bytes of state after as many tokens.
"""
import json
import math
import sys

COLOURS = ("#1b6ca8", "#c1440e", "#2e7d32", "#6a1b9a", "#555555")
LABEL = {"softmax": "exact", "linear": "linear, elu + 1", "dijiang": "DiJiang", "windowed": "window 64 + 4 first + linear rest"}


def panel(lines, left, width, height, title, unit, values, ticks):
    top, bottom = 46, 52
    xs = [math.log2(x) for _, rows in values for x, _ in rows]
    ys = [math.log10(y) for _, rows in values for _, y in rows]
    x0, x1, y0, y1 = min(xs), max(xs), math.floor(min(ys)), math.ceil(max(ys))
    X = lambda v: left + (math.log2(v) - x0) / (x1 - x0) * width
    Y = lambda v: height - bottom - (math.log10(v) - y0) / (y1 - y0) * (height - top - bottom)
    lines.append(f'<text x="{left}" y="{top - 16}" font-size="13" fill="#222">{title}</text>')
    for v in range(y0, y1 + 1):
        lines.append(f'<line x1="{left}" x2="{left + width}" y1="{Y(10.0**v):.1f}" y2="{Y(10.0**v):.1f}" stroke="#e6e6e6"/>'
                     f'<text x="{left - 8}" y="{Y(10.0**v) + 4:.1f}" text-anchor="end" fill="#444">{ticks(10.0**v)}</text>')
    for e in range(10, 21, 2):
        if x0 <= e <= x1:
            lines.append(f'<text x="{X(2**e):.1f}" y="{height - bottom + 18}" text-anchor="middle" fill="#444">{2**e // 1024}k</text>')
    lines.append(f'<text x="{left + width / 2:.0f}" y="{height - 12}" text-anchor="middle" fill="#444">tokens</text>')
    for i, (name, rows) in enumerate(values):
        points = " ".join(f"{X(x):.1f},{Y(y):.1f}" for x, y in rows)
        lines.append(f'<polyline fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2" points="{points}"><title>{name}</title></polyline>')


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1]) as f:
        runs = json.load(f)
    W, H = 860, 400
    s = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="12">', f'<rect width="{W}" height="{H}" fill="#fff"/>']
    name = lambda r: LABEL.get(r["config"]["mechanism"], r["config"]["mechanism"])
    time = [(f'{name(r)} (slope {r["slope"]:.2f})', [(x["tokens"], x["seconds"]) for x in r["rows"]]) for r in runs]
    state = [(name(r), [(x["tokens"], x["state_bytes"]) for x in r["rows"]]) for r in runs]
    panel(s, 64, 330, H, "prefill, one head, one thread", "s", time, lambda v: f"{v:g} s" if v >= 1 else f"{v * 1e3:g} ms" if v >= 1e-3 else f"{v * 1e6:g} us")
    panel(s, 500, 330, H, "state, bytes", "B", state, lambda v: f"{v / 1e6:g} MB" if v >= 1e6 else f"{v / 1e3:g} kB")
    for i, (label, _) in enumerate(time):
        s.append(f'<text x="76" y="{64 + 16 * i}" fill="{COLOURS[i % len(COLOURS)]}">{label}</text>')
    s.append("</svg>")
    with open(sys.argv[2], "w") as f:
        f.write("\n".join(s) + "\n")


if __name__ == "__main__":
    main()
