// SPDX-License-Identifier: MIT
#pragma once
/// @file  What is remembered of the keys and values of a block: mean, spread, range, a rounded copy of the keys, sizes, small values.
///
///   mean_J = (1 / n_J) sum_j k_j      spread_J = sum_j (k_j - mean_J)^2      low_J <= k_j <= high_J      (channel by channel)
///   code_j = round(k_j / step_j),     step_j = max_c |k_jc| / levels,        k'_j = step_j code_j
///   residual_j >= |k_j - k'_j|        size_j >= |k'_j|                       norm_v_j >= |v_j|           (token by token)
///   small: of each stretch of `stretch` keys the `kept` ones with the smallest |v_j|, ties to the earlier
///   sample: in place of the mean of a part one of its members, every one with the same probability (sampled_member)
///
/// Contract   tokens are folded in one after the other in their order, so the result does not depend on how a sequence is cut
///            into calls. Equal rows give exactly that row as mean and a spread of 0. The last block may be incomplete.
///            residual, size and norm_v are upper bounds of the norms of the stored numbers in exact arithmetic (kernel::norm_above);
///            NaN where a row is not finite. When a stretch ends, its kept keys leave the means, the spread and the counts.
///            Parts: each block as `parts` equal stretches with a mean key and value of their own; parts divides block_k.
///            The mean of finite rows is finite. A sample depends on seed, part and the number of members, on nothing else.
/// Cost       O(d + e) a token.      Source  Welford's recurrence (1962).

#include <cmath>
#include <limits>

#include <fovea/core/view.hpp>
#include <fovea/core/workspace.hpp>
#include <fovea/simd/convert.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

struct summary_needs {
  bool means = false, spread = false, range = false;
  int levels = 0;               ///< of the rounded copy: 127, 7, or 0 for none
  bool bounds = false;          ///< residual, size (with levels > 0) and norm_v
  isize parts = 1;              ///< pooled tokens a block
  bool sampled = false;         ///< a pooled token is a member of its part, in place of the mean
  std::uint64_t seed = 0;       ///< of the samples
  isize stretch = 0, kept = 0;  ///< keys of a stretch, a multiple of block_k, and how many of them are kept; 0: none

  /// `share` of the keys kept: one of 1 / share keys, in stretches of whole blocks.
  void keep(double share, isize block_k) {
    const double keys = std::ceil(1 / share - 1e-9);
    stretch = ceil_div(static_cast<isize>(keys), block_k) * block_k;
    kept = static_cast<isize>(share * static_cast<double>(stretch) + 0.5);
    kept = kept < 1 ? 1 : kept;
  }
};

