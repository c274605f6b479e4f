// SPDX-License-Identifier: MIT
// compare: what each mechanism costs in accuracy, and saves in time and memory, on real Q, K, V.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <memory>

#include <fovea/any_attention.hpp>
#include <fovea/interop/json.hpp>

#include "common/complain.hpp"
#include "common/machine.hpp"
#include "report.hpp"

namespace compare {

machine_facts machine(int threads) {
  return {::machine::cpu_name(), fovea::simd::name_of_arch<fovea::simd::native>, threads,
          ::machine::fma_peak(0.05) / 1e9, ::machine::stream_read() / 1e9};
}

namespace {

struct options {
  std::vector<std::string> files;
  std::string folder = ".", policy_file, error_of = "median", cost_of = "prefill", only, extra;
  double budget = 0, seconds = 0.6;
  int threads = 1, repeats = 5;
  isize tokens = 0, from = 0, decode = 0;
  bool pictures = true, built_in = true, pooled = false;
};

class progress {
 public:
  explicit progress(std::size_t total) : total_(total), shown_(isatty(STDERR_FILENO) != 0) {}
  void step(const std::string& what) {
    ++done_;
    if (!shown_) return;
    const std::size_t width = 30, filled = total_ > 0 ? done_ * width / total_ : width;
    std::cerr << "\r[" << std::string(filled, '#') << std::string(width - filled, '.') << "] " << done_ << "/" << total_
              << "  " << what.substr(0, 44) << std::string(what.size() < 44 ? 44 - what.size() : 0, ' ') << std::flush;
  }
  ~progress() {
    if (shown_) std::cerr << "\r" << std::string(96, ' ') << "\r";
  }

 private:
  std::size_t total_, done_ = 0;
  bool shown_;
};

std::vector<std::string> built_in_files() {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(FOVEA_DATA_DIR))
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path().string());
  std::sort(files.begin(), files.end());
  if (files.empty()) throw fovea::file_error(FOVEA_DATA_DIR, "holds no .safetensors file");
  return files;
}

/// A file that a list of settings names: as it is named, or beside the list, where that was moved or is read from another folder.
std::string beside(const std::string& list, const std::string& file) {
  const auto moved = std::filesystem::path(list).parent_path() / std::filesystem::path(file).filename();
  return !std::filesystem::exists(file) && std::filesystem::exists(moved) ? moved.string() : file;
}

/// The user's own settings: a JSON list of {"label", "family"?, "note"?, "file"?, "attention": {...}, "weights"?: FILE}. With "file" a
/// setting is for the input of that name alone.
void add_settings(const std::string& path, std::vector<setting>& all) {
  const auto list = fovea::parse_json(fovea::read_text(path, 1 << 24), path);
  if (!list.is_array()) throw fovea::file_error(path, "wanted a list of {\"label\": ..., \"attention\": {...}}");
  for (const auto& item : list) {
    if (!item.is_object() || !item.contains("label") || !item["label"].is_string() || !item.contains("attention"))
      throw fovea::file_error(path, "every setting needs \"label\" (a text) and \"attention\" (a configuration)");
    for (const auto& [key, value] : item.items())
      if (key != "label" && key != "attention" && key != "weights" && key != "note" && key != "family" && key != "file")
        throw fovea::file_error(
            path, "key \"" + key + "\" is not known; known: label, attention, weights, note, family, file");
    const auto c = fovea::configuration_from_json(item["attention"]);
    auto weights = std::make_shared<fovea::arrays>();
    const std::string from = item.contains("weights") ? beside(path, item["weights"].get<std::string>()) : "";
    if (!from.empty()) *weights = fovea::read_safetensors(from).tensors;
    const std::string file = item.value("file", "");
    const std::string family = item.value("family", c.mechanism == "softmax" ? "window" : c.mechanism);
    all.push_back({static_cast<int>(all.size()), item["label"].get<std::string>(), family, "", item.value("note", ""),
                   [c, file](const input& in) {
                     if (!file.empty() && in.file != file) throw not_applicable{"its weights were learned for " + file};
                     return c;
                   },
                   [weights](const input&) { return *weights; }, from});
  }
}

fovea::any_attention make(const setting& s, const input& in) {
  return fovea::any_attention::make(s.configure(in), s.weights(in));
}

