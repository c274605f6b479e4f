// SPDX-License-Identifier: MIT
/// @file  hybrid_attention beyond golden data and laws: identities of pooling, edges, contract, recall, cost, states, configuration.

#include <fovea/feature/learned.hpp>
#include <fovea/hybrid.hpp>
#include <fovea/hybrid/configure.hpp>
#include <fovea/hybrid/reference_int8.hpp>
#include <fovea/softmax.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::dtype;
using test::tensor;

struct call {
  tensor q, k, v, out, lse;
  call(isize H, isize G, isize n, isize m, isize d, isize e, std::uint64_t seed = 1, dtype type = dtype::f32) {
    test::random r(seed);
    q = test::normal(r, type, 1, H, n, d), k = test::normal(r, type, 1, G, m, d), v = test::normal(r, type, 1, G, m, e);
    out = test::unwritten(type, 1, H, n, e), lse = test::unwritten(type == dtype::f64 ? type : dtype::f32, 1, H, n, 1);
  }
  template <class M>
  const tensor& run(const M& m) {
    fovea::prefill(serial, m, q, k, v, out, {.lse = lse});
    return out;
  }
  test::array dense(bool is_causal) {
    softmax_attention exact;
    if (is_causal) exact.mask = causal{};
    return run(exact).values();
  }
};

/// A mask in which every query block computes the diagonal block only.
std::vector<std::uint8_t> diagonal(isize rows, isize columns) {
  std::vector<std::uint8_t> t(static_cast<std::size_t>(rows * columns));
  for (isize i = 0; i < rows; ++i) t[static_cast<std::size_t>(i * columns + std::min(i, columns - 1))] = 1;
  return t;
}
view<const std::uint8_t> as_blocks(const std::vector<std::uint8_t>& t, isize rows, isize columns) {
  return bhnd(t.data(), 1, 1, rows, columns);
}

}  // namespace

TEST_CASE("hybrid: everything computed is dense attention") {
  for (const bool is_causal : {false, true}) {
    call c(4, 2, 150, 150, 24, 40);
    const auto want = c.dense(is_causal);
    const std::vector<std::uint8_t> all(10 * 10, 1);
    CHECK_CLOSE(c.run(hybrid_attention::over(as_blocks(all, 10, 10), 16, 16, is_causal)).values(), want, {.c = 16});
    for (const auto select : {block_selector::mean, block_selector::bound, block_selector::int8, block_selector::exact})
      for (const isize block_q : {isize{1}, isize{16}, isize{64}})
        CHECK_CLOSE(
            c.run(hybrid_attention{
                      .select = select, .block_q = block_q, .block_k = 16, .is_causal = is_causal, .budget = 1.0})
                .values(),
            want, {.c = 16});
  }
}

TEST_CASE("hybrid: equal keys within a block make pooling exact, and constant values come out constant") {
  call c(2, 1, 80, 75, 16, 8);
  for (isize j = 0; j < 75; ++j)
    for (isize x = 0; x < 16; ++x) c.k.set(0, 0, j, x, c.k.get(0, 0, j / 16 * 16, x));
  const auto mask = diagonal(5, 5);
  for (const auto rest : {compensation::zeroth, compensation::cumulant}) {  // no spread: the variance term is exactly 0
    auto m = hybrid_attention::over(as_blocks(mask, 5, 5), 16, 16, false);
    m.compensate = rest;
    const auto want = c.dense(false);
    CHECK_CLOSE(c.run(m).values(), want, {.c = 16});
  }
  c.v.fill([] { return 3.0; });
  for (const auto rest : {compensation::none, compensation::zeroth, compensation::cumulant}) {
    test::random r(4);
    c.k.fill_normal(r);
    auto m = hybrid_attention::over(as_blocks(mask, 5, 5), 16, 16, false);
    m.compensate = rest;
    for (const double x : c.run(m).values().data) CHECK(x == Approx(3.0).epsilon(1e-6));
  }
}

