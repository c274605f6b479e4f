#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Opens a report.html of `compare` in headless Chromium and checks that it says what it should.

  check_report.py REPORT.html [--screenshots DIR]

Three copies of the page are loaded in one browser: wide, wide and dark, and 360 pixels wide (a frame, since Chromium's own window
is never that narrow). In each: every chart is there and drew what it says it drew, no script failed, no "NaN" or "undefined" is to
be read, the page does not scroll sideways, untrained maps are labelled. The wide copy is then used: every input, every setting, every
sort order, the keyboard, the theme button. Exit status: 0 all well, 1 a sentence for each fault, 2 no such file, 77 no Chromium.
"""
import argparse
import html
import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
IDS = ["chart-time", "chart-step", "chart-memory", "heatmap", "attention-map", "table-results"]
FRAMES = [("wide", 1280, 900), ("phone", 360, 740), ("dark", 1280, 900)]
HARMLESS = re.compile(r"\[(Deprecation|Intervention|Violation)\]|willReadFrequently")  # remarks, not errors; the last is about the check itself
FORBIDDEN = r"\b(NaN|undefined|Infinity)\b|\[object "

DRIVER = r"""
"use strict";
const IDS = %(ids)s, FORBIDDEN = new RegExp(%(forbidden)s), faults = [];
function fault(text) { if (!faults.includes(text)) faults.push(text); }

function badText(doc) {                                    // what a reader sees or hears: text outside scripts, and labels
  const walk = doc.createTreeWalker(doc.body, 4);
  for (let n = walk.nextNode(); n; n = walk.nextNode())
    if (!n.parentElement.closest("script,style,noscript") && FORBIDDEN.test(n.data)) return n.data.trim().slice(0, 80);
  for (const n of doc.querySelectorAll("[aria-label],[title]"))
    for (const a of ["aria-label", "title"]) if (FORBIDDEN.test(n.getAttribute(a) || "")) return n.getAttribute(a).slice(0, 80);
  return "";
}

const DRAWN = {                                            // counted independently of what the page says
  "chart-time": e => e.querySelectorAll("svg .pt").length, "chart-step": e => e.querySelectorAll("svg .pt").length,
  "chart-memory": e => e.querySelectorAll("svg .pt").length, "heatmap": e => e.querySelectorAll("td.cell:not(.all)").length,
  "attention-map": e => [...e.querySelectorAll("canvas")].reduce((n, c) => n + (blank(c) ? 0 : c.width * c.height), 0),
  "table-results": e => e.querySelectorAll("tbody tr").length,
};
function blank(canvas) {
  const p = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let i = 4; i < p.length; ++i) if (p[i] !== p[i %% 4]) return false;
  return true;
}

function look(where, win, empty) {                         // empty: an input may lack a cost, if the page says so
  const doc = win.document, root = doc.documentElement;
  if (root.dataset.error) fault(`${where}: the page's script failed: ${root.dataset.error}`);
  for (const id of IDS) {
    const e = doc.getElementById(id);
    if (!e) { fault(`${where}: there is no element with id ${id}`); continue; }
    const said = Number(e.dataset.ready);
    if (!(said > 0) && !(empty && (e.querySelector(".chart-empty, .skip") || id === "attention-map"))) fault(`${where}: ${id} has drawn nothing (data-ready is "${e.dataset.ready ?? "missing"}")`);
    else if (said > 0 && DRAWN[id](e) !== said) fault(`${where}: ${id} says it drew ${said}, but ${DRAWN[id](e)} are found`);
    if (id.startsWith("chart-") && said > 0 && !/as wrong as/.test(e.textContent)) fault(`${where}: ${id} does not mark the error of answering zero`);
  }
  const text = badText(doc);
  if (text) fault(`${where}: the page shows "${text}"`);
  if (root.scrollWidth > root.clientWidth || doc.body.dataset.overflow !== "0")
    fault(`${where}: the page scrolls sideways (${root.scrollWidth} pixels in a width of ${root.clientWidth}; data-overflow is "${doc.body.dataset.overflow ?? "missing"}")`);
}

