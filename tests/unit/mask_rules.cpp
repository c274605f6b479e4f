// SPDX-License-Identifier: MIT
/// @file  Prefix-LM, chunks, key lengths, rules inside packed sequences, draft trees, functions, any number of masks: against their
///        definitions and for consistency of every answer.

#include <fovea/mask/function.hpp>
#include <fovea/mask/tree.hpp>

#include "unit/mask_check.hpp"

namespace {

using namespace fovea;
using test::any_alignment;
using test::at_random_sites;
using test::coins;
using test::cuts;
using test::random_tree;
using test::tiles;

bool is_ancestor(const std::vector<std::int32_t>& parents, isize of, isize k) {
  for (isize a = of; a >= 0; a = parents[static_cast<std::size_t>(a)])
    if (a == k) return true;
  return false;
}

}  // namespace

TEST_CASE("mask: prefix_lm, chunked_local, key_lengths say what their definitions say") {
  const std::int32_t prefixes[] = {4, 1}, lengths[] = {5, 0}, offsets[] = {2, -1};
  for (isize n = 1; n <= 7; ++n)
    for (isize m = n; m <= 9; ++m)
      for (isize b = 0; b < 2; ++b)
        for (isize i = 0; i < n; ++i)
          for (isize j = 0; j < m; ++j) {
            const mask_site at{b, 0, n, m, 1, 1, 2};
            const isize p = i + m - n;
            CHECK(prefix_lm{3}.visible(at, i, j) == (j <= p || j < 3));
            CHECK(prefix_lm{.prefixes = prefixes}.visible(at, i, j) == (j <= p || j < prefixes[b]));
            CHECK(chunked_local{4}.visible(at, i, j) == (j <= p && j / 4 == p / 4));
            CHECK(chunked_local{4, top_left}.visible(at, i, j) == (j <= i && j / 4 == i / 4));
            CHECK(key_lengths{lengths}.visible(at, i, j) == (j < lengths[b]));
            CHECK(causal{at_offsets(offsets)}.visible(at, i, j) == (j <= i + offsets[b]));
          }
}
TEST_CASE("mask: prefix_lm, chunked_local, key_lengths, offsets a batch item are consistent") {
  std::vector<std::int32_t> table(2);
  at_random_sites([&](test::random& r, const mask_site&) {
    for (auto& x : table) x = static_cast<std::int32_t>(r.integer(0, 50));
    return prefix_lm{r.integer(0, 20), r.coin() ? table.data() : nullptr, any_alignment(r)};
  });
  at_random_sites([](test::random& r, const mask_site&) { return chunked_local{r.integer(1, 12), any_alignment(r)}; });
  at_random_sites([&](test::random& r, const mask_site& at) {
    for (auto& x : table) x = static_cast<std::int32_t>(r.integer(0, at.m));
    return key_lengths{table.data()};
  });
  at_random_sites([&](test::random& r, const mask_site& at) {
    for (auto& x : table) x = static_cast<std::int32_t>(r.integer(-at.n, at.m));
    return window{.width = r.integer(1, 9), .first = r.integer(0, 3), .align = at_offsets(table.data())};
  });
}