TEST_CASE("hybrid: a sampled key for each key is dense attention, and samples are unbiased over the seeds") {
  const auto nothing = std::vector<std::uint8_t>(25, 0);
  call c(2, 1, 80, 75, 16, 8);
  auto m = hybrid_attention::over(as_blocks(nothing, 5, 5), 16, 16, false);
  m.compensate = compensation::sampled;
  for (const isize parts : {16, 8}) {
    m.parts = parts;
    if (parts == 16) {  // a part is a key
      const auto want = c.dense(false), sums = c.lse.values();
      CHECK_CLOSE(c.run(m).values(), want, {.c = 16});
      CHECK_CLOSE(c.lse.values(), sums, {.c = 16});
      continue;
    }
    // Denominator and numerator of a row, averaged over seeds, against their exact values: 4 deviations of the mean.
    call one(1, 1, 1, 64, 8, 1, 6);
    const auto value = one.dense(false);
    const double mass = std::exp(one.lse.get(0, 0, 0, 0)), weighed = mass * value.data[0];
    auto few = hybrid_attention::over(as_blocks(nothing, 1, 4), 1, 16, false);
    few.compensate = compensation::sampled;
    double sum = 0, squares = 0, other = 0, other_squares = 0;
    const int seeds = 2000;
    for (int seed = 0; seed < seeds; ++seed) {
      few.seed = static_cast<std::uint64_t>(seed) << 20;
      one.run(few);
      const double x = std::exp(one.lse.get(0, 0, 0, 0)), y = x * one.out.get(0, 0, 0, 0);
      sum += x, squares += x * x, other += y, other_squares += y * y;
    }
    const auto deviations = [&](double all, double all_squares, double want) {
      const double mean = all / seeds, variance = all_squares / seeds - mean * mean;
      return std::fabs(mean - want) / std::sqrt(variance / seeds);
    };
    CHECK(squares / seeds > sum / seeds * sum / seeds * 1.001);  // they do differ
    CHECK(deviations(sum, squares, mass) < 4);
    CHECK(deviations(other, other_squares, weighed) < 4);
  }
}

TEST_CASE("hybrid: a linear rest over prefixes and over the skipped keys themselves, with a gate, against the twin") {
  test::random r(21);
  for (int round = 0; round < 40; ++round) {
    const isize G = r.integer(1, 2), H = G * r.integer(1, 3), n = r.integer(1, 70), m = r.integer(300, 700),
                d = r.integer(1, 24), e = r.integer(1, 24);
    call c(H, G, n, m, d, e, 300 + static_cast<std::uint64_t>(round), round % 4 == 0 ? dtype::f64 : dtype::f32);
    std::vector<float> level(static_cast<std::size_t>(H)), gate(static_cast<std::size_t>(H * d));
    for (float& x : level) x = static_cast<float>(r.normal());
    for (float& x : gate) x = static_cast<float>(0.3 * r.normal());
    hybrid_attention h{.select = round % 2 == 0 ? block_selector::mean : block_selector::int8};
    h.compensate = compensation::linear, h.budget = r.coin() ? 0.1 : 0.6, h.at_least = 0;
    h.block_q = r.coin(0.3) ? 1 : r.integer(4, 70), h.block_k = r.integer(1, 40), h.is_causal = r.coin();
    h.keep_small = r.coin() ? 0 : 0.05, h.share_group = r.coin(0.3);
    if (r.coin()) h.map = hedgehog{};
    if (r.coin()) h.log_weight = bhnd<const float>(level.data(), 1, H, 1, 1);
    if (r.coin()) h.query_gate = bhnd<const float>(gate.data(), 1, H, 1, d);
    tensor want = test::unwritten(dtype::f64, 1, H, n, e), sums = test::unwritten(dtype::f64, 1, H, n, 1);
    reference::prefill(h, {c.q, c.k, c.v, want, sums, {}});
    c.run(h);
    CAPTURE(round, H, G, n, m, d, e, static_cast<int>(h.select), h.block_q, h.block_k, h.is_causal, h.budget);
    CHECK_CLOSE(c.out.values(), want.values(), {.c = 256, .acc = c.q.type()});
    CHECK_CLOSE(c.lse.values(), sums.values(), {.c = 256, .acc = c.q.type(), .scale = 4});
    if (round > 0) continue;
    threads two(2);
    tensor own = test::unwritten(dtype::f64, 1, H, n, e);
    prefill(two, h, c.q, c.k, c.v, own);
    CHECK(own.values().data == c.out.values().data);
  }
}

TEST_CASE("hybrid: a capped variance lies between pooling and the whole term") {
  call c(2, 1, 80, 75, 16, 8);
  const auto mask = diagonal(5, 5);
  auto m = hybrid_attention::over(as_blocks(mask, 5, 5), 16, 16, false);
  m.compensate = compensation::zeroth;
  const auto pooled = c.run(m).values(), least = c.lse.values();
  m.compensate = compensation::cumulant;
  c.run(m);
  const auto most = c.lse.values();
  m.variance_cap = 0;
  CHECK_CLOSE(c.run(m).values(), pooled, {.c = 16});
  m.variance_cap = 1e-2;
  c.run(m);
  const auto between = c.lse.values();
  for (std::size_t x = 0; x < between.data.size(); ++x) {
    CHECK(between.data[x] > least.data[x]);
    CHECK(between.data[x] < most.data[x]);
    CHECK(between.data[x] <= least.data[x] + 1.01e-2);
  }
}

