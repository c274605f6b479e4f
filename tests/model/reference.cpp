// SPDX-License-Identifier: MIT
/// @file  SmolLM2-135M in this engine against the figures that PyTorch gives for the same weights (tests/data/model_reference.json).
///
///   test_model MODEL_DIR DATA_DIR      0: all equal, 1: not, 77: the model is not there
///
/// Logits, residual streams and mean NLL within 1e-3 relative of PyTorch; prefill in chunks, token by token and in batches of different
/// lengths as in one piece; greedy text to the token; the same bits on one thread and on two.

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <string>

#include <nlohmann/json.hpp>

#include "engine/perplexity.hpp"
#include "engine/pool.hpp"
#include "engine/sampler.hpp"
#include "engine/session.hpp"
#include "engine/text.hpp"

namespace {

using namespace engine;
using nlohmann::json;
using numbers = std::vector<float>;

int failures = 0;

void check(bool good, const std::string& what) {
  std::printf("%s %s\n", good ? "ok  " : "FAIL", what.c_str());
  std::fflush(stdout);
  failures += good ? 0 : 1;
}
void check_near(double got, double want, const std::string& what, double bound = 1e-3) {
  const double error = std::abs(got - want) / std::abs(want);
  check(std::isfinite(got) && error <= bound,
        what + ": " + std::to_string(got) + ", wanted " + std::to_string(want) + ", off by " + std::to_string(error));
}
double rms(std::span<const float> x) {
  double sum = 0;
  for (const float a : x) sum += static_cast<double>(a) * static_cast<double>(a);
  return std::sqrt(sum / static_cast<double>(x.size()));
}
/// Largest difference over the rms of what is wanted.
double distance(std::span<const float> got, std::span<const float> want) {
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i)
    worst = std::max(worst, std::abs(static_cast<double>(got[i]) - static_cast<double>(want[i])));
  return worst / rms(want);
}

/// The stretches of kjv_eval.bin that DATA_DIR/model_tokens.bin holds: [first, first + count) behind each other.
struct reference_text {
  std::vector<token> ids;
  std::span<const token> at(std::size_t offset, std::size_t count) const {
    constexpr std::size_t stretches[][2] = {{0, 1024}, {34569, 1335}};
    std::size_t before = 0;
    for (const auto& [first, length] : stretches) {
      if (offset >= first && offset + count <= first + length)
        return std::span(ids).subspan(before + offset - first, count);
      before += length;
    }
    throw std::runtime_error("model_tokens.bin does not hold the tokens at " + std::to_string(offset));
  }
};

numbers copy(std::span<const float> x) { return {x.begin(), x.end()}; }

void check_prompt(const model& net, fovea::exec_ref exec, std::span<const token> prompt, const json& want) {
  session s(net, exact_plan(net.config()), exec);
  std::vector<double> hidden;
  s.on_hidden = [&](isize, isize rows, const float* x) {
    const auto width = static_cast<std::size_t>(net.config().width);
    hidden.push_back(rms({x + static_cast<std::size_t>(rows - 1) * width, width}));
  };
  sequence a = s.make_sequence();
  const numbers whole = copy(s.forward({{a, prompt}}, logits_of::last).row(0));
  s.on_hidden = nullptr;
  double worst = 0;
  const json& rms_want = want["hidden_rms_last_token"];
  for (std::size_t l = 0; l < hidden.size(); ++l)
    worst = std::max(worst, std::abs(hidden[l] / rms_want[l].get<double>() - 1));
  check(hidden.size() == rms_want.size() && worst <= 1e-3,
        "residual stream of every layer, off by " + std::to_string(worst));
  check_near(rms(whole), want["last_token_logit_rms"], "rms of the last logits");
  for (const json& top : want["last_token_top5"])
    check_near(static_cast<double>(whole[top["id"].get<std::size_t>()]), top["logit"],
               "logit of " + top["text"].dump());

  for (const auto& cuts : {std::vector<std::size_t>{1, 511}, {500, 12}, {3, 97, 256, 155, 1}}) {
    sequence b = s.make_sequence();
    numbers last;
    std::size_t at = 0;
    for (const std::size_t n : cuts) {
      last = copy(s.forward({{b, prompt.subspan(at, n)}}, logits_of::last).row(0));
      at += n;
    }
    const double off = distance(last, whole);
    check(off <= 1e-3, "prefill in " + std::to_string(cuts.size()) + " calls, off by " + std::to_string(off));
  }
}