function use(win) {
  const doc = win.document, $ = id => doc.getElementById(id), report = win.eval("report");
  const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new win.Event("change", { bubbles: true })); };
  const blind = new Set(report.settings.filter(s => s.trained === "untrained").map(s => s.id));
  const first = $("pick-input").value;
  report.inputs.forEach((input, i) => {
    set("pick-input", i);
    look(`input ${i}`, win, true);
    const want = report.results.filter(r => r.input === i && blind.has(r.setting)).length, got = doc.querySelectorAll("#table-results tbody .tag").length;
    if (want !== got) fault(`input ${i}: ${want} untrained settings are in the table, ${got} are labelled so`);
    for (const s of report.settings) {
      set("pick-setting", s.id);
      if (blind.has(s.id) && !$("heat-title").querySelector(".tag")) fault(`setting ${s.id} is untrained and not labelled so over the heat map`);
      look(`input ${i}, setting ${s.id}`, win, true);
    }
  });
  set("pick-input", first);
  for (const m of $("pick-metric").options) { set("pick-metric", m.value); look(`error measure ${m.value}`, win, true); }
  for (const b of [...$("cost").children]) { b.click(); look(`cheapest by ${b.textContent}`, win, true); }
  const keys = [...doc.querySelectorAll("#table-results [data-sort]")].map(b => b.dataset.sort);
  if (keys.length < 10) fault(`the table has ${keys.length} columns to sort by`);
  for (const key of keys) {
    const press = () => doc.querySelector(`#table-results [data-sort="${key}"]`).click();
    press(); const once = $("table-results").querySelector("tbody").textContent;
    press(); const twice = $("table-results").querySelector("tbody").textContent;
    if (!doc.querySelector(`#table-results th[aria-sort] [data-sort="${key}"]`)) fault(`the table is not sorted by ${key} when asked to be`);
    if (key === "error" && once === twice && $("table-results").querySelectorAll("tbody tr").length > 2) fault("sorting the table by error twice changes nothing");
    look(`table by ${key}`, win, true);
  }
  const point = doc.querySelector('#chart-time .pt[tabindex="0"]');
  if (!point) fault("no point of chart-time can be reached by the keyboard");
  else {
    point.focus();
    point.dispatchEvent(new win.KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    if (doc.querySelectorAll("#chart-time .pt").length > 1 && (doc.activeElement === point || !doc.activeElement.closest("#chart-time"))) fault("the arrow keys do not walk through the points of chart-time");
    if ($("tip").hidden || !$("tip").textContent) fault("a focused point shows no tooltip");
    doc.activeElement.blur();
  }
  const theme = doc.documentElement.dataset.theme;
  $("theme").click();
  if (doc.documentElement.dataset.theme === theme) fault("the theme button does nothing");
  $("theme").click();
}

addEventListener("load", () => {
  try {
    for (const f of document.querySelectorAll("iframe")) {
      if (f.id === "dark") { const d = f.contentDocument; if (d.documentElement.dataset.theme !== "dark" && d.getElementById("theme")) d.getElementById("theme").click(); }
      look(f.id, f.contentWindow, false);
      if (f.id === "phone" && f.contentDocument.documentElement.scrollWidth > 360) fault("phone: the page is wider than 360 pixels");
    }
    if (!faults.length) use(document.getElementById("wide").contentWindow);
  } catch (e) { fault("the page could not be used: " + e); }
  document.getElementById("verdict").textContent = JSON.stringify(faults);
});
"""


class Visible(html.parser.HTMLParser):
    """Collects attributes by id, the attributes of html and body, and the text a reader sees."""

    def __init__(self):
        super().__init__()
        self.ids, self.tags, self.text, self.mute = {}, {}, [], 0

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.setdefault(tag, attrs)
        if "id" in attrs:
            self.ids[attrs["id"]] = attrs
        self.mute += tag in ("script", "style", "noscript")

    def handle_endtag(self, tag):
        self.mute -= tag in ("script", "style", "noscript")

    def handle_data(self, data):
        if not self.mute:
            self.text.append(data)


def browse(browser, profile, page, *flags):
    """Runs the browser on one page; returns its standard output and what the page wrote to the console."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--hide-scrollbars",
               "--disable-background-networking", f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=4000", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=240, check=False)
    log = done.stderr.decode("utf-8", "replace").splitlines()
    console = [re.sub(r"^.*?CONSOLE[^\]]*\]\s*", "", line) for line in log if "CONSOLE" in line]
    return done.stdout.decode("utf-8", "replace"), [line for line in console if not HARMLESS.search(line)]