TEST_CASE("hybrid: a mean of huge keys or values is finite, and rows that compute its block are as without pooling") {
  call c(1, 1, 32, 64, 8, 8, 9);
  for (isize j = 16; j < 32; ++j)
    for (isize x = 0; x < 8; ++x) c.v.set(0, 0, j, x, j % 2 == 0 ? 3e38 : -3e38), c.k.set(0, 0, j, x, x == 0 ? -90 : 0);
  for (isize i = 0; i < 32; ++i) c.q.set(0, 0, i, 0, 4.0);  // weights of e^-127 and less
  std::vector<std::uint8_t> mask(2 * 4, 0);
  mask[0] = mask[1] = mask[4] = 1;  // rows 0 to 15 compute the block, the others pool it
  auto m = hybrid_attention::over(as_blocks(mask, 2, 4), 16, 16, false);
  for (const auto rest : {compensation::zeroth, compensation::sampled})
    for (const isize parts : {1, 4}) {
      m.compensate = rest, m.parts = parts;
      tensor want = test::unwritten(dtype::f64, 1, 1, 32, 8), sums = test::unwritten(dtype::f64, 1, 1, 32, 1);
      reference::prefill(m, {c.q, c.k, c.v, want, sums, {}});
      c.run(m);
      for (const double x : c.out.values().data) CHECK(std::isfinite(x));
      CHECK_CLOSE(c.lse.values(), sums.values(), {.c = 128, .scale = 4});
    }
}

TEST_CASE("hybrid: pooling takes the true size of the last block") {
  // 20 equal keys of score 0 in blocks of 16: nothing computed, the two pooled tokens weigh 16 and 4.
  call c(1, 1, 1, 20, 4, 1);
  c.q.fill([] { return 0.0; });
  isize j = 0;
  c.v.fill([&] { return j++ < 16 ? 1.0 : 11.0; });
  const std::vector<std::uint8_t> nothing(2, 0);
  auto m = hybrid_attention::over(as_blocks(nothing, 1, 2), 1, 16, false);
  CHECK(c.run(m).get(0, 0, 0, 0) == 0);  // dropped: a row with no key
  CHECK(c.lse.get(0, 0, 0, 0) == -HUGE_VAL);
  m.compensate = compensation::zeroth;
  CHECK(c.run(m).get(0, 0, 0, 0) == Approx((16 * 1.0 + 4 * 11.0) / 20));
  CHECK(c.lse.get(0, 0, 0, 0) == Approx(std::log(20.0)));
}

TEST_CASE("hybrid: a needle that mean keys hide is found by token scores") {
  // 64 blocks; one key of block 20 answers the queries, its 15 neighbours point away, so the block's mean key is unremarkable.
  const isize m = 1024, d = 32;
  call c(1, 1, 16, m, d, 4, 7);
  for (isize i = 0; i < 16; ++i)
    for (isize x = 0; x < d; ++x) c.q.set(0, 0, i, x, x == 0 ? 12.0 : 0.0);
  for (isize j = 320; j < 336; ++j) c.k.set(0, 0, j, 0, j == 327 ? 9.0 : -1.5);
  const hybrid_attention base{
      .block_q = 16, .block_k = 16, .is_causal = true, .budget = 0.05, .at_least = 0, .compensate = compensation::none};
  tensor recall = test::unwritten(dtype::f32, 1, 1, 16, 1);
  const auto kept = [&](block_selector select) {
    hybrid_attention h = base;
    h.select = select;
    mass_recall(serial, h, c.q, c.k, c.v, recall);
    return recall.get(0, 0, 3, 0);
  };
  CHECK(kept(block_selector::exact) > 0.99);
  CHECK(kept(block_selector::int8) > 0.99);
  CHECK(kept(block_selector::int4) > 0.99);
  CHECK(kept(block_selector::bound) > 0.99);
  CHECK(kept(block_selector::mean) < 0.01);
}

TEST_CASE("hybrid: recall is the mass of the computed keys") {
  call c(2, 1, 48, 96, 8, 8, 3);
  hybrid_attention m{.select = block_selector::mean,
                     .block_q = 8,
                     .block_k = 8,
                     .is_causal = true,
                     .budget = 0.2,
                     .at_least = 0,
                     .first = 8,
                     .window = 8,
                     .keep_small = 0};
  tensor recall = test::unwritten(dtype::f32, 1, 2, 48, 1);
  mass_recall(serial, m, c.q, c.k, c.v, recall);
  c.run(m);
  const problem p{c.q, c.k, c.v, c.out, c.lse, {}};
  for (isize h = 0; h < 2; ++h) {
    const auto fates = reference::block_fates(m, p, 0, h);
    for (isize i = 0; i < 48; ++i) {
      double some = 0, all = 0;
      for (isize j = 0; j <= i + 48; ++j) {
        double dot = 0;
        for (isize x = 0; x < 8; ++x) dot += c.q.get(0, h, i, x) * c.k.get(0, 0, j, x);
        const double w = std::exp(dot / std::sqrt(8.0));
        all += w;
        if (fates[static_cast<std::size_t>(i / 8)][static_cast<std::size_t>(j / 8)] == 1) some += w;
      }
      CHECK(recall.get(0, h, i, 0) == Approx(some / all).epsilon(1e-5));
    }
  }
  hybrid_attention spread = m;  // what stands for skipped blocks is no part of it
  spread.compensate = compensation::cumulant, spread.variance_share = 0.25, spread.variance_cap = 1;
  tensor same = test::unwritten(dtype::f32, 1, 2, 48, 1);
  mass_recall(serial, spread, c.q, c.k, c.v, same);
  CHECK_SAME_BITS(same, recall);
  m.budget = 1;
  mass_recall(serial, m, c.q, c.k, c.v, recall);
  for (const double x : recall.values().data) CHECK(x == Approx(1.0).epsilon(1e-5));
}

