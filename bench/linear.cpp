// SPDX-License-Identifier: MIT
// Names: state/<rule>          one step of 32 heads, D = r = 128, states of 64 layers in turn (130 MB): `of_pass` is the time of
//                              reading, scaling and writing the same memory once over the time of the step
//        threads/<rule>        one head, N = 16384: time with one thread over time with two (`speedup`), the same bits demanded;
//                              `halves`: the same where two heads of half the length share nothing, the most that this machine gives
//        threads/<rule>/H<h>   h heads, N = 4096: the same. threads/windowed: window 64, 4 first keys, elu + 1 for the rest
//        threads/chunks        one head, prefill_chunks in eighths on two threads against prefill on one
//        calls/<rule>/n<n>     a call of n tokens with a state: the time of n steps over it (`of_steps`)
//        dijiang/decode/N<n>   one step of 8 heads of width 64 behind n tokens: time of an exact step over 8192 keys over it (`of_exact`)
#include "linear.hpp"

#include <cstring>

#include <fovea/core/chunks.hpp>
#include <fovea/core/kv_cache.hpp>
#include <fovea/dijiang.hpp>
#include <fovea/linear.hpp>
#include <fovea/softmax.hpp>
#include <fovea/windowed.hpp>

#include "measure.hpp"

namespace bench {
namespace {

using fovea::linear_attention, fovea::rule, fovea::state;

std::vector<float> gate(isize count, float value) { return std::vector<float>(static_cast<std::size_t>(count), value); }

/// Gates of `rows` tokens for the rules used here.
struct gate_rows {
  std::vector<float> g, beta;
  gate_rows(isize G, isize rows, isize width) : g(gate(G * rows * width, -0.05F)), beta(gate(G * rows, 0.5F)) {}
  fovea::gates views(const linear_attention& m, isize G, isize rows, isize width) const {
    fovea::gates out;
    if (m.rule == rule::decay || m.rule == rule::gla || m.rule == rule::gated_delta)
      out.log_decay = fovea::bhnd(g.data(), 1, G, rows, width);
    if (fovea::is_delta(m.rule)) out.beta = fovea::bhnd(beta.data(), 1, G, rows, 1);
    return out;
  }
};

/// Seconds of reading, scaling and writing all states once.
double pass_over(std::vector<state>& layers) {
  using P = fovea::simd::pack<float, fovea::simd::native>;
  const double t = machine::now();
  for (state& s : layers) {
    auto* x = s.as<float>();
    const isize count = static_cast<isize>(s.bytes() / sizeof(float));
    for (isize i = 0; i + P::size <= count; i += P::size) (P::load(x + i) * P(0.999F)).store(x + i);
  }
  return machine::now() - t;
}

void step_of_state(benchmark::State& b, rule u) {
  const isize heads = 32, d = 128, width = u == rule::gla ? d : 1;
  const fovea::shape s{1, heads, heads, 1, 1, d, d, fovea::dtype::f32};
  linear_attention m{.map = fovea::identity_map{}, .rule = u, .scale = 0.01, .normalise = false};
  const tensors t(s);
  const gate_rows rows(heads, 1, width);
  std::vector<state> layers(64);
  for (state& layer : layers) layer = m.make_state(s);
  fovea::buffer memory(m.workspace_size(s, 1) + 64);
  const fovea::call_options options{.lse = {}, .gates = rows.views(m, heads, 1, width), .workspace = memory.span()};
  const auto steps = [&] {
    for (state& layer : layers) fovea::step(fovea::serial, m, t.Q(), t.K(), t.V(), t.O(), layer, options);
  };
  b.counters["of_pass"] = samples(
      b, steps, [&] { return pass_over(layers); }, [](double seconds, double pass) { return pass / seconds; });
}

/// `call` on two threads against one, in turn; false where they give other bits.
template <class Call>
bool one_against_two(benchmark::State& b, const tensors& t, const fovea::threads& two, Call&& call) {
  fovea::buffer first(t.out.size());
  call(fovea::serial);
  std::memcpy(first.data(), t.out.data(), t.out.size());
  call(two);
  if (std::memcmp(first.data(), t.out.data(), t.out.size()) != 0)
    return b.SkipWithError("two threads give other bits"), false;
  b.counters["speedup"] = samples(
      b, [&] { call(two); },
      [&] {
        const double start = machine::now();
        call(fovea::serial);
        return machine::now() - start;
      },
      [](double seconds, double one) { return one / seconds; });
  return true;
}

void two_threads(benchmark::State& b, rule u, isize d, isize heads) {
  const isize n = heads == 1 ? 16384 : 4096;
  const fovea::shape s{1, heads, heads, n, n, d, d, fovea::dtype::f32};
  linear_attention m{.rule = u, .scale = u == rule::none ? 1.0 : 0.01};
  const tensors t(s);
  const gate_rows rows(heads, n, 1);
  const fovea::threads two(2);
  fovea::buffer memory(m.workspace_size(s, 2) + m.workspace_size(s, 1) + 64);
  const fovea::call_options options{.lse = {}, .gates = rows.views(m, heads, n, 1), .workspace = memory.span()};
  const auto call = [&](fovea::exec_ref exec) { fovea::prefill(exec, m, t.Q(), t.K(), t.V(), t.O(), options); };
  if (!one_against_two(b, t, two, call) || heads > 1) return;
  const auto half = [d, n](const fovea::tensor_mut& x) {
    return fovea::tensor_mut{x.data, x.type, 1, 2, n / 2, d, n * d, n / 2 * d, d};
  };
  const fovea::shape h{1, 2, 2, n / 2, n / 2, d, d, fovea::dtype::f32};
  fovea::buffer own(m.workspace_size(h, 2) + 64);
  const fovea::call_options apart{.lse = {}, .gates = rows.views(m, 2, n / 2, 1), .workspace = own.span()};
  std::vector<double> ratios;
  for (int i = 0; i < 9; ++i) {
    const double start = machine::now();
    call(fovea::serial);
    const double between = machine::now();
    fovea::prefill(two, m, half(t.Q()), half(t.K()), half(t.V()), half(t.O()), apart);
    ratios.push_back((between - start) / (machine::now() - between));
  }
  b.counters["halves"] = median(ratios);
}

void two_threads_windowed(benchmark::State& b, isize heads) {
  const isize n = heads == 1 ? 16384 : 4096;
  const fovea::shape s{1, heads, heads, n, n, 64, 64, fovea::dtype::f32};
  const fovea::windowed_attention m;
  const tensors t(s);
  const fovea::threads two(2);
  const fovea::buffer memory(m.workspace_size(s, 2) + m.workspace_size(s, 1) + 64);
  one_against_two(b, t, two, [&](fovea::exec_ref exec) {
    fovea::prefill(exec, m, t.Q(), t.K(), t.V(), t.O(), {.workspace = memory.span()});
  });
}

/// Along the length: another sum, so no bits are compared with prefill's.
void chunks(benchmark::State& b, rule u, isize d) {
  const isize n = 16384;
  const fovea::shape s{1, 1, 1, n, n, d, d, fovea::dtype::f32};
  linear_attention m{.rule = u, .scale = u == rule::none ? 1.0 : 0.01};
  const tensors t(s);
  const gate_rows rows(1, n, 1);
  const fovea::threads two(2);
  const fovea::call_options options{.lse = {}, .gates = rows.views(m, 1, n, 1), .workspace = {}};
  state held = m.make_state(s);
  b.counters["speedup"] = samples(
      b,
      [&] {
        m.clear(held);
        fovea::prefill_chunks(two, m, t.Q(), t.K(), t.V(), t.O(), held, n / 8, options);
      },
      [&] {
        m.clear(held);
        const double start = machine::now();
        fovea::prefill(fovea::serial, m, t.Q(), t.K(), t.V(), t.O(), held, options);
        return machine::now() - start;
      },
      [](double seconds, double one) { return one / seconds; });
}

void short_call(benchmark::State& b, rule u, isize n) {
  const fovea::shape s{1, 1, 1, n, n, 64, 64, fovea::dtype::f32};
  linear_attention m{.rule = u, .scale = u == rule::none ? 1.0 : 0.01};
  const tensors t(s);
  const gate_rows rows(1, n, 1);
  fovea::buffer memory(m.workspace_size(s, 1) + 64);
  const fovea::gates g = rows.views(m, 1, n, 1);
  for (isize i = 0; i < n * 64; ++i)
    static_cast<float*>(t.K().data)[i] *= 0.125F;  // of length 1: the state stays finite
  state held = m.make_state(s);
  const auto part = [](const auto& x, isize i, isize count) { return x ? x.slice(i, count) : x; };
  const auto call = [&](isize i, isize count) {
    fovea::prefill(
        fovea::serial, m, part(t.Q(), i, count), part(t.K(), i, count), part(t.V(), i, count), part(t.O(), i, count),
        held, {.gates = {part(g.log_decay, i, count), part(g.beta, i, count), {}, {}}, .workspace = memory.span()});
  };
  b.counters["of_steps"] = samples(
      b, [&] { call(0, n); },
      [&] {
        const int rounds = static_cast<int>(2000 / n) + 1;
        const double start = machine::now();
        for (int r = 0; r < rounds; ++r)
          for (isize i = 0; i < n; ++i) call(i, 1);
        return (machine::now() - start) / rounds;
      },
      [](double seconds, double steps) { return steps / seconds; });
}

void dijiang_decode(benchmark::State& b, isize held) {
  const isize heads = 8, d = 64, keys = 8192;
  const fovea::shape s{1, heads, heads, 512, 512, d, d, fovea::dtype::f32};
  fovea::shape room = s;
  room.m = keys + 8;
  const auto m = fovea::dijiang_attention::make({.head_dim = d});
  const fovea::softmax_attention exact{.mask = fovea::causal{}};
  const tensors t(s);
  state mine = m.make_state(s), cache = exact.make_state(room);
  for (isize n = 0; n + 512 <= keys; n += 512) fovea::kv_cache::append({t.Q(), t.K(), t.V(), t.O(), {}, {}}, cache);
  for (isize n = 0; n + 512 <= held; n += 512) fovea::prefill(fovea::serial, m, t.Q(), t.K(), t.V(), t.O(), mine);
  const auto one = [](const fovea::tensor_mut& x) { return x.slice(0, 1); };
  fovea::shape step = s;
  step.n = step.m = 1;
  fovea::buffer memory(m.workspace_size(step, 1) + 64);
  const fovea::call_options options{.lse = {}, .gates = {}, .workspace = memory.span()};
  b.counters["of_exact"] = samples(
      b, [&] { fovea::step(fovea::serial, m, one(t.Q()), one(t.K()), one(t.V()), one(t.O()), mine, options); },
      [&] {
        const double start = machine::now();
        fovea::kv_cache::truncate(cache, keys);
        fovea::step(fovea::serial, exact, one(t.Q()), one(t.K()), one(t.V()), one(t.O()), cache);
        return machine::now() - start;
      },
      [](double seconds, double other) { return other / seconds; });
}

template <class F>
void add(const std::string& name, F&& f) {
  benchmark::RegisterBenchmark(name.c_str(), [f](benchmark::State& b) {
    try {
      f(b);
    } catch (const std::exception& e) {
      b.SkipWithError(e.what());
    }
  })->Unit(benchmark::kMicrosecond);
}

}  // namespace

void register_linear() {
  for (const rule u : {rule::none, rule::decay, rule::gla, rule::delta, rule::gated_delta})
    add(std::string("state/") + fovea::name_of(u), [u](benchmark::State& b) { step_of_state(b, u); });
  for (const rule u : {rule::none, rule::decay, rule::gated_delta})
    for (const isize d : {64, 128})
      add(std::string("threads/") + fovea::name_of(u) + "/D" + std::to_string(d),
          [u, d](benchmark::State& b) { two_threads(b, u, d, 1); });
  for (const rule u : {rule::none, rule::decay, rule::gated_delta})
    for (const isize d : {64, 128})
      for (const isize heads : {3, 8, 9})
        add(std::string("threads/") + fovea::name_of(u) + "/H" + std::to_string(heads) + "/D" + std::to_string(d),
            [u, d, heads](benchmark::State& b) { two_threads(b, u, d, heads); });
  for (const isize heads : {1, 3, 8})
    add("threads/windowed/H" + std::to_string(heads) + "/D64",
        [heads](benchmark::State& b) { two_threads_windowed(b, heads); });
  for (const rule u : {rule::none, rule::decay})
    for (const isize d : {64, 128})
      add(std::string("threads/chunks/") + fovea::name_of(u) + "/D" + std::to_string(d),
          [u, d](benchmark::State& b) { chunks(b, u, d); });
  for (const rule u : {rule::none, rule::delta, rule::gated_delta})
    for (const isize n : {2, 4, 8, 33})
      add(std::string("calls/") + fovea::name_of(u) + "/n" + std::to_string(n),
          [u, n](benchmark::State& b) { short_call(b, u, n); });
  for (const isize n : {1024, 65536, 1048576})
    add("dijiang/decode/N" + std::to_string(n), [n](benchmark::State& b) { dijiang_decode(b, n); });
}

}  // namespace bench
