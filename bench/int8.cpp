// SPDX-License-Identifier: MIT
// Exact attention in int8 against f32 in the same process; what each step of the recipe costs and is worth.
#include "int8.hpp"

#include <cmath>
#include <fovea/interop/safetensors.hpp>
#include <fovea/kernel/int8_softmax.hpp>
#include <fovea/softmax.hpp>
#include <string>

#include "measure.hpp"

namespace bench {
namespace {

/// first over second, in turns, for about as long as `b` runs; b counts the second.
template <class First, class Second>
double in_turns(benchmark::State& b, First&& first, Second&& second) {
  const auto rate = [&] {
    const double start = machine::now();
    first();
    return 1 / (machine::now() - start);
  };
  return samples(b, second, rate, [](double seconds, double rate_of_first) { return 1 / rate_of_first / seconds; });
}

void prefill(benchmark::State& b, const fovea::shape& s, bool is_causal) {
  const tensors t(s);
  fovea::softmax_attention f32;
  if (is_causal) f32.mask = fovea::causal{};
  fovea::softmax_attention int8 = f32;
  int8.arithmetic = fovea::precision::int8;
  const fovea::buffer scratch(std::max(f32.workspace_size(s, 1), int8.workspace_size(s, 1)));
  const auto call = [&](const fovea::softmax_attention& m) {
    fovea::prefill(fovea::serial, m, t.Q(), t.K(), t.V(), t.O(), {.workspace = scratch.span()});
  };
  b.counters["over_f32"] = in_turns(
      b, [&] { call(f32); }, [&] { call(int8); });
}

/// Built-in Q, K, V of one layer, exact attention in double, and its rows' lengths.
struct capture {
  isize H, G, n, d, e;
  std::vector<float> q, k, v;
  std::vector<double> exact;