void check_steps_and_batches(const model& net, fovea::exec_ref exec, std::span<const token> prompt) {
  // In an f16 store, products summed in another order round some keys the other way, which moves logits by up to 2e-3 of their rms.
  session s(net, exact_plan(net.config()), exec, {.cache = fovea::dtype::f32});
  const std::size_t lengths[] = {48, 7, 130};
  std::vector<numbers> alone;
  for (const std::size_t n : lengths) {
    sequence a = s.make_sequence();
    alone.push_back(copy(s.forward({{a, prompt.first(n)}}, logits_of::last).row(0)));
  }
  sequence one = s.make_sequence();
  logits l;
  for (std::size_t i = 0; i < 48; ++i) l = s.forward({{one, prompt.subspan(i, 1)}}, logits_of::last);
  check(distance(l.row(0), alone[0]) <= 1e-4, "token by token, off by " + std::to_string(distance(l.row(0), alone[0])));

  sequence x = s.make_sequence(), y = s.make_sequence(), z = s.make_sequence();
  s.forward({{x, prompt.first(47)}, {z, prompt.first(60)}}, logits_of::none);
  l = s.forward({{x, prompt.subspan(47, 1)}, {y, prompt.first(7)}, {z, prompt.subspan(60, 70)}}, logits_of::last);
  for (isize i = 0; i < 3; ++i) {
    const double off = distance(l.row(i), alone[static_cast<std::size_t>(i)]);
    check(off <= 1e-4, "sequence " + std::to_string(i) + " of a batch, off by " + std::to_string(off));
  }
}

void check_greedy(const model& net, fovea::exec_ref exec, const json& want, bool bits) {
  session s(net, exact_plan(net.config()), exec);
  pool two(2);
  session other(net, exact_plan(net.config()), two);
  for (const json& sample : want["greedy"]) {
    const auto prompt = sample["prompt_ids"].get<std::vector<token>>();
    const auto ids = sample["greedy_ids"].get<std::vector<token>>();
    sequence a = s.make_sequence(), b = other.make_sequence();
    sampler choose(0, 1, 1);
    std::vector<token> got;
    bool same = true;
    std::span<const token> next = prompt;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const logits l = s.forward({{a, next}}, logits_of::last);
      if (bits && i < 6) {
        const auto row = other.forward({{b, next}}, logits_of::last).row(0);
        same = same && std::equal(row.begin(), row.end(), l.row(0).begin());
      }
      got.push_back(choose.next(l.row(0)));
      next = std::span(got).last(1);
    }
    check(got == ids, "greedy text after " + sample["prompt"].dump());
    if (bits) check(same, "the same bits on two threads");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::filesystem::path folder = argc > 1 ? argv[1] : "", data = argc > 2 ? argv[2] : "";
  if (!std::filesystem::exists(folder / "model.safetensors")) {
    std::printf("skipped: no model in %s (tools/export_model.py --out DIR)\n", folder.string().c_str());
    return 77;
  }
  try {
    const model net(folder.string());
    const json j =
        fovea::parse_json(fovea::read_text((data / "model_reference.json").string(), 1'000'000), "reference");
    const json& want = j["f16"];
    const reference_text text{read_ids((data / "model_tokens.bin").string())};
    const auto prompt = text.at(j["prompt"]["offset"], j["prompt"]["tokens"]);
    check_prompt(net, fovea::serial, prompt, want);
    check_steps_and_batches(net, fovea::serial, prompt);
    check_greedy(net, fovea::serial, want, true);
    session s(net, exact_plan(net.config()), fovea::serial);
    for (const std::size_t window : {std::size_t{0}, std::size_t{4}}) {
      const auto ids = text.at(j["nll_windows"]["offsets"][window], 1024);
      const std::int64_t start[] = {0};
      double sum = 0;
      for (const double x : window_nll(s, ids, start, 1024, 256)) sum += x;
      check_near(sum / 1023, want["nll_each"][window], "mean NLL of window " + std::to_string(window));
    }
  } catch (const std::exception& e) {
    check(false, e.what());
  }
  return failures == 0 ? 0 : 1;
}
