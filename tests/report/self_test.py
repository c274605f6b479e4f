#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tests the page of `compare` and its checker on invented data: good pages must pass, and every kind of bad page must be refused.

  self_test.py            exit status 0, 1 or, without Chromium, 77
"""
import copy
import json
import pathlib
import sys
import tempfile

import check_report
import make_sample

HERE = pathlib.Path(__file__).resolve().parent
SAMPLE = json.loads((HERE / "sample_report.json").read_text(encoding="utf-8"))
TEMPLATE = make_sample.TEMPLATE.read_text(encoding="utf-8")


def changed(change):
    report = copy.deepcopy(SAMPLE)
    change(report)
    return make_sample.render(TEMPLATE, report)


def broken_html(old, new):
    page = make_sample.render(TEMPLATE, SAMPLE)
    assert page.count(old) >= 1, old
    return page.replace(old, new, 1)


def hostile(report):
    report["settings"][3]["label"] = '</script><script>throw 1</script><!--<b onclick="x">'
    report["inputs"][0]["text"] = "<img src=x onerror='throw 1'> \u2028 \\u0000 \"quoted\""


def sparse(report):                # everything that may be absent is absent
    report["budget"] = None
    report["inputs"][1].update(model="", layer=None, text="")
    report["machine"] = {"cpu": "", "isa": "sse2", "threads": 1, "fma_peak_gflops": None, "stream_gbs": None}
    for r in report["results"]:
        if not r["skipped"] and r["input"] == 1:
            r.update(step_us=None, step_ratio=None, recall=None, cosine=None, error_p95=None)


GOOD = {
    "the sample": lambda: make_sample.render(TEMPLATE, SAMPLE),
    "the crowded sample": lambda: make_sample.render(TEMPLATE, make_sample.make(False)),
    "text that looks like markup": lambda: changed(hostile),
    "missing values": lambda: changed(sparse),
}
BAD = {                            # name: (page, a part of the sentence that must come out)
    "an empty template": (lambda: TEMPLATE, "has drawn nothing"),
    "no results": (lambda: changed(lambda r: r.update(results=[])), ""),
    "no decode times at all": (lambda: changed(lambda r: [x.update(step_us=None) for x in r["results"]]), "chart-step has drawn nothing"),
    "no pictures": (lambda: changed(lambda r: r.update(maps=[])), "attention-map has drawn nothing"),
    "a chart without its id": (lambda: broken_html('id="chart-memory"', 'id="chart-bytes"'), ""),
    "NaN in the text": (lambda: changed(lambda r: r["settings"][2].update(note="NaN", label="window NaN")), "NaN"),
    "undefined in a tooltip label": (lambda: broken_html(": error ${pct(p.value)}", ": error ${undefined}"), "undefined"),
    "a script that throws": (lambda: broken_html("</body>", "<script>nothing.at.all()</script></body>"), "nothing is not defined"),
    "a page wider than a phone": (lambda: broken_html("<main>", '<main><div style="width:700px">wide</div>'), "sideways"),
    "a chart that claims too much": (lambda: broken_html("host.dataset.ready = points.length", "host.dataset.ready = points.length + 1"), "says it drew"),
    "untrained maps without a label": (lambda: broken_html('const tag = s => untrained(s) ?', 'const tag = s => false ?'), "untrained"),
    "no line at 100 %": (lambda: broken_html('svg("text", { class: "limit", x: box.x1 - 2', 'svg("desc", { class: "limit", x: box.x1 - 2').replace("as wrong as", "so"), "answering zero"),
    "a table that does not sort": (lambda: broken_html("down ? v - u : u - v", "0"), "sort"),
    "a script from elsewhere": (lambda: broken_html("</head>", '<script src="https://example.org/x.js"></script></head>'), "outside"),
}


def main():
    browser = check_report.find_browser()
    if not browser:
        print("self_test: no Chromium found; skipped", file=sys.stderr)
        return 77
    failed = 0
    if make_sample.make(True) != SAMPLE:
        failed += 1
        print("FAILED  sample_report.json is not what make_sample.py --small writes")
    with tempfile.TemporaryDirectory(dir=pathlib.Path.cwd(), prefix="self_test_", ignore_cleanup_errors=True) as scratch:
        page = pathlib.Path(scratch) / "report.html"
        for name, make in GOOD.items():
            page.write_text(make(), encoding="utf-8")
            faults = check_report.check(browser, page)
            failed += bool(faults)
            print("FAILED " if faults else "ok     ", f"passes: {name}", *faults, sep="\n          " if faults else " ")
        for name, (make, wanted) in BAD.items():
            page.write_text(make(), encoding="utf-8")
            faults = check_report.check(browser, page)
            good = bool(faults) and any(wanted in fault for fault in faults)
            failed += not good
            print("ok     " if good else "FAILED ", f"refused: {name}", *([] if good else [f"wanted {wanted!r}"] + faults), sep="\n          " if not good else " ")
    print(f"{failed} failed" if failed else "all well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
