// SPDX-License-Identifier: MIT
/// @file  Every mask policy answers tile(), keys(), queries() and lanes() as visible() says, over random sites; visible() itself against
///        the definitions.

#include "unit/mask_check.hpp"

namespace {

using namespace fovea;
using test::any_alignment;
using test::at_random_sites;
using test::coins;
using test::contradiction;
using test::cuts;
using test::tiles;

}  // namespace

TEST_CASE("mask: causal, window, two_sided say what their definitions say") {
  for (isize n = 1; n <= 7; ++n)
    for (isize m = 1; m <= 9; ++m)
      for (isize i = 0; i < n; ++i)
        for (isize j = 0; j < m; ++j) {
          const mask_site at{0, 0, n, m, 1, 1};
          const isize p = i + m - n;
          CHECK(causal{}.visible(at, i, j) == (j <= p));
          CHECK(causal{top_left}.visible(at, i, j) == (j <= i));
          CHECK(causal{at_offset(3)}.visible(at, i, j) == (j <= i + 3));
          CHECK(window{.width = 3}.visible(at, i, j) == (j <= p && j > p - 3));
          CHECK(window{.width = 2, .first = 2}.visible(at, i, j) == (j <= p && (j > p - 2 || j < 2)));
          CHECK(two_sided{2, 1}.visible(at, i, j) == (j >= p - 2 && j <= p + 1));
        }
}

TEST_CASE("mask: no_mask and causal are consistent") {
  at_random_sites([](test::random&, const mask_site&) { return no_mask{}; });
  at_random_sites([](test::random& r, const mask_site&) { return causal{any_alignment(r)}; });
}
TEST_CASE("mask: window is consistent") {
  at_random_sites([](test::random& r, const mask_site&) {
    return window{.width = r.integer(1, 12), .first = r.coin() ? r.integer(0, 6) : 0, .align = any_alignment(r)};
  });
}
TEST_CASE("mask: two_sided is consistent") {
  at_random_sites([](test::random& r, const mask_site&) {
    return two_sided{r.integer(0, 9), r.integer(0, 9), any_alignment(r)};
  });
}
TEST_CASE("mask: boolean_mask is consistent, broadcast strides included") {
  std::vector<std::uint8_t> table;
  at_random_sites([&](test::random& r, const mask_site& at) {
    table = coins(r, 2 * at.H * at.n * at.m, r.uniform());
    if (r.coin(0.3)) return boolean_mask{table.data(), 0, 0, at.m};
    if (r.coin(0.3)) return boolean_mask{table.data(), at.m, 0, 0};
    return boolean_mask{table.data(), at.H * at.n * at.m, at.n * at.m, at.m};
  });
}
TEST_CASE("mask: block_mask is consistent, ragged blocks, KV heads, inverted") {
  std::vector<std::uint8_t> table;
  at_random_sites([&](test::random& r, const mask_site& at) {
    block_mask p;
    p.block_q = r.integer(1, 9), p.block_k = r.integer(1, 9);
    const isize rows = (at.n + p.block_q - 1) / p.block_q, columns = (at.m + p.block_k - 1) / p.block_k;
    p.per_kv_head = r.coin(), p.inverted = r.coin();
    table = coins(r, 2 * at.H * rows * columns, r.uniform());
    p.table = table.data();
    p.row_stride = columns, p.head_stride = rows * columns, p.batch_stride = at.H * rows * columns;
    return p;
  });
}
TEST_CASE("mask: packed is consistent, empty sequences included") {
  std::vector<std::int32_t> q, k;
  at_random_sites([&](test::random& r, const mask_site& at) {
    const isize sequences = r.integer(1, 5);
    q = cuts(r, sequences, at.n), k = cuts(r, sequences, at.m);
    return packed{q.data(), k.data(), sequences, r.coin()};
  });
}
TEST_CASE("mask: both and either are consistent") {
  std::vector<std::uint8_t> table;
  at_random_sites(
      [&](test::random& r, const mask_site& at) {
        table = coins(r, at.n * at.m, 0.5);
        return both{causal{any_alignment(r)}, boolean_mask{table.data(), 0, 0, at.m}};
      },
      tiles::loose);
  at_random_sites(
      [](test::random& r, const mask_site&) {
        return both{window{.width = r.integer(1, 9), .first = r.integer(0, 3)},
                    two_sided{r.integer(0, 9), r.integer(0, 9), any_alignment(r)}};
      },
      tiles::loose);
  at_random_sites(
      [&](test::random& r, const mask_site& at) {
        table = coins(r, at.n * at.m, 0.5);
        return either{window{.width = r.integer(1, 5), .first = 0, .align = any_alignment(r)},
                      boolean_mask{table.data(), 0, 0, at.m}};
      },
      tiles::loose);
  at_random_sites(
      [](test::random& r, const mask_site&) {
        return either{two_sided{r.integer(0, 3), r.integer(0, 3), any_alignment(r)}, causal{any_alignment(r)}};
      },
      tiles::loose);
}

