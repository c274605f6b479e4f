// SPDX-License-Identifier: MIT
#pragma once
/// @file  Asks a mask policy everything that it can be asked, over random sites, and compares with visible().

#include <vector>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

#include <fovea/mask/causal.hpp>
#include <fovea/mask/table.hpp>

namespace test {

using fovea::isize;
using fovea::mask_site;
using fovea::tile_kind;

/// Whether `partial` may stand for `empty` and `full`.
enum class tiles { exact, loose };

/// Asks one policy everything at one site; "" or the first contradiction.
template <fovea::mask_policy P>
std::string contradiction(const P& p, const mask_site& at, random& r, tiles answers = tiles::loose) {
  namespace detail = fovea::detail;
  const fovea::mask held(p);
  for (isize i = 0; i < at.n; ++i)
    for (isize j = 0; j < at.m; ++j) {
      if (held.visible(at, i, j) != p.visible(at, i, j)) return "the held mask differs";
      if constexpr (requires { p.queries(at, j); })
        if (p.queries(at, j).holds(i) != p.visible(at, i, j))
          return detail::sentence("queries(", j, ") is wrong about row ", i);
    }
  if (const fovea::key_band band = held.band(at); band.any())
    for (isize i = 0; i < at.n; ++i)
      for (isize j = 0; j < at.m; ++j)
        if (p.visible(at, i, j) != (j >= i + band.first && j < i + band.last))
          return detail::sentence("band() is wrong about row ", i, ", key ", j);
  for (int round = 0; round < 40 && at.n > 0 && at.m > 0; ++round) {
    const isize i0 = r.integer(0, at.n - 1), i1 = r.integer(i0 + 1, at.n), j0 = r.integer(0, at.m - 1),
                j1 = r.integer(j0 + 1, at.m);
    bool any = false, all = true;
    const fovea::range keys = held.keys(at, i0, i1);
    if (!keys.empty() && (keys.first < 0 || keys.last > at.m)) return "keys() leaves [0, m)";
    for (isize i = i0; i < i1; ++i)
      for (isize j = 0; j < at.m; ++j) {
        const bool sees = p.visible(at, i, j);
        if (sees && !keys.holds(j)) return detail::sentence("keys(", i0, ", ", i1, ") misses key ", j);
        if (j >= j0 && j < j1) any = any || sees, all = all && sees;
      }
    const tile_kind kind = held.tile(at, i0, i1, j0, j1);
    if (kind == tile_kind::empty && any)
      return detail::sentence("tile ", i0, " ", i1, " ", j0, " ", j1, " called empty");
    if (kind == tile_kind::full && !all)
      return detail::sentence("tile ", i0, " ", i1, " ", j0, " ", j1, " called full");
    if (answers == tiles::exact && kind == tile_kind::partial && (!any || all))
      return detail::sentence("tile ", i0, " ", i1, " ", j0, " ", j1, " called partial");
    const isize count = std::min<isize>(64, i1 - i0);
    std::vector<std::uint64_t> bits(static_cast<std::size_t>(j1 - j0), 0xdeadULL);
    held.lanes(at, i0, count, j0, j1, bits.data());
    for (isize j = j0; j < j1; ++j)
      for (isize l = 0; l < 64; ++l)
        if (((bits[static_cast<std::size_t>(j - j0)] >> l) & 1U) != (l < count && p.visible(at, i0 + l, j) ? 1U : 0U))
          return detail::sentence("lanes: row ", i0 + l, " key ", j);
  }
  return {};
}

template <class Make>
void at_random_sites(Make&& make, tiles answers = tiles::exact) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    random r(seed);
    mask_site at;
    at.n = r.integer(1, seed % 5 == 0 ? 130 : 20), at.m = r.integer(1, 40), at.G = r.integer(1, 2),
    at.H = at.G * r.integer(1, 3), at.B = 2;
    at.b = r.integer(0, 1), at.h = r.integer(0, at.H - 1);
    const auto policy = make(r, at);
    CAPTURE(seed, at.n, at.m);
    REQUIRE_NOTHROW(fovea::mask(policy).check(at));
    REQUIRE(contradiction(policy, at, r, answers) == std::string());
  }
}

inline fovea::alignment_of_rows any_alignment(random& r) {
  const isize which = r.integer(0, 2);
  return which == 0 ? fovea::bottom_right : which == 1 ? fovea::top_left : fovea::at_offset(r.integer(-5, 12));
}
inline std::vector<std::uint8_t> coins(random& r, isize count, double chance) {
  std::vector<std::uint8_t> t;
  for (isize i = 0; i < count; ++i)
    t.push_back(r.coin(chance) ? static_cast<std::uint8_t>(r.integer(1, 255)) : std::uint8_t{0});
  return t;
}
/// sequences + 1 cumulative lengths from 0 to total, some sequences empty.
inline std::vector<std::int32_t> cuts(random& r, isize sequences, isize total) {
  std::vector<std::int32_t> c{0};
  for (isize s = 1; s < sequences; ++s)
    c.push_back(static_cast<std::int32_t>(r.coin(0.3) ? c.back() : r.integer(c.back(), total)));
  c.push_back(static_cast<std::int32_t>(total));
  return c;
}

/// parents[i] < i, or -1.
inline std::vector<std::int32_t> random_tree(random& r, isize n) {
  std::vector<std::int32_t> parents;
  for (isize i = 0; i < n; ++i)
    parents.push_back(static_cast<std::int32_t>(r.coin(0.15) ? -1 : r.integer(r.coin() ? -1 : i / 2 - 1, i - 1)));
  return parents;
}

inline std::vector<float> numbers(random& r, isize count) {
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& y : x) y = static_cast<float>(3 * r.normal());
  return x;
}

}  // namespace test