/// One result for every input and setting; a mechanism that refuses an input says why.
void measure_all(report& r, const options& o, fovea::exec_ref exec) {
  progress bar(r.inputs.size() * r.settings.size());
  for (std::size_t x = 0; x < r.inputs.size(); ++x) {
    const input& in = r.inputs[x];
    const fovea::any_attention exact = make(r.settings.front(), in);
    for (const setting& s : r.settings) {
      bar.step(in.file + ": " + s.label);
      figures f;
      try {
        const fovea::any_attention a = make(s, in);
        json& config = r.configs[static_cast<std::size_t>(s.id)];
        if (config.is_null()) config = json::parse(fovea::to_json(s.configure(in)).dump());
        f = measure(in, exact, s, a, exec, {o.repeats, o.seconds});
      } catch (const not_applicable& no) {
        f.skipped = no.why;
      } catch (const fovea::contract_error& no) {
        if (s.family == "exact") throw;
        f.skipped = no.what();
      }
      f.input = static_cast<int>(x), f.setting = s.id;
      r.results.push_back(std::move(f));
    }
  }
}

/// Pictures of two heads of each input: the first, and the one on which a window fails most.
void draw_all(report& r) {
  constexpr isize most = 40;
  progress bar(r.results.size());
  for (std::size_t x = 0; x < r.inputs.size(); ++x) {
    const input& in = r.inputs[x];
    std::vector<int> heads{0};
    for (const figures& f : r.results)
      if (f.input == static_cast<int>(x) && r.settings[static_cast<std::size_t>(f.setting)].family == "window" &&
          f.skipped.empty() && f.worst_head != 0 && heads.size() < 2)
        heads.push_back(f.worst_head);
    if (heads.size() < 2 && in.H > 1) heads.push_back(static_cast<int>(in.H / 2));
    for (const figures& f : r.results) {
      if (f.input != static_cast<int>(x)) continue;
      const setting& s = r.settings[static_cast<std::size_t>(f.setting)];
      bar.step("pictures: " + s.label);
      if (!f.skipped.empty()) continue;
      const isize size = std::min(most, in.n);
      for (const int h : heads)
        r.pictures.push_back({f.input, h, s.id, s.label, size, attention_picture(in, make(s, in), h, size)});
    }
  }
}

void write_policy(const report& r, const std::string& path) {
  const json j = policy(r, std::filesystem::absolute(path).parent_path().string());
  for (const auto& o : j["overrides"]) {  // what is written must load
    const auto c = fovea::configuration_from_json(nlohmann::json::parse(o["attention"].dump()));
    for (const assignment& a : r.budget->assignments) {
      const setting& s = r.settings[static_cast<std::size_t>(a.setting)];
      if (s.label == o["label"].get<std::string>()) {
        (void)fovea::any_attention::make(c, s.weights(r.inputs[static_cast<std::size_t>(a.input)]));
        break;
      }
    }
  }
  fovea::write_whole(path, [&](std::ostream& out) { out << j.dump(1) << "\n"; });
}

void print_budget(const report& r) {
  const budget_result& b = *r.budget;
  std::cout << "\nCheapest setting of each head with a " << b.error_of << " error of at most " << 100 * b.error
            << " % (cost: " << b.cost_of << "):\n"
            << std::flush;
  for (const assignment& a : b.assignments)
    std::printf("  %-30s head %2d  %-34s %6.2f %%\n", r.inputs[static_cast<std::size_t>(a.input)].file.c_str(), a.head,
                r.settings[static_cast<std::size_t>(a.setting)].label.c_str(), 100 * a.error);
  std::printf("  against exact everywhere: prefill time %+.0f %%, state %+.0f %%\n", -100 * b.time_saved,
              -100 * b.bytes_saved);
  std::fflush(stdout);
}

