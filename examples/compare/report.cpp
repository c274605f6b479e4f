// SPDX-License-Identifier: MIT
#include "report.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iostream>

#include <fovea/interop/json.hpp>
#include <fovea/version.hpp>

#include "report_template.hpp"  // generated from report_template.html by CMake

namespace compare {
namespace {

json number(double x) { return std::isfinite(x) ? json(x) : json(nullptr); }
json number(const std::optional<double>& x) { return x ? number(*x) : json(nullptr); }

std::string fixed(double x, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, x);
  return text;
}
/// 0.0523 -> "5.2 %", 1.7 -> "170 %"
std::string percent(double x) { return !std::isfinite(x) ? "-" : fixed(100 * x, x < 0.0995 ? 1 : 0) + " %"; }
std::string times(const std::optional<double>& x) { return x ? fixed(*x, *x < 10 ? 1 : 0) + "x" : ""; }
std::string size(const std::optional<double>& bytes) {
  if (!bytes) return "-";
  return *bytes < 1024 * 1024 ? fixed(*bytes / 1024, 0) + " KB" : fixed(*bytes / 1024 / 1024, 1) + " MB";
}

std::string pad(const std::string& s, std::size_t width, bool left = false) {
  const std::string space(s.size() < width ? width - s.size() : 0, ' ');
  return left ? s + space : space + s;
}

std::string now_text() {
  const std::time_t t = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm utc{};
  gmtime_r(&t, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

json result_json(const figures& f) {
  json j{{"input", f.input}, {"setting", f.setting}, {"skipped", f.skipped}};
  if (!f.skipped.empty()) return j;
  j["prefill_ms"] = number(f.prefill_ms), j["step_us"] = number(f.step_us), j["state_bytes"] = number(f.state_bytes),
  j["macs"] = number(f.macs);
  j["prefill_ratio"] = number(f.prefill_ratio), j["step_ratio"] = number(f.step_ratio),
  j["state_ratio"] = number(f.state_ratio);
  j["error_median"] = number(f.error_median), j["error_mean"] = number(f.error_mean),
  j["error_p95"] = number(f.error_p95), j["error_p99"] = number(f.error_p99);
  j["recall_p5"] = number(f.recall_p5), j["density"] = number(f.density);
  j["storage_error"] = number(f.storage_error), j["arithmetic_error"] = number(f.arithmetic_error),
  j["skipped_mass"] = number(f.skipped_mass);
  j["worst_head"] = f.worst_head, j["worst_error"] = number(f.worst_error), j["cosine"] = number(f.cosine),
  j["recall"] = number(f.recall);
  j["heads"] = json::array();
  for (std::size_t h = 0; h < f.heads.size(); ++h)
    j["heads"].push_back({{"head", h},
                          {"error_median", number(f.heads[h].error_median)},
                          {"error_p95", number(f.heads[h].error_p95)},
                          {"cosine", number(f.heads[h].cosine)},
                          {"recall", number(f.heads[h].recall)}});
  return j;
}

json maps_json(const report& r) {
  json maps = json::array();
  for (const picture& p : r.pictures) {
    const auto same = [&](const json& m) { return m["input"] == p.input && m["head"] == p.head; };
    auto at = std::find_if(maps.begin(), maps.end(), same);
    if (at == maps.end()) {
      maps.push_back({{"input", p.input}, {"head", p.head}, {"size", p.size}, {"panels", json::array()}});
      at = maps.end() - 1;
    }
    json values = json::array();
    for (const float x : p.values)
      values.push_back(std::isfinite(x) ? json(std::round(static_cast<double>(x) * 1e5) / 1e5) : json(nullptr));
    (*at)["panels"].push_back({{"setting", p.setting}, {"title", p.title}, {"values", std::move(values)}});
  }
  return maps;
}

double cost(const figures& f, const std::string& cost_of) {
  const std::optional<double> c = cost_of == "prefill" ? f.prefill_ms : cost_of == "step" ? f.step_us : f.state_bytes;
  return c.value_or(std::numeric_limits<double>::infinity());
}
/// This setting's cost as a share of exact's: from the turns, where it is a time.
double share(const figures& f, const std::string& cost_of) {
  const std::optional<double> ratio = cost_of == "prefill" ? f.prefill_ratio
                                      : cost_of == "step"  ? f.step_ratio
                                                           : f.state_ratio;
  return ratio ? 1 / *ratio : std::numeric_limits<double>::infinity();
}

}  // namespace

budget_result propose(const report& r, double error, const std::string& error_of, const std::string& cost_of) {
  budget_result b{error, error_of, cost_of, {}, 0, 0};
  double time = 0, bytes = 0;
  isize counted = 0;
  for (int x = 0; x < static_cast<int>(r.inputs.size()); ++x) {
    const input& in = r.inputs[static_cast<std::size_t>(x)];
    // Decode costs say nothing about a bidirectional input: its prefill decides.
    const std::string by = !in.causal ? "prefill" : cost_of;
    for (isize h = 0; h < in.H; ++h) {
      const figures* best = nullptr;
      double best_error = 0;
      for (const figures& f : r.results) {
        if (f.input != x || !f.skipped.empty()) continue;
        const head_figures& g = f.heads[static_cast<std::size_t>(h)];
        const bool exact = f.setting == 0;
        const double e = exact ? 0 : error_of == "p95" ? g.error_p95 : g.error_median;
        if (!(e <= error)) continue;
        if (best == nullptr || (exact ? 1.0 : share(f, by)) < (best->setting == 0 ? 1.0 : share(*best, by)))
          best = &f, best_error = e;
      }
      if (best == nullptr || !std::isfinite(cost(*best, by))) continue;
      b.assignments.push_back({x, static_cast<int>(h), best->setting, best_error});
      time += best->setting == 0 ? 1 : share(*best, "prefill");
      bytes += best->setting == 0 || !best->state_ratio ? 1 : 1 / *best->state_ratio;
      ++counted;
    }
  }
  if (counted > 0)
    b.time_saved = 1 - time / static_cast<double>(counted), b.bytes_saved = 1 - bytes / static_cast<double>(counted);
  return b;
}

void print_table(const report& r) {
  for (std::size_t x = 0; x < r.inputs.size(); ++x) {
    const input& in = r.inputs[x];
    std::cout << "\n" << in.file << ": " << (in.model.empty() ? "model not named" : in.model);
    if (in.layer >= 0) std::cout << ", layer " << in.layer;
    std::cout << ", n = " << in.n << ", H/G = " << in.H << "/" << in.G << ", d = " << in.d
              << (in.causal ? ", causal" : ", bidirectional") << "\n";
    std::cout
        << pad("", 36, true)
        << "   error of a row against exact               prefill            decode step        state          "
           "multiply-\n"
        << pad("setting", 36, true)
        << "  median     p95   worst head  cosine recall     ms    saves     us     saves         saves   adds (M)\n";
    for (const figures& f : r.results) {
      if (f.input != static_cast<int>(x)) continue;
      const setting& s = r.settings[static_cast<std::size_t>(f.setting)];
      std::cout << pad(s.label + (s.trained.empty() ? "" : " *"), 36, true);
      if (!f.skipped.empty()) {
        std::cout << "  not applicable: " << f.skipped << "\n";
        continue;
      }
      std::cout << pad(percent(f.error_median), 8) << pad(percent(f.error_p95), 8) << pad(percent(f.worst_error), 8)
                << " #" << pad(std::to_string(f.worst_head), 3, true) << pad(fixed(f.cosine, 3), 7)
                << pad(f.recall ? fixed(*f.recall, 3) : "-", 7) << pad(f.prefill_ms ? fixed(*f.prefill_ms, 2) : "-", 8)
                << pad(times(f.prefill_ratio), 8) << pad(f.step_us ? fixed(*f.step_us, 1) : "-", 8)
                << pad(times(f.step_ratio), 8) << pad(size(f.state_bytes), 10) << pad(times(f.state_ratio), 7)
                << pad(f.macs ? fixed(*f.macs / 1e6, 0) : "-", 9) << "\n";
      if (f.storage_error || f.arithmetic_error || f.skipped_mass) {
        const char* between = "  of it: ";
        std::cout << pad("", 36, true);
        const auto say = [&](const char* what, const std::optional<double>& part) {
          if (!part) return;
          std::cout << between << what << " " << percent(*part);
          between = ", ";
        };
        say("storage", f.storage_error), say("arithmetic", f.arithmetic_error), say("mass skipped", f.skipped_mass);
        std::cout << "\n";
      }
    }
  }
  std::cout << "\n* untrained: its maps or projections were drawn, not learned; 100 % is as wrong as answering zero.\n"
               "  saves: exact over this setting, timed in turns; above 1x is cheaper. Average error does not predict "
               "what a model loses: docs/mechanisms.\n";
}

void print_pooled(const report& r) {
  std::cout << "\nRows of all inputs together:\n"
            << pad("setting", 36, true) << "  median    mean     p95     p99  recall     p5  density  prefill\n";
  for (const pooled_figures& x : pooled(r.results))
    std::cout << pad(r.settings[static_cast<std::size_t>(x.setting)].label, 36, true) << pad(percent(x.error_median), 8)
              << pad(percent(x.error_mean), 8) << pad(percent(x.error_p95), 8) << pad(percent(x.error_p99), 8)
              << pad(x.recall ? fixed(*x.recall, 3) : "-", 8) << pad(x.recall_p5 ? fixed(*x.recall_p5, 2) : "-", 7)
              << pad(x.density ? fixed(*x.density, 3) : "-", 9) << pad(times(x.prefill_ratio), 9) << "\n";
}

json pooled_json(const report& r) {
  json all = json::array();
  for (const pooled_figures& x : pooled(r.results))
    all.push_back({{"setting", x.setting},
                   {"inputs", x.inputs},
                   {"rows", x.rows},
                   {"error_median", number(x.error_median)},
                   {"error_mean", number(x.error_mean)},
                   {"error_p95", number(x.error_p95)},
                   {"error_p99", number(x.error_p99)},
                   {"p95_by_input", number(x.p95_by_input)},
                   {"recall", number(x.recall)},
                   {"recall_p5", number(x.recall_p5)},
                   {"density", number(x.density)},
                   {"prefill_ratio", number(x.prefill_ratio)}});
  return all;
}

json to_json(const report& r) {
  json j{{"fovea", FOVEA_VERSION_STRING}, {"created", now_text()}, {"command", r.command}};
  j["machine"] = {{"cpu", r.machine.cpu},
                  {"isa", r.machine.isa},
                  {"threads", r.machine.threads},
                  {"fma_peak_gflops", number(r.machine.fma_peak_gflops)},
                  {"stream_gbs", number(r.machine.stream_gbs)}};
  j["inputs"] = json::array();
  for (const input& in : r.inputs)
    j["inputs"].push_back({{"file", in.file},
                           {"model", in.model},
                           {"layer", in.layer >= 0 ? json(in.layer) : json(nullptr)},
                           {"tokens", in.n},
                           {"heads", in.H},
                           {"kv_heads", in.G},
                           {"width", in.d},
                           {"causal", in.causal},
                           {"text", in.text}});
  j["settings"] = json::array();
  for (const setting& s : r.settings) {
    const json& c = r.configs[static_cast<std::size_t>(s.id)];
    j["settings"].push_back({{"id", s.id},
                             {"mechanism", c.is_object() ? c["mechanism"] : json("")},
                             {"label", s.label},
                             {"family", s.family},
                             {"trained", s.trained},
                             {"config", c},
                             {"note", s.note}});
  }
  j["results"] = json::array();
  for (const figures& f : r.results) j["results"].push_back(result_json(f));
  j["pooled"] = pooled_json(r);
  j["maps"] = maps_json(r);
  j["budget"] = nullptr;
  if (r.budget) {
    j["budget"] = {{"error", r.budget->error},
                   {"error_of", r.budget->error_of},
                   {"cost_of", r.budget->cost_of},
                   {"assignments", json::array()},
                   {"time_saved", number(r.budget->time_saved)},
                   {"bytes_saved", number(r.budget->bytes_saved)}};
    for (const assignment& a : r.budget->assignments)
      j["budget"]["assignments"].push_back(
          {{"input", a.input}, {"head", a.head}, {"setting", a.setting}, {"error", number(a.error)}});
  }
  return j;
}

json policy(const report& r, const std::string& folder) {
  json j{{"fovea_policy", 1},
         {"error", r.budget->error},
         {"error_of", r.budget->error_of},
         {"cost_of", r.budget->cost_of}};
  j["default"] = {{"mechanism", "softmax"}, {"causal", r.inputs.empty() || r.inputs.front().causal}};
  j["overrides"] = json::array();
  for (const assignment& a : r.budget->assignments) {
    const input& in = r.inputs[static_cast<std::size_t>(a.input)];
    const setting& s = r.settings[static_cast<std::size_t>(a.setting)];
    json o{{"input", in.file}, {"heads", {a.head}}};
    if (in.layer >= 0) o["layers"] = {in.layer, in.layer};
    o["label"] = s.label;
    o["error"] = number(a.error);
    o["attention"] = json::parse(fovea::to_json(s.configure(in)).dump());
    namespace fs = std::filesystem;
    if (!s.weights_file.empty()) o["weights"] = fs::proximate(fs::absolute(s.weights_file), folder).string();
    if (!s.trained.empty()) o["untrained"] = true;
    j["overrides"].push_back(std::move(o));
  }
  return j;
}

void write_report(const report& r, const std::string& folder) {
  std::filesystem::create_directories(folder);
  const json j = to_json(r);
  fovea::write_whole(folder + "/report.json", [&](std::ostream& out) { out << j.dump(1) << "\n"; });
  std::string text = j.dump(), safe;
  for (const char c : text) c == '<' ? safe += "\\u003c" : safe += c;
  std::string page = report_template();
  const std::string token = "/*FOVEA_REPORT_JSON*/null";
  page.replace(page.find(token), token.size(), safe);
  fovea::write_whole(folder + "/report.html", [&](std::ostream& out) { out << page; });
}

}  // namespace compare