TEST_CASE("mask: a rule inside packed sequences counts positions within each") {
  std::vector<std::int32_t> q, k, prefixes;
  at_random_sites(
      [&](test::random& r, const mask_site& at) {
        q = cuts(r, 4, at.n), k = cuts(r, 4, at.m);
        const documents d{packed{q.data(), k.data(), 4, r.coin()},
                          window{.width = r.integer(1, 9), .first = r.integer(0, 3), .align = any_alignment(r)}};
        for (isize i = 0; i < at.n; ++i)
          for (isize j = 0; j < at.m; ++j) {
            bool want = false;
            for (std::size_t s = 0; s < 4; ++s) {
              if (i < q[s] || i >= q[s + 1] || j < k[s] || j >= k[s + 1]) continue;
              mask_site own = at;
              own.n = q[s + 1] - q[s], own.m = k[s + 1] - k[s], own.B = 4, own.b = static_cast<isize>(s);
              want = d.inner.visible(own, i - q[s], j - k[s]) &&
                     (!d.sequences.is_causal || causal{}.visible(own, i - q[s], j - k[s]));
            }
            if (d.visible(at, i, j) != want) FAIL("row " << i << " key " << j);
          }
        return d;
      },
      tiles::loose);  // two rules at once where packed is causal itself
  at_random_sites([&](test::random& r, const mask_site& at) {
    q = cuts(r, 5, at.n), k = cuts(r, 5, at.m);
    return documents{packed{q.data(), k.data(), 5}, two_sided{r.integer(0, 5), r.integer(0, 5), any_alignment(r)}};
  });
  at_random_sites([&](test::random& r, const mask_site& at) {
    q = cuts(r, 3, at.n), k = cuts(r, 3, at.m), prefixes.assign(3, 0);
    for (auto& x : prefixes) x = static_cast<std::int32_t>(r.integer(0, 9));
    return documents{packed{q.data(), k.data(), 3}, prefix_lm{.prefixes = prefixes.data()}};
  });
  at_random_sites([&](test::random& r, const mask_site& at) {
    q = cuts(r, 3, at.n), k = cuts(r, 3, at.m);
    return documents{packed{q.data(), k.data(), 3}, chunked_local{r.integer(1, 7)}};
  });
}

TEST_CASE("mask: any number of masks, and an inner rule that only the run knows") {
  std::vector<mask> parts;
  std::vector<std::uint8_t> table;
  std::vector<std::int32_t> cu_q, cu_k;
  const auto draw = [&](test::random& r, const mask_site& at) {
    parts.clear();
    table = coins(r, at.n * at.m, 0.8);
    if (r.coin()) parts.emplace_back(causal{any_alignment(r)});
    if (r.coin()) parts.emplace_back(window{.width = r.integer(1, 30), .first = r.integer(0, 3)});
    if (r.coin()) parts.emplace_back(chunked_local{r.integer(4, 20)});
    if (r.coin()) parts.emplace_back(boolean_mask{table.data(), 0, 0, at.m});
  };
  at_random_sites(
      [&](test::random& r, const mask_site& at) {
        draw(r, at);
        const every all{parts.data(), static_cast<isize>(parts.size())};
        for (isize i = 0; i < at.n; ++i)
          for (isize j = 0; j < at.m; ++j) {
            bool want = true;
            for (const mask& p : parts) want = want && p.visible(at, i, j);
            if (all.visible(at, i, j) != want) FAIL("row " << i << " key " << j);
          }
        return all;
      },
      tiles::loose);
  at_random_sites([&](test::random& r, const mask_site& at) {
    parts.assign(1, mask(window{.width = r.integer(1, 9)}));
    cu_q = cuts(r, 3, at.n), cu_k = cuts(r, 3, at.m);
    return documents{packed{cu_q.data(), cu_k.data(), 3}, mask_ref{parts.data()}};
  });
  CHECK(every{}.visible({0, 0, 1, 1}, 0, 0));
  CHECK_FALSE(every{}.is_causal());
  parts.assign({mask(causal{}), mask(window{.width = 9, .first = 2}), mask(chunked_local{7})});
  CHECK(every{parts.data(), 3}.is_causal());
  CHECK(every{parts.data(), 3}.kept().window == 7);
  CHECK(every{parts.data(), 3}.kept().first == 2);
  CHECK_FALSE(every{parts.data(), 1}.kept().bounded());
  CHECK(mask(both{window{.width = 5}, causal{}}).kept().window == 5);
}

