#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The accuracy of hybrid sparse attention by recipe, on real Q/K/V: a table, and the trade-off picture.

    build/release/bin/engine capture tests/data/mixed_text.txt --model build/release/model --layers 5,11,17,23,29 --count 4096 --out qkv.safetensors
    python3 tools/quality.py build/release/bin/compare                        # the three causal built-in captures: the ablation
    python3 tools/quality.py build/release/bin/compare qkv.layer*.safetensors # captures of your own
    python3 tools/quality.py build/release/bin/compare qkv.layer*.safetensors --picture docs/tradeoff.svg

Error: |o - o*| / |o*| of a row, o* exact attention in double, over the rows of all files from --from on. Recall: share of the exact softmax mass on computed
keys. Density: computed keys over visible keys, kept ones among them. Blocks of 16 queries and 16 keys, the first 16 keys and a window of 64 always computed,
no floor. --picture runs other recipes, several budgets for each selector, and draws the mean error against density and against time: exact attention's share,
timed in turns. --json keeps what `compare` measured; --from-json draws or prints such a file again.
"""
import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

BASE = {"mechanism": "hybrid", "causal": True, "block_q": 16, "block_k": 16, "first": 16, "window": 64, "at_least": 0}
CURVES = [("exact mass (oracle)", "exact", "#555555"), ("int8", "int8", "#1b6ca8"), ("int4", "int4", "#6a1b9a"),
          ("mean key", "mean", "#c1440e"), ("mean + variance / 4", "variance", "#b8860b"), ("bound (Quest)", "bound", "#2e7d32")]
SHARES = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
MASSES = [.8, .9, .95, .98]


def recipe(label, select="int8", budget=1 / 8, kept=1 / 64, compensate="zeroth", **more):
    value = dict(BASE, select=select, keep_small=kept, compensate=compensate, **more)
    if "top_p" not in more:
        value["budget"] = budget
    return {"label": label, "family": "hybrid", "attention": value}


def ablation():
    rows = [recipe(f"{name}, {text}", select, budget=1 / 8, **more) for name, select in (("exact mass", "exact"), ("int8", "int8"))
            for text, more in (("1/8, dropped: select only", {"kept": 0, "compensate": "none"}), ("1/8, kept, dropped", {"compensate": "none"}),
                               ("1/8, pooled: + compress", {"kept": 0}), ("1/8, kept, pooled", {}))]
    rows += [recipe("int8, 1/8, kept, halves", parts=2), recipe("int8, 1/8, kept, quarters", parts=4),
             recipe("int8, 1/8, kept, + variance: + compensate", compensate="cumulant"),
             recipe("int8, 1/8, kept, + variance, at most 1 nat", compensate="cumulant", variance_cap=1),
             recipe("int8, 1/8, kept, + 1/4 of the variance", compensate="cumulant", variance_share=.25),
             recipe("int8, 1/8, kept, + 1/4 of the variance, at most 1 nat", compensate="cumulant", variance_share=.25, variance_cap=1),
             recipe("int8, 1/8, kept, one sampled key", compensate="sampled"),
             recipe("int8, 1/8, kept, two sampled keys", compensate="sampled", parts=2),
             recipe("int8, 1/8, kept, four sampled keys", compensate="sampled", parts=4),
             recipe("int8, 1/8, kept, linear rest, untrained (elu + 1)", compensate="linear")]
    for name, select in (("int4", "int4"), ("mean key", "mean"), ("mean + variance / 4", "variance"), ("bound", "bound")):
        rows += [recipe(f"{name}, 1/8, pooled", select, kept=0), recipe(f"{name}, 1/8, kept, pooled", select)]
    for text, budget in (("1/4", 1 / 4), ("1/2", 1 / 2)):
        rows += [recipe(f"{name}, {text}, kept, pooled", select, budget=budget) for name, select in
                 (("exact mass", "exact"), ("int8", "int8"), ("int4", "int4"), ("mean key", "mean"))]
    rows += [recipe("int8, 1/4, kept, pooled, one selection a group", budget=1 / 4, share_group=True)]
    rows += [recipe(f"int8, top_p {p}, kept, pooled", top_p=p) for p in (.95, .98)]
    return rows


def kept_selections():
    rows = [recipe(f"{name}, {text}, a selection for {r} steps", select, budget=budget, refresh=r) for name, select, text, budget in
            (("int8", "int8", "1/8", 1 / 8), ("int8", "int8", "1/4", 1 / 4), ("int4", "int4", "1/8", 1 / 8)) for r in (1, 4, 16, 64)]
    return rows + [recipe(f"int8, 1/8, one selection a group, for {r} steps", refresh=r, share_group=True) for r in (1, 4, 16, 64)]


def rests(a):
    rows = []
    for item in json.loads((pathlib.Path(a.rest) / "settings.json").read_text()) if a.rest else []:
        if item["attention"]["mechanism"] == "windowed" and "untrained" not in item["label"]:
            more = {k: v for k, v in item["attention"].items() if k not in ("mechanism", "first", "window", "level", "scale")}
            weights = pathlib.Path(a.rest) / pathlib.Path(item["weights"]).name
            rows.append(dict(recipe(f'int8, 1/8, kept, linear rest, calibrated, {item["file"]}', compensate="linear", **more), file=item["file"],
                             weights=str(weights.resolve())))
    return rows


def curves():
    rows = [recipe(f"{name}|{share}", select, budget=share) for name, select, _ in CURVES for share in SHARES]
    return rows + [recipe(f"int8, top_p|{p}", top_p=p) for p in MASSES]


def measure(a, recipes):
    with tempfile.TemporaryDirectory() as folder:
        settings = pathlib.Path(folder) / "settings.json"
        settings.write_text(json.dumps(recipes))
        files = a.files or sorted(str(p) for p in (pathlib.Path(__file__).resolve().parent.parent / "data").glob("smollm2*.safetensors"))
        command = [a.compare, *files, "--no-built-in", "--settings", str(settings), "--pooled", "--no-pictures", "--from", str(a.first), "--report", folder,
                   "--repeats", str(a.repeats), "--seconds", "2" if a.picture else "0.001", "--threads", str(a.threads)]
        if a.decode:
            command += ["--decode", str(a.decode)]
        if a.tokens:
            command += ["--tokens", str(a.tokens)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((pathlib.Path(folder) / "report.json").read_text())
    labels = {s["id"]: s["label"] for s in report["settings"]}
    return {"inputs": report["inputs"], "rows": [dict(x, label=labels[x["setting"]]) for x in report["pooled"]]}


def percent(x):
    return "-" if x is None else f"{100 * x:.2f}" if x < .1 else f"{100 * x:.1f}"


def table(found):
    names = ", ".join(f'{x["file"]} ({x["tokens"]} tokens, {x["heads"]} heads)' for x in found["inputs"])
    print(f'{names}; {found["rows"][0]["rows"]} rows\n')
    print("| recipe | error median / mean / p95 / p99 % | p95 of a layer, mean | recall mean / p5 | density |\n| --- | --- | --- | --- | --- |")
    for x in found["rows"]:
        if x["recall"] is None:
            continue
        print(f'| {x["label"]} | {percent(x["error_median"])} / {percent(x["error_mean"])} / {percent(x["error_p95"])} / {percent(x["error_p99"])} | '
              f'{percent(x["p95_by_input"])} | {x["recall"]:.3f} / {x["recall_p5"]:.2f} | {x["density"]:.3f} |')


def panel(lines, left, width, height, title, across, rows, x_of):
    top, bottom = 50, 50
    points = [[(x_of(x), x["error_mean"], x["label"].split("|")[1]) for x in line] for _, _, line in rows]
    xs, ys = [x for p in points for x, _, _ in p], [y for p in points for _, y, _ in p]
    x0, x1 = math.log2(min(xs)) - .1, math.log2(max(xs)) + .1
    y0, y1 = math.log2(min(ys)) - .1, math.log2(max(ys)) + .1
    X = lambda v: left + (math.log2(v) - x0) / (x1 - x0) * width
    Y = lambda v: height - bottom - (math.log2(v) - y0) / (y1 - y0) * (height - top - bottom)
    lines.append(f'<text x="{left}" y="{top - 22}" font-size="13" fill="#222">{title}</text>')
    for v in (.005, .01, .02, .05, .1, .2, .5, 1):
        if y0 <= math.log2(v) <= y1:
            lines.append(f'<line x1="{left}" x2="{left + width}" y1="{Y(v):.1f}" y2="{Y(v):.1f}" stroke="#e6e6e6"/>'
                         f'<text x="{left - 8}" y="{Y(v) + 4:.1f}" text-anchor="end" fill="#444">{100 * v:g} %</text>')
    for v in (.05, .1, .15, .2, .3, .4, .5, .7, 1, 1.5, 2):
        if x0 <= math.log2(v) <= x1:
            lines.append(f'<line x1="{X(v):.1f}" x2="{X(v):.1f}" y1="{top}" y2="{height - bottom}" stroke="#f2f2f2"/>'
                         f'<text x="{X(v):.1f}" y="{height - bottom + 18}" text-anchor="middle" fill="#444">{v:g}</text>')
    lines.append(f'<text x="{left + width / 2:.0f}" y="{height - 12}" text-anchor="middle" fill="#444">{across}</text>')
    for (name, colour, _), line in zip(rows, points):
        dash = ' stroke-dasharray="5 3"' if "top_p" in name or "oracle" in name else ""
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2"{dash} points="{" ".join(f"{X(x):.1f},{Y(y):.1f}" for x, y, _ in line)}"/>')
        for x, y, what in line:
            lines.append(f'<circle cx="{X(x):.1f}" cy="{Y(y):.1f}" r="3" fill="{colour}"><title>{name}, {float(what):g}: {100 * y:.2f} % at {x:.3f}</title></circle>')


def picture(found, path):
    W, H = 900, 420
    by_name = {}
    for x in found["rows"]:
        if "|" in x["label"]:
            by_name.setdefault(x["label"].split("|")[0], []).append(x)
    rows = [(name, colour, by_name[name]) for name, _, colour in CURVES] + [("int8, top_p", "#00838f", by_name["int8, top_p"])]
    s = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="12">', f'<rect width="{W}" height="{H}" fill="#fff"/>']
    n, layers = found["inputs"][0]["tokens"], len(found["inputs"])
    panel(s, 60, 370, H, f"mean error of a row, {n} tokens, {layers} layers", "computed keys over visible keys", rows, lambda x: x["density"])
    panel(s, 510, 370, H, "the same error against time, one thread", "prefill time over exact attention's (f32)", rows, lambda x: 1 / x["prefill_ratio"])
    for i, (name, colour, _) in enumerate(rows):
        s.append(f'<text x="72" y="{H - 64 - 16 * (len(rows) - 1 - i)}" fill="{colour}">{name}</text>')
    s.append("</svg>")
    pathlib.Path(path).write_text("\n".join(s) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("compare", help="the program (or -, with --from-json)")
    p.add_argument("files", nargs="*", help="safetensors files of q, k, v; none: the causal built-in ones")
    p.add_argument("--tokens", type=int, help="the first TOKENS of each file")
    p.add_argument("--from", dest="first", type=int, default=64, help="judge rows from this one on")
    p.add_argument("--decode", type=int, help="the last DECODE rows as decoding gives them, with selections that serve 1 to 64 steps")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--picture", metavar="SVG", help="draw the trade-off")
    p.add_argument("--json", metavar="FILE", help="keep the figures")
    p.add_argument("--from-json", metavar="FILE", help="figures of an earlier run")
    p.add_argument("--recipes", metavar="WORD", help="only recipes whose label holds WORD")
    p.add_argument("--rest", metavar="FOLDER", help="also a linear rest with the maps that `calibrate --window` wrote there for these files")
    a = p.parse_args()
    recipes = [x for x in (curves() if a.picture else kept_selections() if a.decode else ablation() + rests(a)) if not a.recipes or a.recipes in x["label"]]
    found = json.loads(pathlib.Path(a.from_json).read_text()) if a.from_json else measure(a, recipes)
    if a.json:
        pathlib.Path(a.json).write_text(json.dumps(found, indent=1) + "\n")
    if a.picture:
        picture(found, a.picture)
    else:
        table(found)


if __name__ == "__main__":
    sys.exit(main())