  capture() {
    const auto file = fovea::read_safetensors(FOVEA_DATA_DIR "/smollm2_layer14.safetensors");
    const auto &Q = file.tensors.at("q"), &K = file.tensors.at("k"), &V = file.tensors.at("v");
    H = Q.dim(-3), G = K.dim(-3), n = Q.dim(-2), d = Q.dim(-1), e = V.dim(-1);
    q = Q.floats(), k = K.floats(), v = V.floats();
    const std::vector<double> q64 = Q.doubles(), k64 = K.doubles(), v64 = V.doubles();
    exact.resize(static_cast<std::size_t>(H * n * e));
    fovea::prefill(fovea::serial, fovea::softmax_attention{.mask = fovea::causal{}},
                   fovea::bhnd(q64.data(), 1, H, n, d), fovea::bhnd(k64.data(), 1, G, n, d),
                   fovea::bhnd(v64.data(), 1, G, n, e), fovea::bhnd(exact.data(), 1, H, n, e));
  }
};

template <fovea::kernel::int8_recipe R>
void recipe(benchmark::State& b) {
  using arch = fovea::simd::native;
  using loop = fovea::kernel::int8_softmax<arch, R>;
  const capture x;
  const fovea::mask mask = fovea::causal{};
  const fovea::tensor_ref q = fovea::bhnd(x.q.data(), 1, x.H, x.n, x.d), k = fovea::bhnd(x.k.data(), 1, x.G, x.n, x.d),
                          v = fovea::bhnd(x.v.data(), 1, x.G, x.n, x.e);
  std::vector<float> out(x.exact.size());
  const fovea::tensor_mut to = fovea::bhnd(out.data(), 1, x.H, x.n, x.e);
  const isize group = x.H / x.G, rows = group * x.n, block = loop::superblock(rows, x.d, x.e);
  const auto lay_out = [&](fovea::arena& memory) {
    struct parts {
      fovea::kernel::int8_head head;
      fovea::kernel::detail::int8_rounding<arch, R> rounding;
      loop attend;
    };
    return parts{{memory, x.n, x.d, x.e, R.keys, R.fold}, {memory, x.d, x.e}, {memory, rows, x.d, x.e}};
  };
  fovea::arena measure;
  (void)lay_out(measure);
  const fovea::buffer scratch(measure.bytes());
  const auto int8 = [&] {
    fovea::arena memory(scratch.span());
    auto own = lay_out(memory);
    for (isize g = 0; g < x.G; ++g) {
      fovea::kernel::key_set<float> set;
      set.k = fovea::rows_of(k, 0, g), set.v = fovea::rows_of(v, 0, g), set.count = x.n, set.visible = &mask;
      set.site = {0, 0, x.n, x.n, x.H, x.G, 1};
      for (isize y = 0; y < own.head.blocks; ++y) own.rounding.block(set, own.head, y);
      for (isize first = 0; first < rows; first += block) {
        own.attend.begin({q, 0, g * group, first, std::min(first + block, rows)},
                         1 / std::sqrt(static_cast<double>(x.d)), nullptr);
        own.attend.absorb(set, own.head), own.attend.finish(to, {}, {}, nullptr);
      }
    }
  };
  std::vector<float> other(out.size());
  const auto f32 = [&] {
    fovea::prefill(fovea::serial, fovea::softmax_attention{.mask = mask}, q, k, v,
                   fovea::bhnd(other.data(), 1, x.H, x.n, x.e));
  };
  b.counters["over_f32"] = in_turns(b, f32, int8);
  std::vector<double> errors;
  for (std::size_t row = 0; row < out.size(); row += static_cast<std::size_t>(x.e)) {
    double apart = 0, size = 0;
    for (std::size_t c = row; c < row + static_cast<std::size_t>(x.e); ++c)
      apart += std::pow(static_cast<double>(out[c]) - x.exact[c], 2), size += x.exact[c] * x.exact[c];
    errors.push_back(100 * std::sqrt(apart / size));
  }
  b.counters["error_median"] = median(errors);
  std::sort(errors.begin(), errors.end());
  b.counters["error_p95"] = errors[errors.size() * 95 / 100];
}

}  // namespace

void register_int8() {
  const auto add = [](const std::string& name, auto run) {
    benchmark::RegisterBenchmark(name.c_str(), run)->Unit(benchmark::kMillisecond);
  };
  const auto one = [&](isize d, isize n, bool is_causal, isize H = 1, isize G = 1) {
    std::string name =
        std::string("int8/") + (is_causal ? "causal" : "full") + "/D" + std::to_string(d) + "/N" + std::to_string(n);
    if (H > 1) name += "/H" + std::to_string(H) + "/G" + std::to_string(G);
    add(name, [=](benchmark::State& b) { prefill(b, {1, H, G, n, n, d, d}, is_causal); });
  };
  for (const bool is_causal : {false, true}) {
    for (const isize d : {64, 128})
      for (const isize n : {512, 2048, 8192}) one(d, n, is_causal);
    for (const isize d : {80, 96, 256}) one(d, 2048, is_causal);
    one(64, 512, is_causal, 8, 2);
  }
  using fovea::kernel::int8_recipe;
  add("int8_recipe/accurate", recipe<int8_recipe{}>);
  add("int8_recipe/no_rotation", recipe<int8_recipe{.rotate = false}>);
  add("int8_recipe/no_fold", recipe<int8_recipe{.fold = false}>);
  add("int8_recipe/no_dither", recipe<int8_recipe{.dither = false}>);
  add("int8_recipe/running_maximum", recipe<int8_recipe{.running_max = true}>);
  add("int8_recipe/none", recipe<int8_recipe{.rotate = false, .fold = false, .dither = false, .running_max = true}>);
  add("int8_recipe/blocks_of_64", recipe<int8_recipe{.keys = 64}>);
  add("int8_recipe/blocks_of_256", recipe<int8_recipe{.keys = 256}>);
}

}  // namespace bench
