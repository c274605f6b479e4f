#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""check_calibrate.py CALIBRATE COMPARE DATA: the program learns, resumes with the same bits, fits projections, is read by compare, and refuses with one line and code 2."""
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

calibrate, compare, data = sys.argv[1:4]
layer = pathlib.Path(data) / "smollm2_layer29.safetensors"
small = ["--tokens", "640", "--steps", "60", "--rows", "16", "--look-every", "20", "--loss", "relative"]


def run(*command, code=0):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=200)
    assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def refused(text, *command):
    done = run(*command, code=2)
    assert done.stderr.count("\n") == 1 and text in done.stderr, f"{command}: {done.stderr!r} lacks {text!r}"


with tempfile.TemporaryDirectory() as tmp:
    tmp = pathlib.Path(tmp)
    run(calibrate, layer, *small, "--out", tmp / "a")
    weights = tmp / "a" / "smollm2_layer29.hedgehog_two.safetensors"
    state = tmp / "a" / "smollm2_layer29.hedgehog_two.checkpoint.safetensors"
    (tmp / "b").mkdir()
    shutil.copy(state, tmp / "b")  # finished: nothing is left to do
    run(calibrate, layer, *small, "--out", tmp / "b", "--resume", "--threads", "2")
    assert (tmp / "b" / weights.name).read_bytes() == weights.read_bytes(), "a resumed run gives other weights"

    run(compare, layer, "--from", "640", "--settings", tmp / "a" / "settings.json", "--only", "linear", "--no-pictures", "--repeats", "1",
        "--report", tmp)
    report = json.loads((tmp / "report.json").read_text())
    error = {s["label"]: r["error_median"] for s in report["settings"] for r in report["results"] if r["setting"] == s["id"] and "error_median" in r}
    before, after = error["hedgehog_two, untrained"], error["hedgehog_two, calibrated"]
    assert after < 0.93 * before, f"median error on rows never seen: {before} untrained, {after} calibrated"

    encoder = pathlib.Path(data) / "minilm_layer2.safetensors"
    fit = ["--mechanism", "linformer", encoder, "--positions", "64", "--slots", "16", "--steps", "20"]
    said = run(calibrate, *fit, "--out", tmp / "c").stdout
    spectrum = [[float(x) for x in line.split()] for line in said.splitlines() if line.split()[:1] in (["8"], ["16"], ["32"]) and len(line.split()) == 5]
    assert [row[0] for row in spectrum] == [8, 16, 32], said
    for _, own, fixed, own_error, fixed_error in spectrum:  # no directions are better than a text's own
        assert 0 < fixed < own <= 100 and 0 < own_error < fixed_error < 100, said
    assert all(a[1] < b[1] and a[4] > b[4] for a, b in zip(spectrum, spectrum[1:])), said
    fitted = [line.split() for line in said.splitlines() if "steps" in line and line.split()[0] == "16"]
    means, start, end = (float(x) for x in fitted[0][1:4])
    assert end <= start <= means < 100, said
    made = tmp / "c" / "minilm_layer2.linformer.safetensors"
    run(calibrate, *fit, "--out", tmp / "d", "--threads", "2")
    assert (tmp / "d" / made.name).read_bytes() == made.read_bytes(), "two threads fit other weights"
    run(compare, encoder, "--tokens", "64", "--settings", tmp / "c" / "settings.json", "--only", "Linformer k=16", "--no-pictures", "--repeats", "1",
        "--report", tmp)
    report = json.loads((tmp / "report.json").read_text())
    mine = [r for s in report["settings"] if s["label"] == "Linformer k=16, fitted" for r in report["results"] if r["setting"] == s["id"]]
    assert len(mine) == 1 and 0 < mine[0]["error_median"] < 1, mine
    said = run(calibrate, "--mechanism", "linformer", encoder, "--positions", "64", "--error", "0.6", "--steps", "1", "--out", tmp / "d").stdout
    assert "chosen: 8 slots" in said, said
    refused("is causal", calibrate, "--mechanism", "linformer", layer, "--out", tmp)
    refused("go with --mechanism linformer", calibrate, layer, "--slots", "8", "--out", tmp)
    refused("both given", calibrate, "--mechanism", "linformer", encoder, "--slots", "8", "--error", "0.5", "--out", tmp)
    refused("--map goes with feature maps", calibrate, "--mechanism", "linformer", encoder, "--map", "t2r", "--out", tmp)
    refused("held out leave", calibrate, "--mechanism", "linformer", encoder, "--positions", "300", "--out", tmp)

    refused("no such file", calibrate, tmp / "none.safetensors", "--out", tmp)
    broken = tmp / "broken.safetensors"
    broken.write_bytes(layer.read_bytes()[:1000])
    refused("broken.safetensors", calibrate, broken, "--out", tmp)
    refused("too few", calibrate, layer, "--tokens", "20", "--out", tmp)
    refused("window needs causal", calibrate, pathlib.Path(data) / "minilm_layer2.safetensors", "--window", "64", "--out", tmp)
    refused("--map", calibrate, layer, "--map", "other", "--out", tmp)
    refused("--first goes with --window", calibrate, layer, "--first", "4", "--out", tmp)
    refused("other options", calibrate, layer, *small, "--rate", "0.02", "--out", tmp / "b", "--resume")
print("calibrate: learned, resumed, fitted, compared, refused")
