// SPDX-License-Identifier: MIT
/// @file  Score policies: definitions, T5's buckets against published code, and the register and tile forms against one element at a time.
///
/// The runs of T5 buckets come from T5Attention._relative_position_bucket of Hugging Face transformers 5.23 (modeling_t5.py).

#include <fovea/score/packed.hpp>
#include <fovea/score/score.hpp>

#include "unit/mask_check.hpp"

namespace {

using namespace fovea;
using test::any_alignment;
using test::numbers;

/// Applies a policy to tiles of random scores as kernels do, in both orientations, and compares with one element at a time in double.
template <class Acc, class Policy>
void forms_agree(const Policy& p, const mask_site& at, test::random& r, double c) {
  const score held(p);
  for (int round = 0; round < 12; ++round) {
    const bool decode = r.coin(0.3);
    const isize i0 = r.integer(0, at.n - 1), j0 = r.integer(0, at.m - 1),
                count = decode ? 1 : r.integer(1, std::min<isize>(64, at.n - i0)),
                keys = r.integer(1, std::min<isize>(130, at.m - j0)), stride = decode ? 1 : count + r.integer(0, 20);
    std::vector<Acc> s(static_cast<std::size_t>(keys * stride)), got;
    for (Acc& x : s) x = static_cast<Acc>(8 * r.normal());
    got = s;
    held.apply(at, i0, count, j0, j0 + keys, got.data(), stride);
    double worst = 0;
    for (isize y = 0; y < keys; ++y)
      for (isize l = 0; l < stride; ++l) {
        const auto x = static_cast<std::size_t>(y * stride + l);
        const double before = static_cast<double>(s[x]), after = static_cast<double>(got[x]);
        if (l >= count) {  // behind the rows nothing is touched
          if (before != after) FAIL("lane " << l << " of " << count << " was touched");
          continue;
        }
        const double want = held(at, i0 + l, j0 + y, before * 0.69314718055994530942) * 1.4426950408889634074;
        if (want == after) continue;  // infinities, too
        const double gap = std::fabs(after - want) / std::fmax(std::fmax(std::fabs(want), std::fabs(before)), 1.0);
        if (!(gap <= worst)) worst = gap;
      }
    CAPTURE(decode, i0, count, j0, keys, stride);
    CHECK(worst <= c * (sizeof(Acc) == 8 ? 0x1p-53 : 0x1p-24));
  }
}

template <class Make>
void at_random_sites(Make&& make, double c = 8) {
  for (std::uint64_t seed = 0; seed < 120; ++seed) {
    test::random r(seed);
    mask_site at;
    at.n = r.integer(1, 100), at.m = r.integer(1, 200), at.G = r.integer(1, 2), at.H = at.G * r.integer(1, 3), at.B = 2;
    at.b = r.integer(0, 1), at.h = r.integer(0, at.H - 1);
    const auto policy = make(r, at);
    CAPTURE(seed, at.n, at.m);
    REQUIRE_NOTHROW(score(policy).check(at));
    forms_agree<float>(policy, at, r, c);
    forms_agree<double>(policy, at, r, c);
  }
}

}  // namespace

TEST_CASE("score: tanh in registers") {
  using P = simd::pack<float, simd::native>;
  const auto one = [](float x) {
    float lanes[P::size];
    simd::tanh(P(x)).store(lanes);
    return lanes[0];
  };
  double worst = 0;
  for (double x = 1e-6; x < 20; x *= 1.0007)
    for (const double y : {x, -x}) {
      const double want = std::tanh(static_cast<double>(static_cast<float>(y))), got = one(static_cast<float>(y));
      worst = std::fmax(worst, std::fabs(got - want) / std::ldexp(1.0, std::ilogb(want) - 23));
    }
  CHECK(worst <= 3);  // ulp
  CHECK(one(0.0F) == 0.0F);
  CHECK(one(HUGE_VALF) == 1.0F);
  CHECK(one(-HUGE_VALF) == -1.0F);
  CHECK(std::isnan(one(std::nanf(""))));
}

