// SPDX-License-Identifier: MIT
#pragma once
/// @file  The geometry and budget of a block selection, and the choice: votes in, the fate of every key block out.
///
/// Contract   ties go to the earlier block; a NaN vote counts as the highest.
/// Cost       32 (double: 64) sweeps over the votes: a bisection for the last vote that is chosen, without branches on data.

#include <bit>
#include <cmath>
#include <limits>

#include <algorithm>
#include <fovea/core/workspace.hpp>
#include <fovea/mask/mask.hpp>
#include <fovea/simd/reduce.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

enum class block_score : unsigned char { mean, variance, bound, code, exact };
enum block_fate : std::uint8_t { skipped = 0, computed = 1, pooled = 2 };

/// The geometry and budget of a selection. Row i of a call is in query block (i + origin) / block_q and at position i + offset.
struct block_rule {
  block_score score = block_score::mean;
  isize block_q = 1, block_k = 1, origin = 0, offset = 0;
  isize n = 0, m = 0;
  isize top = 0, at_least = 0, first = 0, window = 0;
  double budget = 0, scale = 1, top_p = 0;
  isize stretch =
      0;  ///< blocks of a stretch of so many keys that is not over before the query block are computed; 0: none
  isize kept = 0;   ///< keys that each stretch keeps
  isize share = 1;  ///< heads that share a selection
  bool causal = false, pool = false;

  /// One row that votes alone: the order of its log-masses, which cannot underflow.
  bool votes_are_logs() const { return block_q == 1 && share == 1 && top_p == 0; }

  FOVEA_HD isize blocks() const { return ceil_div(m, block_k); }
  FOVEA_HD range rows(isize block) const {
    return meet({block * block_q - origin, (block + 1) * block_q - origin}, {0, n});
  }
  /// Position of the first row of a query block, which may have come in an earlier call.
  FOVEA_HD isize start(isize block) const { return block * block_q - origin + offset; }
  /// Blocks [0, past) are wholly before the query block; [past, seen) hold its own keys, or keys that only some rows may see.
  struct reach {
    isize past, seen;
  };
  FOVEA_HD reach reach_of(isize block) const {
    if (!causal) return {blocks(), blocks()};
    const isize p0 = start(block), p1 = rows(block).last - 1 + offset;
    const isize past = p0 < 0 ? 0 : p0 / block_k, seen = p1 < 0 ? 0 : p1 / block_k + 1;
    return {past < blocks() ? past : blocks(), seen < blocks() ? seen : blocks()};
  }
  /// Blocks [0, settled) lie in stretches that are over before the query block: which keys those keep depends on nothing that comes later.
  FOVEA_HD isize settled(isize block) const {
    const isize past = reach_of(block).past, p0 = start(block);
    if (stretch <= 0 || !causal) return past;
    const isize over = p0 < 0 ? 0 : p0 / stretch * stretch / block_k;
    return over < past ? over : past;
  }
  /// Is key block J < past computed whatever its score?
  FOVEA_HD bool always(isize block, isize J) const {
    const isize j0 = J * block_k, j1 = j0 + block_k - 1, p0 = start(block), p1 = rows(block).last - 1 + offset;
    return j0 < first || (stretch > 0 && causal && (j0 / stretch + 1) * stretch > p0) ||
           (window > 0 && j1 > p0 - window && (causal || j0 < p1 + window));
  }
  /// Is any candidate computed for its score?
  bool chooses() const { return top > 0 || budget > 0 || at_least > 0 || top_p > 0; }
  /// How many of the candidates are computed, given how many own blocks are.
  isize count(isize candidates, isize own) const {
    const isize by_share = static_cast<isize>(std::ceil(budget * static_cast<double>(candidates) * (1 - 1e-12)));
    const isize wanted = top > 0 ? (top > own ? top - own : 0) : by_share, floor = ceil_div(at_least, block_k);
    return std::min(candidates, std::max(wanted, floor));
  }
};