TEST_CASE("hybrid: density counts the computed keys, kept ones among them") {
  call c(2, 1, 50, 98, 8, 8, 4);
  hybrid_attention m{.select = block_selector::int8,
                     .block_q = 8,
                     .block_k = 8,
                     .is_causal = true,
                     .budget = 0.2,
                     .at_least = 0,
                     .first = 8,
                     .window = 8,
                     .keep_small = 1.0 / 16};
  tensor density = test::unwritten(dtype::f32, 1, 2, 50, 1);
  computed_density(serial, m, c.q, c.k, c.v, density);
  const problem p{c.q, c.k, c.v, c.out, c.lse, {}};
  const auto kept = reference::hybrid_detail::kept_keys_of(m, p, 0, 0);
  for (isize h = 0; h < 2; ++h) {
    const auto fates = reference::block_fates(m, p, 0, h);
    for (isize i = 0; i < 50; ++i) {
      isize some = 0;
      for (isize j = 0; j <= i + 48; ++j) {
        const bool over = (j / 16 + 1) * 16 <= i / 8 * 8 + 48;  // its stretch, before the query block
        some += fates[static_cast<std::size_t>(i / 8)][static_cast<std::size_t>(j / 8)] == 1 ||
                        (over && kept[static_cast<std::size_t>(j)])
                    ? 1
                    : 0;
      }
      CHECK(density.get(0, h, i, 0) == Approx(static_cast<double>(some) / static_cast<double>(i + 49)));
    }
  }
  const hybrid_attention pattern = hybrid_attention::hsa(hsa_mode::local, 16);
  computed_density(serial, pattern, c.q, c.k, c.v, density);
  CHECK(density.get(0, 0, 9, 0) == Approx(16.0 / 58));
}

TEST_CASE("hybrid: a shared selection does not see keys of its own block, or later ones") {
  const hybrid_attention m{.select = block_selector::exact,
                           .block_q = 16,
                           .block_k = 8,
                           .is_causal = true,
                           .budget = 0.3,
                           .at_least = 0,
                           .first = 0,
                           .window = 0};
  call a(1, 1, 96, 96, 8, 8, 9), b(1, 1, 96, 96, 8, 8, 9);
  for (isize j = 71; j < 96; ++j)
    for (isize x = 0; x < 8; ++x) b.k.set(0, 0, j, x, 50.0), b.v.set(0, 0, j, x, -50.0);
  a.run(m), b.run(m);
  CHECK_SAME_BITS(test::rows_of(a.out, 0, 71),
                  test::rows_of(b.out, 0, 71));  // rows 64 to 70 share their block with row 71
}

TEST_CASE("hybrid: NaN in a skipped block stays there") {
  call c(1, 1, 64, 64, 16, 16, 2);
  const auto mask = diagonal(4, 4);
  const auto m = hybrid_attention::over(as_blocks(mask, 4, 4), 16, 16, false);
  for (isize j = 32; j < 48; ++j) c.k.set(0, 0, j, 3, NAN), c.v.set(0, 0, j, 2, HUGE_VAL);
  c.run(m);
  for (isize i = 0; i < 64; ++i) CHECK(std::isfinite(c.out.get(0, 0, i, 0)) == (i < 32 || i >= 48));
}

