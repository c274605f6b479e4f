// SPDX-License-Identifier: MIT
/// @file  RoPE: both pairings, partial rotary, every scaling against published code, whole tensors.
///
/// The golden numbers come from the functions of Hugging Face transformers 5.23 in float: _compute_*_parameters of
/// modeling_rope_utils.py (inverse frequencies, attention factor), apply_rotary_pos_emb of modeling_llama.py and modeling_gptj.py.

#include <fovea/position/rope_table.hpp>
#include <fovea/position/rotate.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::tensor;

rope_table table_of(isize width, rope_scaling scaling, double base = 10000) {
  return rope_table({.base = base, .width = width, .positions = 1, .scaling = std::move(scaling)});
}

/// Frequencies and magnitude agree with numbers that were computed in float.
void agrees(const rope_table& t, const std::vector<double>& want, double magnitude = 1) {
  REQUIRE(t.frequencies().size() >= want.size());
  for (std::size_t i = 0; i < want.size(); ++i) {
    CAPTURE(i);
    CHECK(t.frequencies()[i] == Approx(want[i]).epsilon(2e-6));
  }
  CHECK(t.magnitude() == Approx(magnitude).epsilon(1e-8));
}

/// The definition, in long double.
std::vector<double> turned(std::vector<double> x, isize position, isize width, rope::pairing pair, double base) {
  for (isize i = 0; i < width / 2; ++i) {
    const long double angle =
        static_cast<long double>(position) *
        std::pow(static_cast<long double>(base), -2.0L * static_cast<long double>(i) / static_cast<long double>(width));
    const auto a = static_cast<std::size_t>(pair == rope::pairing::neox ? i : 2 * i),
               b = static_cast<std::size_t>(pair == rope::pairing::neox ? i + width / 2 : 2 * i + 1);
    const long double p = x[a], q = x[b];
    x[a] = static_cast<double>(p * std::cos(angle) - q * std::sin(angle));
    x[b] = static_cast<double>(q * std::cos(angle) + p * std::sin(angle));
  }
  return x;
}

}  // namespace

TEST_CASE("rope: the pairings of LLaMA (halves) and GPT-J (neighbours) turn as the published code does") {
  const double neox[3][8] = {
      {0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0},
      {-0.4583815336, 0.1738759875, 0.3662314117, 0.4989997745, 0.4428728223, 0.7712115049, 0.8787062168, 1.0004994869},
      {-0.3163788617, -0.2919526696, 0.3128816485, 0.4929878116, 0.5533122420, 0.7346860766, 0.8990857005,
       1.0034754276}};
  const double gptj[3][8] = {
      {0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0},
      {-0.1428299546, 0.2402594537, 0.3232098520, 0.5349396467, 0.6174688935, 0.7562124133, 0.8739995956, 1.0008745193},
      {-0.0700088665, 0.2705988884, -0.0352930129, 0.6240026951, 0.5710122585, 0.7918775678, 0.8679785728,
       1.0061004162}};
  for (const rope::pairing pair : {rope::pairing::neox, rope::pairing::gptj}) {
    const rope_table t({.base = 10000, .width = 8, .positions = 8, .pair = pair});
    for (int row = 0; row < 3; ++row) {
      float x[8];
      for (int c = 0; c < 8; ++c) x[c] = static_cast<float>(c + 1) / 8;
      rotate(t, row == 0 ? 0 : row == 1 ? 1 : 7, x);
      for (int c = 0; c < 8; ++c)
        CHECK(x[c] == Approx((pair == rope::pairing::neox ? neox : gptj)[row][c]).margin(2e-7));
    }
  }
}