namespace detail {

/// Integers in the order of floats, and back.
template <class T>
struct ordered {
  using word = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  static constexpr word top = word{1} << (8 * sizeof(T) - 1);
  static word from(T x) noexcept {
    const word bits = std::bit_cast<word>(x);
    return (bits & top) != 0 ? ~bits : bits | top;
  }
  static T to(word x) noexcept { return std::bit_cast<T>((x & top) != 0 ? x ^ top : static_cast<word>(~x)); }
};

/// The count-th largest of x[n], or a number between it and the next; count in [1, n], no NaN; x is read up to a whole vector behind n, where it must be -infinity.
template <class Arch, class T>
FOVEA_NOINLINE T count_th_largest(const T* x, isize n, isize count) noexcept {
  using P = simd::pack<T, Arch>;
  using order = ordered<T>;
  const isize padded = (n + P::size - 1) / P::size * P::size;
  auto low = order::from(-std::numeric_limits<T>::infinity()), high = order::from(std::numeric_limits<T>::infinity());
  while (low < high) {
    const auto middle = low + (high - low) / 2 + 1;
    const P least(order::to(middle));
    P below[2] = {P(T(0)), P(T(0))};
    isize j = 0;
    for (; j + 2 * P::size <= n; j += 2 * P::size)
      for (isize y = 0; y < 2; ++y)
        below[y] = below[y] + simd::select_greater(least, P::load(x + j + y * P::size), P(T(1)), P(T(0)));
    for (; j < n; j += P::size) below[0] = below[0] + simd::select_greater(least, P::load(x + j), P(T(1)), P(T(0)));
    const isize left = padded - static_cast<isize>(simd::reduce_add(below[0] + below[1]));
    if (left == count) return order::to(middle);
    if (left > count)
      low = middle;
    else
      high = middle - 1;
  }
  return order::to(low);
}

template <class Arch, class T>
bool all_finite(const T* x, isize n) noexcept {
  using P = simd::pack<T, Arch>;
  P odd(T(0));
  isize j = 0;
  for (; j + P::size <= n; j += P::size) odd = simd::fma(P::load(x + j), P(T(0)), odd);
  T sum = simd::reduce_add(odd);
  for (; j < n; ++j) sum += x[j] * T(0);
  return sum == 0;
}

}  // namespace detail

/// How many candidates, best first, leave at most 1 - top_p of all votes behind; all of them where votes are not numbers. `sorted` [past] is scratch.
template <class Arch, class T>
FOVEA_NOINLINE isize count_by_mass(const block_rule& rule, isize block, isize past, const T* votes,
                                   T* sorted) noexcept {
  double all = 0, left = 0;
  isize candidates = 0;
  for (isize J = 0; J < past; ++J) {
    all += static_cast<double>(votes[J]);
    if (!rule.always(block, J)) left += static_cast<double>(votes[J]), sorted[candidates++] = votes[J];
  }
  if (!(all < std::numeric_limits<double>::infinity())) return candidates;
  std::sort(sorted, sorted + candidates, [](T a, T b) { return a > b; });
  isize count = 0;
  while (count < candidates && left > (1 - rule.top_p) * all) left -= static_cast<double>(sorted[count++]);
  return count;
}

/// fate [blocks] of query block `block`. votes [past, and a vector more] are changed. sorted [past]: scratch, with top_p only.
template <class Arch, class T>
void choose_blocks(const block_rule& rule, isize block, T* votes, std::uint8_t* fate, T* sorted = nullptr) noexcept {
  constexpr T least = -std::numeric_limits<T>::infinity(), most = std::numeric_limits<T>::infinity();
  const isize blocks = rule.blocks();
  const auto reach = rule.reach_of(block);
  const isize by_mass = rule.top_p > 0 ? count_by_mass<Arch>(rule, block, reach.past, votes, sorted) : 0;
  const std::uint8_t rest = rule.pool ? pooled : skipped;
  isize candidates = 0, low = 0, high = reach.past;  // all candidates lie in [low, high)
  while (low < high && rule.always(block, low)) fate[low] = computed, votes[low++] = least;
  while (low < high && rule.always(block, high - 1)) fate[high - 1] = computed, votes[--high] = least;
  for (isize J = low; J < high; ++J) fate[J] = rest;
  if (!detail::all_finite<Arch>(votes + low, high - low))
    for (isize J = low; J < high; ++J) votes[J] = votes[J] == votes[J] ? votes[J] : most;
  if (rule.causal) {  // what is always computed is some of the first and some of the last
    candidates = high - low;
  } else {
    for (isize J = low; J < high; ++J) {
      const bool always = rule.always(block, J);
      if (always) fate[J] = computed, votes[J] = least;
      candidates += always ? 0 : 1;
    }
  }
  for (isize J = reach.past; J < blocks; ++J) fate[J] = J < reach.seen ? computed : skipped;
  for (isize J = reach.past; J < reach.past + simd::pack<T, Arch>::size; ++J) votes[J] = least;
  isize count = rule.top_p > 0 ? std::max(by_mass, std::min(candidates, ceil_div(rule.at_least, rule.block_k)))
                               : rule.count(candidates, reach.seen - reach.past);
  if (count <= 0) return;
  const T last = count < candidates ? detail::count_th_largest<Arch>(votes, reach.past, count) : least;
  for (isize J = low; J < high; ++J) {  // no branch: which ones they are cannot be foreseen
    const bool chosen = votes[J] > last;
    fate[J] = chosen ? std::uint8_t{computed} : fate[J], count -= chosen ? 1 : 0;
  }
  for (isize J = low; J < high && count > 0; ++J)
    if (votes[J] == last && fate[J] != computed) fate[J] = computed, --count;
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
