// SPDX-License-Identifier: MIT
#pragma once
/// @file  Which keys a query may see: small policies that answer per tile, so that loops skip what is ruled out.
///
/// A mask policy is a trivially copyable struct with
///   bool visible(site, i, j)             may query row i see key j?
///   range keys(site, i0, i1)             a range that holds every key that some row in [i0, i1) sees
///   tile_kind tile(site, i0, i1, j0, j1) empty, full or partial; partial is always a correct answer
/// and optionally
///   range queries(site, j)               exactly the rows that see key j, if they are a range: partial tiles then cost a shift
///   void lanes(site, i0, count, j0, j1, out) bit l of out[j - j0]: row i0 + l sees key j, for all of a partial tile at once
///   bool is_causal()                     no row sees a key behind its own position, bottom-right: states need that
///   kept_keys kept()                     causal policies that never look further back than a number of keys: ring stores need that
///   key_band band(site)                  every row sees one stretch of keys, and the next row the stretch one key on: loops need not ask
///   void check(site)                     throws contract_error if the policy does not fit item b of the problem
///
/// Contract   i in [0, n), j in [0, m). Kernels hold a `mask_ref`: one indirect call per tile, none per element.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <new>
#include <type_traits>

#include <fovea/core/contract.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct range {
  isize first = 0, last = 0;  // [first, last)
  FOVEA_HD constexpr bool empty() const { return last <= first; }
  FOVEA_HD constexpr bool holds(isize x) const { return first <= x && x < last; }
};
FOVEA_HD constexpr range meet(range a, range b) {
  return {a.first > b.first ? a.first : b.first, a.last < b.last ? a.last : b.last};
}

enum class tile_kind : unsigned char { empty, partial, full };

/// How many keys from j on, in whole blocks, sees(j0, j1) denies: in a few questions, where a window lies far behind the first keys.
template <class Sees>
isize unseen_keys(isize j, isize last, isize block, const Sees& sees) {
  isize count = 0;
  for (isize step = block; j + count < last;) {
    if (!sees(j + count, j + count + step < last ? j + count + step : last)) {
      count += step, step *= 2;
      continue;
    }
    if (step == block) break;
    step /= 2;
  }
  return count;
}

/// What a row sees at most: the last `window` keys up to its own position, and the first `first`. Ring stores keep no more.
struct kept_keys {
  isize window = PTRDIFF_MAX;
  isize first = 0;
  FOVEA_HD constexpr bool bounded() const { return window < PTRDIFF_MAX; }
};
/// What is left of two such bounds at once.
FOVEA_HD constexpr kept_keys tighter(kept_keys a, kept_keys b) {
  if (!a.bounded() || !b.bounded()) return a.bounded() ? a : b;
  return {a.window < b.window ? a.window : b.window, a.first > b.first ? a.first : b.first};
}

/// Row i sees keys [i + first, i + last) of those there are, and no others. None: it is not said.
struct key_band {
  isize first = 0, last = 0;
  FOVEA_HD constexpr bool any() const { return first < last; }
};

/// Where a question is asked: the batch item, the query head, and the sizes of the problem.
struct mask_site {
  isize b = 0, h = 0, n = 0, m = 0;
  isize H = 1, G = 1, B = 1;
};

/// Sizes of a table [batch, heads, rows, keys] that a policy reads; 1 broadcasts, 0 means not known (not checked).
struct table_extent {
  isize batch = 0, heads = 0, rows = 0, keys = 0;
  void check(const char* name, const mask_site& at) const {
    const auto fits = [](isize have, isize want) { return have <= 1 || have == want; };
    const bool rows_fit = rows == 0 || rows == 1 || rows == at.n, keys_fit = keys == 0 || keys == 1 || keys == at.m;
    require(fits(batch, at.B) && fits(heads, at.H) && rows_fit && keys_fit, name, " is [", batch, ", ", heads, ", ",
            rows, ", ", keys, "]; wanted [", at.B, ", ", at.H, ", ", at.n, ", ", at.m, "] or 1 in place of a size");
  }
};

template <class P>
concept mask_policy = std::is_trivially_copyable_v<P> && requires(const P& p, const mask_site& at, isize i) {
  { p.visible(at, i, i) } -> std::same_as<bool>;
  { p.keys(at, i, i) } -> std::same_as<range>;
  { p.tile(at, i, i, i, i) } -> std::same_as<tile_kind>;
};

