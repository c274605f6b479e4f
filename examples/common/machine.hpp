// SPDX-License-Identifier: MIT
#pragma once
/// @file  The limits of this machine, measured: the rate of fused multiply-adds of one thread, and of reading memory.
///
/// Both are short bursts, meant to run between the things that are compared with them: machines are shared and their speed drifts.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <fstream>
#include <string>
#include <vector>

#include <fovea/simd/pack.hpp>
#include <fovea/tile/unroll.hpp>

namespace machine {

using fovea::isize;

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Keeps a result alive.
template <class T>
inline void use(const T& x) {
#if defined(__GNUC__) || defined(__clang__)
  __asm__ volatile("" : : "m"(x) : "memory");
#else
  static volatile T sink;
  sink = x;
#endif
}

/// Flops a second of independent fused multiply-adds in registers, one thread; about `seconds` long.
template <class T = float>
inline double fma_peak(double seconds = 0.004) {
  using P = fovea::simd::pack<T, fovea::simd::native>;
  constexpr int chains = fovea::simd::native::registers >= 32 ? 16 : 12;
  P a[chains];  // indexed by constants only: an array that a loop touches lives in memory
  fovea::tile::unroll<chains>([&](auto i) FOVEA_INLINE_LAMBDA { a[i] = P(static_cast<T>(0.001 * (i + 1))); });
  const P x(static_cast<T>(0.999)), y(static_cast<T>(0.001));
  double best = 0, spent = 0;
  const double start = now();
  while (spent < seconds) {
    constexpr int steps = 20000;
    const double t = now();
    for (int s = 0; s < steps; ++s)
      fovea::tile::unroll<chains>([&](auto i) FOVEA_INLINE_LAMBDA { a[i] = fovea::simd::fma(a[i], x, y); });
    const double dt = now() - t;
    best = std::max(best, 2.0 * chains * static_cast<double>(P::size) * steps / dt);
    spent = now() - start;
  }
  P sum = a[0];
  fovea::tile::unroll<chains>([&](auto i) FOVEA_INLINE_LAMBDA { sum = sum + a[i]; });
  use(sum);
  return best;
}

/// Bytes a second of reading `bytes` bytes once, in order.
inline double stream_read(const void* data, std::size_t bytes) {
  using P = fovea::simd::pack<float, fovea::simd::native>;
  const auto* p = static_cast<const float*>(data);
  const isize count = static_cast<isize>(bytes / sizeof(float)) / (8 * P::size) * (8 * P::size);
  P sum[8];
  fovea::tile::unroll<8>([&](auto k) FOVEA_INLINE_LAMBDA { sum[k] = P(0.0F); });
  const double t = now();
  for (isize i = 0; i < count; i += 8 * P::size)
    fovea::tile::unroll<8>([&](auto k) FOVEA_INLINE_LAMBDA { sum[k] = sum[k] + P::load(p + i + k * P::size); });
  const double dt = now() - t;
  fovea::tile::unroll<7>([&](auto k) FOVEA_INLINE_LAMBDA { sum[0] = sum[0] + sum[k + 1]; });
  const P all = sum[0];
  use(all);
  return static_cast<double>(count) * 4 / dt;
}

/// The median of a few reads of a fresh 256 MB.
inline double stream_read() {
  std::vector<float> memory(64 << 20, 1.0F);
  std::vector<double> rates;
  for (int r = 0; r < 3; ++r) rates.push_back(stream_read(memory.data(), memory.size() * sizeof(float)));
  std::sort(rates.begin(), rates.end());
  return rates[1];
}

inline std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.rfind("model name", 0) == 0 && line.find(':') != std::string::npos) return line.substr(line.find(':') + 2);
  return "unknown processor";
}

}  // namespace machine
