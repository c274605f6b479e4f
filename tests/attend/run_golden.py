#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Sends every golden case through the program `attend` and compares what it writes with the float64 outputs.

    run_golden.py ATTEND [--data DIR] [--family F] [--only TEXT] [--verbose]

Each case is run
  plain            against the golden outputs
  --threads 2      must give the same bytes
  in f64           inputs converted exactly; against the golden outputs within 1e-10
  --decode P       for P = 0 and half of the tokens, where a state can express the case; it must be refused elsewhere
Cases that no file can express are named. Exit code 1 if anything failed.
"""
import argparse
import collections
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "tools"))
try:
    import numpy as np
    from fovea_attend import Refused, attend, read_safetensors
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

FAMILIES = ("softmax", "linear", "dijiang", "lowrank", "sparse")
TOLERANCE = {"softmax": 1e-5, "sparse": 1e-5, "linear": 1e-4, "dijiang": 1e-4, "lowrank": 2e-5}

F64_TOLERANCE = 1e-10

# Parameters of a case that describe the data and are no keys of a configuration.
PROSE = {"f32_gap", "density", "mean_error_to_exact", "tolerance", "views", "page", "d"}

LINEAR_RULES = {"retention": "decay", "simple_gla": "decay", "gla": "gla", "delta_rule": "delta", "gated_delta": "gated_delta",
                "kda": "kda", "gdn2": "gdn2"}
LINFORMER_PROJECTIONS = {"linformer_mean_pool": "mean", "linformer_max_pool": "max", "linformer_conv": "conv"}

UNIT_TESTS = {  # what a file of q, k, v cannot ask for
    "split_kv": "partials and their merge",
    "quest_bounds": "bounds of blocks",
    "lolcats_window": "a composed form",
}


class Case:
    """A golden case as `attend` is asked for it: config, inputs, wanted outputs."""

    def __init__(self, family, case, tensors):
        name = case["name"]
        self.family, self.name = family, name
        params = {k: v for k, v in case["params"].items() if k not in PROSE and not k.startswith("torch_")}
        for key in {"causal", "normalise"} & set(params):
            params[key] = bool(params[key])
        self.inputs = {k: tensors[f"{name}/{k}"] for k in case["inputs"]}
        self.wanted = {k: tensors[f"{name}/{k}"] for k in case["outputs"]}
        self.rows = self.inputs.pop("rows", None)
        self.exact = {}  # float64 inputs that are no f32 numbers
        self.elsewhere = UNIT_TESTS.get(name)
        if "views" in case["params"]:
            self.elsewhere = "strided views"
        self.config = getattr(self, "_" + family)(params)

    def keep(self, *names):
        """The outputs of these names, and gradients."""
        self.wanted = {k: v for k, v in self.wanted.items() if k in names or ("do" in self.inputs and k.startswith("d"))}

    def _softmax(self, p):
        return {"mechanism": "softmax", **p}

    def _linear(self, p):
        stem = self.name.removeprefix("grad_")
        rules = [rule for prefix, rule in sorted(LINEAR_RULES.items(), key=lambda x: -len(x[0])) if stem.startswith(prefix)]
        p.setdefault("map", "identity")
        if p["map"] == "hedgehog_fla":
            p["map"] = "hedgehog"
        self.keep("o", "S", "z")
        return {"mechanism": "linear", "rule": rules[0] if rules else "none", "causal": True, **p}

    def _dijiang(self, p):
        if "o" not in self.wanted:
            self.elsewhere = "transforms and point sets"
        self.keep("o")
        return {"mechanism": "dijiang", **p}

    def _lowrank(self, p):
        if self.name.startswith("efficient"):
            self.keep("o")
            return {"mechanism": "efficient", "normalisation": "scaling" if self.name == "efficient_scaling" else "softmax", **p}
        if self.name.startswith("nystrom"):
            self.keep("o")
            return {"mechanism": "nystrom", **p}
        if "heads_o" in self.wanted:  # a whole module: ask at its attention core
            x, y = self.inputs, self.wanted
            self.exact = {n: y[n] for n in ("q", "k", "v")}
            self.inputs = {n: t.astype(np.float32) for n, t in self.exact.items()}
            self.inputs |= {"E": x["proj_k"], "F": x.get("proj_v", x["proj_k"])}
            self.wanted = {"o": y["heads_o"]}
        self.keep("o")
        return {"mechanism": "linformer", "projection": LINFORMER_PROJECTIONS.get(self.name, "linear"), **p}

    def _sparse(self, p):
        if "rule" in p:
            p["compensate"] = p.pop("rule")
        if self.inputs.pop("selected", None) is not None:
            p["select"] = "mean"
        return {"mechanism": "hybrid", "compensate": "none", **p}

    def tolerance(self):
        if self.name.startswith("huge_logits"):
            return 5e-3
        if self.name == "logits_1e4_apart":
            return 2e-2
        if self.exact:
            return 1e-4  # q, k, v of a module's core are rounded to f32 here
        return TOLERANCE[self.family]

    def decodable(self):
        """Can prefill and steps over one state give these rows?"""
        c, x = self.config, self.inputs
        tokens, keys = x["q"].shape[-2], x["k"].shape[-2]
        if c.get("map") == "favor":  # its features need the largest exponent of all keys at once
            return False
        return (c.get("causal", False) and c.get("align", "bottom_right") == "bottom_right" and tokens <= keys
                and not {"cu", "cu_q", "cu_k", "do"} & set(x) and c["mechanism"] != "linformer")


def difference(got, want):
    """The worst |got - want| over the largest |want|; minus infinity must stand exactly where it is wanted."""
    if got.shape != want.shape:
        return f"shape {got.shape}, wanted {want.shape}"
    inf = np.isneginf(want)
    if not (np.isneginf(got) == inf).all():
        return "minus infinity in the wrong places"
    if not np.isfinite(got[~inf]).all():
        return "NaN or Inf"
    if inf.all():
        return 0.0
    d = np.abs(got[~inf].astype(np.float64) - want[~inf]).max()
    return float(d / max(np.abs(want[~inf]).max(), 1e-30))


def compare(case, got, tolerance):
    """(worst difference, None), or (difference, sentence)."""
    worst = 0.0
    for key, want in case.wanted.items():
        if key not in got:
            return worst, f"no output {key}"
        have = got[key] if case.rows is None else got[key][:, :, case.rows]
        if case.name == "bias_1e30":  # row 3 is not defined: every key is 1e30 away
            have, want = (np.delete(t, 3, 2) for t in (have, want))
        e = difference(have, want)
        allowed = tolerance * 10 if key.startswith("d") else tolerance  # gradients
        if key in ("dbias", "dsinks", "dE", "dF"):
            allowed = max(allowed, 1e-6)  # always float
        if isinstance(e, str) or not e <= allowed:
            return worst, f"{key}: {e}, allowed {allowed:.0e}"
        worst = max(worst, e)
    return worst, None


class Runner:
    def __init__(self, binary, verbose):
        self.binary, self.verbose = binary, verbose
        self.count = collections.Counter()
        self.worst = collections.defaultdict(float)

    def say(self, case, how, error, detail=""):
        self.count["failed" if error else how.split()[0]] += 1
        if error:
            print(f"FAIL  {case.family}/{case.name}  {how}  {json.dumps(case.config)}\n      {error}")
        elif self.verbose:
            print(f"ok    {case.family}/{case.name}  {how}  {detail}")

    def ask(self, case, inputs, **options):
        return attend(case.config, binary=self.binary, **inputs, **options)

    def refused(self, case, how, word, **options):
        try:
            self.ask(case, case.inputs, **options)
            self.say(case, how, "was not refused")
        except Refused as line:
            self.say(case, how, None if word in str(line) else f"the refusal does not say '{word}': {line}", str(line))

    def check(self, case, how, tolerance, inputs, **options):
        try:
            got = self.ask(case, inputs, **options)
        except (Refused, RuntimeError) as line:
            self.say(case, how, str(line))
            return None
        worst, error = compare(case, got, tolerance)
        self.worst[case.family, how.split()[0]] = max(self.worst[case.family, how.split()[0]], worst)
        self.say(case, how, error, f"{worst:.1e}")
        return got

    def run(self, case):
        got = self.check(case, "plain", case.tolerance(), case.inputs)
        if got is None:
            return None
        again = self.ask(case, case.inputs, threads=2)
        same = got.keys() == again.keys() and all(got[k].tobytes() == again[k].tobytes() for k in got)
        self.say(case, "threads", None if same else "two threads give other bytes than one")
        wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in case.inputs.items()}
        self.check(case, "f64", F64_TOLERANCE, wide | case.exact)
        keys = case.inputs["k"].shape[-2]
        for first in sorted({0, keys // 2}):
            if case.decodable():
                self.check(case, f"decode {first}", case.tolerance(), case.inputs, decode=first)
            else:
                self.refused(case, f"undecodable {first}", "", decode=first)
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attend")
    parser.add_argument("--data", type=pathlib.Path, default=HERE.parent / "data" / "golden")
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--only", default="")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()

    runner, skipped = Runner(options.attend, options.verbose), []
    for family in FAMILIES:
        if options.family not in (None, family):
            continue
        tensors = read_safetensors(options.data / f"{family}.safetensors")
        for entry in json.loads((options.data / f"{family}.json").read_text())["cases"]:
            if options.only not in entry["name"]:
                continue
            case = Case(family, entry, tensors)
            if case.elsewhere:
                skipped.append(f"{family}/{case.name} ({case.elsewhere})")
            else:
                runner.run(case)
    count = runner.count
    for (family, how), worst in sorted(runner.worst.items()):
        print(f"worst difference  {family:8} {how:6} {worst:.1e}")
    print(f"for the unit tests, not for a file: {len(skipped)}: " + ", ".join(skipped))
    print(f"{count['plain']} cases passed; {count['threads']} the same with two threads, {count['f64']} in f64, {count['decode']} decoded, "
          f"{count['undecodable']} refused to decode; {count['failed']} failed")
    return 1 if count["failed"] or not count["plain"] else 0


if __name__ == "__main__":
    sys.exit(main())