TEST_CASE("score: definitions") {
  const float slopes[] = {0.5F, 0.25F}, table[] = {1, 2, 3, 4, 5, 6}, ends[] = {10, 20, 30, 40};
  const std::int32_t offsets[] = {7, 2};
  const mask_site at{1, 1, 2, 3, 2, 1, 2};
  CHECK(softcap{3}(at, 0, 0, 2.0) == Approx(3 * std::tanh(2.0 / 3)));
  CHECK(alibi{slopes}(at, 0, 2, 1.0) == 1 - 0.25 * (1 - 2));  // row 0 of 2 stands at position 1 of 3
  CHECK(alibi{slopes, 2, top_left}(at, 1, 0, 1.0) == 1 - 0.25 * (1 - 0));
  CHECK(alibi{slopes, 2, at_offset(5)}(at, 1, 0, 1.0) == 1 - 0.25 * 6);
  CHECK(alibi{slopes, 2, at_offsets(offsets)}(at, 1, 0, 1.0) == 1 - 0.25 * 3);
  CHECK(additive_bias{table, 0, 0, 3}(at, 1, 2, 1.0) == 7);
  CHECK(relative_bias{ends, 2, 1, 1}(at, 0, 0, 1.0) == 21);  // distance -1
  CHECK(relative_bias{ends, 2, 1, 1}(at, 0, 2, 1.0) == 41);
  CHECK(relative_bias{ends, 2, 1, 1, at_offset(50)}(at, 0, 2, 1.0) == 11);
  CHECK(relative_bias{table, 1, 1, 2}(at, 1, 2, 1.0) == 6);  // head 1, distance 0
  CHECK(chain{softcap{3}, alibi{slopes}}(at, 0, 2, 2.0) == Approx(3 * std::tanh(2.0 / 3) + 0.25));
}

TEST_CASE("score: every form of a policy is the same function") {
  std::vector<float> table, more;
  std::vector<std::int32_t> cu_q, cu_k;
  at_random_sites([](test::random& r, const mask_site&) { return softcap{r.uniform(0.5, 60)}; });
  at_random_sites(
      [&](test::random& r, const mask_site& at) {
        table = numbers(r, at.H);
        return alibi{table.data(), at.H, any_alignment(r)};
      },
      400);  // slope times distance is larger than the score
  const auto bias = [&](test::random& r, const mask_site& at) {
    table = numbers(r, at.B * at.H * at.n * at.m);
    if (r.coin(0.2)) table[0] = -HUGE_VALF;
    additive_bias p{table.data()};
    p.row_stride = r.coin(0.2) ? 0 : at.m, p.key_stride = r.coin(0.2) ? 0 : 1;
    if (r.coin()) p.head_stride = at.n * at.m, p.batch_stride = at.H * at.n * at.m;
    return p;
  };
  at_random_sites(bias);
  at_random_sites([&](test::random& r, const mask_site& at) {  // keys lie apart
    table = numbers(r, 3 * at.n * at.m);
    return additive_bias{table.data(), 0, 0, 1, 3 * at.n, {1, 1, at.n, at.m}};
  });
  const auto relative = [&](test::random& r, const mask_site& at) {
    const isize left = r.integer(0, 40), right = r.integer(0, 40), heads = r.coin() ? 1 : at.H;
    more = numbers(r, heads * (left + right + 1));
    return relative_bias{more.data(), left, right, heads, any_alignment(r)};
  };
  at_random_sites(relative);
  at_random_sites(
      [&](test::random& r, const mask_site& at) {
        return chain{chain{softcap{r.uniform(1, 60)}, bias(r, at)}, relative(r, at)};
      },
      48);
  at_random_sites(
      [](test::random&, const mask_site&) {
        return [](const mask_site& at, isize i, isize j, auto s) {
          return s * static_cast<decltype(s)>(i < 3 ? 2 : 1) - static_cast<decltype(s)>(j + at.h);
        };
      },
      100);
  at_random_sites([&](test::random& r, const mask_site& at) {
    cu_q = test::cuts(r, 3, at.n), cu_k = test::cuts(r, 3, at.m);
    const isize left = r.integer(0, 9);
    more = numbers(r, left + 6);
    return documents_score{packed{cu_q.data(), cu_k.data(), 3}, relative_bias{more.data(), left, 5, 1}};
  });
}

