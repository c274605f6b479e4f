// SPDX-License-Identifier: MIT
// windowed_attention against the library's own exact attention: `exact_takes` is the exact time over its own, measured around each sample.
#include "windowed.hpp"

#include <fovea/feature/learned.hpp>
#include <fovea/softmax.hpp>
#include <fovea/windowed.hpp>
#include <memory>
#include <string>

#include "measure.hpp"

namespace bench {
namespace {

struct weights {
  fovea::projection w;
  explicit weights(isize d) {
    std::vector<float> rows(static_cast<std::size_t>(d * d));
    std::uint64_t seed = 7;
    for (float& x : rows) {
      seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
      x = static_cast<float>((static_cast<double>(seed >> 40) / 8388608.0 - 1) / std::sqrt(static_cast<double>(d)));
    }
    w = fovea::projection(rows.data(), 1, d, d, nullptr);
  }
};

template <class M>
void against_exact(benchmark::State& b, const M& m, isize d, isize n) {
  const tensors t({1, 1, 1, n, n, d, d});
  const fovea::softmax_attention exact{.mask = fovea::causal{}};
  const fovea::buffer scratch(std::max(m.workspace_size(t.s, 1), exact.workspace_size(t.s, 1)));
  const auto call = [&](const auto& mechanism) {
    fovea::prefill(fovea::serial, mechanism, t.Q(), t.K(), t.V(), t.O(), {.workspace = scratch.span()});
  };
  const auto rate = [&] {
    const double start = machine::now();
    call(exact);
    return 1 / (machine::now() - start);
  };
  b.counters["exact_takes"] = samples(
      b, [&] { call(m); }, rate, [](double seconds, double rate_of_exact) { return 1 / rate_of_exact / seconds; });
}

void run(benchmark::State& b, const std::string& rest, isize d, isize n) {
  if (rest == "no_rest") {
    const fovea::softmax_attention near{.mask = fovea::window{.width = 64, .first = 4}};
    return against_exact(b, near, d, n);
  }
  const weights own(d);
  fovea::windowed_attention m;
  if (rest == "hedgehog") m.map = fovea::hedgehog{own.w.ref(), own.w.ref()};
  against_exact(b, m, d, n);
}

}  // namespace

void register_windowed() {
  for (const std::string rest : {"no_rest", "elu1", "hedgehog"})
    for (const isize n : {isize{2048}, isize{16384}}) {
      const std::string name = "windowed/" + rest + "/w64f4/D64/N" + std::to_string(n);
      benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& b) {
        run(b, rest, 64, n);
      })->Unit(benchmark::kMillisecond);
    }
}

}  // namespace bench
