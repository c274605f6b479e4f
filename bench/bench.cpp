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

/// Samples of a few calls each, at least 3 ms, every one between two measurements of the machine, which are not timed.
/// ratio(seconds of a call, rate of the machine) is collected; the median comes back.
template <class Call, class Rate, class Ratio>
double samples(benchmark::State& b, Call&& call, Rate&& rate, Ratio&& ratio) {
  call();  // warm-up
  int calls = 1;
  for (double spent = 0; spent < 0.003 && calls < 1 << 20;) {
    const double t = machine::now();
    for (int i = 0; i < calls; ++i) call();
    spent = machine::now() - t;
    if (spent < 0.003) calls *= 2;
  }
  std::vector<double> found;
  while (b.KeepRunningBatch(calls)) {
    b.PauseTiming();
    const double before = rate();
    b.ResumeTiming();
    const double t = machine::now();
    for (int i = 0; i < calls; ++i) call();
    const double seconds = (machine::now() - t) / calls;
    b.PauseTiming();
    found.push_back(ratio(seconds, (before + rate()) / 2));
    b.ResumeTiming();
  }
  return found.empty() ? 0 : median(found);
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
