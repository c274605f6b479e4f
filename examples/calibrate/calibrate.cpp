// SPDX-License-Identifier: MIT
// calibrate: learns the feature maps of a layer, or the projections of Linformer, from its captured q, k, v, for any_attention and compare.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <mutex>

#include <fovea/interop/file.hpp>
#include <fovea/interop/json.hpp>
#include <fovea/interop/safetensors.hpp>
#include <fovea/train.hpp>
#include <fovea/version.hpp>

#include "common/complain.hpp"
#include "compare/input.hpp"
#if FOVEA_HAS_EIGEN
#include "calibrate/low_rank/linformer.hpp"
#endif

namespace {

using fovea::isize;

struct options {
  std::vector<std::string> files;
  std::string folder = ".", mechanism = "linear", map = "hedgehog_two", loss = "cross_entropy", share = "none";
  isize tokens = 0, positions = 0, slots = 0;
  double error = 0;
  int threads = 1;
  bool resume = false;
  fovea::train::calibration_options how;
};

std::vector<std::string> built_in_files() {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(FOVEA_DATA_DIR))
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path().string());
  std::sort(files.begin(), files.end());
  return files;
}

/// {"label", "attention", "weights"} for compare --settings.
nlohmann::json setting(const std::string& label, const options& o, const compare::input& in,
                       const std::string& weights) {
  nlohmann::json a;
  if (o.how.loss.window > 0)
    a = {{"mechanism", "windowed"},
         {"window", o.how.loss.window},
         {"first", o.how.loss.first},
         {"scale", in.scale},
         {"map", o.map}};
  else if (o.map == "dijiang")
    a = {{"mechanism", "dijiang"}, {"form", "unbiased"}, {"head_dim", in.d}, {"causal", in.causal}};
  else
    a = {{"mechanism", "linear"}, {"map", o.map}, {"causal", in.causal}, {"eps", 1e-6}};
  if (o.map == "t2r") a["query_scale"] = 1.0;
  return {{"label", label}, {"file", in.file}, {"attention", a}, {"weights", weights}};
}

void learn_maps(const std::string& file, const options& o, nlohmann::json& settings) {
  const compare::input in = compare::read_input(file, o.tokens);
  const std::string window = o.how.loss.window > 0 ? "_window" + std::to_string(o.how.loss.window) : "";
  const std::string stem = o.folder + "/" + std::filesystem::path(file).stem().string() + "." + o.map + window;
  fovea::train::calibration c(o.how, in.Q(), in.K(), in.V(), in.scale, in.causal);
  const std::string state = stem + ".checkpoint.safetensors";
  if (o.resume && std::filesystem::exists(state)) {
    try {
      c.resume(fovea::read_safetensors(state).tensors);
    } catch (const fovea::contract_error& e) {
      throw fovea::file_error(state, e);
    }
  }
  const fovea::safetensors_metadata about{{"made_by", "calibrate " FOVEA_VERSION_STRING},
                                          {"from", in.file},
                                          {"map", o.map},
                                          {"tokens", std::to_string(in.n)}};
  std::printf("%s: %td heads, %td tokens, map %s%s, %td features\n", in.file.c_str(), in.H, in.n, o.map.c_str(),
              window.c_str(), c.form().features());
  const fovea::threads pool(o.threads);
  double first = 0, best = 0;
  c.run(pool, [&](const fovea::train::calibration_progress& p) {
    if (p.step == p.steps || p.stopped) {
      std::printf("  KV head %td: step %td, loss %.4f -> %.4f (held-out rows: KL %.3f, output error %.1f %%)%s\n",
                  p.kv_head, p.step, p.first, p.best, p.held_out.cross_entropy, 100 * p.held_out.relative,
                  p.stopped ? ", stopped early" : "");
      std::fflush(stdout);
      first += p.first, best += p.best;
    }
    fovea::write_safetensors(state, c.checkpoint(), about);
    return true;
  });
  fovea::write_safetensors(stem + ".safetensors", c.weights(), about);
  fovea::write_safetensors(stem + ".untrained.safetensors", c.start(), about);
  settings.push_back(setting(o.map + window + ", untrained", o, in, stem + ".untrained.safetensors"));
  settings.push_back(setting(o.map + window + ", calibrated", o, in, stem + ".safetensors"));
  std::printf("  written: %s.safetensors\n", stem.c_str());
}