TEST_CASE("hybrid: ragged, rectangular and shared blocks against the twin") {
  test::random r(11);
  for (int round = 0; round < 120; ++round) {
    const isize G = r.integer(1, 2), H = G * r.integer(1, 3), n = r.integer(1, 90), m = r.integer(1, 120),
                d = r.integer(1, 40), e = r.integer(1, 40);
    call c(H, G, n, m, d, e, 100 + static_cast<std::uint64_t>(round), round % 3 == 0 ? dtype::f64 : dtype::f32);
    hybrid_attention h;
    h.select = static_cast<block_selector>(r.integer(2, 7)), h.compensate = static_cast<compensation>(r.integer(0, 3));
    h.block_q = r.integer(1, 40), h.block_k = r.integer(1, 40), h.is_causal = r.coin(), h.budget = r.uniform(),
    h.at_least = r.integer(0, 20);
    h.top = r.coin(0.3) ? r.integer(1, 5) : 0, h.first = r.integer(0, 9), h.window = r.integer(0, 20);
    if (r.coin(0.2)) h.align = top_left;
    if (r.coin(0.4)) h.keep_small = r.uniform(0.02, 0.4);
    if (r.coin(0.3) && h.compensate != compensation::cumulant) h.share_group = true;
    if (r.coin(0.3) && (h.compensate == compensation::zeroth || h.compensate == compensation::sampled))
      h.parts = h.block_k % 3 == 0 ? 3 : h.block_k % 2 == 0 ? 2 : 1;
    if (r.coin(0.3) && h.select >= block_selector::int8) h.top_p = r.uniform();
    if (h.compensate == compensation::cumulant && r.coin()) h.variance_cap = r.uniform(), h.variance_share = 0.25;
    h.seed = static_cast<std::uint64_t>(round);
    tensor want = test::unwritten(dtype::f64, 1, H, n, e), sums = test::unwritten(dtype::f64, 1, H, n, 1);
    reference::prefill(h, {c.q, c.k, c.v, want, sums, {}});
    c.run(h);
    CAPTURE(round, H, G, n, m, d, e, static_cast<int>(h.select), h.block_q, h.block_k, h.is_causal, h.budget, h.top,
            h.keep_small, h.share_group, h.parts, h.top_p, static_cast<int>(h.compensate));
    CHECK_CLOSE(c.out.values(), want.values(), {.c = 128, .acc = c.q.type()});
    CHECK_CLOSE(c.lse.values(), sums.values(), {.c = 128, .acc = c.q.type(), .scale = 4});
  }
}

TEST_CASE("hybrid: multiply-adds follow the plan") {
  const shape s{1, 4, 2, 96, 96, 16, 24};
  call c(4, 2, 96, 96, 16, 24, 5);
  hybrid_attention m{.select = block_selector::mean,
                     .block_q = 8,
                     .block_k = 8,
                     .is_causal = true,
                     .budget = 0.25,
                     .at_least = 16,
                     .first = 8,
                     .window = 8,
                     .keep_small = 0};
  double want = 0;
  for (isize h = 0; h < 4; ++h) {
    const auto fates = reference::block_fates(m, {c.q, c.k, c.v, c.out, c.lse, {}}, 0, h);
    for (isize i = 0; i < 96; ++i) {
      want += static_cast<double>(i / 8) * 16;  // mean keys of the blocks before its own
      for (isize J = 0; J < 12; ++J) {
        const int fate = fates[static_cast<std::size_t>(i / 8)][static_cast<std::size_t>(J)];
        want += fate == 2 ? 40 : fate == 1 ? 40.0 * static_cast<double>(std::min<isize>(8, i + 1 - J * 8)) : 0;
      }
    }
  }
  CHECK(m.macs(s) == want);
  CHECK(hybrid_attention::hsa(hsa_mode::local, 10).macs(s) == 4.0 * 40 * (96 * 10 - 45));
  CHECK(m.step_macs({1, 4, 2, 1, 97, 16, 24}) < m.step_macs({1, 4, 2, 1, 960, 16, 24}));
  CHECK(m.state_bytes({1, 4, 2, 1, 4096, 16, 24}) == m.make_state({1, 4, 2, 1, 4096, 16, 24}).bytes());
}

TEST_CASE("hybrid: a call that breaks the contract is refused by a sentence, and writes nothing") {
  call c(4, 2, 32, 32, 8, 8);
  const auto before = c.out.bytes();
  const std::vector<std::uint8_t> table(4, 1);
  const auto refused = [&](const hybrid_attention& m, const char* word) {
    const std::string said = test::refusal([&] { c.run(m); });
    CAPTURE(said);
    CHECK(said.find(word) != std::string::npos);
    CHECK(c.out.bytes() == before);
  };
  refused({.block_q = 0}, "block_q");
  refused({.block_k = -3}, "block_k");
  refused({.top = -1}, "top");
  refused({.budget = 1.5}, "budget");
  refused({.budget = NAN}, "budget");
  refused({.at_least = -1}, "at_least");
  refused({.window = -1}, "window");
  refused({.top_p = 1.5}, "top_p");
  refused({.select = block_selector::mean, .top_p = 0.9}, "top_p");
  refused({.keep_small = 0.7}, "keep_small");
  refused({.parts = 3}, "parts");
  refused({.parts = 2, .compensate = compensation::cumulant}, "parts");
  refused({.share_group = true, .compensate = compensation::cumulant}, "share_group");
  refused({.scale = -1.0}, "scale");
  refused({.scale = HUGE_VAL}, "scale");
  refused({.select = block_selector::given}, "blocks is null");
  refused(hybrid_attention::over(as_blocks(table, 2, 2), 16, 8, false), "blocks is [1, 1, 2, 2]");
  refused(hybrid_attention::over(bhnd(table.data(), 1, 3, 1, 1), 32, 32, false), "blocks has 3 heads");
  refused(hybrid_attention::hsa(hsa_mode::local, 0), "stride");
  auto open = hybrid_attention::hsa(hsa_mode::fixed, 4);
  open.is_causal = false;
  refused(open, "causal by definition");
  auto pooled = hybrid_attention::hsa(hsa_mode::fixed, 4);
  pooled.compensate = compensation::zeroth;
  refused(pooled, "single tokens");
  CHECK(test::refusal([&] { hybrid_attention{}.make_state(shape{}); }).find("causal") != std::string::npos);
}