TEST_CASE("rope: rows of any width at any position agree with the definition, elements behind the width stay") {
  test::random r(1);
  for (int trial = 0; trial < 200; ++trial) {
    const isize width = 2 * r.integer(1, 80), d = width + r.integer(0, 30), position = r.integer(0, 5000);
    const auto pair = r.coin() ? rope::pairing::neox : rope::pairing::gptj;
    const double base = r.coin() ? 10000 : 500000;
    const rope_table t({.base = base, .width = width, .positions = position + 1, .pair = pair, .f64 = r.coin()});
    const bool exact = static_cast<rope>(t).cos_f64 != nullptr;
    std::vector<double> x(static_cast<std::size_t>(d)), back;
    std::vector<float> y(static_cast<std::size_t>(d));
    for (std::size_t c = 0; c < x.size(); ++c) x[c] = y[c] = static_cast<float>(r.normal());
    const std::vector<double> want = turned(x, position, width, pair, base);
    rotate(t, position, y.data());
    rotate(t, position, x.data());
    CAPTURE(trial, width, d, position, exact);
    for (std::size_t c = 0; c < x.size(); ++c) {
      CHECK(y[c] == Approx(want[c]).margin(1e-6));
      CHECK(x[c] == Approx(want[c]).margin(exact ? 1e-11 : 4e-7));
      if (static_cast<isize>(c) >= width) CHECK(x[c] == want[c]);
    }
  }
}

TEST_CASE("rope: scores depend on the distance alone, and rotate_back is the transpose") {
  test::random r(2);
  for (const auto pair : {rope::pairing::neox, rope::pairing::gptj}) {
    const rope_table t({.base = 10000, .width = 32, .positions = 4096, .pair = pair, .f64 = true});
    double q[32], k[32];
    for (int c = 0; c < 32; ++c) q[c] = r.normal(), k[c] = r.normal();
    const auto score = [&](isize i, isize j) {
      double a[32], b[32], sum = 0;
      std::copy(q, q + 32, a), std::copy(k, k + 32, b);
      rotate(t, i, a), rotate(t, j, b);
      for (int c = 0; c < 32; ++c) sum += a[c] * b[c];
      rotate_back(t, i, a);
      for (int c = 0; c < 32; ++c) CHECK(a[c] == Approx(q[c]).margin(1e-12));
      return sum;
    };
    CHECK(score(7, 3) == Approx(score(4007, 4003)).margin(1e-9));
    CHECK(score(100, 0) == Approx(score(1100, 1000)).margin(1e-9));
  }
}

TEST_CASE("rope: frequencies without scaling, linear, NTK, LongRoPE, partial: those of the published code") {
  const std::vector<double> plain{1.0,           0.316227764,   0.100000001,   0.0316227786,
                                  0.00999999978, 0.00316227786, 0.00100000005, 0.000316227786};
  agrees(table_of(16, {}), plain);
  agrees(table_of(8, {}), {1.0, 0.100000001, 0.00999999978, 0.00100000005});  // a quarter of 32
  agrees(table_of(16, rope_linear{4}), {0.25, 0.079056941, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466,
                                        0.000250000012, 7.90569466e-05});
  agrees(table_of(16, rope_ntk{2, 2048, 8192}),
         {1.0, 0.239481375, 0.057351321, 0.0137345716, 0.00328917382, 0.00078769587, 0.000188638471, 4.51753949e-05});
  agrees(table_of(16, rope_ntk{2, 2048, 100}), plain);
  agrees(table_of(16, rope_ntk{7}), table_of(16, rope_ntk{2, 2048, 8192}).frequencies());  // 2 * 4 - 1 = 7
  agrees(table_of(16, rope_factors{{1, 1.5, 2, 3, 5, 9, 17, 33}, 1.19023807}),
         {1.0, 0.210818499, 0.0500000007, 0.010540925, 0.00200000009, 0.0003513642, 5.88235307e-05, 9.58265991e-06},
         1.19023807);
}