TEST_CASE("score: T5's buckets are those of the published code, and the table holds them") {
  struct runs {
    bool bidirectional;
    isize buckets, max_distance;
    std::vector<std::pair<isize, isize>> starts;  // from this distance on, this bucket
    isize last;
  };
  const runs cases[] = {
      {true,
       32,
       128,
       {{-140, 15}, {-90, 14}, {-63, 13}, {-45, 12}, {-31, 11}, {-22, 10}, {-15, 9}, {-11, 8},
        {-7, 7},    {-6, 6},   {-5, 5},   {-4, 4},   {-3, 3},   {-2, 2},   {-1, 1},  {0, 0},
        {1, 17},    {2, 18},   {3, 19},   {4, 20},   {5, 21},   {6, 22},   {7, 23},  {8, 24},
        {12, 25},   {16, 26},  {23, 27},  {32, 28},  {46, 29},  {64, 30},  {91, 31}},
       140},
      {false,
       32,
       128,
       {{-140, 31}, {-112, 30}, {-98, 29}, {-86, 28}, {-76, 27}, {-66, 26}, {-58, 25}, {-51, 24},
        {-45, 23},  {-39, 22},  {-34, 21}, {-30, 20}, {-26, 19}, {-23, 18}, {-20, 17}, {-18, 16},
        {-15, 15},  {-14, 14},  {-13, 13}, {-12, 12}, {-11, 11}, {-10, 10}, {-9, 9},   {-8, 8},
        {-7, 7},    {-6, 6},    {-5, 5},   {-4, 4},   {-3, 3},   {-2, 2},   {-1, 1},   {0, 0}},
       3},
      {true, 8, 20, {{-30, 3}, {-6, 2}, {-1, 1}, {0, 0}, {1, 5}, {2, 6}, {7, 7}}, 30},
      {false, 10, 50, {{-60, 9}, {-31, 8}, {-19, 7}, {-12, 6}, {-7, 5}, {-4, 4}, {-3, 3}, {-2, 2}, {-1, 1}, {0, 0}}, 5},
      {true,
       12,
       64,
       {{-70, 5}, {-23, 4}, {-8, 3}, {-2, 2}, {-1, 1}, {0, 0}, {1, 7}, {2, 8}, {3, 9}, {9, 10}, {24, 11}},
       70},
      {false, 7, 33, {{-40, 6}, {-18, 5}, {-9, 4}, {-5, 3}, {-2, 2}, {-1, 1}, {0, 0}}, 2},
  };
  test::random r(9);
  for (const runs& c : cases) {
    const isize heads = 3, right = c.bidirectional ? c.max_distance : 0;
    const std::vector<float> weights = numbers(r, c.buckets * heads);
    const std::vector<float> table = t5_distances(weights.data(), heads, c.buckets, c.max_distance, c.bidirectional);
    const relative_bias bias{table.data(), c.max_distance, right, heads};
    REQUIRE(static_cast<isize>(table.size()) == heads * (c.max_distance + right + 1));
    std::size_t run = 0;
    for (isize distance = c.starts[0].first; distance <= c.last; ++distance) {
      if (run + 1 < c.starts.size() && distance == c.starts[run + 1].first) ++run;
      CAPTURE(c.buckets, c.max_distance, distance);
      CHECK(t5_bucket(distance, c.buckets, c.max_distance, c.bidirectional) == c.starts[run].second);
      for (isize h = 0; h < heads; ++h) {
        const mask_site at{0, h, 200, 400, heads, 1};
        const float want = weights[static_cast<std::size_t>(c.starts[run].second * heads + h)];
        CHECK(bias(at, 0, 200 + distance, 0.0F) == want);  // row 0 of 200 stands at position 200 of 400
      }
    }
  }
  const std::vector<float> turned{1, 2, 3, 4, 5, 6, 7, 8};  // [2 heads][4 buckets]
  CHECK(t5_distances(turned.data(), 2, 4, 8, false, true).front() == 4.0F);
}

TEST_CASE("score: what does not fit is refused with a sentence") {
  const mask_site at{0, 0, 4, 5, 2, 1};
  const auto refused = [&](const score& x) { return test::refusal([&] { x.check(at); }); };
  const float table[64] = {};
  CHECK_SAYS(refused(softcap{0}), "softcap is 0");
  CHECK_SAYS(refused(alibi{table, 3}), "alibi has 3 slopes");
  CHECK_SAYS(refused(additive_bias{}), "null table");
  CHECK_SAYS(refused(relative_bias{}), "null table");
  CHECK_SAYS(refused(relative_bias{table, -1, 2}), "left, right are -1, 2");
  CHECK_SAYS(refused(relative_bias{table, 1, 2, 3}), "relative_bias has 3 heads");
  CHECK_SAYS(refused(chain{softcap{1}, relative_bias{table, 1, 2, 3}}), "relative_bias has 3 heads");
  CHECK_SAYS(test::refusal([&] { t5_distances(table, 2, 2, 128, true); }), "at least 4");
  CHECK_SAYS(test::refusal([&] { t5_distances(table, 2, 32, 8, true); }), "max_distance above 8");
  CHECK_SAYS(test::refusal([&] { t5_distances(nullptr, 2, 32, 128, true); }), "null");
}
