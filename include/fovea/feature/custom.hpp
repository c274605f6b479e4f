// SPDX-License-Identifier: MIT
#pragma once
/// @file  Any callable as a feature map.
///
///   auto squares = fovea::custom_map(64, [](const auto* x, isize d, auto* out) { for (isize c = 0; c < d; ++c) out[c] = x[c] * x[c]; });
///
/// Contract   f(x, d, out) or f(site, x, d, out) writes `features` numbers for one row, for float and for double pointers, and does
///            not throw; it is trivially copyable (captures by value or pointer) and at most 64 bytes. `site` tells the head, the
///            position and the side (feature_site). Two states are taken to be alike if `features` and `name` are.
/// Cost       one call a row; nothing is vectorised but what the compiler makes of f.

#include <string_view>

#include <fovea/feature/feature_map.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

template <class F>
struct custom_map {
  isize count = 0;
  F f;
  const char* name = "custom";

  custom_map(isize features, F callable, const char* called = "custom") : count(features), f(callable), name(called) {}

  static constexpr bool log_scaled = false, positional = true;
  isize features(isize) const { return count; }
  isize scratch(isize) const { return 0; }
  void check(const shape&) const { require(count >= 1, "custom_map: features is ", count, "; it must be at least 1"); }
  void fingerprint(detail::fingerprint& g) const { g.text(name).number(static_cast<double>(count)); }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc*) const noexcept {
    for (isize t = 0; t < b.rows; ++t)
      call<Acc>({b.head, b.kv_head, b.position + t, b.key, 0.0}, b.x + t * b.x_stride, b.width,
                b.out + t * b.out_stride);
  }
  double define(const feature_site& at, const double* x, isize d, double* out) const {
    call<double>(at, x, d, out);
    return 0.0;
  }

 private:
  template <class Acc>
  void call(const feature_site& at, const Acc* x, isize d, Acc* out) const {
    if constexpr (requires { f(at, x, d, out); })
      f(at, x, d, out);
    else
      f(x, d, out);
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