TEST_CASE("rope: YaRN as in Qwen, gpt-oss and DeepSeek") {
  agrees(table_of(32, rope_yarn{.factor = 4, .original = 32768}, 1e6),
         {1.0, 0.421696514, 0.177827939, 0.0749894157, 0.0316227786, 0.0133352149, 0.00477990136, 0.00165996165,
          0.000549999997, 0.000168678584, 4.44569851e-05, 1.87473561e-05, 7.90569356e-06, 3.33380353e-06,
          1.40585337e-06, 5.92843435e-07},
         1.13862944);
  agrees(table_of(64, rope_yarn{.factor = 32, .original = 4096, .truncate = false}, 150000),
         {1.0,           0.689044297,   0.47478205,     0.327145875,    0.225418001,    0.155322984,   0.107024424,
          0.0737445652,  0.0508132726,  0.0317056961,   0.0193349998,   0.0115920492,   0.00679495931, 0.00386035908,
          0.00209379266, 0.00105260219, 0.000456483918, 0.000129318694, 3.83088118e-05, 2.63964685e-05},
         1.34657359);
  agrees(table_of(64, rope_yarn{.factor = 40, .original = 4096, .mscale = 1, .mscale_all_dim = 0.707}),
         {1.0,           0.749894202,   0.562341332,    0.421696514,    0.316227764,   0.237137362,
          0.177827939,   0.133352146,   0.100000001,    0.0749894157,   0.0562341288,  0.0390069261,
          0.0268793609,  0.0183781441,  0.012447956,    0.0083345091,   0.00550000044, 0.00356199732,
          0.00224936521, 0.00137051346, 0.000790569407, 0.000414990413, 0.00017782794, 3.3338034e-05,
          2.49999994e-05},
         1.0857264);
  agrees(table_of(32, rope_yarn{.factor = 4, .original = 32768, .attention_factor = 0.5}, 1e6), {1.0}, 0.5);
  const rope_table t({.base = 10000, .width = 8, .positions = 3, .scaling = rope_yarn{.factor = 4, .original = 512}});
  CHECK(static_cast<rope>(t).cos[0] == static_cast<float>(t.magnitude()));  // the magnitude is in the table
}

TEST_CASE("rope: the scaling of Llama 3.1") {
  agrees(table_of(32, rope_llama3{}, 500000),
         {1.0, 0.440366626, 0.193922758, 0.0853971019, 0.0376060307, 0.0165604409, 0.00729266508, 0.00321144611,
          0.000524846022, 7.78465546e-05, 3.42810235e-05, 1.50962178e-05, 6.64786967e-06, 2.92749974e-06,
          1.28917316e-06, 5.6770881e-07});
}

TEST_CASE("rope: tables are right at far positions") {
  const rope_table t({.base = 10000, .width = 4, .positions = 1000001});
  const rope r = t;
  for (const isize p : {1, 999, 65537, 1000000})
    for (isize i = 0; i < 2; ++i) {
      const long double angle = static_cast<long double>(p) * (i == 0 ? 1.0L : 0.01L);
      CHECK(r.cos[p * 2 + i] == Approx(static_cast<double>(std::cos(angle))).margin(6e-8));
      CHECK(r.sin[p * 2 + i] == Approx(static_cast<double>(std::sin(angle))).margin(6e-8));
    }
}

