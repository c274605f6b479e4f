#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draws exact attention under the roofs of the machine, from what `bench` wrote.

    build/release/bin/bench --benchmark_filter='softmax|decode' --benchmark_out=bench.json
    python3 tools/roofline.py bench.json docs/roofline.svg

Across: useful flops for each byte of q, k, v and out read or written once. Up: GFLOP/s. The roofs are the FMA rate and the stream-read rate that `bench`
measured beside each case (their medians). Exact attention only; steps and decoding count 2 (d + e) flops for each query head and key.
"""
import json
import math
import re
import statistics
import sys

SIZE = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "i8_by_row": 1, "i8_by_group": 1}
NAME = re.compile(r"^(prefill/softmax|decode/(?:contiguous|pages_of_\d+))/(\w+?)(?:/(\w+))?/D(\d+)(?:e(\d+))?/N(\d+)/H(\d+)/G(\d+)(?:/n(\d+))?$")


def points(path):
    """(label, kind, flops / byte, GFLOP/s, of_peak or None, of_stream or None, GB/s)"""
    with open(path) as f:
        runs = json.load(f)["benchmarks"]
    for run in runs:
        found = NAME.match(run["name"])
        if not found or "error_occurred" in run:
            continue
        where, kind, variant, d, e, N, H, G, n = found.groups()
        d, N, H, G = int(d), int(N), int(H), int(G)
        e, n, decode = int(e or d), int(n or 1), where.startswith("decode")
        seconds = run["real_time"] * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3}[run["time_unit"]]
        size = SIZE[kind]
        if decode:
            flops, data = 2.0 * H * n * N * (d + e), G * N * (d + e) * size
        else:
            share = 1.0 if "full" in variant else 0.5
            if variant.startswith("window"):
                w = int(variant[6:])
                share = (w * N - w * (w - 1) / 2) / N / N
            flops, data = 2.0 * H * N * N * (d + e) * share, (H * N * (d + e) + G * N * (d + e)) * size
        yield run["name"], "decode" if decode else variant, flops / data, flops / seconds / 1e9, run.get("of_peak"), run.get("of_stream"), data / seconds / 1e9


def draw(found, out):
    peak = statistics.median(g / p for _, _, _, g, p, _, _ in found if p)
    stream = statistics.median(b / s for _, _, _, _, _, s, b in found if s)
    W, H, left, top, right, bottom = 860, 460, 64, 28, 24, 52
    x0, x1, y0, y1 = math.log10(0.2), math.log10(4000), math.log10(1), math.log10(400)
    X = lambda v: left + (math.log10(v) - x0) / (x1 - x0) * (W - left - right)
    Y = lambda v: H - bottom - (math.log10(v) - y0) / (y1 - y0) * (H - top - bottom)
    s = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="12">',
         f'<rect width="{W}" height="{H}" fill="#fff"/>']
    for v in (0.25, 1, 4, 16, 64, 256, 1024):
        s.append(f'<line x1="{X(v):.1f}" x2="{X(v):.1f}" y1="{top}" y2="{H - bottom}" stroke="#e6e6e6"/><text x="{X(v):.1f}" y="{H - bottom + 18}" text-anchor="middle" fill="#444">{v:g}</text>')
    for v in (1, 3, 10, 30, 100, 300):
        s.append(f'<line x1="{left}" x2="{W - right}" y1="{Y(v):.1f}" y2="{Y(v):.1f}" stroke="#e6e6e6"/><text x="{left - 8}" y="{Y(v) + 4:.1f}" text-anchor="end" fill="#444">{v:g}</text>')
    ridge = peak / stream
    s.append(f'<polyline fill="none" stroke="#222" stroke-width="2" points="{X(0.2):.1f},{Y(max(1, 0.2 * stream)):.1f} {X(ridge):.1f},{Y(peak):.1f} {W - right},{Y(peak):.1f}"/>')
    s.append(f'<text x="{X(ridge) + 12:.1f}" y="{Y(peak) - 8:.1f}" fill="#222">fused multiply-adds: {peak:.0f} GFLOP/s, one thread</text>')
    s.append(f'<text transform="translate({X(0.9):.1f} {Y(0.9 * stream) - 10:.1f}) rotate(-27)" fill="#222">reading: {stream:.1f} GB/s</text>')
    colour = {"decode": "#c2410c", "full": "#1d4ed8", "causal": "#0f766e", "window512": "#7c3aed", "strided_full": "#64748b", "strided_causal": "#64748b"}
    for name, kind, intensity, gflops, *_ in found:
        s.append(f'<circle cx="{X(intensity):.1f}" cy="{Y(gflops):.1f}" r="4" fill="{colour.get(kind, "#64748b")}" fill-opacity="0.75"><title>{name}: {gflops:.0f} GFLOP/s</title></circle>')
    for i, (kind, text) in enumerate((("decode", "decoding"), ("full", "prefill, full"), ("causal", "prefill, causal"), ("window512", "window of 512"), ("strided_full", "[n, H, d] strides"))):
        s.append(f'<circle cx="{W - 170}" cy="{H - bottom - 100 + 18 * i}" r="4" fill="{colour[kind]}"/><text x="{W - 160}" y="{H - bottom - 96 + 18 * i}" fill="#222">{text}</text>')
    s.append(f'<text x="{(left + W - right) / 2}" y="{H - 14}" text-anchor="middle" fill="#222">useful flops for each byte of q, k, v, out</text>')
    s.append(f'<text x="{left}" y="16" fill="#222">GFLOP/s</text></svg>')
    with open(out, "w") as f:
        f.write("\n".join(s) + "\n")
    print(f"{len(found)} cases, peak {peak:.0f} GFLOP/s, reading {stream:.1f} GB/s: {out}")


if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
cases = list(points(sys.argv[1]))
if not any(c[4] for c in cases) or not any(c[5] for c in cases):
    sys.exit(f"{sys.argv[1]}: wanted prefill/softmax and decode cases; run bench with --benchmark_filter='softmax|decode'")
draw(cases, sys.argv[2])