/// The rank, among `count` members, of the one that stands for part x: splitmix64's hash, as a multiple of count / 2^32.
inline isize sampled_member(std::uint64_t seed, isize x, isize count) noexcept {
  std::uint64_t z = seed + 0x9e3779b97f4a7c15ULL * (static_cast<std::uint64_t>(x) + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return static_cast<isize>(((z ^ (z >> 31)) >> 32) * static_cast<std::uint64_t>(count) >> 32);
}

/// The summaries of one KV head; a pointer is null where it is not needed.
template <class Acc>
struct block_summary {
  isize block_k = 1, d = 0, e = 0;
  int levels = 0;
  isize parts = 1, stretch = 0, kept = 0;
  bool sampled = false;
  std::uint64_t seed = 0;
  Acc *mean_k = nullptr, *mean_v = nullptr;                ///< [blocks x d], [blocks x e]
  Acc *spread = nullptr, *low = nullptr, *high = nullptr;  ///< [blocks x d]
  Acc *part_k = nullptr, *part_v = nullptr;  ///< [blocks * parts x d], [.. x e]; null for one part of means
  std::int32_t* members = nullptr;           ///< [blocks * parts]: tokens in the mean of a part
  std::int8_t* code = nullptr;               ///< [tokens x d], 4 bytes to spare
  Acc* step = nullptr;                       ///< [tokens]
  Acc *residual = nullptr, *size = nullptr, *norm_v = nullptr;  ///< [tokens]
  std::int32_t* small = nullptr;                                ///< [stretches x kept]: tokens, the smallest |v| first

  block_summary() = default;
  block_summary(arena& memory, const summary_needs& needs, isize tokens, isize block, isize width, isize value_width)
      : block_k(block),
        d(width),
        e(value_width),
        levels(needs.levels),
        parts(needs.parts),
        stretch(needs.stretch),
        kept(needs.kept),
        sampled(needs.sampled),
        seed(needs.seed) {
    const isize blocks = ceil_div(tokens, block);
    if (needs.means) {
      mean_k = memory.take<Acc>(blocks * d), mean_v = memory.take<Acc>(blocks * e);
      members = memory.take<std::int32_t>(blocks * parts);
    }
    if (needs.means && (parts > 1 || sampled))
      part_k = memory.take<Acc>(blocks * parts * d), part_v = memory.take<Acc>(blocks * parts * e);
    if (needs.spread) spread = memory.take<Acc>(blocks * d);
    if (needs.range) low = memory.take<Acc>(blocks * d), high = memory.take<Acc>(blocks * d);
    if (needs.levels > 0) code = memory.take<std::int8_t>(tokens * d + 4), step = memory.take<Acc>(tokens);
    if (needs.bounds && needs.levels > 0) residual = memory.take<Acc>(tokens), size = memory.take<Acc>(tokens);
    if (needs.bounds || kept > 0) norm_v = memory.take<Acc>(tokens);
    if (kept > 0) small = memory.take<std::int32_t>(ceil_div(tokens, stretch) * kept);
  }
  /// Pooled tokens: the parts, or the blocks.
  const Acc* pool_k() const { return part_k != nullptr ? part_k : mean_k; }
  const Acc* pool_v() const { return part_v != nullptr ? part_v : mean_v; }
  /// Is key j of `tokens` a kept one? Of a stretch that is over.
  bool keeps(isize j, isize tokens) const {
    if (kept == 0 || (j / stretch + 1) * stretch > tokens) return false;
    for (isize x = 0; x < kept; ++x)
      if (small[j / stretch * kept + x] == j) return true;
    return false;
  }
  /// Kept keys of stretch x of a sequence of `tokens`.
  isize kept_in(isize x, isize tokens) const {
    const isize held = tokens - x * stretch < stretch ? tokens - x * stretch : stretch;
    return held < kept ? held : kept;
  }
};

namespace detail {

/// mean += (x - mean) / count, and the sum of squared deviations along with it. The difference is taken by halves, which is exact: that of
/// two large numbers would overflow.
template <class Arch, class Acc>
FOVEA_INLINE void fold_mean(const Acc* x, isize width, Acc inverse, Acc* mean, Acc* spread) noexcept {
  using P = simd::pack<Acc, Arch>;
  for (isize c = 0; c < width; c += P::size) {
    const isize left = width - c;
    const P value = simd::load_n<P>(x + c, left), old = simd::load_n<P>(mean + c, left);
    const P half = value * P(Acc(0.5)) - old * P(Acc(0.5)), next = simd::fma(half, P(2 * inverse), old);
    simd::store_n(mean + c, next, left);
    if (spread != nullptr)
      simd::store_n(spread + c, simd::fma(value - old, value - next, simd::load_n<P>(spread + c, left)), left);
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
  using P = simd::pack<Acc, Arch>;
  P most(Acc(0)), odd(Acc(0));
  for (isize c = 0; c < width; c += P::size) {
    const P y = simd::load_n<P>(x + c, width - c);
    most = simd::max(most, simd::max(y, P(Acc(0)) - y)), odd = simd::fma(y, P(Acc(0)), odd);
  }
  const Acc top = simd::highest(most), scale = static_cast<Acc>(levels);
  const bool sound = simd::reduce_add(odd) == 0;  // else some element is NaN or infinite
  const bool usable = sound && top > 0 && top < std::numeric_limits<Acc>::max() / scale;
  // Divided, not multiplied by an inverse: then ties of 16-bit elements are exact, and every compiler rounds them alike.
  for (isize c = 0; c < width; c += P::size) {
    const isize left = width - c < P::size ? width - c : P::size;
    alignas(64) Acc whole[P::size] = {};
    if (usable) (simd::load_n<P>(x + c, left) * P(scale) / P(top) + P(magic) - P(magic)).store(whole);
    if (left == P::size)
      for (isize l = 0; l < P::size; ++l) out[c + l] = static_cast<Code>(static_cast<int>(whole[l]));
    else
      for (isize l = 0; l < left; ++l) out[c + l] = static_cast<Code>(static_cast<int>(whole[l]));
  }
  return usable || (sound && top == 0) ? top / scale : std::numeric_limits<Acc>::quiet_NaN();
}

namespace detail {

/// An upper bound of the Euclidean norm of a row whose elements at(c, left) returns in packs, whatever their size; NaN if one is not finite.
/// Each of the width + 4 roundings of the scaled sum is of relative size eps / 2 at most.
template <class Arch, class Acc, class F>
FOVEA_INLINE Acc norm_above(isize width, F&& at) noexcept {
  using limits = std::numeric_limits<Acc>;
  using P = simd::pack<Acc, Arch>;
  P most(Acc(0)), odd(Acc(0)), sum(Acc(0));
  for (isize c = 0; c < width; c += P::size) {
    const P x = at(c, width - c);
    most = simd::max(most, simd::max(x, P(Acc(0)) - x)), odd = simd::fma(x, P(Acc(0)), odd);
  }
  if (!(simd::reduce_add(odd) == 0)) return limits::quiet_NaN();
  const Acc top = simd::highest(most);
  if (top == 0) return Acc(0);
  for (isize c = 0; c < width; c += P::size) {
    const P x = at(c, width - c) / P(top);
    sum = simd::fma(x, x, sum);
  }
  return top * std::sqrt(simd::reduce_add(sum)) * (1 + static_cast<Acc>(width + 8) * limits::epsilon()) + limits::min();
}

}  // namespace detail

/// An upper bound of the Euclidean norm of x, whatever the size of its elements; NaN if one is not finite.
template <class Arch, class Acc>
FOVEA_NOINLINE Acc norm_above(const Acc* x, isize width) noexcept {
  using P = simd::pack<Acc, Arch>;
  return detail::norm_above<Arch, Acc>(width, [&](isize c, isize left) { return simd::load_n<P>(x + c, left); });
}

/// |x - step code| and |step code|, from above.
template <class Acc>
struct rounding_size {
  Acc residual, size;
};
template <class Arch, class Acc, class Code>
FOVEA_NOINLINE rounding_size<Acc> size_of_rounding(const Acc* x, const Code* code, Acc step, isize width) noexcept {
  using P = simd::pack<Acc, Arch>;
  const auto rounded = [&](isize c, isize left) {
    if constexpr (std::is_same_v<Code, std::int8_t>)
      if (left >= P::size) return simd::load_as<P>(code + c) * P(step);
    alignas(64) Acc whole[P::size] = {};
    for (isize l = 0; l < P::size && l < left; ++l) whole[l] = static_cast<Acc>(code[c + l]);
    return P::load(whole) * P(step);
  };
  const Acc size = detail::norm_above<Arch, Acc>(width, rounded);
  const Acc residual = detail::norm_above<Arch, Acc>(
      width, [&](isize c, isize left) { return simd::load_n<P>(x + c, left) - rounded(c, left); });
  return {residual + 2 * std::numeric_limits<Acc>::epsilon() * size, size};  // the products were rounded, too
}

namespace detail {

/// Token t into the list of its stretch, which holds the smallest values so far in their order.
template <class Arch, class Acc>
void keep_small(const block_summary<Acc>& s, isize t) noexcept {
  std::int32_t* list = s.small + t / s.stretch * s.kept;
  const isize seen = t % s.stretch, held = seen < s.kept ? seen : s.kept;
  isize at = held;
  while (at > 0 && s.norm_v[t] < s.norm_v[list[at - 1]]) --at;
  for (isize x = (held < s.kept ? held : s.kept - 1); x > at; --x) list[x] = list[x - 1];
  if (at < s.kept) list[at] = static_cast<std::int32_t>(t);
}

/// Token t, whose row of keys or values is `x`, into the mean of its block and part; `seen` and `part` count those before it.
template <class Arch, class Acc>
void fold_token(const Acc* x, isize width, isize seen, Acc* mean, Acc* spread) noexcept {
  for (isize c = 0; seen == 0 && spread != nullptr && c < width; ++c) spread[c] = Acc(0);
  if (seen == 0) copy(x, width, mean);
  fold_mean<Arch>(x, width, Acc(1) / static_cast<Acc>(seen + 1), mean, spread);
}

/// Means of block J without the kept keys of its stretch, which has ended.
template <class Arch, class Acc>
void leave_out(const block_summary<Acc>& s, isize J, const tensor_ref& k, const tensor_ref& v, isize b, isize g,
               Acc* row) noexcept {
  const std::int32_t* list = s.small + J * s.block_k / s.stretch * s.kept;
  const isize part = s.block_k / s.parts;
  isize seen = 0, inside = 0;
  for (isize t = J * s.block_k; t < (J + 1) * s.block_k; ++t) {
    const isize at = t / part;
    if (t % part == 0) inside = 0, s.members[at] = 0;
    bool kept = false;
    for (isize x = 0; x < s.kept; ++x) kept = kept || list[x] == t;
    if (kept) continue;
    const Acc* key = simd::row_as<Arch, Acc>(k.type, k.row(b, g, t), s.d, row);
    fold_token<Arch>(key, s.d, seen, s.mean_k + J * s.d, s.spread == nullptr ? nullptr : s.spread + J * s.d);
    const bool parts = s.part_k != nullptr && !s.sampled;
    if (parts) fold_token<Arch>(key, s.d, inside, s.part_k + at * s.d, static_cast<Acc*>(nullptr));
    const Acc* value = simd::row_as<Arch, Acc>(v.type, v.row(b, g, t), s.e, row);
    fold_token<Arch>(value, s.e, seen, s.mean_v + J * s.e, static_cast<Acc*>(nullptr));
    if (parts) fold_token<Arch>(value, s.e, inside, s.part_v + at * s.e, static_cast<Acc*>(nullptr));
    ++seen, s.members[at] = static_cast<std::int32_t>(++inside);
  }
}

/// The samples of the parts that tokens [first, end) touch, kept keys included: what their stretch keeps is no member.
template <class Arch, class Acc>
void draw_samples(const block_summary<Acc>& s, isize first, isize end, const tensor_ref& k, const tensor_ref& v,
                  isize b, isize g) noexcept {
  const isize part = s.block_k / s.parts, from = s.kept > 0 ? first / s.stretch * s.stretch : first;
  for (isize x = from / part; x * part < end; ++x) {
    Acc *key = s.part_k + x * s.d, *value = s.part_v + x * s.e;
    for (isize c = 0; c < s.d; ++c) key[c] = Acc(0);
    for (isize c = 0; c < s.e; ++c) value[c] = Acc(0);
    if (s.members[x] == 0) continue;
    const isize stretch = s.kept > 0 ? x * part / s.stretch : 0;
    const bool over = s.kept > 0 && (stretch + 1) * s.stretch <= end;
    isize t = x * part;
    for (isize rank = sampled_member(s.seed, x, s.members[x]);; ++t) {
      bool kept = false;
      for (isize y = 0; over && y < s.kept; ++y) kept = kept || s.small[stretch * s.kept + y] == t;
      if (!kept && rank-- == 0) break;
    }
    simd::load_row<Arch, Acc>(k.type, k.row(b, g, t), s.d, key);
    simd::load_row<Arch, Acc>(v.type, v.row(b, g, t), s.e, value);
  }
}

}  // namespace detail

/// Folds in tokens [first, first + count) of head g of k and v, which hold all tokens so far. `row` is scratch of max(d, e).
template <class Arch, class Acc>
void summarise(const block_summary<Acc>& s, isize first, isize count, const tensor_ref& k, const tensor_ref& v, isize b,
               isize g, Acc* row) noexcept {
  const isize part = s.block_k / s.parts;
  for (isize t = first; t < first + count; ++t) {
    const isize block = t / s.block_k, seen = t % s.block_k;
    const Acc* key = simd::row_as<Arch, Acc>(k.type, k.row(b, g, t), s.d, row);
    if (s.levels > 0) s.step[t] = round_row<Arch>(key, s.d, s.levels, s.code + t * s.d);
    if (s.residual != nullptr) {
      const auto sizes = size_of_rounding<Arch>(key, s.code + t * s.d, s.step[t], s.d);
      s.residual[t] = sizes.residual, s.size[t] = sizes.size;
    }
    if (s.low != nullptr) {
      Acc *low = s.low + block * s.d, *high = s.high + block * s.d;
      if (seen == 0) detail::copy(key, s.d, low), detail::copy(key, s.d, high);
      detail::fold_range<Arch>(key, s.d, low, high);
    }
    for (isize x = 0; s.members != nullptr && seen == 0 && x < s.parts; ++x) s.members[block * s.parts + x] = 0;
    if (s.mean_k != nullptr) {
      Acc* spread = s.spread == nullptr ? nullptr : s.spread + block * s.d;
      detail::fold_token<Arch>(key, s.d, seen, s.mean_k + block * s.d, spread);
      if (s.part_k != nullptr && !s.sampled)
        detail::fold_token<Arch>(key, s.d, t % part, s.part_k + t / part * s.d, static_cast<Acc*>(nullptr));
    }
    if (s.mean_v == nullptr && s.norm_v == nullptr) continue;
    const Acc* value = simd::row_as<Arch, Acc>(v.type, v.row(b, g, t), s.e, row);
    if (s.norm_v != nullptr) s.norm_v[t] = norm_above<Arch, Acc>(value, s.e);
    if (s.mean_v != nullptr) {
      detail::fold_token<Arch>(value, s.e, seen, s.mean_v + block * s.e, static_cast<Acc*>(nullptr));
      if (s.part_v != nullptr && !s.sampled)
        detail::fold_token<Arch>(value, s.e, t % part, s.part_v + t / part * s.e, static_cast<Acc*>(nullptr));
      s.members[t / part] = static_cast<std::int32_t>(t % part + 1);
    }
    if (s.kept == 0) continue;
    detail::keep_small<Arch>(s, t);
    if (s.mean_k != nullptr && (t + 1) % s.stretch == 0)
      for (isize x = 0; x < s.kept; ++x)
        detail::leave_out<Arch>(s, s.small[t / s.stretch * s.kept + x] / s.block_k, k, v, b, g, row);
  }
  if (s.sampled) detail::draw_samples<Arch>(s, first, first + count, k, v, b, g);
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
