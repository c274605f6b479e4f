// SPDX-License-Identifier: MIT
/// @file  The comparator rejects what it must reject: a comparator that accepts a NaN makes every other test worthless.

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/tensors.hpp"

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

test::array numbers(test::isize count) {
  test::random r(7);
  test::array a{{count / 10, 10}, {}};
  for (test::isize i = 0; i < count; ++i) a.data.push_back(0.2 + r.uniform());
  return a;
}

}  // namespace

TEST_CASE("comparator: accepts equal numbers and errors within the bound") {
  const test::array want = numbers(1000);
  CHECK(test::compare(want, want));
  test::array got = want;
  for (double& x : got.data) x = static_cast<float>(x);
  CHECK(test::compare(got, want, {.c = 1}));
  CHECK(test::compare(test::array{{0, 4}, {}}, test::array{{0, 4}, {}}));
}

TEST_CASE("comparator: rejects one bad element in 1000") {
  const test::array want = numbers(1000);
  const auto with = [&](double x) {
    test::array got = want;
    got.data[617] = x;
    return test::compare(got, want);
  };
  for (double bad : {not_a_number, -not_a_number, inf, -inf, -want.data[617], 0.0, want.data[617] * 1.00001,
                     want.data[617] + 1e-5}) {
    CAPTURE(bad);
    const test::verdict v = with(bad);
    CHECK_FALSE(v.ok);
    CHECK(v.at == 617);
    CHECK(v.text.find("[61, 7]") != std::string::npos);
  }
}

TEST_CASE("comparator: rejects all zeros, a wrong shape, swapped rows, missing data") {
  const test::array want = numbers(1000);
  test::array zeros = want;
  for (double& x : zeros.data) x = 0;
  CHECK_FALSE(test::compare(zeros, want).ok);
  CHECK_FALSE(test::compare(want, zeros).ok);
  test::array reshaped = want;
  reshaped.dims = {10, 100};
  CHECK_FALSE(test::compare(reshaped, want).ok);
  test::array swapped = want;
  for (std::size_t c = 0; c < 10; ++c) std::swap(swapped.data[c], swapped.data[10 + c]);
  CHECK_FALSE(test::compare(swapped, want).ok);
  test::array fewer = want;
  fewer.data.pop_back();
  CHECK_FALSE(test::compare(fewer, want).ok);
}

TEST_CASE("comparator: minus infinity stands exactly where it is wanted") {
  test::array want = numbers(100);
  want.data[3] = -inf;
  CHECK(test::compare(want, want));
  test::array got = want;
  got.data[3] = -1e30;
  CHECK_FALSE(test::compare(got, want).ok);
  got = want;
  got.data[3] = inf;
  CHECK_FALSE(test::compare(got, want).ok);
  got.data[3] = not_a_number;
  CHECK_FALSE(test::compare(got, want).ok);
  got = want;
  got.data[4] = -inf;
  CHECK_FALSE(test::compare(got, want).ok);
}

TEST_CASE("comparator: a wanted NaN or +inf is a fault of the test, never a pass") {
  test::array want = numbers(100);
  want.data[0] = not_a_number;
  CHECK_FALSE(test::compare(want, want).ok);
  want.data[0] = inf;
  CHECK_FALSE(test::compare(want, want).ok);
}

TEST_CASE("comparator: many small errors fail by their rms where each alone passes") {
  test::array want = numbers(1000);
  want.data[0] = 100.0;  // one large element makes the elementwise bound wide
  test::array got = want;
  for (double& x : got.data) x += 0.5 * 16 * 0x1p-24 * 100.0;
  const test::verdict v = test::compare(got, want);
  CHECK(v.worst <= 1);
  CHECK_FALSE(v.ok);
}

TEST_CASE("comparator: zeros must be zeros unless a scale is given, 16-bit results may be half a unit off") {
  const test::array zeros{{4}, {0, 0, 0, 0}}, tiny{{4}, {0, 1e-30, 0, 0}};
  CHECK_FALSE(test::compare(tiny, zeros).ok);
  CHECK(test::compare(tiny, zeros, {.scale = 1.0}).ok);
  const test::array want{{2}, {1.0 + 0x1p-9, -3.0}}, got{{2}, {1.0, -3.0}};
  CHECK(test::compare(got, want, {.stored = test::dtype::bf16}).ok);
  CHECK_FALSE(test::compare(got, want, {.stored = test::dtype::f16}).ok);
}

TEST_CASE("tensors: layouts hold the same numbers, and guards see any stray write") {
  for (test::layout l : test::layouts)
    for (test::dtype t : {test::dtype::f32, test::dtype::f64, test::dtype::bf16, test::dtype::f16}) {
      CAPTURE(test::name_of(l), fovea::name_of(t));
      test::random r(3), again(3);
      test::tensor x = test::normal(r, t, 2, 3, 4, 5, l), y = test::normal(again, t, 2, 3, 4, 5);
      CHECK_SAME_BITS(x, y);
      CHECK(x.guards_intact());
      CHECK(reinterpret_cast<std::uintptr_t>(x.ref().data) % 64 ==
            (l == test::layout::unaligned ? fovea::size_of(t) : 0));
      auto* base = static_cast<std::byte*>(x.ref().data);
      base[-1] = std::byte{0};
      CHECK_FALSE(x.guards_intact());
      base[-1] = std::byte{0xff};
      if (l == test::layout::strided) {
        base[static_cast<std::size_t>(x.width()) * fovea::size_of(t)] = std::byte{0};  // the gap behind row 0
        CHECK_FALSE(x.guards_intact());
      }
      y.set(1, 2, 3, 4, 17.0);
      CHECK_FALSE(test::same_bits(x, y));
    }
}
