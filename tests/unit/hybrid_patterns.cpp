// SPDX-License-Identifier: MIT
/// @file  Sparse patterns: MST's masks as its code draws them, BigBird, global tokens; what they say of tiles agrees with single keys.

#include <vector>

#include <fovea/mask/patterns.hpp>
#include <fovea/mask/table.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

namespace {

using namespace fovea;

/// "" or the first tile, hull or bit that contradicts visible().
template <mask_policy P>
std::string contradiction(const P& p, const mask_site& at, test::random& r) {
  const mask held(p);
  for (int round = 0; round < 60; ++round) {
    const isize i0 = r.integer(0, at.n - 1), i1 = std::min(at.n, r.integer(i0 + 1, i0 + 64)),
                j0 = r.integer(0, at.m - 1), j1 = r.integer(j0 + 1, at.m);
    bool any = false, all = true;
    const range keys = held.keys(at, i0, i1);
    std::vector<std::uint64_t> bits(static_cast<std::size_t>(j1 - j0), 0xdeadULL);
    held.lanes(at, i0, i1 - i0, j0, j1, bits.data());
    for (isize i = i0; i < i1; ++i)
      for (isize j = 0; j < at.m; ++j) {
        const bool sees = held.visible(at, i, j);
        if (sees && !keys.holds(j)) return detail::sentence("keys(", i0, ", ", i1, ") misses key ", j);
        if (j < j0 || j >= j1) continue;
        any = any || sees, all = all && sees;
        if (((bits[static_cast<std::size_t>(j - j0)] >> (i - i0)) & 1U) != (sees ? 1U : 0U))
          return detail::sentence("lanes: row ", i, " key ", j);
      }
    for (const std::uint64_t x : bits)
      if (i1 - i0 < 64 && (x >> (i1 - i0)) != 0) return "lanes: bits behind the last row";
    const tile_kind kind = held.tile(at, i0, i1, j0, j1);
    if (kind == tile_kind::empty && any)
      return detail::sentence("tile ", i0, " ", i1, " ", j0, " ", j1, " called empty");
    if (kind == tile_kind::full && !all)
      return detail::sentence("tile ", i0, " ", i1, " ", j0, " ", j1, " called full");
    if (kind == tile_kind::partial && !any && i1 - i0 == 1 && j1 - j0 == 1) return "a single hidden key called partial";
  }
  return {};
}

template <class Make>
void at_random_sites(Make&& make) {
  for (std::uint64_t seed = 0; seed < 250; ++seed) {
    test::random r(seed);
    mask_site at;
    at.n = r.integer(1, 150), at.m = r.integer(1, 150), at.G = r.integer(1, 2), at.H = at.G * 2,
    at.h = r.integer(0, at.H - 1);
    CAPTURE(seed, at.n, at.m);
    CHECK(contradiction(make(r), at, r) == std::string());
  }
}

alignment_of_rows any_alignment(test::random& r) {
  return r.coin() ? bottom_right : r.coin() ? top_left : at_offset(r.integer(-20, 60));
}

}  // namespace

TEST_CASE("patterns: tiles, hulls and bits agree with visible()") {
  at_random_sites([](test::random& r) {
    return hsa_pattern{static_cast<hsa_mode>(r.integer(0, 3)), r.integer(1, r.coin() ? 5 : 40), any_alignment(r)};
  });
  at_random_sites([](test::random& r) { return global_tokens{r.integer(0, 20), any_alignment(r)}; });
  at_random_sites([](test::random& r) { return dilated{r.integer(1, 30), r.integer(1, 9), any_alignment(r)}; });
  at_random_sites([](test::random& r) {
    return bigbird{.block = r.integer(1, 20),
                   .window = 2 * r.integer(0, 2) + 1,
                   .global = r.integer(0, 2),
                   .random = r.integer(0, 3),
                   .seed = r.bits(),
                   .is_causal = r.coin(),
                   .align = any_alignment(r)};
  });
  at_random_sites([](test::random& r) {
    return both{causal{}, either{global_tokens{r.integer(0, 9)}, hsa_pattern{hsa_mode::local, r.integer(1, 9)}}};
  });
}

