#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The commands `engine evaluate`, `sensitivity` and `policy` on a real model and short texts.

  check_judging.py ENGINE COMPARE --model DIR        exit code 0, 1, or 77 where DIR has no model

  * a policy that says exact attention in other words has no loss, no divergence and every first choice;
  * perplexities are those of `engine perplexity` on the same window; the pooled loss is the predictions' mean of the texts' losses;
  * int8 stores move little, untrained maps in many layers a lot, and the retrieval text is the easier one for exact attention;
  * `sensitivity` finds the layer that was made loud on purpose; `policy` leaves it out, and what it writes can be run;
  * what `compare --budget` writes is a policy that runs, and so does one with a hybrid of another kind in each head;
  * a layer that does not exist, an unknown mechanism, missing weights, a text too short, a file that is no model: one line, exit code 2.
"""
import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

TEXT = pathlib.Path(__file__).resolve().parent.parent.parent / "docs" / "design.md"
SOFTMAX = {"mechanism": "softmax", "causal": True}
LOUD, QUIET = 6, 27
faults = []


def expect(good, what):
    if not good:
        faults.append(what)


class Engine:
    def __init__(self, program, model, folder):
        self.program, self.model, self.folder = program, model, folder

    def run(self, command, *args):
        return subprocess.run([self.program, command, "--model", str(self.model), *map(str, args)], capture_output=True, text=True, check=False)

    def json(self, command, *args):
        done = self.run(command, *args, "--json")
        if done.returncode:
            raise RuntimeError(f"engine {command} failed with {done.returncode}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def policy(self, name, default=None, overrides=(), **more):
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps({"fovea_policy": 1, "label": name, "default": default or SOFTMAX, "overrides": list(overrides), **more}))
        return path


def one_layer(layer, attention, **more):
    return {"layers": [layer, layer], "attention": attention, **more}


def check_evaluate(e):
    same = e.policy("same", overrides=[{"heads": [0, 1, 2, 3], "attention": {**SOFTMAX, "window": 100000, "store_type": "f16"}}])
    int8 = e.policy("int8", {**SOFTMAX, "store_type": "i8"})
    lost = e.policy("lost", overrides=[{"layers": [10, 19], "attention": {"mechanism": "linear", "map": "elu1"}}])
    j = e.json("evaluate", "--texts", TEXT, "--context", 128, "--windows", 1, "--block", 16, "--steps", 2, "--repeats", 1, "--policies", same, int8, lost)
    exact, same, int8, lost = j["policies"]
    expect([t["retrieval"] for t in j["texts"]] == [False, True], f"texts are {j['texts']}")
    expect(exact["all"]["loss"] == 0 and exact["all"]["kl"] == 0 and exact["all"]["top1"] == 1, f"exact against itself: {exact['all']}")
    expect(abs(same["all"]["loss"]) < 2e-4 and same["all"]["kl"] < 1e-5 and same["all"]["top1"] > 0.98, f"exact in other words: {same['all']}")
    expect(1e-6 < int8["all"]["kl"] < 0.03 and abs(int8["all"]["loss"]) < 0.1 and int8["all"]["top1"] > 0.85, f"int8 stores: {int8['all']}")
    expect(int8["speed"]["state_bytes"] < 0.65 * exact["speed"]["state_bytes"], f"int8 stores take {int8['speed']['state_bytes']} bytes, exact {exact['speed']['state_bytes']}")
    expect(lost["all"]["low"] > 0.5 and lost["all"]["kl"] > 0.3 and lost["layers"] == 10, f"ten linear layers: {lost['all']}")
    expect(exact["texts"][1]["perplexity"] < 0.5 * exact["texts"][0]["perplexity"], "exact attention does not see the copy")
    for p in (int8, lost):
        n = [t["predictions"] for t in p["texts"]]
        pooled = sum(k * math.log1p(t["loss"]) for k, t in zip(n, p["texts"])) / sum(n)
        expect(abs(pooled - math.log1p(p["all"]["loss"])) < 1e-6, f"{p['label']}: pooled loss {p['all']['loss']} is not the mean of the texts'")
        expect(p["all"]["low"] <= p["all"]["loss"] <= p["all"]["high"], f"{p['label']}: the interval does not hold its middle")
        for t, x in zip(p["texts"], exact["texts"]):
            expect(abs(t["perplexity"] / x["perplexity"] - 1 - t["loss"]) < 1e-6 * (1 + t["loss"]), f"{p['label']}: loss {t['loss']} is not the ratio of perplexities")
    # Rounding to int8 turns differences in the last bit into other draws of its noise.
    for p, attention, most in ((exact, (), 2e-4), (int8, ("--attention", e.folder / "int8.json"), 5e-3)):
        alone = e.json("perplexity", "--text", TEXT, "--context", 128, "--offsets", 0, *attention)
        expect(abs(alone["perplexity"] / p["texts"][0]["perplexity"] - 1) < most, f"{p['label']}: evaluate says {p['texts'][0]['perplexity']}, perplexity {alone['perplexity']}")


def check_ranking(e):
    # No window at all in the loud layer, hardly a change in the quiet one.
    both = e.policy("both", overrides=[one_layer(LOUD, {**SOFTMAX, "window": 1}), one_layer(QUIET, {**SOFTMAX, "window": 96, "first": 4})])
    ranking, chosen = e.folder / "ranking.json", e.folder / "chosen.json"
    j = e.json("sensitivity", "--texts", TEXT, "--context", 192, "--windows", 1, "--attention", both, "--no-triples", "--out", ranking)
    order = [s["layers"][0] for s in j["layers"]]
    expect(order == [QUIET, LOUD] and j["layers"][1]["kl"] > 5 * j["layers"][0]["kl"], f"sensitivity ranks {j['layers']}")
    done = e.run("policy", "--texts", TEXT, "--context", 192, "--windows", 1, "--attention", both, "--ranking", ranking, "--keep-loss", "1.5%", "--out", chosen)
    expect(done.returncode == 0, f"policy: {done.returncode}, {done.stderr.strip()}")
    if done.returncode == 0:
        p = json.loads(chosen.read_text())
        expect([o["layers"] for o in p["overrides"]] == [[QUIET, QUIET]] and p["measured"]["loss"] <= 0.015, f"policy chose {p}")
        expect(e.run("perplexity", "--text", TEXT, "--context", 64, "--offsets", 0, "--attention", chosen).returncode == 0, "the chosen policy cannot be run")
    done = e.run("policy", "--texts", TEXT, "--context", 128, "--windows", 1, "--attention", e.policy("loud", overrides=[one_layer(LOUD, {**SOFTMAX, "window": 1})]),
                 "--ranking", ranking, "--keep-loss", "nonsense", "--out", chosen)
    expect(done.returncode == 2, "--keep-loss nonsense is taken")


def check_compare(e, compare):
    capture = TEXT.parent.parent / "data" / "smollm2_layer14.safetensors"
    done = subprocess.run([compare, str(capture), "--budget", "0.2", "--only", "hybrid", "--tokens", "128", "--repeats", "1", "--seconds", "0.01", "--no-pictures", "--report", str(e.folder / "compare")],
                          capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"compare: {done.stderr.strip()}")
    path = e.folder / "compare" / "policy.json"
    overrides = json.loads(path.read_text())["overrides"]
    # Which setting is the cheapest is a matter of the machine, and at so few tokens of chance.
    expect(sorted(h for o in overrides for h in o["heads"]) == list(range(9)) and all(o["layers"] == [14, 14] for o in overrides), f"compare proposes {overrides}")
    done = e.run("perplexity", "--text", TEXT, "--context", 64, "--offsets", 0, "--attention", path)
    expect(done.returncode == 0, f"compare's policy: {done.stderr.strip()}")
    kinds = [{"pattern": "local"}, {"pattern": "strided"}, {"pattern": "sparse"}, {"pattern": "fixed"}, {"select": "mean"}, {"select": "bound"},
             {"compensate": "sampled"}, {"compensate": "cumulant"}, {"precision": "int8"}]
    path = e.policy("kinds", overrides=[{"layers": [14, 14], "heads": [h], "attention": {"mechanism": "hybrid", "causal": True, **kind}} for h, kind in enumerate(kinds)])
    done = e.run("perplexity", "--text", TEXT, "--context", 64, "--offsets", 0, "--attention", path)
    expect(done.returncode == 0, f"a kind of hybrid in each head: {done.stderr.strip()}")


def check_refusals(e):
    short = e.folder / "short.txt"
    short.write_text("too short")
    cases = {
        "layer 30 does not exist": e.policy("layer", overrides=[one_layer(30, SOFTMAX)]),
        "head 9 does not exist": e.policy("head", overrides=[{"heads": [9], "attention": SOFTMAX}]),
        "sofmax": e.policy("name", {"mechanism": "sofmax"}),
        "without learned weights": e.policy("untrained", overrides=[one_layer(3, {"mechanism": "windowed", "map": "hedgehog"})]),
        "no such file": e.policy("gone", overrides=[one_layer(3, SOFTMAX, weights="gone.safetensors")]),
        "has no state": e.policy("forward", {"mechanism": "softmax"}),
        "no such file ": e.folder / "nowhere.json",
    }
    for wanted, path in cases.items():
        done = e.run("evaluate", "--texts", TEXT, "--policies", path)
        expect(done.returncode == 2 and wanted.strip() in done.stderr and done.stderr.count("\n") == 1, f"{path.name}: exit code {done.returncode}, {done.stderr.strip()!r}; wanted 2 and {wanted!r}")
    good = e.policy("good", {**SOFTMAX, "store_type": "i8"})
    for args, wanted in ((("--texts", short), "windows take"), (("--texts", TEXT, "--context", 9000), "context is 8192"), (("--texts", TEXT, "--windows", 0), "windows is 0")):
        done = e.run("evaluate", "--policies", good, *args)
        expect(done.returncode == 2 and wanted in done.stderr and done.stderr.count("\n") == 1, f"{args}: exit code {done.returncode}, {done.stderr.strip()!r}; wanted 2 and {wanted!r}")


def main():
    parser = argparse.ArgumentParser(description="tests evaluate, sensitivity and policy on a real model")
    parser.add_argument("engine")
    parser.add_argument("compare")
    parser.add_argument("--model", type=pathlib.Path, required=True, metavar="DIR")
    args = parser.parse_args()
    if not (args.model / "model.safetensors").is_file():
        print(f"skipped: {args.model} holds no model (tools/export_model.py writes one)")
        return 77
    with tempfile.TemporaryDirectory() as folder:
        e = Engine(args.engine, args.model, pathlib.Path(folder))
        for part in (check_evaluate, check_ranking, check_refusals):
            part(e)
        check_compare(e, args.compare)
    for fault in faults:
        print(f"check_judging: {fault}")
    print("all well" if not faults else f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