TEST_CASE("hybrid: a state of another recipe is refused") {
  const shape s{1, 2, 1, 8, 32, 8, 8};
  call c(2, 1, 8, 8, 8, 8);
  hybrid_attention m{.block_q = 1, .block_k = 8, .is_causal = true};
  state st = m.make_state(s);
  fovea::prefill(serial, m, c.q, c.k, c.v, c.out, st);
  m.budget = 0.5;
  CHECK(test::refusal([&] { fovea::prefill(serial, m, c.q, c.k, c.v, c.out, st); }).find("hyper-parameters") !=
        std::string::npos);
}

TEST_CASE("hybrid: decoding with a shared selection gives finite rows and follows the keys") {
  // Selection is shared by 16 rows in a prefill and made row by row in steps: other blocks, the same budget (see the contract).
  call c(3, 1, 200, 200, 16, 16, 8);
  const hybrid_attention m{.is_causal = true, .budget = 0.25, .at_least = 64};
  const auto want = c.dense(true);
  state st = m.make_state({1, 3, 1, 200, 200, 16, 16});
  double error = 0, size = 0;
  for (isize i = 0; i < 200; ++i)
    fovea::step(serial, m, c.q.ref().slice(i, 1), c.k.ref().slice(i, 1), c.v.ref().slice(i, 1), c.out.ref().slice(i, 1),
                st);
  const auto got = c.out.values();
  for (std::size_t x = 0; x < want.data.size(); ++x)
    error += std::pow(got.data[x] - want.data[x], 2), size += std::pow(want.data[x], 2);
  CHECK(std::sqrt(error / size) < 0.5);
}

TEST_CASE("hybrid: steps that keep a selection compute all of their query block") {
  // Nothing is chosen: a row sees its query block, whether its selection is new or kept. Selections are made in mid-block, too.
  call c(2, 1, 150, 150, 16, 16, 9);
  hybrid_attention m{.block_q = 48, .block_k = 16, .is_causal = true, .budget = 0, .at_least = 0, .first = 0};
  m.window = 0, m.keep_small = 0, m.compensate = compensation::none;
  const auto in_steps = [&](isize refresh) {
    m.refresh = refresh;
    state st = m.make_state({1, 2, 1, 150, 150, 16, 16});
    for (isize i = 0; i < 150; ++i)
      fovea::step(serial, m, c.q.ref().slice(i, 1), c.k.ref().slice(i, 1), c.v.ref().slice(i, 1),
                  c.out.ref().slice(i, 1), st);
    return c.out.bytes();
  };
  const auto each = in_steps(1);
  for (const isize refresh : {2, 4, 24}) CHECK((in_steps(refresh) == each));  // whole numbers of them a query block
}

