// SPDX-License-Identifier: MIT
#include "evaluation.hpp"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <filesystem>

#include <fovea/interop/file.hpp>
#include <fovea/version.hpp>

#include "common/machine.hpp"
#include "evaluate_template.hpp"  // generated from evaluate_template.html by CMake

namespace engine {
namespace {

using json = nlohmann::ordered_json;

json number(double x) { return std::isfinite(x) ? json(x) : json(nullptr); }

std::string now_text() {
  const std::time_t t = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm utc{};
  gmtime_r(&t, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

json figures(const text_summary& s) {
  const bool known = std::isfinite(s.difference.error);
  return {{"exact_perplexity", number(s.exact_perplexity)},
          {"perplexity", number(s.perplexity)},
          {"loss", number(s.ratio() - 1)},
          {"low", known ? json(s.ratio_low() - 1) : json(nullptr)},
          {"high", known ? number(s.ratio_high() - 1) : json(nullptr)},
          {"error", number(s.difference.error)},
          {"kl", number(s.kl.mean)},
          {"kl_error", number(s.kl.error)},
          {"kl_p99", number(s.kl_p99)},
          {"top1", number(s.top1)},
          {"absolute", number(s.absolute)},
          {"predictions", s.difference.values},
          {"blocks", s.difference.blocks}};
}

json speed_json(const evaluated_policy& p) {
  const speed& s = p.cost;
  return {{"context", s.context},
          {"steps", s.steps},
          {"prefill_seconds", s.prefill},
          {"prefill_attention_seconds", s.prefill_attention},
          {"prefill_tokens_per_second", static_cast<double>(s.context) / s.prefill},
          {"prefill_ratio", p.prefill_ratio},
          {"step_seconds", s.step},
          {"step_attention_seconds", s.step_attention},
          {"decode_tokens_per_second", 1 / s.step},
          {"step_ratio", p.step_ratio},
          {"state_bytes", s.bytes}};
}

/// "+0.52 %", "+1310 %"
std::string loss_text(double x) {
  char text[32];
  std::snprintf(text, sizeof text, std::abs(x) < 0.0995 ? "%+.2f" : std::abs(x) < 9.95 ? "%+.1f" : "%+.0f", 100 * x);
  return text;
}

}  // namespace

void print_table(const evaluation& e) {
  const speed& s = e.policies[0].cost;
  std::printf(
      "Loss of perplexity against exact attention on the same tokens, %%, [95 %% interval]; KL in 0.001 nats\n");
  for (std::size_t t = 0; t < e.texts.size(); ++t)
    std::printf("  text %zu: %s, %td predictions, perplexity with exact %.3f%s\n", t + 1, e.texts[t].name.c_str(),
                e.texts[t].predictions(), e.policies[0].texts[t].exact_perplexity,
                e.texts[t].retrieval ? " (retrieval)" : "");
  std::printf("Speed: prefill of %td tokens, %td decode steps behind it\n\n%-34s %6s %9s %19s", s.context, s.steps,
              "policy", "layers", "all", "");
  for (std::size_t t = 0; t < e.texts.size(); ++t) std::printf("  text %zu", t + 1);
  std::printf("      KL  top-1  prefill tok/s    decode tok/s    state MB\n");
  for (const evaluated_policy& p : e.policies) {
    std::printf("%-34s %6td %9s  [%7s, %7s]", p.what.label.substr(0, 34).c_str(), p.layers,
                loss_text(p.all.ratio() - 1).c_str(), loss_text(p.all.ratio_low() - 1).c_str(),
                loss_text(p.all.ratio_high() - 1).c_str());
    for (const text_summary& t : p.texts) std::printf(" %7s", loss_text(t.ratio() - 1).c_str());
    std::printf(" %7.2f %5.1f%% %7.1f (%.2fx) %7.2f (%.2fx) %9.2f\n", 1000 * p.all.kl.mean, 100 * p.all.top1,
                static_cast<double>(p.cost.context) / p.cost.prefill, p.prefill_ratio, 1 / p.cost.step, p.step_ratio,
                static_cast<double>(p.cost.bytes) / 1048576);
  }
}

json to_json(const evaluation& e, const evaluate_options& o) {
  json j{{"fovea", FOVEA_VERSION_STRING}, {"created", now_text()}, {"command", e.command}};
  j["machine"] = {
      {"cpu", machine::cpu_name()}, {"isa", fovea::simd::name_of_arch<fovea::simd::native>}, {"threads", o.threads}};
  j["model"] = {{"folder", std::filesystem::path(e.model).filename().string()},
                {"layers", e.config.layers},
                {"heads", e.config.heads},
                {"kv_heads", e.config.kv_heads},
                {"width", e.config.head_dim},
                {"vocabulary", e.config.vocabulary}};
  j["how"] = {{"context", o.texts.context}, {"windows", o.texts.windows},       {"block", o.block},
              {"chunk", o.chunk},           {"cache", fovea::name_of(o.cache)}, {"repeats", o.repeats}};
  j["texts"] = json::array();
  for (const judged_text& t : e.texts)
    j["texts"].push_back({{"name", t.name},
                          {"source", t.source},
                          {"retrieval", t.retrieval},
                          {"windows", t.windows.size()},
                          {"predictions", t.predictions()}});
  j["policies"] = json::array();
  for (const evaluated_policy& p : e.policies) {
    json one{{"label", p.what.label}, {"file", p.what.path}, {"layers", p.layers}};
    one["policy"] = to_json(p.what, o.folder);
    one["texts"] = json::array();
    for (const text_summary& t : p.texts) one["texts"].push_back(figures(t));
    one["all"] = figures(p.all);
    one["speed"] = speed_json(p);
    j["policies"].push_back(std::move(one));
  }
  return j;
}

void write_report(const json& j, const std::string& folder) {
  std::filesystem::create_directories(folder);
  fovea::write_whole(folder + "/evaluate.json", [&](std::ostream& out) { out << j.dump(1) << "\n"; });
  std::string safe;
  for (const char c : j.dump()) c == '<' ? safe += "\\u003c" : safe += c;
  std::string page = evaluate_template();
  const std::string mark = "/*FOVEA_REPORT_JSON*/null";
  page.replace(page.find(mark), mark.size(), safe);
  fovea::write_whole(folder + "/evaluate.html", [&](std::ostream& out) { out << page; });
}

}  // namespace engine
