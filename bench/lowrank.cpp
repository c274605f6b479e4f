// SPDX-License-Identifier: MIT
// Names: lowrank/<mechanism>/D64/N65536, one head, one thread, f32; .../backward: dq, dk, dv (Linformer: dE as well).
// Counters: of_peak      multiply-adds that the mechanism counts (macs), over the FMA rate
//           over_exact   time of exact attention (no mask) over that of the mechanism. Exact attention is timed at N = 8192 and scaled by
//                        (N / 8192)^2: at 65536 one call of it takes seven seconds.
#include "lowrank.hpp"

#include <fovea/efficient.hpp>
#include <fovea/linformer.hpp>
#include <fovea/nystrom.hpp>

#include "measure.hpp"

namespace bench {
namespace {

using fovea::dtype;

constexpr isize D = 64, few = 8192;

/// Seconds of one call of exact attention at N = few, once a sample.
double exact_seconds(const tensors& t, fovea::buffer& memory) {
  const double start = machine::now();
  fovea::prefill(fovea::serial, fovea::softmax_attention{}, t.Q().slice(0, few), t.K().slice(0, few),
                 t.V().slice(0, few), t.O().slice(0, few), {.workspace = memory.span()});
  return machine::now() - start;
}

template <class M>
void forward(benchmark::State& b, const M& m, isize n) {
  const fovea::shape s{1, 1, 1, n, n, D, D, dtype::f32}, small{1, 1, 1, few, few, D, D, dtype::f32};
  const tensors t(s);
  fovea::buffer memory(m.workspace_size(s, 1) + 64), other(fovea::softmax_attention{}.workspace_size(small, 1) + 64);
  const double times = static_cast<double>(n) / static_cast<double>(few);
  std::vector<double> ratios;
  b.counters["of_peak"] = samples(
      b,
      [&] {
        fovea::prefill(fovea::serial, m, t.Q(), t.K(), t.V(), t.O(), {.workspace = memory.span()});
        machine::use(*t.out.data());
      },
      [] { return machine::fma_peak(); },
      [&](double seconds, double peak) {
        ratios.push_back(exact_seconds(t, other) * times * times / seconds);
        return 2 * m.macs(s) / seconds / peak;
      });
  if (!ratios.empty()) b.counters["over_exact"] = median(ratios);
  b.counters["bytes"] = static_cast<double>(memory.size() - 64);
}

/// Time a call; of_peak by twice the forward's multiply-adds and those of the contexts or slots anew.
template <class M>
void back(benchmark::State& b, const M& m, isize n, double macs, float* dE) {
  const fovea::shape s{1, 1, 1, n, n, D, D, dtype::f32};
  const tensors t(s), g(s), dout(s);
  std::vector<float> lse(static_cast<std::size_t>(n));
  fovea::tensor_mut rows;
  if constexpr (requires { M::has_lse; }) rows = fovea::bhnd(lse.data(), 1, 1, n, 1);
  fovea::prefill(fovea::serial, m, t.Q(), t.K(), t.V(), t.O(), {.lse = rows});
  fovea::buffer memory(m.workspace_size_backward(s, 1) + 64);
  fovea::gradients to{.dq = g.Q(), .dk = g.K(), .dv = g.V()};
  to.dE = dE;
  b.counters["of_peak"] = samples(
      b,
      [&] {
        fovea::backward(fovea::serial, m, t.Q(), t.K(), t.V(), t.O(), rows, dout.Q(), to, {.workspace = memory.span()});
        machine::use(*g.q.data());
      },
      [] { return machine::fma_peak(); }, [&](double seconds, double peak) { return 2 * macs / seconds / peak; });
}

template <class Run>
void add(const std::string& name, Run&& run) {
  benchmark::RegisterBenchmark(("lowrank/" + name).c_str(), run)->Unit(benchmark::kMicrosecond);
}

}  // namespace

void register_lowrank() {
  constexpr isize N = 65536, slots = 128;
  using kfree = fovea::kfree_reconstruction;
  // Filled when the first of them runs: a list of all benchmarks needs no 32 MiB.
  static const auto linformer = [](bool shared) {
    static std::vector<float> E, F;
    for (std::vector<float>* x : {&E, &F})
      if (x->empty()) {
        x->resize(static_cast<std::size_t>(N * slots));
        for (std::size_t i = 0; i < x->size(); ++i)
          (*x)[i] = static_cast<float>((i * 2654435761U >> 16) % 1024) * 1e-5F;
      }
    fovea::linformer_attention m{.E = fovea::bhnd<const float>(E.data(), 1, 1, N, slots)};
    if (!shared) m.F = fovea::bhnd<const float>(F.data(), 1, 1, N, slots);
    return m;
  };
  add("linformer_128/D64/N65536", [](benchmark::State& b) { forward(b, linformer(false), N); });
  add("linformer_128_key_value/D64/N65536", [](benchmark::State& b) { forward(b, linformer(true), N); });
  add("linformer_128_key_value/D64/N65536/backward", [](benchmark::State& b) {
    static std::vector<float> dE(static_cast<std::size_t>(N * slots));
    const fovea::linformer_attention m = linformer(true);
    // the slots anew (2), softmax over them (5 products of n slots d), dk, dv and dE (4)
    back(b, m, N, 11.0 * static_cast<double>(N * slots * D), dE.data());
  });
  for (const bool max : {false, true})
    add(std::string("linformer_128_") + (max ? "max" : "mean") + "/D64/N65536/backward", [max](benchmark::State& b) {
      using projection = fovea::sequence_projection;
      const fovea::linformer_attention m{.projection = max ? projection::max : projection::mean, .slots = slots};
      back(b, m, N, 5.0 * static_cast<double>(N * slots * D),
           nullptr);  // softmax over the slots, no products beside it
    });
  add("linformer_causal_16_of_128/D64/N8192/backward", [](benchmark::State& b) {
    static std::vector<float> own(static_cast<std::size_t>(128 * 16), 1.0F / 128), dE(own.size());
    const fovea::linformer_attention m{
        .E = fovea::bhnd<const float>(own.data(), 1, 1, 128, 16), .causal = true, .block = 128};
    back(b, m, few, 2.5 * m.macs({1, 1, 1, few, few, D, D, dtype::f32}), dE.data());  // five products for two
  });
  add("efficient/D64/N65536", [](benchmark::State& b) { forward(b, fovea::efficient_attention{}, N); });
  add("efficient_causal/D64/N65536",
      [](benchmark::State& b) { forward(b, fovea::efficient_attention{.causal = true}, N); });
  add("efficient/D64/N65536/backward", [](benchmark::State& b) {
    back(b, fovea::efficient_attention{}, N, 5.0 * static_cast<double>(N * D * D), nullptr);
  });
  add("efficient_causal/D64/N8192/backward", [](benchmark::State& b) {
    back(b, fovea::efficient_attention{.causal = true}, few, 6.0 * static_cast<double>(few * D * D), nullptr);
  });
  add("kfree_context/D64/N65536", [](benchmark::State& b) { forward(b, kfree{.form = kfree::form_type::context}, N); });
  add("kfree_channel/D64/N65536",
      [](benchmark::State& b) { forward(b, kfree{.form = kfree::form_type::channel, .scale = 0.1}, N); });
  for (const isize landmarks : {64, 128})
    add("nystrom_" + std::to_string(landmarks) + "/D64/N65536",
        [landmarks](benchmark::State& b) { forward(b, fovea::nystrom_attention{.landmarks = landmarks}, N); });
}

}  // namespace bench