TEST_CASE("hybrid: from a configuration") {
  const auto make = [](const configuration& c, const arrays& tensors = {}) {
    configuration_reader reader(c, tensors);
    any_attention a = configure_hybrid(reader);
    reader.finish();
    return a;
  };
  const auto recipe = make({"hybrid", {{"causal", true}}});
  const auto* m = recipe.as<hybrid_attention>();
  CHECK((m->select == block_selector::int8 && m->block_q == 16 && m->budget == 0.25 && m->at_least == 256 &&
         m->compensate == compensation::zeroth && m->keep_small == 1.0 / 64));
  const auto wide =
      make({"hybrid", {{"causal", true}, {"top_p", 0.95}, {"parts", 4.0}, {"share_group", true}, {"keep_small", 0.0}}});
  m = wide.as<hybrid_attention>();
  CHECK((m->top_p == 0.95 && m->parts == 4 && m->share_group && m->keep_small == 0));
  const auto moba = make({"hybrid", {{"causal", true}, {"top", 3.0}, {"block_k", 64.0}}});
  m = moba.as<hybrid_attention>();
  CHECK((m->select == block_selector::mean && m->block_q == 1 && m->block_k == 64 && m->top == 3 && m->window == 0 &&
         m->keep_small == 0 && m->compensate == compensation::none));
  const auto hsa = make({"hybrid", {{"causal", true}, {"pattern", std::string("fixed")}, {"stride", 32.0}}});
  CHECK(hsa.as<hybrid_attention>()->pattern == hsa_mode::fixed);
  const arrays table{{"blocks", array({2, 2}, std::vector<std::uint8_t>{1, 0, 1, 1})}};
  CHECK(make({"hybrid", {{"compensate", std::string("zeroth")}}}, table).as<hybrid_attention>()->select ==
        block_selector::given);
  const auto refused = [&](const configuration& c, const char* word, const arrays& tensors = {}) {
    CHECK(test::refusal([&] { make(c, tensors); }).find(word) != std::string::npos);
  };
  const auto drawn = make({"hybrid", {{"compensate", std::string("sampled")}, {"seed", 7.0}, {"parts", 2.0}}});
  m = drawn.as<hybrid_attention>();
  CHECK((m->compensate == compensation::sampled && m->seed == 7 && m->parts == 2));
  const auto capped =
      make({"hybrid", {{"compensate", std::string("cumulant")}, {"variance_cap", 1.0}, {"variance_share", 0.25}}});
  m = capped.as<hybrid_attention>();
  CHECK((m->compensate == compensation::cumulant && m->variance_cap == 1 && m->variance_share == 0.25));
  const arrays gate{{"query_gate", array({2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6})}};
  const auto gated = make({"hybrid", {{"compensate", std::string("linear")}, {"map", std::string("hedgehog")}}}, gate);
  m = gated.as<hybrid_attention>();
  CHECK((m->compensate == compensation::linear && m->map.features(8) == 16 && *m->query_gate.row(0, 1, 0) == 4));
  refused({"hybrid", {{"map", std::string("elu1")}}}, "map");
  refused({"hybrid", {{"seed", -1.0}}}, "seed");
  refused({"hybrid", {{"error", 0.01}}}, "error");
  refused({"hybrid", {{"keep_small_values", 0.1}}}, "keep_small_values");
  refused({"hybrid", {{"select", std::string("given")}}}, "blocks is missing");
  refused({"hybrid", {{"select", std::string("int2")}}}, "int2");
  refused({"hybrid", {{"top", 3.0}, {"budget", 0.5}}}, "one of them");
  refused({"hybrid", {{"top_p", 0.9}, {"budget", 0.5}}}, "one of them");
  refused({"hybrid", {{"pattern", std::string("local")}, {"causal", true}}}, "one of them", table);
}

namespace {

/// Rows in int8 against the twin with the same integers, and against f32 within what roundings of the scales' sizes would make of a row: no
/// row beyond 5 deviations, 1.3 on average (tests/int8/prefill.cpp).
void int8_is_near(hybrid_attention m, call& c) {
  const isize H = c.q.heads(), n = c.q.length(), e = c.v.width();
  tensor exact = test::unwritten(dtype::f64, 1, H, n, e), exact_lse = test::unwritten(dtype::f64, 1, H, n, 1),
         twin = test::unwritten(dtype::f64, 1, H, n, e), twin_lse = test::unwritten(dtype::f64, 1, H, n, 1);
  reference::prefill(m, {c.q, c.k, c.v, exact, exact_lse, {}});
  c.run(m);
  const tensor floats =
      c.out;  // where these are not the twin's, two blocks tied in the selection and the twin took the other one
  m.arithmetic = precision::int8;
  const problem p{c.q, c.k, c.v, twin, twin_lse, {}};
  const std::vector<double> predicted = reference::hybrid_int8_twin(m, p).prefill(true);
  c.run(m);
  double worst = 0, mean = 0, apart = 0, lse = 0;
  isize tied = 0;
  for (isize h = 0, row = 0; h < H; ++h)
    for (isize i = 0; i < n; ++i, ++row) {
      double from_exact = 0, from_twin = 0, from_floats = 0, size = 0;
      for (isize x = 0; x < e; ++x) {
        const double want = exact.get(0, h, i, x);
        from_floats += std::pow(floats.get(0, h, i, x) - want, 2), size += want * want;
      }
      if (from_floats > 1e-8 * size + 1e-12) {
        ++tied;
        continue;
      }
      for (isize x = 0; x < e; ++x) {
        const double y = c.out.get(0, h, i, x);
        from_exact += std::pow(y - exact.get(0, h, i, x), 2), from_twin += std::pow(y - twin.get(0, h, i, x), 2);
      }
      if (exact_lse.get(0, h, i, 0) == -HUGE_VAL) {
        CHECK(c.lse.get(0, h, i, 0) == -HUGE_VAL);
        CHECK(from_exact == 0);
        continue;
      }
      const double scale = std::sqrt(predicted[static_cast<std::size_t>(row)]) + 1e-6;
      worst = std::isfinite(from_exact) ? std::max(worst, std::sqrt(from_exact) / scale) : HUGE_VAL;
      mean += std::sqrt(from_exact) / scale / static_cast<double>(H * n);
      apart = std::max(apart, std::sqrt(from_twin) / scale);
      lse = std::max(lse, std::fabs(c.lse.get(0, h, i, 0) - twin_lse.get(0, h, i, 0)));
    }
  INFO("worst " << worst << " mean " << mean << " twin " << apart << " lse " << lse << " tied " << tied);
  CHECK(tied <= m.block_q);  // one query block
  CHECK(worst < 5);
  CHECK(mean < 1.3);
  CHECK(apart < 1);
  CHECK(lse < 0.011);
}

}  // namespace

