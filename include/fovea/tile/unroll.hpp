// SPDX-License-Identifier: MIT
#pragma once
/// @file  Compile-time loops. Accumulators that live in registers may only be indexed by constants: these make them.

#include <type_traits>
#include <utility>

#include <fovea/core/types.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace tile {

template <int I>
using constant = std::integral_constant<int, I>;

/// f(constant<0>), ..., f(constant<N - 1>). Mark the lambda FOVEA_INLINE_LAMBDA, or its captures go through memory.
template <int N, class F>
FOVEA_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) FOVEA_INLINE_LAMBDA { (f(constant<I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

/// f(constant<n>) for a run-time n in [1, N].
template <int N, class F>
FOVEA_INLINE void with_constant(isize n, F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) FOVEA_INLINE_LAMBDA {
    (void)((n == I + 1 ? (f(constant<I + 1>{}), true) : false) || ...);
  }
  (std::make_integer_sequence<int, N>{});
}

}  // namespace tile
}  // namespace FOVEA_ABI
}  // namespace fovea
