// SPDX-License-Identifier: MIT
// Names: <prefill|step>/<mechanism>/<dtype>/<variant>/D<d>/N<n>/H<h>/G<g>[/T<t>], one thread unless /T follows.
// Counters: of_peak    useful flops a second over the FMA rate measured just before and after each sample (times the threads)
//           of_stream  bytes of K and V that a step must read once, a second, over the stream-read rate of the same memory
//           bytes      workspace of the call;  state  bytes of the state
// Medians over the samples. Inputs are random; results are consumed.
#include <benchmark/benchmark.h>

#include <memory>

#include "cases.hpp"
#include "common/machine.hpp"

namespace {

using fovea::isize;

struct tensors {
  fovea::buffer q, k, v, out;
  fovea::shape s;
  explicit tensors(const fovea::shape& shape)
      : q(bytes(shape, shape.B * shape.H * shape.n * shape.d)),
        k(bytes(shape, shape.B * shape.G * shape.m * shape.d)),
        v(bytes(shape, shape.B * shape.G * shape.m * shape.e)),
        out(bytes(shape, shape.B * shape.H * shape.n * shape.e)),
        s(shape) {
    std::uint64_t seed = 1;
    for (fovea::buffer* b : {&q, &k, &v}) fill(*b, seed);
  }
  static std::size_t bytes(const fovea::shape& s, isize count) {
    return static_cast<std::size_t>(count) * fovea::size_of(s.type);
  }
  void fill(fovea::buffer& b, std::uint64_t& seed) const {  // uniform in [-1.7, 1.7]: variance 1
    const isize count = static_cast<isize>(b.size() / fovea::size_of(s.type));
    for (isize i = 0; i < count; ++i) {
      seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
      fovea::store_from_double(s.type, b.data(), i, (static_cast<double>(seed >> 40) / 8388608.0 - 1) * 1.732);
    }
  }
  fovea::tensor_mut at(const fovea::buffer& b, isize heads, isize rows, isize width) const {
    return {b.data(), s.type, s.B, heads, rows, width, heads * rows * width, rows * width, width};
  }
  fovea::tensor_mut Q() const { return at(q, s.H, s.n, s.d); }
  fovea::tensor_mut K() const { return at(k, s.G, s.m, s.d); }
  fovea::tensor_mut V() const { return at(v, s.G, s.m, s.e); }
  fovea::tensor_mut O() const { return at(out, s.H, s.n, s.e); }
};

double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2), x.end());
  return x[x.size() / 2];
}

/// One sample is a few calls, at least 3 ms of them, between two measurements of the machine.
template <class Call>
double sample(benchmark::State& b, int& calls, Call&& call) {
  for (;;) {
    const double t = machine::now();
    for (int i = 0; i < calls; ++i) call();
    const double dt = machine::now() - t;
    if (dt > 0.003 || calls >= 1 << 20) {
      b.SetIterationTime(dt / calls);
      return dt / calls;
    }
    calls *= 2;
  }
}

struct runner {
  bench::attention_case c;
  fovea::exec_ref exec;

  void prefill(benchmark::State& b) const {
    const fovea::any_attention a = c.make();
    const tensors t(c.shape);
    const bench::gate_tensors gates(c);
    fovea::buffer memory(a.workspace_size(c.shape, c.threads) + 64);
    const fovea::call_options options{.lse = {}, .gates = gates.views(), .workspace = memory.span()};
    std::vector<double> ratios;
    int calls = 1;
    for (auto _ : b) {
      const double before = machine::fma_peak();
      const double seconds = sample(b, calls, [&] {
        fovea::prefill(exec, a, t.Q(), t.K(), t.V(), t.O(), options);
        machine::use(*t.out.data());
      });
      const double after = machine::fma_peak();
      ratios.push_back(c.flops / seconds / ((before + after) / 2 * c.threads));
    }
    b.counters["of_peak"] = median(ratios);
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
    std::vector<double> ratios;
    int calls = 1;
    for (auto _ : b) {
      const double before = c.keeps_tokens ? machine::stream_read(s.as<void>(), s.bytes()) : 0;
      const double seconds = sample(b, calls, [&] {
        if (c.keeps_tokens) fovea::kv_cache::truncate(s, held);
        fovea::step(exec, a, t.Q().slice(0, 1), t.K().slice(0, 1), t.V().slice(0, 1), t.O().slice(0, 1), s, options);
        machine::use(*t.out.data());
      });
      if (!c.keeps_tokens) continue;
      const double after = machine::stream_read(s.as<void>(), s.bytes());
      ratios.push_back(static_cast<double>(a.state_bytes(c.shape)) / seconds / ((before + after) / 2));
    }
    if (c.keeps_tokens) b.counters["of_stream"] = median(ratios);
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
    benchmark::RegisterBenchmark(c.name().c_str(),
                                 [r](benchmark::State& b) {
                                   try {
                                     r.c.is_step ? r.step(b) : r.prefill(b);
                                   } catch (const std::exception& e) {
                                     b.SkipWithError(e.what());
                                   }
                                 })
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond)
        ->MinTime(0.2);
  }
  benchmark::AddCustomContext("fovea_arch", fovea::simd::name_of_arch<fovea::simd::native>);
  benchmark::AddCustomContext("cpu", machine::cpu_name());
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