TEST_CASE("mask: a tree of draft tokens shows the cache, the ancestors and the token itself") {
  draft_tree trees[2];
  std::vector<std::int32_t> parents[2];
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    test::random r(seed);
    mask_site at;
    at.n = r.integer(1, seed % 4 == 0 ? 200 : 30), at.m = at.n + (r.coin(0.3) ? 0 : r.integer(0, 90)), at.B = 2;
    at.b = r.integer(0, 1);
    for (int t = 0; t < 2; ++t) {
      parents[t] = random_tree(r, at.n);
      trees[t] = draft_tree(parents[t].data(), at.n);
    }
    const tree policy{trees, r.coin() ? 1 : 2};
    const auto& own = parents[policy.count == 1 ? 0 : at.b];
    CAPTURE(seed, at.n, at.m);
    for (isize i = 0; i < at.n; ++i)
      for (isize j = 0; j < at.m; ++j) {
        const isize k = j - (at.m - at.n);
        if (policy.visible(at, i, j) != (k < 0 || is_ancestor(own, i, k))) FAIL("row " << i << " key " << j);
      }
    REQUIRE_NOTHROW(mask(policy).check(at));
    REQUIRE(test::contradiction(policy, at, r, tiles::exact) == std::string());
  }
  const std::int32_t chain[] = {-1, 0, 1, 1, 2};
  CHECK(draft_tree(chain, 5).depth() == std::vector<std::int32_t>{0, 1, 2, 2, 3});
}

TEST_CASE("mask: functions of the caller's, alone and with known blocks") {
  mask_blocks known;
  at_random_sites(
      [](test::random& r, const mask_site&) {
        const isize step = r.integer(1, 5);
        return mask_function{[step](const mask_site& at, isize i, isize j) {
          const isize p = bottom_right.position(at, i);
          return j <= p && (p - j) % step == 0;
        }};
      },
      tiles::loose);
  at_random_sites(
      [&](test::random& r, const mask_site& at) {
        const bool heads = r.coin();
        const mask_function rule{[heads](const mask_site& s, isize i, isize j) {
                                   return j <= bottom_right.position(s, i) - (heads ? s.h * 3 : 0);
                                 },
                                 true};
        known = mask_blocks(rule, at, r.integer(1, 9), r.integer(1, 9), r.coin(), heads);
        return mask_blocks_of{&known, rule};
      },
      tiles::loose);
}

TEST_CASE("mask: the rules that do not fit are refused with a sentence") {
  const mask_site at{0, 0, 4, 5, 2, 1, 2};
  const auto refused = [&](const mask& m, isize b = 0) {
    mask_site x = at;
    x.b = b;
    return test::refusal([&] { m.check(x); });
  };
  const std::int32_t lengths[] = {3, 6}, prefixes[] = {3, -6}, q[] = {0, 2, 4}, k[] = {0, 2, 5};
  CHECK_SAYS(refused(prefix_lm{-1}), "prefix_lm prefix is -1");
  CHECK_SAYS(refused(prefix_lm{.prefixes = prefixes}, 1), "prefix_lm prefix is -6");
  CHECK_SAYS(refused(chunked_local{0}), "chunked_local chunk is 0");
  CHECK_SAYS(refused(key_lengths{}), "no lengths");
  CHECK(refused(key_lengths{lengths}) == "accepted");
  CHECK_SAYS(refused(key_lengths{lengths}, 1), "key_lengths[1] is 6");
  CHECK_SAYS(refused(documents{packed{q, q, 2}, causal{}}), "wanted 0, 0 to n = 4");
  CHECK_SAYS(refused(documents{packed{q, k, 2}, window{.width = 0}}), "window width is 0");
  CHECK_SAYS(refused(documents{packed{q, k, 2}, mask_ref{}}), "mask_ref is null");
  CHECK_SAYS(refused(every{nullptr, 2}), "every has 2 masks");
  CHECK_SAYS(refused(tree{}), "tree has 0 trees");
  const std::int32_t parents[] = {-1, 0, 0}, late[] = {-1, 1, 0};
  const draft_tree small(parents, 3);
  CHECK_SAYS(refused(tree{&small}), "tree has 3 draft tokens; wanted n = 4");
  CHECK_SAYS(refused(tree{&small, 3}), "tree has 3 trees");
  CHECK_SAYS(test::refusal([&] { draft_tree(late, 3); }), "parents[1] is 1");
  CHECK_SAYS(test::refusal([&] { draft_tree(parents, draft_tree::most + 1); }), "4097 tokens");
  const mask_function all{[](const mask_site&, isize, isize) { return true; }};
  const mask_blocks known(all, {0, 0, 4, 6, 2, 1, 2});
  CHECK_SAYS(refused(mask_blocks_of{&known, all}), "mask_blocks was made for");
  CHECK_SAYS(refused(mask_blocks_of{nullptr, all}), "no blocks");
}
