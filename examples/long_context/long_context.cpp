// SPDX-License-Identifier: MIT
/// @file  long_context: decodes past a million tokens in constant memory, and measures how time and memory grow with the length.
///
///   long_context                              decodes 1,100,000 tokens with each mechanism, exact attention for as long as is bearable
///   long_context --growth growth.json         prefill from 1k to 1M tokens; tools/growth.py draws the file
///
/// The tokens are random numbers: time and memory do not depend on them. What a mechanism's answers are worth is for `compare` to say.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include <unistd.h>

#include <CLI/CLI.hpp>

#include <fovea/any_attention.hpp>
#include <fovea/core/exec.hpp>
#include <fovea/interop/json.hpp>

namespace {

using fovea::isize;
using seconds = std::chrono::duration<double>;

struct arguments {
  isize tokens = 1'100'000, exact_tokens = 32'768, heads = 4, kv_heads = 4, width = 64;
  std::vector<std::string> configs = {R"({"mechanism": "linear", "map": "elu1"})",
                                      R"({"mechanism": "dijiang", "head_dim": 64})",
                                      R"({"mechanism": "windowed", "window": 64, "first": 4, "map": "hedgehog"})"};
  std::string growth;
};

double now() { return seconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Resident memory of this process in MB; 0 where /proc does not say.
double resident_megabytes() {
  std::ifstream file("/proc/self/statm");
  double pages = 0, resident = 0;
  file >> pages >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1e6;
}

std::vector<float> normal_numbers(isize count) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& f : x) f = normal(generator);
  return x;
}

fovea::any_attention make(const std::string& text) {
  return fovea::any_attention::make(fovea::parse_configuration(text, "--config"));
}

/// Decodes `tokens` tokens; a line at each power of two from 1024, and at the end.
void decode(const arguments& a, const std::string& config, isize tokens) {
  constexpr isize pool = 4096;  // tokens that are used again and again
  const fovea::any_attention m = make(config);
  const std::vector<float> q = normal_numbers(a.heads * pool * a.width),
                           kv = normal_numbers(2 * a.kv_heads * pool * a.width);
  std::vector<float> o(static_cast<std::size_t>(a.heads * a.width));
  const auto Q = fovea::bhnd(q.data(), 1, a.heads, pool, a.width),
             K = fovea::bhnd(kv.data(), 1, a.kv_heads, pool, a.width);
  const auto V = fovea::bhnd(kv.data() + a.kv_heads * pool * a.width, 1, a.kv_heads, pool, a.width);
  const auto O = fovea::bhnd(o.data(), 1, a.heads, 1, a.width);
  const fovea::shape s{1, a.heads, a.kv_heads, 1, tokens, a.width, a.width};
  fovea::state state = m.make_state(s);
  const fovea::buffer scratch(m.workspace_size(s, 1));
  std::printf("%s\n%12s %14s %14s %14s\n", config.c_str(), "tokens", "us a token", "state, bytes", "resident, MB");
  double last = now();
  isize last_count = 0, mark = 1024;
  for (isize t = 0; t < tokens; ++t) {
    const isize i = t % pool;
    fovea::step(fovea::serial, m, Q.slice(i, 1), K.slice(i, 1), V.slice(i, 1), O, state, {.workspace = scratch.span()});
    if (t + 1 != mark && t + 1 != tokens) continue;
    const double time = now();
    std::printf("%12td %14.2f %14zu %14.1f\n", t + 1, (time - last) * 1e6 / static_cast<double>(t + 1 - last_count),
                state.bytes(), resident_megabytes());
    std::fflush(stdout);
    last = now(), last_count = t + 1, mark *= 2;
  }
  std::printf("\n");
}