TEST_CASE("rope: whole tensors, every type and layout, positions given or counted, in place, on two threads") {
  const threads two(2);
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    test::random r(seed);
    const isize B = r.integer(1, 3), H = r.integer(1, 3), n = r.integer(1, 150), width = 2 * r.integer(1, 150),
                d = width + (r.coin() ? r.integer(0, 300) : 0);
    const auto type = static_cast<dtype>(r.integer(0, 3));
    const rope_table t({.width = width,
                        .positions = 400,
                        .pair = r.coin() ? rope::pairing::neox : rope::pairing::gptj,
                        .f64 = r.coin()});
    std::vector<std::int32_t> given(static_cast<std::size_t>(B * n));
    for (auto& p : given) p = static_cast<std::int32_t>(r.integer(0, 399));
    row_positions where;
    where.first = r.integer(0, 200);
    if (r.coin()) where.data = given.data(), where.batch_stride = r.coin() ? n : 0;
    const test::layout l = test::layouts[r.integer(0, 3)];
    tensor x = test::normal(r, type, B, H, n, d, l), out = test::unwritten(type, B, H, n, d, test::layouts[seed % 4]);
    tensor want(type == dtype::f64 ? dtype::f64 : dtype::f32, B, H, n, d);
    for (isize b = 0; b < B; ++b)
      for (isize h = 0; h < H; ++h)
        for (isize i = 0; i < n; ++i) {
          for (isize c = 0; c < d; ++c) want.set(b, h, i, c, x.get(b, h, i, c));
          if (type == dtype::f64)
            rotate(t, where.at(b, i), static_cast<double*>(want.ref().row(b, h, i)));
          else
            rotate(t, where.at(b, i), static_cast<float*>(want.ref().row(b, h, i)));
        }
    rotate(serial, t, x, where, out);
    CAPTURE(seed, B, H, n, width, d, fovea::name_of(type));
    CHECK_CLOSE(out.values(), want.values(), {.c = 2, .acc = want.type(), .stored = type});
    CHECK(out.guards_intact());
    rotate(two, t, x, where, x);
    CHECK_SAME_BITS(x, out);
    CHECK(x.guards_intact());
  }
}

TEST_CASE("rope: what does not fit is refused with a sentence") {
  const auto made = [](const rope_options& o) { return test::refusal([&] { rope_table{o}; }); };
  CHECK_SAYS(made({.width = 7, .positions = 4}), "rope width is 7");
  CHECK_SAYS(made({.width = 8, .positions = 0}), "rope positions is 0");
  CHECK_SAYS(made({.base = -1, .width = 8, .positions = 4}), "rope base is -1");
  CHECK_SAYS(made({.width = 8, .positions = 4, .scaling = rope_linear{0}}), "rope factor is 0");
  CHECK_SAYS(made({.width = 2, .positions = 4, .scaling = rope_ntk{2}}), "NTK");
  CHECK_SAYS(made({.width = 8, .positions = 4, .scaling = rope_ntk{2, 0, 10}}), "rope original is 0");
  CHECK_SAYS(made({.width = 8, .positions = 4, .scaling = rope_yarn{.factor = 0.5, .original = 8}}), "factor is 0.5");
  CHECK_SAYS(made({.width = 8, .positions = 4, .scaling = rope_yarn{.factor = 2}}), "rope original is 0");
  CHECK_SAYS(made({.width = 8, .positions = 4, .scaling = rope_llama3{.low = 4, .high = 4}}), "high above low");
  CHECK_SAYS(made({.width = 8, .positions = 4, .scaling = rope_factors{{1, 2}}}), "2 factors; wanted width / 2 = 4");
  const rope_table t({.width = 8, .positions = 4});
  const rope r = t;
  const auto checked = [&](const rope& x, isize d, isize last) { return test::refusal([&] { x.check(d, last); }); };
  CHECK(checked(r, 8, 3) == "accepted");
  CHECK_SAYS(checked(r, 6, 3), "rope width is 8");
  CHECK_SAYS(checked(r, 8, 4), "needs position 4");
  CHECK_SAYS(checked({}, 8, 3), "null table");
  test::tensor x(dtype::f32, 1, 1, 3, 8), y(dtype::f32, 1, 1, 2, 8);
  x.fill([] { return 1.0; });
  CHECK_SAYS(test::refusal([&] { rotate(serial, r, x, {}, y); }), "wanted the shape of x");
  CHECK_SAYS(test::refusal([&] { rotate(serial, r, x, {.first = 2}, x); }), "position of row 2 is 4");
  CHECK_SAYS(test::refusal([&] { rotate(serial, r, x, {.first = -1}, x); }), "position of row 0 is -1");
}