/// What an earlier run left in the list stays, in front, unless it is of the same label and file.
void merge_settings(const std::string& path, nlohmann::json& now) {
  if (!std::filesystem::exists(path)) return;
  const auto before = fovea::parse_json(fovea::read_text(path, 1 << 24), path);
  nlohmann::json all = nlohmann::json::array();
  for (const auto& old : before) {
    const auto same = [&](const nlohmann::json& x) {
      return x["label"] == old.value("label", "") && x["file"] == old.value("file", "");
    };
    if (std::none_of(now.begin(), now.end(), same)) all.push_back(old);
  }
  for (const auto& x : now) all.push_back(x);
  now = all;
}

/// Projections of the bidirectional layers; a file of a causal model is refused, unless nobody named it.
void project(const std::string& file, const options& o, const CLI::App& app, nlohmann::json& settings) {
#if FOVEA_HAS_EIGEN
  const compare::input in = compare::read_input(file, o.tokens);
  if (in.causal && o.files.empty()) {
    std::printf("%s: causal, and a Linformer slot mixes all positions: left out\n", in.file.c_str());
    return;
  }
  fovea::require(!in.causal,
                 "this layer is causal; a Linformer slot mixes all positions and has no causal form to fit");
  calibrate::linformer_options how;
  using sharing = fovea::train::projection_sharing;
  how.how.positions = o.positions, how.how.seed = o.how.seed;
  how.how.share = o.share == "none" ? sharing::none : o.share == "headwise" ? sharing::headwise : sharing::key_value;
  const auto given = [&](const char* name) { return app.get_option(name)->count() > 0; };
  if (given("--steps")) how.how.steps = o.how.steps;
  if (given("--rate")) how.how.optimiser.rate = o.how.optimiser.rate;
  if (given("--look-every")) how.how.look_every = o.how.look_every;
  if (given("--patience")) how.how.patience = o.how.patience;
  if (given("--held-out")) how.how.held_out = o.how.held_out;
  how.how.optimiser.decay = o.how.optimiser.decay;
  how.slots = o.slots, how.error = o.error, how.threads = o.threads, how.folder = o.folder;
  calibrate::fit_linformer(in, how, settings);
#else
  (void)file, (void)o, (void)app, (void)settings;
  fovea::fail("--mechanism linformer needs Eigen, and this program was built without it");
#endif
}

}  // namespace

