#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Opens an evaluate.html of `engine evaluate` in headless Chromium and checks that it says what it should.

  check_evaluate.py EVALUATE.html [--screenshots DIR]

Wide, dark and 360 pixels wide: all three charts and both tables are drawn and hold what they say they hold, no script failed, no "NaN" or
"undefined" is to be read, nothing scrolls sideways. Then every text and every measure is chosen, the keyboard walks through the points and the theme
is changed. Exit status as check_report.py: 0, 1, 2, or 77 without Chromium.
"""
import argparse
import html
import json
import pathlib
import re
import sys
import tempfile

import check_report

IDS = ["chart-step", "chart-time", "chart-memory", "policies", "by-text"]
DRIVER = r"""
"use strict";
const IDS = %(ids)s, FORBIDDEN = new RegExp(%(forbidden)s), faults = [];
const fault = text => { if (!faults.includes(text)) faults.push(text); };
function look(where, win) {
  const doc = win.document, root = doc.documentElement, report = win.eval("report");
  if (root.dataset.error) fault(`${where}: the page's script failed: ${root.dataset.error}`);
  for (const id of IDS) {
    const e = doc.getElementById(id), said = Number(e && e.dataset.ready);
    const found = e && (id === "policies" ? e.querySelectorAll("tbody tr").length : id === "by-text" ? e.querySelectorAll("tbody td").length : e.querySelectorAll("svg .pt").length);
    const want = id === "by-text" ? report.policies.length * report.texts.length : report.policies.length;
    if (!e || found !== want || said !== want) fault(`${where}: ${id} says it drew ${said}, ${found} are found, wanted ${want}`);
  }
  const walk = doc.createTreeWalker(doc.body, 4);
  for (let n = walk.nextNode(); n; n = walk.nextNode()) if (!n.parentElement.closest("script,style,noscript") && FORBIDDEN.test(n.data)) fault(`${where}: the page shows "${n.data.trim().slice(0, 80)}"`);
  for (const n of doc.querySelectorAll("[aria-label]")) if (FORBIDDEN.test(n.getAttribute("aria-label"))) fault(`${where}: a label says "${n.getAttribute("aria-label")}"`);
  if (root.scrollWidth > root.clientWidth) fault(`${where}: the page scrolls sideways (${root.scrollWidth} pixels in a width of ${root.clientWidth})`);
}
function use(win) {
  const doc = win.document, set = (id, value) => { doc.getElementById(id).value = value; doc.getElementById(id).dispatchEvent(new win.Event("change", { bubbles: true })); };
  const seen = new Set();
  for (const text of [...doc.getElementById("pick-text").options]) for (const metric of [...doc.getElementById("pick-metric").options]) {
    set("pick-text", text.value); set("pick-metric", metric.value);
    look(`text ${text.text}, ${metric.text}`, win);
    seen.add(doc.getElementById("chart-step").innerHTML);
  }
  if (seen.size < doc.getElementById("pick-metric").options.length) fault("the choice of the measure changes nothing");
  const point = doc.querySelector('#chart-step .pt[tabindex="0"]');
  point.focus();
  point.dispatchEvent(new win.KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  if (doc.activeElement === point || doc.getElementById("tip").hidden || !doc.getElementById("tip").textContent) fault("the arrow keys do not walk through the points, or a point has no tooltip");
  const theme = doc.documentElement.dataset.theme;
  doc.getElementById("theme").click();
  if (doc.documentElement.dataset.theme === theme) fault("the theme button does nothing");
}
addEventListener("load", () => {
  try {
    document.getElementById("dark").contentDocument.documentElement.dataset.theme = "dark";
    for (const f of document.querySelectorAll("iframe")) look(f.id, f.contentWindow);
    if (!faults.length) use(document.getElementById("wide").contentWindow);
  } catch (e) { fault("the page could not be used: " + e); }
  document.getElementById("verdict").textContent = JSON.stringify(faults);
});
"""


def check(browser, page, screenshots=None):
    """Returns a list of sentences; empty if all is well."""
    text = page.read_text(encoding="utf-8")
    faults = []
    if re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(\s*["']?(?:https?:)?//""", re.sub(r"(?s)const report = .*?\n", "", text)):
        faults.append("the page refers to something outside itself")
    if "FOVEA_SHARED" in text:
        faults.append("a shared part was not put in")
    with tempfile.TemporaryDirectory(dir=page.parent, prefix="check_evaluate_", ignore_cleanup_errors=True) as scratch:
        scratch = pathlib.Path(scratch)
        wrapper = scratch / "frames.html"
        script = DRIVER % {"ids": json.dumps(IDS), "forbidden": json.dumps(check_report.FORBIDDEN)}
        wrapper.write_text('<!doctype html><meta charset="utf-8"><body style="margin:0"><script>' + script + '</script><pre id="verdict"></pre>'
                           + "".join(check_report.frame(text, *f) for f in check_report.FRAMES) + "</body>", encoding="utf-8")
        dom, console = check_report.browse(browser, scratch / "profile", wrapper, "--window-size=1400,1000", "--dump-dom")
        faults += [f"the page wrote to the console: {line}" for line in console]
        verdict = re.search(r'<pre id="verdict">(.*?)</pre>', dom, re.S)
        faults += json.loads(html.unescape(verdict.group(1))) if verdict and verdict.group(1) else ["the page did not finish when used"]
        for name, width, _ in check_report.FRAMES if screenshots else []:
            pathlib.Path(screenshots).mkdir(parents=True, exist_ok=True)
            tall = 6000 if name == "phone" else 4300
            dark = "<script>onload = () => document.querySelector('iframe').contentDocument.documentElement.dataset.theme = 'dark'</script>" if name == "dark" else ""
            shot = scratch / f"{name}.html"
            shot.write_text('<!doctype html><meta charset="utf-8"><body style="margin:0">' + check_report.frame(text, name, width, tall) + dark + "</body>", encoding="utf-8")
            check_report.browse(browser, scratch / "profile", shot, f"--window-size={max(width, 500)},{tall}", f"--screenshot={pathlib.Path(screenshots).resolve() / (name + '.png')}")
    return faults


def main():
    parser = argparse.ArgumentParser(description="checks an evaluate.html of engine in headless Chromium")
    parser.add_argument("page", type=pathlib.Path, metavar="EVALUATE.html")
    parser.add_argument("--screenshots", type=pathlib.Path, metavar="DIR", help="also write wide.png, dark.png and phone.png")
    args = parser.parse_args()
    if not args.page.is_file():
        print(f"check_evaluate: {args.page}: no such file", file=sys.stderr)
        return 2
    browser = check_report.find_browser()
    if not browser:
        print("check_evaluate: no Chromium found; skipped", file=sys.stderr)
        return 77
    faults = check(browser, args.page.resolve(), args.screenshots)
    for fault in faults:
        print(f"check_evaluate: {args.page}: {fault}", file=sys.stderr)
    if not faults:
        print(f"check_evaluate: {args.page}: all charts drawn and usable")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
