// SPDX-License-Identifier: MIT
#pragma once
/// @file  What is remembered of the keys and values of a block: mean, spread, range, and a rounded copy of the keys.
///
///   mean_J = (1 / n_J) sum_j k_j      spread_J = sum_j (k_j - mean_J)^2      low_J <= k_j <= high_J      (channel by channel)
///   code_j = round(k_j / step_j),     step_j = max_c |k_jc| / levels
///
/// Contract   tokens are folded in one after the other in their order, so the result does not depend on how a sequence is cut
///            into calls. Equal rows give exactly that row as mean and a spread of 0. The last block may be incomplete.
/// Cost       O(d + e) a token.      Source  Welford's recurrence (1962).

#include <limits>

#include <fovea/core/view.hpp>
#include <fovea/core/workspace.hpp>
#include <fovea/simd/convert.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

struct summary_needs {
  bool means = false, spread = false, range = false;
  int levels = 0;  ///< of the rounded copy: 127, 7, or 0 for none
};

/// The summaries of one KV head; a pointer is null where it is not needed.
template <class Acc>
struct block_summary {
  isize block_k = 1, d = 0, e = 0;
  int levels = 0;
  Acc *mean_k = nullptr, *mean_v = nullptr;                ///< [blocks x d], [blocks x e]
  Acc *spread = nullptr, *low = nullptr, *high = nullptr;  ///< [blocks x d]
  std::int8_t* code = nullptr;                             ///< [tokens x d], 4 bytes to spare
  Acc* step = nullptr;                                     ///< [tokens]

  block_summary() = default;
  block_summary(arena& memory, const summary_needs& needs, isize tokens, isize block, isize width, isize value_width)
      : block_k(block), d(width), e(value_width), levels(needs.levels) {
    const isize blocks = ceil_div(tokens, block);
    if (needs.means) mean_k = memory.take<Acc>(blocks * d), mean_v = memory.take<Acc>(blocks * e);
    if (needs.spread) spread = memory.take<Acc>(blocks * d);
    if (needs.range) low = memory.take<Acc>(blocks * d), high = memory.take<Acc>(blocks * d);
    if (needs.levels > 0) code = memory.take<std::int8_t>(tokens * d + 4), step = memory.take<Acc>(tokens);
  }
};

namespace detail {

/// mean += (x - mean) / count, and the sum of squared deviations along with it.
template <class Arch, class Acc>
FOVEA_INLINE void fold_mean(const Acc* x, isize width, Acc inverse, Acc* mean, Acc* spread) noexcept {
  using P = simd::pack<Acc, Arch>;
  for (isize c = 0; c < width; c += P::size) {
    const isize left = width - c;
    const P value = simd::load_n<P>(x + c, left), old = simd::load_n<P>(mean + c, left), delta = value - old;
    const P next = simd::fma(delta, P(inverse), old);
    simd::store_n(mean + c, next, left);
    if (spread != nullptr)
      simd::store_n(spread + c, simd::fma(delta, value - next, simd::load_n<P>(spread + c, left)), left);
  }
}

template <class Arch, class Acc>
FOVEA_INLINE void fold_range(const Acc* x, isize width, Acc* low, Acc* high) noexcept {
  using P = simd::pack<Acc, Arch>;
  for (isize c = 0; c < width; c += P::size) {
    const isize left = width - c;
    const P value = simd::load_n<P>(x + c, left);
    simd::store_n(low + c, simd::min(value, simd::load_n<P>(low + c, left)), left);
    simd::store_n(high + c, simd::max(value, simd::load_n<P>(high + c, left)), left);
  }
}

template <class Acc>
FOVEA_INLINE void copy(const Acc* from, isize width, Acc* to) noexcept {
  for (isize c = 0; c < width; ++c) to[c] = from[c];
}

}  // namespace detail

/// out[c] = round(x[c] / step), |out| <= levels; returns step (0 for a zero row; NaN, with zeros, where levels * x is not finite).
template <class Arch, class Acc, class Code>
FOVEA_NOINLINE Acc round_row(const Acc* x, isize width, int levels, Code* out) noexcept {
  constexpr Acc magic = sizeof(Acc) == 4 ? static_cast<Acc>(12582912.0)
                                         : static_cast<Acc>(6755399441055744.0);  // 1.5 * 2^(mantissa bits)
  Acc top = 0, sum = 0;
  for (isize c = 0; c < width; ++c) {
    const Acc size = x[c] < 0 ? -x[c] : x[c];
    top = size > top ? size : top;
    sum += size * Acc(0);  // NaN if any is NaN or infinite
  }
  // Divided, not multiplied by an inverse: then ties of 16-bit elements are exact, and every compiler rounds them alike.
  const Acc scale = static_cast<Acc>(levels);
  const bool usable = top > 0 && sum == 0 && top < std::numeric_limits<Acc>::max() / scale;
  using P = simd::pack<Acc, Arch>;
  for (isize c = 0; c < width; c += P::size) {
    const isize left = width - c < P::size ? width - c : P::size;
    Acc whole[P::size] = {};
    if (usable) (simd::load_n<P>(x + c, left) * P(scale) / P(top) + P(magic) - P(magic)).store(whole);
    for (isize l = 0; l < left; ++l) out[c + l] = static_cast<Code>(static_cast<int>(whole[l]));
  }
  return usable || top == 0 ? top / scale : std::numeric_limits<Acc>::quiet_NaN();
}

/// Folds in tokens first, first + 1, ...: rows [0, count) of head g of k and v. `row` is scratch of max(d, e).
template <class Arch, class Acc>
void summarise(const block_summary<Acc>& s, isize first, isize count, const tensor_ref& k, const tensor_ref& v, isize b,
               isize g, Acc* row) noexcept {
  for (isize x = 0; x < count; ++x) {
    const isize t = first + x, block = t / s.block_k, seen = t % s.block_k;
    const Acc inverse = Acc(1) / static_cast<Acc>(seen + 1);
    const Acc* key = simd::row_as<Arch, Acc>(k.type, k.row(b, g, x), s.d, row);
    if (s.levels > 0) s.step[t] = round_row<Arch>(key, s.d, s.levels, s.code + t * s.d);
    if (s.low != nullptr) {
      Acc *low = s.low + block * s.d, *high = s.high + block * s.d;
      if (seen == 0) detail::copy(key, s.d, low), detail::copy(key, s.d, high);
      detail::fold_range<Arch>(key, s.d, low, high);
    }
    if (s.mean_k == nullptr) continue;
    Acc* spread = s.spread == nullptr ? nullptr : s.spread + block * s.d;
    for (isize c = 0; seen == 0 && spread != nullptr && c < s.d; ++c) spread[c] = Acc(0);
    if (seen == 0) detail::copy(key, s.d, s.mean_k + block * s.d);
    detail::fold_mean<Arch>(key, s.d, inverse, s.mean_k + block * s.d, spread);
    const Acc* value = simd::row_as<Arch, Acc>(v.type, v.row(b, g, x), s.e, row);
    if (seen == 0) detail::copy(value, s.e, s.mean_v + block * s.e);
    detail::fold_mean<Arch>(value, s.e, inverse, s.mean_v + block * s.e, static_cast<Acc*>(nullptr));
  }
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
