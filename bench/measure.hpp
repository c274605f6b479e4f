// SPDX-License-Identifier: MIT
#pragma once
/// @file  How everything here is measured: random tensors, samples between two measurements of the machine, their median.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <vector>

#include <fovea/core/view.hpp>
#include <fovea/core/workspace.hpp>

#include "common/machine.hpp"

namespace bench {

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

inline double median(std::vector<double> x) {
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

}  // namespace bench