int run(const options& o, const std::string& command) {
  report r;
  r.command = command;
  for (const std::string& file : o.files.empty() ? built_in_files() : o.files) {
    r.inputs.push_back(read_input(file, o.tokens));
    input& in = r.inputs.back();
    if (o.from >= in.n)
      throw fovea::file_error(file, "has " + std::to_string(in.n) + " tokens; --from " + std::to_string(o.from) +
                                        " leaves no row to judge");
    if (o.decode > in.n)
      throw fovea::file_error(
          file, "has " + std::to_string(in.n) + " tokens; --decode " + std::to_string(o.decode) + " asks for more");
    in.decode = o.decode, in.from = o.decode > 0 ? in.n - o.decode : o.from;
  }
  std::vector<setting> all = built_in_settings();
  if (!o.built_in) all.erase(all.begin() + 1, all.end());  // exact stays, the yardstick
  if (!o.extra.empty()) add_settings(o.extra, all);
  for (setting& s : all)
    if (s.family == "exact" || o.only.empty() || s.label.find(o.only) != std::string::npos || s.family == o.only) {
      s.id = static_cast<int>(r.settings.size());
      r.settings.push_back(s);
    }
  r.configs.resize(r.settings.size());
  r.machine = machine(o.threads);
  for (input& in : r.inputs) in.exact = exact_output(in);
  std::unique_ptr<fovea::threads> pool = o.threads > 1 ? std::make_unique<fovea::threads>(o.threads) : nullptr;
  measure_all(r, o, pool ? fovea::exec_ref(*pool) : fovea::exec_ref(fovea::serial));
  if (o.budget > 0) r.budget = propose(r, o.budget, o.error_of, o.cost_of);
  if (o.pooled)
    print_pooled(r);
  else
    print_table(r);
  if (r.budget) print_budget(r);
  if (o.pictures) draw_all(r);
  write_report(r, o.folder);
  if (r.budget) write_policy(r, o.policy_file.empty() ? o.folder + "/policy.json" : o.policy_file);
  std::cout << "\nwritten: " << o.folder << "/report.html, " << o.folder << "/report.json";
  if (r.budget) std::cout << ", " << (o.policy_file.empty() ? o.folder + "/policy.json" : o.policy_file);
  std::cout << "\n";
  return 0;
}

}  // namespace
}  // namespace compare

int main(int argc, char** argv) {
  compare::options o;
  CLI::App app{"Accuracy, time and memory of attention mechanisms on real Q, K, V, against exact attention."};
  app.add_option("files", o.files,
                 "safetensors files with q [H, n, d], k [G, n, d], v [G, n, e]; none: the built-in ones");
  app.add_option("--report", o.folder, "folder for report.html and report.json");
  app.add_option("--budget", o.budget,
                 "propose for each head the cheapest setting within this error, as 0.01, and write it as policy.json")
      ->check(CLI::Range(1e-9, 10.0));
  app.add_option("--budget-on", o.error_of, "which error of a head the budget bounds")
      ->check(CLI::IsMember(std::vector<std::string>{"median", "p95"}));
  app.add_option("--cost", o.cost_of, "what cheap means to --budget")
      ->check(CLI::IsMember(std::vector<std::string>{"prefill", "step", "memory"}));
  app.add_option("--policy", o.policy_file, "where --budget writes (REPORT/policy.json)");
  app.add_option("--settings", o.extra,
                 "JSON file with more settings: [{\"label\": ..., \"attention\": {...}, \"weights\": FILE}]");
  app.add_option("--only", o.only, "only settings of this family, or with this text in their label (and exact)");
  app.add_flag("!--no-built-in", o.built_in, "only exact attention and the settings of --settings");
  app.add_flag("--pooled", o.pooled, "print one table over the rows of all inputs in place of one for each");
  app.add_option("--tokens", o.tokens, "use the first TOKENS tokens of each file")->check(CLI::Range(1, 1 << 30));
  app.add_option("--from", o.from, "measure errors on rows from this one on (what calibrate has not seen)")
      ->check(CLI::Range(0, 1 << 30));
  app.add_option("--decode", o.decode, "measure errors on the last DECODE rows, which come one by one after a prefill")
      ->check(CLI::Range(1, 1 << 30));
  app.add_option("--threads", o.threads, "threads of each call")->check(CLI::Range(1, 1024));
  app.add_option("--repeats", o.repeats, "timed runs of each setting")->check(CLI::Range(1, 1000));
  app.add_option("--seconds", o.seconds, "at most this long for the timed runs of one setting")
      ->check(CLI::Range(0.001, 3600.0));
  app.add_flag("!--no-pictures", o.pictures, "leave the attention pictures out");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  std::string command = "compare";
  for (int i = 1; i < argc; ++i) command += std::string(" ") + argv[i];
  try {
    return compare::run(o, command);
  } catch (const std::exception& e) {
    return complain("compare", e.what());
  }
}
