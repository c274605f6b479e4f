// SPDX-License-Identifier: MIT
// Names: backward/softmax/<type>/<variant>/D<d>/N<n>/H<h>/G<g>[/T<threads>]. of_peak counts five products of visible pairs: 2.5 times
// the flops of the forward pass, which is not timed.
// backward/linear/<rule>/D<d>/N<n>: one head, r = d, features elu + 1 with a normaliser (rule none) or the rows as they are; of_peak
// counts five products of r d for each token.
#include "backward.hpp"

#include <fovea/linear.hpp>
#include <fovea/softmax.hpp>
#include <string>

#include "measure.hpp"

namespace bench {
namespace {

using fovea::dtype;

struct backward_case {
  std::string variant;
  fovea::mask mask;
  double visible;  ///< share of the pairs
  isize d, n, H = 1, G = 1;
  dtype type = dtype::f32;
  int threads = 1;

  fovea::shape shape() const { return {1, H, G, n, n, d, d, type}; }
  std::string name() const {
    const auto number = [](const char* what, isize x) { return std::string(what) + std::to_string(x); };
    const std::string s = std::string("backward/softmax/") + fovea::name_of(type) + "/" + variant + number("/D", d) +
                          number("/N", n) + number("/H", H) + number("/G", G);
    return threads > 1 ? s + number("/T", threads) : s;
  }
  double flops() const {
    return 2.5 * 4 * static_cast<double>(H * d) * static_cast<double>(n) * static_cast<double>(n) * visible;
  }
};

void run(benchmark::State& b, const backward_case& c, fovea::exec_ref exec) {
  const fovea::shape s = c.shape();
  const fovea::softmax_attention m{.mask = c.mask};
  const tensors t(s), gradients(s);  // dout stands in `out` of the second, dq, dk, dv in its q, k, v
  std::uint64_t seed = 7;
  fovea::buffer dout(t.out.size());
  t.fill(dout, seed);
  const dtype wide = s.type == dtype::f64 ? dtype::f64 : dtype::f32;
  const fovea::buffer lse(static_cast<std::size_t>(s.H * s.n) * fovea::size_of(wide));
  const fovea::tensor_mut L(lse.data(), wide, 1, s.H, s.n, 1, s.H * s.n, s.n, 1);
  fovea::prefill(exec, m, t.Q(), t.K(), t.V(), t.O(), {.lse = L, .gates = {}});
  const fovea::buffer memory(m.workspace_size_backward(s, c.threads));
  const fovea::gradients to{gradients.Q(), gradients.K(), gradients.V()};
  b.counters["of_peak"] = samples(
      b,
      [&] {
        fovea::backward(exec, m, t.Q(), t.K(), t.V(), t.O(), L, t.at(dout, s.H, s.n, s.e), to, {memory.span()});
        machine::use(*gradients.q.data());
      },
      [&] { return s.type == dtype::f64 ? machine::fma_peak<double>() : machine::fma_peak(); },
      [&](double seconds, double peak) { return c.flops() / seconds / (peak * c.threads); });
  b.counters["bytes"] = static_cast<double>(memory.size());
}

void run_linear(benchmark::State& b, fovea::rule u, isize d, isize n) {
  const fovea::shape s{1, 1, 1, n, n, d, d, dtype::f32};
  fovea::linear_attention m{.rule = u};
  if (u != fovea::rule::none) m.map = fovea::identity_map{}, m.scale = 0.01, m.normalise = false;
  const tensors t(s), gradients(s);
  std::uint64_t seed = 7;
  fovea::buffer dout(t.out.size());
  t.fill(dout, seed);
  const std::vector<float> g(static_cast<std::size_t>(n * d), -0.05F), beta(static_cast<std::size_t>(n), 0.01F);
  fovea::gates gates;
  if (u == fovea::rule::decay || u == fovea::rule::gla || u == fovea::rule::gated_delta)
    gates.log_decay = fovea::bhnd(g.data(), 1, 1, n, u == fovea::rule::gla ? d : 1);
  if (fovea::is_delta(u)) gates.beta = fovea::bhnd(beta.data(), 1, 1, n, 1);
  fovea::prefill(fovea::serial, m, t.Q(), t.K(), t.V(), t.O(), {.lse = {}, .gates = gates});
  const fovea::buffer memory(m.workspace_size_backward(s, 1));
  const fovea::gradients to{gradients.Q(), gradients.K(), gradients.V()};
  b.counters["of_peak"] = samples(
      b,
      [&] {
        fovea::backward(fovea::serial, m, t.Q(), t.K(), t.V(), t.O(), {}, t.at(dout, 1, n, d), to,
                        {.workspace = memory.span(), .gates = gates});
        machine::use(*gradients.q.data());
      },
      [] { return machine::fma_peak(); },
      [&](double seconds, double peak) { return 10.0 * static_cast<double>(n * d * d) / seconds / peak; });
  b.counters["bytes"] = static_cast<double>(memory.size());
}

}  // namespace

void register_backward() {
  const fovea::mask full, causal = fovea::causal{}, near = fovea::window{.width = 512};
  const double all = 1, half = 0.5, band = (512.0 * 8192 - 512.0 * 511 / 2) / 8192.0 / 8192.0;
  std::vector<backward_case> cases;
  for (const isize n : {512, 2048, 8192}) cases.push_back({"causal", causal, half, 64, n});
  for (const isize d : {32, 80, 96, 128, 256}) cases.push_back({"causal", causal, half, d, 2048});
  for (const isize d : {64, 128}) cases.push_back({"full", full, all, d, 2048});
  for (const dtype type : {dtype::bf16, dtype::f16, dtype::f64})
    cases.push_back({"causal", causal, half, 64, 2048, 1, 1, type});
  cases.push_back({"causal", causal, half, 128, 2048, 8, 2});
  cases.push_back({"window512", near, band, 64, 8192});
  cases.push_back({"causal", causal, half, 64, 8192, 1, 1, dtype::f32, 2});
  cases.push_back({"causal", causal, half, 64, 2048, 8, 8, dtype::f32, 2});
  static const fovea::threads two(2);
  for (const backward_case& c : cases)
    benchmark::RegisterBenchmark(c.name().c_str(), [c](benchmark::State& b) {
      run(b, c, c.threads > 1 ? fovea::exec_ref(two) : fovea::exec_ref(fovea::serial));
    })->Unit(benchmark::kMicrosecond);
  using fovea::rule;
  for (const rule u : {rule::none, rule::decay, rule::gla, rule::delta, rule::gated_delta})
    for (const isize d : {64, 128}) {
      const std::string name =
          std::string("backward/linear/") + fovea::name_of(u) + "/D" + std::to_string(d) + "/N2048";
      benchmark::RegisterBenchmark(name.c_str(), [u, d](benchmark::State& b) {
        run_linear(b, u, d, 2048);
      })->Unit(benchmark::kMicrosecond);
    }
}

}  // namespace bench
