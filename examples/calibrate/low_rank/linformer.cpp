// SPDX-License-Identifier: MIT
#include "calibrate/low_rank/linformer.hpp"

#include <cstdio>
#include <filesystem>

#include <fovea/version.hpp>

#include "calibrate/low_rank/spectrum.hpp"

namespace calibrate {
namespace {

using fovea::train::projection_error;
using fovea::train::projection_fit;
using fovea::train::projection_sharing;

struct fitted {
  isize slots = 0;
  projection_error means, start, end;  // held-out: pooling, the best start, after AdamW
  double learned = 0;                  // mean error on what was learned from
  fovea::arrays weights;
};

projection_fit fit_of(const compare::input& in, const linformer_options& o, isize slots) {
  auto how = o.how;
  how.slots = slots;
  return {how, in.Q(), in.K(), in.V(), in.scale};
}

fitted fit(const compare::input& in, const linformer_options& o, isize slots, fovea::exec_ref exec) {
  projection_fit f = fit_of(in, o, slots);
  fitted r;
  r.slots = slots;
  const projections pooled = segment_means(f, slots);
  f.start(pooled.E, pooled.F);
  r.means = f.error(exec, true);
  projections best = pooled;
  r.start = r.means;
  const char* from = "pooling";
  for (const start_kind kind : {start_kind::means, start_kind::singular}) {
    const projections p = start_of(kind, in, f, slots, o.how.share);
    f.start(p.E, p.F);
    const projection_error now = f.error(exec, true);
    if (now.mean < r.start.mean) r.start = now, best = p, from = name_of(kind);
  }
  f.start(best.E, best.F);
  fovea::isize steps = 0;
  f.run(exec, [&](const fovea::train::projection_progress& p) { return steps = p.step, true; });
  r.end = f.error(exec, true), r.learned = f.error(exec, false).mean, r.weights = f.weights();
  std::printf("  %5td  %7.1f  %8.1f  %8.1f %7.1f %6.1f  %11.1f   %s, %td steps\n", slots, 100 * r.means.mean,
              100 * r.start.mean, 100 * r.end.mean, 100 * r.end.median, 100 * r.end.p95, 100 * r.learned, from, steps);
  std::fflush(stdout);
  return r;
}

std::vector<isize> powers(isize W) {
  std::vector<isize> ks;
  for (isize k = 8; k <= W / 2; k *= 2) ks.push_back(k);
  if (ks.empty()) ks.push_back(std::max<isize>(1, W / 2));
  return ks;
}

void print_spectrum(const compare::input& in, const projection_fit& f, const std::vector<isize>& ks) {
  std::printf(
      "  how far rank k reaches on the held-out %s, mean over heads, in %%. own: the best k directions of the "
      "attention\n"
      "  matrix judged, which no E fixed beforehand knows; fixed: those of what was learned from, about what E and F "
      "can do\n",
      f.whole() ? "rows" : "windows");
  std::printf("                   energy kept            output error\n");
  std::printf("      k            own   fixed            own   fixed\n");
  for (const spectrum_row& r : spectrum(in, f, ks))
    std::printf("  %5td        %7.1f %7.1f        %7.1f %7.1f\n", r.k, 100 * r.own_energy, 100 * r.fixed_energy,
                100 * r.own_error, 100 * r.fixed_error);
}

}  // namespace

void fit_linformer(const compare::input& in, const linformer_options& o, nlohmann::json& settings) {
  const fovea::threads pool(o.threads);
  const isize W = o.how.positions > 0 ? o.how.positions : in.n;
  const isize slots = o.slots > 0 ? o.slots : std::max<isize>(1, W / 4);
  const projection_fit probe = fit_of(in, o, o.error > 0 ? 1 : slots);
  if (probe.whole())
    std::printf("%s: %td heads, one window of %td tokens; rows %td on are held out, keys and values are not\n",
                in.file.c_str(), in.H, W, probe.train_rows());
  else
    std::printf("%s: %td heads, windows of %td tokens: %zu to learn from, %zu of other tokens held out\n",
                in.file.c_str(), in.H, W, probe.train_windows().size(), probe.held_out_windows().size());
  std::vector<isize> ks = powers(W);
  print_spectrum(in, probe, ks);
  std::printf(
      "  output error |o^ - o| / |o| of the rows held out, in %%: pooling needs no data, start is the best of three "
      "without AdamW\n");
  std::printf("         pooling     start  after AdamW                mean where\n");
  std::printf("  slots     mean      mean      mean  median    p95   it learned   start, steps\n");
  if (o.error <= 0) ks = {slots};
  fitted best;
  for (const isize k : ks) {
    fitted now = fit(in, o, k, pool);
    if (best.slots == 0 || now.end.mean < best.end.mean) best = std::move(now);
    if (o.error > 0 && best.end.mean <= o.error) break;
  }
  if (o.error > 0 && best.end.mean <= o.error)
    std::printf("  chosen: %td slots, the first of these below %.1f %%\n", best.slots, 100 * o.error);
  else if (o.error > 0)
    std::printf(
        "  none of these is below %.1f %%: Linformer is not for this layer at this error; kept: the best, %td slots\n",
        100 * o.error, best.slots);
  if (best.end.mean > 0.99 * best.means.mean)
    std::printf(
        "  learning found next to nothing beyond pooling: {\"projection\": \"mean\", \"slots\": %td} does as well\n",
        best.slots);
  const std::string stem = o.folder + "/" + std::filesystem::path(in.file).stem().string() + ".linformer";
  fovea::write_safetensors(stem + ".safetensors", best.weights,
                           {{"made_by", "calibrate " FOVEA_VERSION_STRING},
                            {"from", in.file},
                            {"positions", std::to_string(W)},
                            {"slots", std::to_string(best.slots)},
                            {"held_out_error", std::to_string(best.end.mean)}});
  settings.push_back({{"label", "Linformer k=" + std::to_string(best.slots) + ", fitted"},
                      {"file", in.file},
                      {"attention", {{"mechanism", "linformer"}, {"scale", in.scale}}},
                      {"weights", stem + ".safetensors"}});
  std::printf("  written: %s.safetensors, E and F for inputs of at most %td tokens\n", stem.c_str(), W);
}

}  // namespace calibrate