/// Of log time over log tokens, by least squares, from so many tokens on; 0: fewer than two lengths.
double slope_from(const nlohmann::json& rows, isize least) {
  double sx = 0, sy = 0, sxx = 0, sxy = 0, count = 0;
  for (const nlohmann::json& row : rows) {
    if (row["tokens"].get<isize>() < least) continue;
    const double x = std::log(row["tokens"].get<double>()), y = std::log(row["seconds"].get<double>());
    sx += x, sy += y, sxx += x * x, sxy += x * y, count += 1;
  }
  return count > 1 ? (count * sxy - sx * sy) / (count * sxx - sx * sx) : 0;
}

/// Prefill of one head at 1k, 2k, ... tokens: the median of several runs, and the slope of log time over log length.
nlohmann::json measure_growth(const arguments& a, const std::string& config, isize most) {
  const fovea::any_attention m = make(config);
  const std::vector<float> x = normal_numbers(3 * most * a.width);
  std::vector<float> o(static_cast<std::size_t>(most * a.width));
  nlohmann::json rows = nlohmann::json::array();
  std::printf("%s\n%12s %14s %16s %14s\n", config.c_str(), "tokens", "prefill, ms", "scratch, bytes", "state, bytes");
  for (isize n = 1024; n <= most; n *= 2) {
    const auto view = [&](isize part) { return fovea::bhnd(x.data() + part * most * a.width, 1, 1, n, a.width); };
    const auto out = fovea::bhnd(o.data(), 1, 1, n, a.width);
    const fovea::shape s{1, 1, 1, n, n, a.width, a.width};
    const fovea::buffer scratch(m.workspace_size(s, 1));
    std::vector<double> times;
    for (double spent = 0; times.size() < 5 || (spent < 0.3 && times.size() < 50); spent += times.back()) {
      const double start = now();
      fovea::prefill(fovea::serial, m, view(0), view(1), view(2), out, {.workspace = scratch.span()});
      times.push_back(now() - start);
    }
    std::sort(times.begin(), times.end());
    const double time = times[times.size() / 2];
    std::printf("%12td %14.3f %16zu %14zu\n", n, time * 1e3, scratch.size(), m.state_bytes(s));
    std::fflush(stdout);
    rows.push_back(
        {{"tokens", n}, {"seconds", time}, {"scratch_bytes", scratch.size()}, {"state_bytes", m.state_bytes(s)}});
  }
  // Rows of a long call come from memory, those of a short one from the second-level cache.
  const double slope = slope_from(rows, most / 16), all = slope_from(rows, 4096);
  std::printf("slope from %td tokens on: %.3f; from 4096 on: %.3f\n\n", most / 16, slope, all);
  return {{"config", nlohmann::json::parse(config)}, {"slope", slope}, {"rows", rows}};
}

void run(const arguments& a) {
  const std::string exact = R"({"mechanism": "softmax", "causal": true})";
  if (a.growth.empty()) {
    for (const std::string& config : a.configs) decode(a, config, a.tokens);
    if (a.exact_tokens > 0) decode(a, exact, std::min(a.tokens, a.exact_tokens));
    return;
  }
  std::ofstream file(a.growth);
  if (!file) throw std::runtime_error(a.growth + " cannot be written");
  nlohmann::json all = nlohmann::json::array();
  for (const std::string& config : a.configs) all.push_back(measure_growth(a, config, a.tokens));
  if (a.exact_tokens > 0) all.push_back(measure_growth(a, exact, std::min(a.tokens, a.exact_tokens)));
  file << all.dump(1) << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  arguments a;
  CLI::App app("Decoding past a million tokens in constant memory; growth of time and memory with the length.");
  app.add_option("--tokens", a.tokens, "tokens to decode, or the longest prefill")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--exact", a.exact_tokens, "tokens of exact attention beside them; 0: none")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  app.add_option("--heads", a.heads, "query heads")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--kv-heads", a.kv_heads, "KV heads")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--width", a.width, "width of q, k and v")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--config", a.configs, "a mechanism as JSON (docs/configuration.md); may be given several times");
  app.add_option("--growth", a.growth, "measure prefill from 1k tokens on and write the figures here");
  CLI11_PARSE(app, argc, argv);
  try {
    run(a);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "long_context: %s\n", e.what());
    return 2;
  }
  return 0;
}