namespace detail {
/// Bits [first, last) of 64; those outside of [0, 64) do not count.
FOVEA_HD constexpr std::uint64_t bits_between(isize first, isize last) {
  const isize a = first > 0 ? first : 0, b = last < 64 ? last : 64;
  return a >= b ? 0 : (~std::uint64_t{0} >> (64 - (b - a))) << a;
}
/// Bit l of out[j - j0]: row i0 + l sees key j, for l < count <= 64.
template <mask_policy P>
void mask_lanes(const P& p, const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) {
  if constexpr (requires { p.lanes(at, i0, count, j0, j1, out); }) return p.lanes(at, i0, count, j0, j1, out);
  for (isize j = j0; j < j1; ++j) {
    std::uint64_t bits = 0;
    if constexpr (requires {
                    { p.queries(at, j) } -> std::same_as<range>;
                  }) {
      const range r = meet(p.queries(at, j), {i0, i0 + count});
      if (!r.empty()) bits = (~std::uint64_t{0} >> (64 - (r.last - r.first))) << (r.first - i0);
    } else {
      for (isize l = 0; l < count; ++l) bits |= static_cast<std::uint64_t>(p.visible(at, i0 + l, j)) << l;
    }
    out[j - j0] = bits;
  }
}

struct mask_table {
  range (*keys)(const void*, const mask_site&, isize, isize);
  tile_kind (*tile)(const void*, const mask_site&, isize, isize, isize, isize);
  void (*lanes)(const void*, const mask_site&, isize, isize, isize, isize, std::uint64_t*);
  bool (*visible)(const void*, const mask_site&, isize, isize);
  void (*check)(const void*, const mask_site&);
  bool (*is_causal)(const void*);
  kept_keys (*kept)(const void*);
  key_band (*band)(const void*, const mask_site&);
};
template <mask_policy P>
inline constexpr mask_table mask_table_of{
    [](const void* p, const mask_site& at, isize i0, isize i1) {
      return meet(static_cast<const P*>(p)->keys(at, i0, i1), {0, at.m});
    },
    [](const void* p, const mask_site& at, isize i0, isize i1, isize j0, isize j1) {
      return static_cast<const P*>(p)->tile(at, i0, i1, j0, j1);
    },
    [](const void* p, const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) {
      mask_lanes(*static_cast<const P*>(p), at, i0, count, j0, j1, out);
    },
    [](const void* p, const mask_site& at, isize i, isize j) { return static_cast<const P*>(p)->visible(at, i, j); },
    [](const void* p, const mask_site& at) {
      if constexpr (requires { static_cast<const P*>(p)->check(at); }) static_cast<const P*>(p)->check(at);
      (void)p, (void)at;
    },
    [](const void* p) {
      (void)p;
      if constexpr (requires { static_cast<const P*>(p)->is_causal(); })
        return static_cast<const P*>(p)->is_causal();
      else
        return false;
    },
    [](const void* p) {
      (void)p;
      if constexpr (requires { static_cast<const P*>(p)->kept(); })
        return static_cast<const P*>(p)->kept();
      else
        return kept_keys{};
    },
    [](const void* p, const mask_site& at) {
      (void)p, (void)at;
      if constexpr (requires { static_cast<const P*>(p)->band(at); })
        return static_cast<const P*>(p)->band(at);
      else
        return key_band{};
    }};
}  // namespace detail

/// Every key.
struct no_mask {
  FOVEA_HD bool visible(const mask_site&, isize, isize) const { return true; }
  FOVEA_HD range keys(const mask_site& at, isize, isize) const { return {0, at.m}; }
  FOVEA_HD range queries(const mask_site& at, isize) const { return {0, at.n}; }
  FOVEA_HD tile_kind tile(const mask_site&, isize, isize, isize, isize) const { return tile_kind::full; }
};

/// Any mask policy, held by value (up to 192 bytes, no allocation).
class mask {
 public:
  mask() : mask(no_mask{}) {}
  template <mask_policy P>
    requires(!std::same_as<P, mask>)
  mask(const P& p) : table_(&detail::mask_table_of<P>) {  // NOLINT(google-explicit-constructor)
    static_assert(sizeof(P) <= sizeof storage_,
                  "a mask policy may hold up to 192 bytes; keep tables outside and point to them");
    ::new (static_cast<void*>(storage_)) P(p);
  }
  bool visible(const mask_site& at, isize i, isize j) const { return table_->visible(storage_, at, i, j); }
  range keys(const mask_site& at, isize i0, isize i1) const { return table_->keys(storage_, at, i0, i1); }
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    return table_->tile(storage_, at, i0, i1, j0, j1);
  }
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    table_->lanes(storage_, at, i0, count, j0, j1, out);
  }
  void check(const mask_site& at) const { table_->check(storage_, at); }
  bool is_causal() const { return table_->is_causal(storage_); }
  kept_keys kept() const { return table_->kept(storage_); }
  key_band band(const mask_site& at) const { return table_->band(storage_, at); }
  bool is_none() const { return table_ == &detail::mask_table_of<no_mask>; }

 private:
  const detail::mask_table* table_;
  alignas(16) std::byte storage_[192]{};
};

}  // namespace FOVEA_ABI
}  // namespace fovea