TEST_CASE("hybrid in int8: against the twin with the same integers, and what the scales predict") {
  hybrid_attention m{.is_causal = true, .budget = 0.2, .at_least = 32, .keep_small = 0};
  for (const auto rest : {compensation::none, compensation::zeroth}) {
    m.compensate = rest;
    call causal(4, 2, 150, 600, 64, 48, 31), wide(1, 1, 70, 300, 128, 128, 32), odd(2, 1, 45, 200, 33, 19, 33);
    int8_is_near(m, causal), int8_is_near(m, wide), int8_is_near(m, odd);
  }
  SECTION("kept keys, parts, blocks of other sizes") {
    m.keep_small = 1.0 / 32, m.parts = 2;
    call c(2, 1, 100, 400, 32, 32, 34);
    int8_is_near(m, c);
    m.block_k = 6, m.block_q = 20;
    int8_is_near(m, c);
    m.block_k = 40, m.block_q = 7, m.parts = 1, m.is_causal = false;
    int8_is_near(m, c);
  }
  SECTION("windows of keys; a given mask, rows that see nothing") {
    call far(1, 1, 20, 9000, 64, 64, 35);
    m.keep_small = 0;
    int8_is_near(m, far);
    call c(1, 1, 64, 40, 16, 16, 36);
    const std::vector<std::uint8_t> all(4 * 5, 1);
    int8_is_near(hybrid_attention::over(as_blocks(all, 4, 5), 16, 8, true), c);
  }
  SECTION("16 bits") {
    for (const dtype type : {dtype::bf16, dtype::f16}) {
      call c(2, 1, 40, 130, 32, 16, 37, type);
      m.arithmetic = precision::f32;
      const auto want = c.run(m).values();
      m.arithmetic = precision::int8;
      const auto got = c.run(m).values();
      double error = 0, size = 0;
      for (std::size_t x = 0; x < want.data.size(); ++x)
        error += std::pow(got.data[x] - want.data[x], 2), size += want.data[x] * want.data[x];
      CHECK(std::sqrt(error / size) < 0.03);
      CHECK(error > 0);
    }
  }
}

TEST_CASE("hybrid patterns: strided views give what the mask gives") {
  for (const dtype type : {dtype::f32, dtype::bf16})
    for (const hsa_mode mode : {hsa_mode::local, hsa_mode::strided, hsa_mode::sparse, hsa_mode::fixed})
      for (const isize stride : {isize{2}, isize{37}, isize{700}}) {
        call c(4, 2, 1200, 1211, 16, 24, 43,
               type);  // more rows of a class than a superblock holds; the first row is at 11
        c.out = test::unwritten(dtype::f32, 1, 4, 1200, 24);
        softmax_attention exact;
        exact.mask = hsa_pattern{mode, stride};
        const auto want = c.run(exact).values(), sums = c.lse.values();
        CAPTURE(name_of(mode), stride, static_cast<int>(type));
        CHECK_CLOSE(c.run(hybrid_attention::hsa(mode, stride)).values(), want, {.c = 16});
        CHECK_CLOSE(c.lse.values(), sums, {.c = 16});
      }
}

TEST_CASE("hybrid in int8: rows that integers cannot hold are those of f32, and reach no other row") {
  for (const int which : {0, 1, 2}) {  // a key that is not finite, a value, scores beyond 16 bits
    call c(1, 1, 64, 256, 32, 16, 41), clean(1, 1, 64, 256, 32, 16, 41);
    const isize j = 230;  // seen by rows 38 on; every block is computed
    for (isize x = 0; x < 32 && which == 2; ++x) c.k.set(0, 0, j, x, 400.0 * (x % 2 == 0 ? 1 : -1));
    if (which == 0) c.k.set(0, 0, j, 5, std::numeric_limits<double>::quiet_NaN());
    if (which == 1) c.v.set(0, 0, j, 5, std::numeric_limits<double>::infinity());
    const std::vector<std::uint8_t> all(4 * 16, 1);
    auto m = hybrid_attention::over(as_blocks(all, 4, 16), 16, 16, true);
    const auto floats = c.run(m).values();
    m.arithmetic = precision::int8;
    const auto got = c.run(m).values(), want = clean.run(m).values();
    isize in_floats = 0;
    for (isize i = 0; i < 64; ++i)
      for (isize x = 0; x < 16; ++x) {
        const auto at = static_cast<std::size_t>(i * 16 + x);
        const double y = got.data[at], f = floats.data[at];
        if (i < 38) CHECK(y == want.data[at]);
        if (i >= 38 && which < 2) CHECK((y == f || (std::isnan(y) && std::isnan(f))));
        in_floats += i >= 38 && y == f ? 1 : 0;
      }
    if (which == 2) CHECK(in_floats > 8 * 16);
  }
}