TEST_CASE("mask: the consistency check itself catches a lying policy") {
  struct liar {
    bool visible(const mask_site&, isize i, isize j) const { return i != 3 || j != 2; }
    range keys(const mask_site& at, isize, isize) const { return {0, at.m}; }
    tile_kind tile(const mask_site&, isize, isize, isize, isize) const { return tile_kind::full; }
  };
  struct narrow_keys {
    bool visible(const mask_site&, isize, isize j) const { return j < 4; }
    range keys(const mask_site&, isize, isize) const { return {0, 3}; }
    tile_kind tile(const mask_site&, isize, isize, isize, isize) const { return tile_kind::partial; }
  };
  struct wrong_queries {
    bool visible(const mask_site&, isize, isize) const { return true; }
    range keys(const mask_site& at, isize, isize) const { return {0, at.m}; }
    range queries(const mask_site& at, isize) const { return {1, at.n}; }
    tile_kind tile(const mask_site&, isize, isize, isize, isize) const { return tile_kind::partial; }
  };
  const mask_site at{0, 0, 9, 9, 1, 1};
  test::random r(1);
  CHECK(contradiction(liar{}, at, r) != std::string());
  CHECK(contradiction(narrow_keys{}, at, r) != std::string());
  CHECK(contradiction(wrong_queries{}, at, r) != std::string());
  struct lazy {
    bool visible(const mask_site&, isize, isize) const { return true; }
    range keys(const mask_site& at, isize, isize) const { return {0, at.m}; }
    tile_kind tile(const mask_site&, isize, isize, isize, isize) const { return tile_kind::partial; }
  };
  CHECK(contradiction(lazy{}, at, r) == std::string());
  CHECK(contradiction(lazy{}, at, r, tiles::exact) != std::string());
}

TEST_CASE("mask: what does not fit is refused with a sentence") {
  const mask_site at{0, 0, 4, 5, 2, 1};
  const auto refused = [&](const mask& m) { return test::refusal([&] { m.check(at); }); };
  const std::int32_t q[] = {0, 2, 4}, falling[] = {0, 5, 4}, shorter[] = {0, 1, 3}, k[] = {0, 2, 5};
  const std::uint8_t table[64] = {};
  CHECK_SAYS(refused(window{.width = 0}), "window width is 0");
  CHECK_SAYS(refused(window{.width = -3}), "window width is -3");
  CHECK_SAYS(refused(window{.width = 3, .first = -1}), "window first is -1");
  CHECK_SAYS(refused(two_sided{-1, 2}), "two_sided left, right are -1, 2");
  CHECK_SAYS(refused(boolean_mask{}), "boolean_mask has a null table");
  CHECK_SAYS(refused(block_mask{.table = nullptr}), "block_mask has a null table");
  CHECK_SAYS(refused(block_mask{.table = table, .block_q = 0}), "block_mask blocks are 0 x 64");
  CHECK_SAYS(refused(packed{nullptr, k, 2}), "cumulative lengths");
  CHECK_SAYS(refused(packed{q, k, 0}), "0 sequences");
  CHECK_SAYS(refused(packed{falling, k, 2}), "fall at sequence 1");
  CHECK_SAYS(refused(packed{shorter, k, 2}), "n = 4");
  CHECK_SAYS(refused(both{window{.width = 0}, causal{}}), "window width is 0");
  CHECK_SAYS(refused(either{causal{}, two_sided{1, -7}}), "-7");
  CHECK(refused(packed{q, k, 2}) == "accepted");
}
