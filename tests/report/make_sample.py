#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes invented data for the page of `compare`. TEST DATA: none of these numbers was measured.

  make_sample.py --json OUT.json                  about 40 settings on 4 inputs, pictures of 64 x 64
  make_sample.py --small --json OUT.json          12 settings on 2 inputs, pictures of 16 x 16 (this is sample_report.json)
  make_sample.py --html OUT.html [--from X.json]  fills the page's template, as the C++ program does

The spread follows what such mechanisms are known to do (untrained maps near or above 100 %, windows good in quiet layers
and bad in diffuse ones), so that the page is tried with crowded, extreme and missing values. The same options give the same bytes.
"""
import argparse
import json
import math
import pathlib
import random

TEMPLATE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "compare" / "report_template.html"
TOKEN = "/*FOVEA_REPORT_JSON*/null"

INPUTS = [  # model, layer, tokens, heads, kv heads, width, causal, how much a window misses, how hard a linear map finds it
    ("SmolLM2-135M-Instruct", 0, 1024, 3, 1, 64, True, 9.0, 0.62),
    ("SmolLM2-135M-Instruct", 14, 1024, 9, 3, 64, True, 1.0, 1.00),
    ("SmolLM2-135M-Instruct", 29, 1024, 3, 1, 64, True, 0.8, 1.08),
    ("all-MiniLM-L6-v2", 2, 512, 6, 6, 32, False, 4.0, 0.85),
]
U = "untrained"
# mechanism, family, label, trained, median error, time share, step share, state share, recall, causal only / full only / "", note
SETTINGS = [
    ("softmax", "exact", "exact", "", 3e-7, 1.0, 1.0, 1.0, None, "", "Online softmax in tiles; the yardstick."),
    ("softmax", "window", "window 32 + 4 sinks", "", .090, .075, .045, .035, .86, "", ""),
    ("softmax", "window", "window 64", "", .60, .11, .08, .0625, .55, "", "No sink tokens."),
    ("softmax", "window", "window 64 + 4 sinks", "", .051, .13, .085, .0664, .92, "", ""),
    ("softmax", "window", "window 128 + 4 sinks", "", .031, .23, .15, .129, .95, "", ""),
    ("softmax", "window", "window 256 + 4 sinks", "", .015, .43, .28, .254, .974, "", ""),
    ("softmax", "window", "window 512 + 4 sinks", "", .0042, .74, .53, .504, .991, "", ""),
    ("linear", "linear", "elu + 1", U, .93, .105, .034, .064, None, "", ""),
    ("linear", "linear", "ReLU(Wx + b), r = 32", U, 1.04, .074, .021, .032, None, "", "T2R at initialisation."),
    ("linear", "linear", "ReLU(Wx + b), r = 64", U, 1.01, .108, .035, .064, None, "", "T2R at initialisation."),
    ("linear", "linear", "Hedgehog, r = 128", U, 1.06, .19, .068, .127, None, "", "At initialisation."),
    ("linear", "linear", "FAVOR+, r = 64", U, 1.15, .13, .041, .064, None, "", ""),
    ("linear", "linear", "FAVOR+, r = 128", U, 1.14, .21, .076, .127, None, "", ""),
    ("linear", "linear", "FAVOR+, r = 256", U, 1.12, .39, .150, .254, None, "", ""),
    ("linear", "linear", "Based, Taylor, r = 153", U, .97, .25, .086, .150, None, "", ""),
    ("linear", "linear", "cosFormer", U, 1.02, .20, .066, .127, None, "", ""),
    ("linear", "linear", "elu + 1, decay 31/32", U, .71, .118, .036, .064, None, "causal", "Scalar decay, no training."),
    ("linear", "linear", "delta rule", U, 1.78, .30, .055, .063, None, "causal", ""),
    ("linear", "linear", "gated delta rule", U, 1.34, .34, .060, .063, None, "causal", ""),
    ("dijiang", "dijiang", "DiJiang, released form", U, .92, .15, .042, .064, None, "", ""),
    ("dijiang", "dijiang", "DiJiang, paper form", U, .94, .15, .042, .064, None, "", ""),
    ("dijiang", "dijiang", "DiJiang, unbiased, MC, r = 64", U, 1.19, .155, .044, .064, None, "", ""),
    ("dijiang", "dijiang", "DiJiang, unbiased, QMC, r = 64", U, 1.16, .155, .044, .064, None, "", ""),
    ("dijiang", "dijiang", "DiJiang, unbiased, QMC, r = 128", U, 1.15, .24, .081, .127, None, "", ""),
    ("dijiang", "dijiang", "DiJiang, weighted QMC, r = 128", U, 1.13, .24, .081, .127, None, "", ""),
    ("linformer", "linformer", "Linformer, k = 64", U, 1.22, .16, None, None, None, "full", ""),
    ("linformer", "linformer", "Linformer, k = 128", U, 1.17, .29, None, None, None, "full", ""),
    ("linformer", "linformer", "mean pool, k = 64", "", .78, .15, .08, .063, None, "full", ""),
    ("linformer", "linformer", "mean pool, k = 128", "", .58, .28, .14, .126, None, "full", ""),
    ("linformer", "linformer", "max pool, k = 128", "", .69, .30, .14, .126, None, "full", ""),
    ("linformer", "linformer", "causal blocks of 64, mean pool", "", .31, .21, .12, .13, None, "causal", ""),
    ("efficient", "efficient", "softmax normalisation", U, .99, .115, .036, .064, None, "full", ""),
    ("efficient", "efficient", "scaling normalisation", U, 42.0, .09, .032, .063, None, "", "Its scale is not that of attention."),
    ("efficient", "efficient", "causal prefix", U, 1.00, .14, .039, .064, None, "causal", ""),
    ("efficient", "efficient", "k-free reconstruction", U, 1.41, .08, None, None, None, "full", ""),
    ("hybrid", "hybrid", "local 64 + strided", "", .044, .24, .19, .19, .94, "", ""),
    ("hybrid", "hybrid", "HSA pattern (MST)", "", .22, .30, .24, .25, .83, "", ""),
    ("hybrid", "hybrid", "1/8 of blocks, drop", "", .041, .36, .27, 1.03, .93, "", ""),
    ("hybrid", "hybrid", "1/8 of blocks + mean token", "", .027, .40, .30, 1.06, .93, "", ""),
    ("hybrid", "hybrid", "1/4 of blocks + mean token", "", .0125, .55, .42, 1.06, .968, "", ""),
    ("hybrid", "hybrid", "1/2 of blocks + mean token", "", .0039, 1.12, .66, 1.06, .99, "", ""),
    ("hybrid", "hybrid", "1/4 of blocks of 64 + mean token", "", .034, .47, .36, 1.02, .949, "", ""),
]
SMALL = ["exact", "window 64", "window 64 + 4 sinks", "window 256 + 4 sinks", "elu + 1", "FAVOR+, r = 128", "DiJiang, paper form", "Linformer, k = 64",
         "mean pool, k = 128", "scaling normalisation", "1/8 of blocks + mean token", "1/4 of blocks + mean token"]


def sig(x, n=4):
    return float(f"{x:.{n}g}")


def result(rng, i, inp, sid, setting, head_noise):
    model, layer, n, heads, kv, d, causal, far, hard = inp
    mechanism, fam, label, trained, err, t, step, memory, recall, only, _ = setting
    if only and (only == "causal") != causal:
        why = "the mechanism is causal only" if only == "causal" else "a causal mask would show later keys through the projection"
        return {"input": i, "setting": sid, "skipped": why}
    grow = far if fam in ("window", "hybrid") else hard
    if fam == "exact":
        grow = 1.0
    noise = 1.0 if fam == "exact" else math.exp(rng.gauss(0, .06))
    per = []
    for h in range(heads):
        e = err * grow * noise * (head_noise[h] if err < .9 else head_noise[h] ** .25)
        tail = 1.15 + 3.5 / (1 + 6 * e)
        cosine = 1 - .5 * min(1.9, e * e) if e < 1 else max(-.1, .5 - .25 * (e - 1))
        # A window that misses one sink: the p95 row is far from the median one.
        per.append({"head": h, "error_median": sig(e), "error_p95": sig(e * tail), "cosine": sig(cosine, 6),
                    "recall": None if recall is None else sig(max(.02, 1 - (1 - recall) * min(8, grow * head_noise[h])), 4)})
    mid = sorted(p["error_median"] for p in per)[heads // 2]
    worst = max(per, key=lambda p: p["error_median"])
    mac = heads * n * n * d * 2 / (2 if causal else 1)
    exact_ms, exact_us = mac / 46e6 + .3, heads * n * d * 2 / 21e3 + 2
    exact_bytes = kv * n * d * 2 * 4
    share = t if n == 1024 or fam == "exact" else min(1.6, t * 1.7)
    out = {"input": i, "setting": sid, "skipped": "", "prefill_ms": sig(exact_ms * share * math.exp(rng.gauss(0, .03) if sid else 0)),
           "step_us": None if step is None else sig(exact_us * step * 1.2 if sid else exact_us), "state_bytes": None if memory is None else int(exact_bytes * memory),
           "macs": sig(mac * (t * .85 if sid else 1.0)), "error_median": mid, "error_p95": sig(max(p["error_p95"] for p in per) * .8),
           "worst_head": worst["head"], "worst_error": worst["error_median"], "cosine": sig(sum(p["cosine"] for p in per) / heads, 6),
           "recall": None if recall is None else sig(sum(p["recall"] for p in per) / heads), "heads": per}
    out["prefill_ratio"] = sig(exact_ms / out["prefill_ms"])
    out["step_ratio"] = None if step is None else sig(exact_us / out["step_us"])
    out["state_ratio"] = None if memory is None else sig(exact_bytes / out["state_bytes"])
    return out


def picture(rng, size, causal, kind):
    """Attention mass of one head in cells: a sink, a diagonal, a few keys that many queries look at."""
    loud = [(rng.randrange(1, size), rng.uniform(.5, 3)) for _ in range(size // 6)]
    grain = [[rng.gauss(0, 1.1) for _ in range(size)] for _ in range(size)]
    values = []
    for i in range(size):
        row = []
        for j in range(size):
            gap = abs(i - j) * 64 / size
            s = -1.2 * math.log1p(gap) + grain[i][j] + sum(w for c, w in loud if c == j) + (5.2 if j == 0 else 0)
            if kind == "uniform":
                s = .25 * grain[i % 3][j]
            keep = not causal or j <= i
            near = gap < 64 / 8 or j == 0
            if kind == "window" and not near or kind == "sparse" and not near and (j // 2 * 7 + i // 4) % 8:
                keep = False
            row.append(math.exp(s) if keep else 0.0)
        total = sum(row) or 1.0
        values += [sig(x / total, 3) for x in row]
    if kind == "signed":
        values = [-x if (k * 2654435761 >> 7) % 5 == 0 else x for k, x in enumerate(values)]
    return values


def make(small):
    rng = random.Random(20)
    inputs = [INPUTS[1], INPUTS[3]] if small else INPUTS
    chosen = [s for s in SETTINGS if not small or s[2] in SMALL]
    size = 16 if small else 64
    out = {"fovea": "0.1.0", "created": "2026-01-31T12:00:00Z", "command": "make_sample.py (invented test data)",
           "machine": {"cpu": "Invented CPU @ 2.60 GHz (test data)", "isa": "avx512", "threads": 1, "fma_peak_gflops": 141.2, "stream_gbs": 12.3},
           "inputs": [{"file": f"{'smollm2' if c else 'minilm'}_layer{l:02}.safetensors", "model": m, "layer": l, "tokens": n, "heads": h, "kv_heads": g, "width": d,
                       "causal": c, "text": "King James Bible, Romans 1 onwards"} for m, l, n, h, g, d, c, _, _ in inputs],
           "settings": [{"id": i, "mechanism": s[0], "label": s[2], "family": s[1], "trained": s[3], "config": {"mechanism": s[0]}, "note": s[10]} for i, s in enumerate(chosen)],
           "results": [], "maps": [], "budget": None}
    for i, inp in enumerate(inputs):
        noise = [math.exp(rng.gauss(0, .45)) for _ in range(inp[3])]
        out["results"] += [result(rng, i, inp, sid, s, noise) for sid, s in enumerate(chosen)]
        for head in sorted({0, inp[3] - 1})[: 1 if small else 2]:
            panels = []
            for label, kind in [("exact", "exact"), ("window 64 + 4 sinks", "window"), ("1/8 of blocks + mean token", "sparse"), ("elu + 1", "uniform"),
                                ("DiJiang, released form", "signed")]:
                ids = [k for k, s in enumerate(chosen) if s[2] == label]
                if ids:
                    panels.append({"setting": ids[0], "title": label, "values": picture(random.Random(100 * i + head), size, inp[6], kind)})
            out["maps"].append({"input": i, "head": head, "size": size, "panels": panels})
    budget = .05
    assign = []
    for i, inp in enumerate(inputs):
        mine = [r for r in out["results"] if r["input"] == i and not r["skipped"]]
        for h in range(inp[3]):
            best = min((r for r in mine if r["heads"][h]["error_median"] <= budget), key=lambda r: r["prefill_ms"])
            assign.append({"input": i, "head": h, "setting": best["setting"], "error": best["heads"][h]["error_median"]})
    out["budget"] = {"error": budget, "assignments": assign, "time_saved": .61, "bytes_saved": .55}
    return out


def render(template, report):
    """What the C++ program does: one token, one replacement; `<` never appears inside the data."""
    if template.count(TOKEN) != 1:
        raise SystemExit(f"the template holds the token {TOKEN} {template.count(TOKEN)} times, once is wanted")
    text = json.dumps(report, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.replace(TOKEN, text)


def main():
    parser = argparse.ArgumentParser(description="invented data for the page of compare")
    parser.add_argument("--small", action="store_true", help="12 settings on 2 inputs")
    parser.add_argument("--json", type=pathlib.Path, help="write the data")
    parser.add_argument("--from", dest="source", type=pathlib.Path, help="use this report.json instead of inventing one")
    parser.add_argument("--html", type=pathlib.Path, help="write the filled page")
    args = parser.parse_args()
    report = json.loads(args.source.read_text(encoding="utf-8")) if args.source else make(args.small)
    if args.json:
        args.json.write_text(json.dumps(report, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    if args.html:
        args.html.write_text(render(TEMPLATE.read_text(encoding="utf-8"), report), encoding="utf-8")
    if not args.json and not args.html:
        parser.error("nothing to do: give --json or --html")


if __name__ == "__main__":
    main()
