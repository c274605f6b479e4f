// SPDX-License-Identifier: MIT
// Hybrid sparse attention against exact attention of the same process: what a skipped tile saves, and what finding it costs.
#include "hybrid.hpp"

#include <cmath>
#include <fovea/hybrid.hpp>
#include <fovea/mask/table.hpp>
#include <fovea/softmax.hpp>
#include <string>

#include "measure.hpp"

namespace bench {
namespace {

struct source {
  std::uint64_t seed = 1;
  float uniform() {
    seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<float>(static_cast<double>(seed >> 40) / 8388608.0 - 1);
  }
  float normal() { return (uniform() + uniform() + uniform()) * 1.0F; }  // variance 1
  isize below(isize n) { return static_cast<isize>((static_cast<double>(uniform()) + 1) / 2 * static_cast<double>(n)); }
};

/// Q, K, V of a head that looks back: keys drift and scatter, a query is near one earlier block of 16.
struct real_like : tensors {
  explicit real_like(const fovea::shape& sizes) : tensors(sizes) {
    source r;
    const auto set = [](const fovea::tensor_mut& t, isize h, isize i, isize c, float x) { t.set(0, h, i, c, x); };
    for (isize g = 0; g < s.G; ++g) {
      std::vector<float> drift(static_cast<std::size_t>(s.d));
      for (isize j = 0; j < s.m; ++j)
        for (isize c = 0; c < s.d; ++c) {
          float& x = drift[static_cast<std::size_t>(c)];
          x = 0.97F * x + 0.25F * r.normal();
          set(K(), g, j, c, 1.6F * x + 0.8F * r.normal());
        }
    }
    for (isize h = 0; h < s.H; ++h)
      for (isize i = 0; i < s.n; ++i) {
        const isize block = r.below(i + s.m - s.n + 1) / 16 * 16;
        for (isize c = 0; c < s.d; ++c)
          set(Q(), h, i, c, 0.8F * static_cast<float>(K().get(0, h / s.group(), block, c)) + 1.2F * r.normal());
      }
  }
};

/// `exact` over `call`, in turns.
template <class Exact, class Call>
double in_turns(benchmark::State& b, Exact&& exact, Call&& call) {
  const auto rate = [&] {
    const double start = machine::now();
    exact();
    return 1 / (machine::now() - start);
  };
  return samples(b, call, rate, [](double seconds, double rate_of_exact) { return 1 / rate_of_exact / seconds; });
}

fovea::softmax_attention exact_attention(bool is_causal, fovea::precision arithmetic = fovea::precision::f32) {
  fovea::softmax_attention m;
  if (is_causal) m.mask = fovea::causal{};
  m.arithmetic = arithmetic;
  return m;
}

template <class M>
double against_exact(benchmark::State& b, const tensors& t, const M& m, bool is_causal,
                     fovea::precision of_exact = fovea::precision::f32) {
  const fovea::softmax_attention exact = exact_attention(is_causal, of_exact);
  const fovea::buffer scratch(std::max(m.workspace_size(t.s, 1), exact.workspace_size(t.s, 1)));
  const auto call = [&](const auto& mechanism) {
    fovea::prefill(fovea::serial, mechanism, t.Q(), t.K(), t.V(), t.O(), {.workspace = scratch.span()});
    machine::use(*t.out.data());
  };
  return b.counters["exact_takes"] = in_turns(
             b, [&] { call(exact); }, [&] { call(m); });
}

void given(benchmark::State& b, isize size, isize d, isize n) {
  const tensors t({1, 1, 1, n, n, d, d});
  std::vector<std::uint8_t> table(static_cast<std::size_t>(n / size * (n / size)));
  source r;
  double on = 0;
  for (auto& x : table) x = r.below(8) == 0, on += x;
  const auto blocks = fovea::bhnd<const std::uint8_t>(table.data(), 1, 1, n / size, n / size);
  const double takes = against_exact(b, t, fovea::hybrid_attention::over(blocks, size, size, false), false);
  b.counters["per_tile"] = static_cast<double>(table.size()) / on / takes;
}

/// `m` against exact attention; `visible` says what its rows see, of which every 61st is counted.
template <class M>
void pattern(benchmark::State& b, const M& m, const fovea::mask& visible, bool is_causal, isize n) {
  const tensors t({1, 1, 1, n, n, 64, 64});
  const fovea::mask_site at{0, 0, n, n, 1, 1};
  double seen = 0, all = 0;
  for (isize i = 0; i < n; i += 61) {
    all += static_cast<double>(is_causal ? i + 1 : n);
    for (isize j = 0; j < n; ++j) seen += visible.visible(at, i, j) ? 1 : 0;
  }
  const double takes = against_exact(b, t, m, is_causal);
  b.counters["per_tile"] = all / seen / takes;
}

/// `arithmetic` of the tiles, and of the exact attention that it is measured against.
void select(benchmark::State& b, fovea::block_selector how, fovea::compensation rest, isize n, isize d,
            fovea::precision arithmetic = fovea::precision::f32, fovea::precision of_exact = fovea::precision::f32) {
  const real_like t({1, 1, 1, n, n, d, d});
  against_exact(b, t,
                fovea::hybrid_attention{.select = how,
                                        .is_causal = true,
                                        .budget = 1.0 / 16,
                                        .keep_small = 0,
                                        .compensate = rest,
                                        .arithmetic = arithmetic},
                true, of_exact);
}

/// Exact attention that leaves keys out of the product with V; `skipped`: the mean share of the mass that they had.
void skip(benchmark::State& b, float epsilon, isize n, isize d) {
  const real_like t({1, 1, 1, n, n, d, d});
  const fovea::softmax_attention m{.mask = fovea::causal{}, .skip = epsilon};
  against_exact(b, t, m, true);
  std::vector<float> mass(static_cast<std::size_t>(n));
  fovea::prefill(fovea::serial, m, t.Q(), t.K(), t.V(), t.O(), {.skipped = fovea::bhnd(mass.data(), 1, 1, n, 1)});
  double sum = 0;
  for (const float x : mass) sum += static_cast<double>(x);
  b.counters["skipped"] = sum / static_cast<double>(n);
}

/// From nothing but the first keys and the window on, pooled, kept. `share`: of the block pairs, computed.
void to_target(benchmark::State& b, const fovea::error_target& target, isize n) {
  const real_like t({1, 3, 1, n, n, 64, 64});
  fovea::hybrid_attention m{.is_causal = true, .budget = 0, .at_least = 0};
  std::vector<float> bound(static_cast<std::size_t>(3 * n));
  b.counters["share"] = fovea::prefill_within(fovea::serial, m, t.Q(), t.K(), t.V(), t.O(),
                                              fovea::bhnd(bound.data(), 1, 3, n, 1), target);
  m.target = target;
  against_exact(b, t, m, true);
}

void pass(benchmark::State& b, isize n, isize d) {
  using arch = fovea::simd::native;
  if constexpr (fovea::kernel::has_code_pass<arch>) {
    const real_like t({1, 1, 1, n, n, d, d});
    const fovea::softmax_attention exact = exact_attention(true);
    const fovea::buffer scratch(exact.workspace_size(t.s, 1));
    fovea::kernel::summary_needs needs;
    needs.levels = 127;
    const auto lay_out = [&](fovea::arena& memory) {
      struct parts {
        fovea::kernel::block_summary<float> summary;
        fovea::kernel::code_keys codes;
        fovea::kernel::code_pass<arch> run;
        float *row, *sums;
      };
      return parts{{memory, needs, n, 16, d, d},
                   {memory, n, 16, d},
                   {memory, d},
                   memory.take<float>(d),
                   memory.take<float>(n / 16 * 128)};
    };
    fovea::arena measure;
    (void)lay_out(measure);
    const fovea::buffer own(measure.bytes());
    const fovea::tensor_ref q = t.Q(), k = t.K(), v = t.V();
    b.counters["exact_takes"] = in_turns(
        b, [&] { fovea::prefill(fovea::serial, exact, t.Q(), t.K(), t.V(), t.O(), {.workspace = scratch.span()}); },
        [&] {
          fovea::arena memory(own.span());
          auto x = lay_out(memory);
          fovea::kernel::summarise<arch>(x.summary, 0, n, k, v, 0, 0, x.row);
          fovea::kernel::detail::prepare_codes<arch>(x.summary, n, x.codes);
          for (isize i = 0; i < n; i += 64) {
            for (isize l = 0; l < 64; ++l) x.run.load(static_cast<const float*>(q.row(0, 0, i + l)), 0.18F, 127, l);
            if (x.run.level(x.codes, i / 16 + 3, 0, 64))
              x.run.run_level(x.codes, 16, i / 16 + 3, 64, x.sums);
            else
              x.run.run(x.codes, n, 16, i / 16 + 3, 64, x.sums);
          }
          machine::use(*reinterpret_cast<const std::byte*>(x.sums));
        });
  }
}

struct step_case {
  fovea::block_selector how;
  fovea::compensation rest;
  bool share_group;
  isize H, G, d, m;
  isize refresh = 1;  ///< steps of a selection, and of a call
  std::string name() const;
};

void step(benchmark::State& b, const step_case& x) {
  const isize m = x.m;
  const fovea::shape all{1, x.H, x.G, m, m, x.d, x.d, fovea::dtype::f16},
      room{1, x.H, x.G, 1, m + 8 + x.refresh, x.d, x.d, fovea::dtype::f16};
  const real_like t(all);
  const fovea::hybrid_attention hybrid{.select = x.how,
                                       .is_causal = true,
                                       .budget = 1.0 / 16,
                                       .keep_small = 0,
                                       .refresh = x.refresh,
                                       .share_group = x.share_group,
                                       .compensate = x.rest};
  const fovea::softmax_attention exact = exact_attention(true);
  fovea::state of_hybrid = hybrid.make_state(room), of_exact = exact.make_state(room);
  // All keys but the last, with their summaries, without attending to them.
  const fovea::tensor_ref k = t.K().slice(0, m - 1), v = t.V().slice(0, m - 1);
  fovea::detail::hybrid_append<float>(hybrid, of_hybrid, k, v);
  fovea::kv_cache::append({t.Q(), k, v, t.O(), {}, {}}, of_exact);
  const isize held = of_exact.tokens();
  fovea::shape one = all;
  one.n = 1, one.m = m + x.refresh;
  const fovea::buffer scratch(std::max(hybrid.state_workspace_size(one, 1), exact.workspace_size(one, 1)) + 64);
  const auto call = [&](const auto& mechanism, fovea::state& s) {
    fovea::kv_cache::truncate(s, held);
    for (isize step = 0; step < x.refresh; ++step)  // a truncated state selects anew
      fovea::step(fovea::serial, mechanism, t.Q().slice(m - 1 - step, 1), t.K().slice(m - 1, 1), t.V().slice(m - 1, 1),
                  t.O().slice(0, 1), s, {.workspace = scratch.span()});
    machine::use(*t.out.data());
  };
  b.counters["exact_takes"] = in_turns(
      b, [&] { call(exact, of_exact); }, [&] { call(hybrid, of_hybrid); });
}

const char* name_of(fovea::block_selector x) {
  return x == fovea::block_selector::int8 ? "int8" : x == fovea::block_selector::int4 ? "int4" : "mean";
}
const char* rest_of(fovea::compensation x) {
  return x == fovea::compensation::none ? "dropped" : x == fovea::compensation::zeroth ? "pooled" : fovea::name_of(x);
}

std::string step_case::name() const {
  const auto text = [](isize x) { return std::to_string(x); };
  return std::string("step/") + name_of(how) + "/" + rest_of(rest) + (share_group ? "/shared" : "") +
         (refresh > 1 ? "/refresh" + text(refresh) : "") + "/f16/D" + text(d) + "/N" + text(m) + "/H" + text(H) + "/G" +
         text(G);
}

}  // namespace

void register_hybrid() {
  const auto add = [](const std::string& name, auto run) {
    benchmark::RegisterBenchmark(("hybrid/" + name).c_str(), run)->Unit(benchmark::kMillisecond);
  };
  const isize n = 16384;
  for (const isize d : {64, 128})
    for (const isize size : {16, 64, 128})
      add("given/B" + std::to_string(size) + "/D" + std::to_string(d) + "/N" + std::to_string(n),
          [=](benchmark::State& b) { given(b, size, d, n); });
  for (const fovea::hsa_mode mode :
       {fovea::hsa_mode::local, fovea::hsa_mode::strided, fovea::hsa_mode::sparse, fovea::hsa_mode::fixed})
    add("pattern/" + std::string(fovea::name_of(mode)) + "128/D64/N16384", [=](benchmark::State& b) {
      pattern(b, fovea::hybrid_attention::hsa(mode, 128), fovea::hsa_pattern{mode, 128}, true, n);
    });
  const auto masked = [&](const char* name, const fovea::mask& visible, bool is_causal) {
    add("pattern/" + std::string(name) + "/D64/N16384",
        [=](benchmark::State& b) { pattern(b, fovea::softmax_attention{.mask = visible}, visible, is_causal, n); });
  };
  masked("bigbird64", fovea::bigbird{}, false);
  masked("global16_window256",
         fovea::both{fovea::causal{}, fovea::either{fovea::global_tokens{16}, fovea::window{256}}}, true);
  masked("dilated64x2", fovea::dilated{}, true);
  for (const float epsilon : {1e-4F, 1e-3F})
    add(std::string("skip/") + (epsilon < 5e-4F ? "1e-4" : "1e-3") + "/D64/N8192",
        [=](benchmark::State& b) { skip(b, epsilon, 8192, 64); });
  for (const isize d : {64, 128})
    add("pass/D" + std::to_string(d) + "/N16384", [=](benchmark::State& b) { pass(b, n, d); });
  using enum fovea::block_selector;
  for (const isize d : {64, 128})
    add("select/int8/dropped/tiles_int8/against_int8/D" + std::to_string(d) + "/N16384", [=](benchmark::State& b) {
      select(b, int8, fovea::compensation::none, n, d, fovea::precision::int8, fovea::precision::int8);
    });
  for (const fovea::block_selector how : {int8, mean})
    for (const fovea::compensation rest : {fovea::compensation::none, fovea::compensation::zeroth}) {
      const std::string name = std::string(name_of(how)) + "/" + rest_of(rest);
      for (const isize d : {64, 128}) {
        const std::string size = "/D" + std::to_string(d) + "/N16384";
        add("select/" + name + size, [=](benchmark::State& b) { select(b, how, rest, n, d); });
        add("select/" + name + "/tiles_int8" + size,
            [=](benchmark::State& b) { select(b, how, rest, n, d, fovea::precision::int8); });
      }
    }
  using enum fovea::compensation;
  for (const fovea::compensation rest : {sampled, cumulant, linear})
    add("select/int8/" + std::string(rest_of(rest)) + "/D64/N16384",
        [=](benchmark::State& b) { select(b, int8, rest, n, 64); });
  for (const bool estimated : {false, true})
    for (const double target : {0.3, 0.1})
      add(std::string("target/") + (estimated ? "estimated/" : "proven/") + (target > 0.2 ? "30" : "10") + "/D64/N4096",
          [=](benchmark::State& b) { to_target(b, {.relative = target, .estimated = estimated}, 4096); });
  std::vector<step_case> steps;
  for (const fovea::block_selector how : {int8, int4, mean})
    for (const fovea::compensation rest : {none, zeroth})
      for (const bool shared : {false, true}) steps.push_back({how, rest, shared, 9, 3, 64, 32768});
  for (const fovea::compensation rest : {none, zeroth}) {
    steps.push_back({int8, rest, false, 3, 3, 64, 32768});
    for (const bool shared : {false, true}) steps.push_back({int8, rest, shared, 32, 8, 128, 32768});
  }
  for (const isize refresh : {4, 16})
    for (const fovea::compensation rest : {none, zeroth})
      for (const bool shared : {false, true}) steps.push_back({int8, rest, shared, 9, 3, 64, 32768, refresh});
  for (const step_case& x : steps) add(x.name(), [=](benchmark::State& b) { step(b, x); });
}

}  // namespace bench