int main(int argc, char** argv) {
  using fovea::train::map_kind;
  options o;
  CLI::App app{
      "Learns the feature maps, or the projections, of each file's heads from its q [H, n, d], k [G, n, d], v [G, n, "
      "e]."};
  app.add_option("files", o.files, "safetensors files of captured layers; none: the built-in ones");
  app.add_option("--out", o.folder, "folder for the weights, their checkpoints and settings.json");
  app.add_option("--mechanism", o.mechanism, "linear: feature maps (also DiJiang's); linformer: projections E and F")
      ->check(CLI::IsMember(std::vector<std::string>{"linear", "linformer"}));
  app.add_option("--slots", o.slots, "linformer: projected length (a quarter of the positions)")
      ->check(CLI::Range(1, 1 << 20));
  app.add_option(
         "--positions", o.positions,
         "linformer: tokens of a window, the longest input of E (the whole text; then only queries are held out)")
      ->check(CLI::Range(2, 1 << 20));
  app.add_option("--share", o.share, "linformer: none (E, F of each KV head), headwise, key_value (headwise, F = E)")
      ->check(CLI::IsMember(std::vector<std::string>{"none", "headwise", "key_value"}));
  app.add_option("--error", o.error, "linformer: the fewest slots whose held-out error is below this share")
      ->check(CLI::Range(1e-6, 1.0));
  app.add_option("--map", o.map, "t2r, hedgehog, hedgehog_two or dijiang")
      ->check(CLI::IsMember(std::vector<std::string>{"t2r", "hedgehog", "hedgehog_two", "dijiang"}));
  app.add_option("--features", o.how.features, "features of a row (d; 2 d for Hedgehog)")->check(CLI::Range(1, 65536));
  app.add_option("--window", o.how.loss.window, "exact keys before and with a row; the map is the rest's")
      ->check(CLI::Range(1, 1 << 20));
  app.add_option("--first", o.how.loss.first, "exact first keys, with --window (4)")->check(CLI::Range(0, 1 << 20));
  app.add_option("--loss", o.loss,
                 "cross_entropy, mean_square, relative (output error) or both (cross_entropy + relative)")
      ->check(CLI::IsMember(std::vector<std::string>{"cross_entropy", "mean_square", "relative", "both"}));
  app.add_option("--tokens", o.tokens, "use the first TOKENS tokens; compare --from TOKENS then judges by the others")
      ->check(CLI::Range(1, 1 << 30));
  app.add_option("--steps", o.how.steps, "steps of AdamW")->check(CLI::Range(1, 1 << 24));
  app.add_option("--rows", o.how.rows, "query rows of a step")->check(CLI::Range(1, 1 << 16));
  app.add_option("--rate", o.how.optimiser.rate, "learning rate at the start")->check(CLI::Range(1e-9, 10.0));
  app.add_option("--decay", o.how.optimiser.decay, "weight decay")->check(CLI::Range(0.0, 10.0));
  app.add_option("--look-every", o.how.look_every, "steps between looks at the held-out rows")
      ->check(CLI::Range(1, 1 << 24));
  app.add_option("--patience", o.how.patience, "looks without a better loss before a head stops")
      ->check(CLI::Range(1, 1 << 20));
  app.add_option("--held-out", o.how.held_out, "share of the rows that is never learned from")
      ->check(CLI::Range(0.001, 0.9));
  app.add_option("--seed", o.how.seed, "of weights and batches");
  app.add_option("--threads", o.threads, "threads; the result does not depend on it")->check(CLI::Range(1, 1024));
  app.add_flag("--resume", o.resume, "go on from the checkpoints in --out");
  o.how.loss.first = -1;
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    return complain("calibrate", e.what());
  }
  try {
    o.how.map = o.map == "t2r"            ? map_kind::t2r
                : o.map == "hedgehog"     ? map_kind::hedgehog
                : o.map == "hedgehog_two" ? map_kind::hedgehog_two
                                          : map_kind::dijiang;
    fovea::require(o.how.loss.first < 0 || o.how.loss.window > 0, "--first goes with --window");
    fovea::require(o.mechanism == "linformer" || (o.slots == 0 && o.positions == 0 && o.error == 0),
                   "--slots, --positions and --error go with --mechanism linformer");
    fovea::require(o.slots == 0 || o.error == 0, "--slots and --error were both given; --error chooses the slots");
    for (const char* name : {"--map", "--features", "--window", "--first", "--loss", "--rows", "--resume"})
      fovea::require(o.mechanism != "linformer" || app.get_option(name)->count() == 0, name,
                     " goes with feature maps, not with --mechanism linformer");
    fovea::require(o.mechanism == "linformer" || app.get_option("--share")->count() == 0,
                   "--share goes with --mechanism linformer");
    if (o.how.loss.first < 0) o.how.loss.first = o.how.loss.window > 0 ? 4 : 0;
    o.how.loss.cross_entropy = o.loss == "cross_entropy" || o.loss == "both" ? 1.0 : 0.0;
    o.how.loss.mean_square = o.loss == "mean_square" ? 1.0 : 0.0;
    o.how.loss.relative = o.loss == "relative" || o.loss == "both" ? 1.0 : 0.0;
    std::filesystem::create_directories(o.folder);
    nlohmann::json settings = nlohmann::json::array();
    const std::string list = o.folder + "/settings.json";
    for (const std::string& file : o.files.empty() ? built_in_files() : o.files) {
      try {
        o.mechanism == "linformer" ? project(file, o, app, settings) : learn_maps(file, o, settings);
      } catch (const fovea::contract_error& e) {
        throw fovea::file_error(file, e);
      }
    }
    fovea::require(!settings.empty(), "nothing to learn: none of the files suits --mechanism ", o.mechanism);
    merge_settings(list, settings);
    fovea::write_whole(list, [&](std::ostream& out) { out << settings.dump(1) << "\n"; });
    std::printf("written: %s\n", list.c_str());
    return 0;
  } catch (const std::bad_alloc&) {
    return complain("calibrate", "not enough memory");
  } catch (const std::exception& e) {
    return complain("calibrate", e.what());
  }
}