def frame(text, name, width, height):
    return f'<iframe id="{name}" style="border:0;display:block" width="{width}" height="{height}" srcdoc="{html.escape(text, quote=True)}"></iframe>'


def check(browser, page, screenshots=None):
    """Returns a list of sentences; empty if all is well."""
    faults, text = [], page.read_text(encoding="utf-8")
    if re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(\s*["']?(?:https?:)?//""", re.sub(r"(?s)const report = .*?\n", "", text)):
        faults.append("the page refers to something outside itself")
    # Beside the page, not in /tmp: a browser installed as a snap has a /tmp of its own.
    with tempfile.TemporaryDirectory(dir=page.parent, prefix="check_report_", ignore_cleanup_errors=True) as scratch:
        scratch = pathlib.Path(scratch)
        dom, console = browse(browser, scratch / "profile", page, "--window-size=1280,900", "--dump-dom")
        seen = Visible()
        seen.feed(dom)
        if "body" not in seen.tags:
            return faults + ["the browser did not open the page"]
        faults += [f"the page wrote to the console: {line}" for line in console]
        for name in IDS:
            ready = seen.ids.get(name, {}).get("data-ready")
            if name not in seen.ids:
                faults.append(f"there is no element with id {name}")
            elif not ready or not ready.isdigit() or int(ready) == 0:
                faults.append(f"{name} has drawn nothing (data-ready is {ready!r})")
        bad = re.search(FORBIDDEN, " ".join(seen.text))
        if bad:
            faults.append(f"the page shows the word {bad.group(0)!r}")
        if faults:
            return faults

        wrapper = scratch / "frames.html"
        script = DRIVER % {"ids": json.dumps(IDS), "forbidden": json.dumps(FORBIDDEN)}
        wrapper.write_text('<!doctype html><meta charset="utf-8"><body style="margin:0"><script>' + script + '</script><pre id="verdict"></pre>'
                           + "".join(frame(text, *f) for f in FRAMES) + "</body>", encoding="utf-8")
        dom, console = browse(browser, scratch / "profile", wrapper, "--window-size=1400,1000", "--dump-dom")
        faults += [f"the page wrote to the console while in use: {line}" for line in console]
        verdict = re.search(r'<pre id="verdict">(.*?)</pre>', dom, re.S)
        if not verdict or not verdict.group(1):
            faults.append("the page did not finish when used")
        else:
            faults += json.loads(html.unescape(verdict.group(1)))

        for name, width, height in FRAMES if screenshots else []:
            pathlib.Path(screenshots).mkdir(parents=True, exist_ok=True)
            shot = scratch / f"{name}.html"
            tall = 14000 if name == "phone" else 8200
            dark = "<script>onload = () => document.querySelector('iframe').contentDocument.getElementById('theme').click()</script>" if name == "dark" else ""
            shot.write_text('<!doctype html><meta charset="utf-8"><body style="margin:0">' + frame(text, name, width, tall) + dark + "</body>", encoding="utf-8")
            target = pathlib.Path(screenshots).resolve() / f"{name}.png"
            browse(browser, scratch / "profile", shot, f"--window-size={max(width, 500)},{tall}", f"--screenshot={target}")
    return faults


def find_browser():
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


def main():
    parser = argparse.ArgumentParser(description="checks a report.html of compare in headless Chromium")
    parser.add_argument("page", type=pathlib.Path, metavar="REPORT.html")
    parser.add_argument("--screenshots", type=pathlib.Path, metavar="DIR", help="also write wide.png, dark.png and phone.png")
    args = parser.parse_args()
    if not args.page.is_file():
        print(f"check_report: {args.page}: no such file", file=sys.stderr)
        return 2
    browser = find_browser()
    if not browser:
        print("check_report: no Chromium found (looked for " + ", ".join(BROWSERS) + "); skipped", file=sys.stderr)
        return 77
    faults = check(browser, args.page.resolve(), args.screenshots)
    for fault in faults:
        print(f"check_report: {args.page}: {fault}", file=sys.stderr)
    if not faults:
        print(f"check_report: {args.page}: all charts drawn and usable")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
