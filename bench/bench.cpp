// SPDX-License-Identifier: MIT
// Names: <prefill|step>/<mechanism>/<dtype>/<variant>/D<d>/N<n>/H<h>/G<g>[/T<t>], one thread unless /T follows.
// Counters: of_peak    useful flops a second over the FMA rate measured just before and after each sample (times the threads)
//           of_stream  bytes of K and V that a step must read once, a second, over the stream-read rate of the same memory
//           bytes      workspace of the call;  state  bytes of the state
// Medians over the samples. Inputs are random; results are consumed.
#include <benchmark/benchmark.h>

#include <memory>

#include "backward.hpp"
#include "cases.hpp"
#include "exact.hpp"
#include "hybrid.hpp"
#include "int8.hpp"
#include "linear.hpp"
#include "lowrank.hpp"
#include "measure.hpp"
#include "windowed.hpp"

namespace {

using bench::isize, bench::samples, bench::tensors;

struct runner {
  bench::attention_case c;
  fovea::exec_ref exec;

  void prefill(benchmark::State& b) const {
    const fovea::any_attention a = c.make();
    const tensors t(c.shape);
    const bench::gate_tensors gates(c);
    fovea::buffer memory(a.workspace_size(c.shape, c.threads) + 64);
    const fovea::call_options options{.lse = {}, .gates = gates.views(), .workspace = memory.span()};
    b.counters["of_peak"] = samples(
        b,
        [&] {
          fovea::prefill(exec, a, t.Q(), t.K(), t.V(), t.O(), options);
          machine::use(*t.out.data());
        },
        [] { return machine::fma_peak(); },
        [&](double seconds, double peak) { return c.flops / seconds / (peak * c.threads); });
    b.counters["bytes"] = static_cast<double>(memory.size() - 64);
  }

  void step(benchmark::State& b) const {
    const fovea::any_attention a = c.make();
    fovea::shape room = c.shape, one = c.shape, piece = c.shape;
    room.m = c.shape.m + 8, one.n = 1;
    piece.n = piece.m = std::min<isize>(512, c.shape.m);
    const tensors t(piece);
    const bench::gate_tensors gates(c);
    fovea::state s = a.make_state(room);
    if (c.keeps_tokens)
      for (isize n = 0; n + piece.m <= c.shape.m; n += piece.m)  // the cache, without the cost of attending to fill it
        fovea::kv_cache::append({t.Q(), t.K(), t.V(), t.O(), {}, {}}, s);
    else
      fovea::prefill(exec, a, t.Q(), t.K(), t.V(), t.O(), s,
                     {.lse = {}, .gates = gates.views(piece.n), .workspace = {}});
    fovea::buffer memory(a.workspace_size(one, c.threads) + 64);
    const fovea::call_options options{.lse = {}, .gates = gates.views(1), .workspace = memory.span()};
    const isize held = s.tokens();
    const double bytes = static_cast<double>(a.state_bytes(c.shape));
    const double of_stream = samples(
        b,
        [&] {
          if (c.keeps_tokens) fovea::kv_cache::truncate(s, held);
          fovea::step(exec, a, t.Q().slice(0, 1), t.K().slice(0, 1), t.V().slice(0, 1), t.O().slice(0, 1), s, options);
          machine::use(*t.out.data());
        },
        [&] { return c.keeps_tokens ? machine::stream_read(s.as<void>(), s.bytes()) : 1.0; },
        [&](double seconds, double rate) { return bytes / seconds / rate; });
    if (c.keeps_tokens) b.counters["of_stream"] = of_stream;
    b.counters["bytes"] = static_cast<double>(memory.size() - 64);
    b.counters["state"] = static_cast<double>(a.state_bytes(c.shape));
  }
};

}  // namespace

int main(int argc, char** argv) {
  std::map<int, std::unique_ptr<fovea::threads>> pools;
  for (const bench::attention_case& c : bench::all_cases()) {
    if (c.threads > 1 && !pools.contains(c.threads)) pools[c.threads] = std::make_unique<fovea::threads>(c.threads);
    const runner r{c, c.threads > 1 ? fovea::exec_ref(*pools[c.threads]) : fovea::exec_ref(fovea::serial)};
    benchmark::RegisterBenchmark(c.name().c_str(), [r](benchmark::State& b) {
      try {
        r.c.is_step ? r.step(b) : r.prefill(b);
      } catch (const std::exception& e) {
        b.SkipWithError(e.what());
      }
    })->Unit(benchmark::kMicrosecond);
  }
  bench::register_exact();
  bench::register_linear();
  bench::register_int8();
  bench::register_backward();
  bench::register_windowed();
  bench::register_lowrank();
  bench::register_hybrid();
  benchmark::AddCustomContext("fovea_arch", fovea::simd::name_of_arch<fovea::simd::native>);
  benchmark::AddCustomContext("cpu", machine::cpu_name());
  // Names stay as they are above: a minimum time set on the cases would be added to each.
  std::vector<char*> arguments(argv, argv + argc);
  char brief[] = "--benchmark_min_time=0.2";
  arguments.insert(arguments.begin() + (argc > 0 ? 1 : 0), brief);
  argc = static_cast<int>(arguments.size());
  argv = arguments.data();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