TEST_CASE("patterns: MST's masks, drawn as get_causal_attn_mask draws them") {
  const isize n = 48, s = 12;
  const mask_site at{0, 0, n, n, 1, 1};
  for (isize i = 0; i < n; ++i)
    for (isize j = 0; j < n; ++j) {
      const bool lower = j <= i;
      const bool local = lower && j >= i - (s - 1);  // triu(tril(ones), -(s - 1))
      const bool strided = lower && (i - j) % s == 0;
      bool fixed = i / s == j / s;  // block_diag of ones, then columns c * s - 1 for c = 1 .. n / s - 1
      for (isize c = 1; c < n / s; ++c) fixed = fixed || j == c * s - 1;
      CAPTURE(i, j);
      CHECK(hsa_pattern{hsa_mode::local, s}.visible(at, i, j) == local);
      CHECK(hsa_pattern{hsa_mode::strided, s}.visible(at, i, j) == strided);
      CHECK(hsa_pattern{hsa_mode::sparse, s}.visible(at, i, j) == (local || strided));
      CHECK(hsa_pattern{hsa_mode::fixed, s}.visible(at, i, j) == (lower && fixed));
    }
}

TEST_CASE("patterns: loops skip what MST's masks leave out") {
  const mask_site at{0, 0, 4096, 4096, 1, 1};
  const auto share = [&](hsa_mode mode) {
    isize asked = 0, kept = 0;
    for (isize i = 0; i < 4096; i += 32)
      for (isize j = 0; j <= i; j += 32)
        ++asked, kept += hsa_pattern{mode, 512}.tile(at, i, i + 32, j, j + 32) != tile_kind::empty;
    return static_cast<double>(kept) / static_cast<double>(asked);
  };
  CHECK(share(hsa_mode::local) < 0.27);    // 512 keys of 2048 on average, and the edge
  CHECK(share(hsa_mode::strided) < 0.16);  // a stripe of two tiles in 16
  CHECK(share(hsa_mode::fixed) < 0.22);
}

TEST_CASE("patterns: the schedule in time") {
  const hsa_schedule released, middle{100, 400};
  const mask_site at{0, 0, 64, 64, 1, 1};
  const hsa_pattern pattern{hsa_mode::strided, 8};
  for (const isize iteration : {0, 99999, 100000, 250000, 399999, 400000}) {
    CHECK_FALSE(released.sparse_at(iteration));  // [100, 100) is empty
    const bool sparse = iteration >= 100000 && iteration < 400000;
    CHECK(middle.sparse_at(iteration) == sparse);
    CHECK(middle.at(iteration, pattern).visible(at, 40, 31) == !sparse);
    CHECK(middle.at(iteration, pattern).visible(at, 40, 32));
  }
}

TEST_CASE("patterns: bad sizes are refused") {
  const mask_site at{0, 0, 8, 8, 1, 1};
  CHECK_SAYS(test::refusal([&] { mask(hsa_pattern{hsa_mode::local, 0}).check(at); }), "stride");
  CHECK_SAYS(test::refusal([&] { mask(bigbird{.window = 2}).check(at); }), "odd");
  CHECK_SAYS(test::refusal([&] { mask(global_tokens{-1}).check(at); }), "count");
}

TEST_CASE("patterns: a dilated window sees every step-th key, and joins with others") {
  const mask_site at{0, 0, 20, 20, 1, 1};
  const dilated d{3, 4, {}};
  for (isize i = 0; i < 20; ++i)
    for (isize j = 0; j < 20; ++j) CHECK(d.visible(at, i, j) == (j == i || j == i - 4 || j == i - 8));
  const either both_ways{d, hsa_pattern{hsa_mode::local, 2, {}}};
  CHECK((both_ways.visible(at, 15, 14) && both_ways.visible(at, 15, 7) && !both_ways.visible(at, 15, 13)));
  CHECK(test::refusal([&] { dilated{0, 2, {}}.check(at); }).find("dilated") != std::string::npos);
}
