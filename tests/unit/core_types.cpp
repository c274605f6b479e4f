// SPDX-License-Identifier: MIT
/// @file  bf16 and f16: every 16-bit pattern, every rounding boundary, and the rule "nearest, ties to even" stated in double.

#include <cmath>

#include "support/catch.hpp"
#include "support/tensors.hpp"

#include <fovea/simd/convert.hpp>

namespace {

using fovea::bf16;
using fovea::f16;
using fovea::isize;

struct format {
  int precision, least, greatest;  // bits of the significand; exponents of the smallest and the largest normal number
};
constexpr format half{11, -14, 15}, brain{8, -126, 127};

/// The definition: x rounded to the nearest number of the format, ties to the even one; beyond the largest, infinity.
double nearest(double x, format f) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent = 0;
  std::frexp(x, &exponent);  // x = [0.5, 1) * 2^exponent
  const int e = std::max(exponent - 1, f.least);
  const double unit = std::ldexp(1.0, e - f.precision + 1);
  const double y = std::nearbyint(x / unit) * unit;
  return std::fabs(y) >= std::ldexp(1.0, f.greatest + 1) ? std::copysign(HUGE_VAL, x) : y;
}

/// What the bits mean, from the standard's formula.
double meaning(std::uint16_t bits, format f) {
  const int mantissa_bits = f.precision - 1, exponent_bits = 15 - mantissa_bits;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1),
            mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(mantissa, f.least - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - 1 + f.least - mantissa_bits);
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class T>
int wrong_meanings(format f) {
  int wrong = 0;
  for (int u = 0; u < 65536; ++u) {
    T x;
    x.bits = static_cast<std::uint16_t>(u);
    const auto y = static_cast<float>(x);
    wrong += !same(static_cast<double>(y), meaning(x.bits, f));
    if (!std::isnan(y)) wrong += T(y).bits != x.bits;  // and back
  }
  return wrong;
}

/// Around every boundary between two neighbours: the boundary itself and the floats beside it.
template <class T>
int wrong_roundings(format f) {
  int wrong = 0;
  for (int u = 0; u < 65536; ++u) {
    T x;
    x.bits = static_cast<std::uint16_t>(u);
    const double here = meaning(x.bits, f);
    if (!std::isfinite(here)) continue;
    T up;
    up.bits = static_cast<std::uint16_t>(u + 1);
    double next = meaning(up.bits, f);
    if (std::isinf(next)) next = std::copysign(std::ldexp(1.0, f.greatest + 1), here);
    const auto middle = static_cast<float>((here + next) / 2);
    for (float y : {middle, std::nextafterf(middle, -HUGE_VALF), std::nextafterf(middle, HUGE_VALF)})
      wrong += !same(static_cast<double>(static_cast<float>(T(y))), nearest(static_cast<double>(y), f));
  }
  return wrong;
}

template <class T>
int wrong_at_random(format f) {
  test::random r(11);
  int wrong = 0;
  for (int i = 0; i < 500000; ++i) {
    const float y = std::bit_cast<float>(static_cast<std::uint32_t>(r.bits()));
    const double z = static_cast<double>(static_cast<float>(T(y)));
    wrong += std::isnan(y) ? !std::isnan(z) : !same(z, nearest(static_cast<double>(y), f));
  }
  return wrong;
}

}  // namespace

TEST_CASE("f16: all 65536 patterns mean what binary16 says and survive a round trip") {
  CHECK(wrong_meanings<f16>(half) == 0);
}
TEST_CASE("bf16: all 65536 patterns mean what they should and survive a round trip") {
  CHECK(wrong_meanings<bf16>(brain) == 0);
}
TEST_CASE("f16: every rounding boundary goes to nearest even") { CHECK(wrong_roundings<f16>(half) == 0); }
TEST_CASE("bf16: every rounding boundary goes to nearest even") { CHECK(wrong_roundings<bf16>(brain) == 0); }
TEST_CASE("f16, bf16: random float patterns") {
  CHECK(wrong_at_random<f16>(half) == 0);
  CHECK(wrong_at_random<bf16>(brain) == 0);
}

TEST_CASE("f16, bf16: NaN stays NaN and becomes quiet, whatever its payload") {
  for (std::uint32_t payload : {1U, 0x1000U, 0x3fffffU, 0x400000U, 0x7fffffU})
    for (std::uint32_t sign : {0U, 0x80000000U}) {
      const float y = std::bit_cast<float>(sign | 0x7f800000U | payload);
      CAPTURE(payload, sign);
      CHECK((f16(y).bits & 0x7fff) > 0x7c00);
      CHECK((f16(y).bits & 0x0200) != 0);
      CHECK((bf16(y).bits & 0x7fff) > 0x7f80);
      CHECK((bf16(y).bits & 0x0040) != 0);
      CHECK((f16(y).bits >> 15) == (sign >> 31));
      CHECK((bf16(y).bits >> 15) == (sign >> 31));
    }
}

TEST_CASE("dtype: sizes, names, element access") {
  using fovea::dtype;
  CHECK(fovea::size_of(dtype::f64) == 8);
  CHECK(fovea::size_of(dtype::f32) == 4);
  CHECK(fovea::size_of(dtype::bf16) == 2);
  CHECK(fovea::size_of(dtype::f16) == 2);
  CHECK(fovea::dtype_of<const bf16> == dtype::bf16);
  for (dtype t : {dtype::f64, dtype::f32, dtype::bf16, dtype::f16}) {
    double memory[4] = {};
    fovea::store_from_double(t, memory, 2, -1.5);
    CHECK(fovea::load_as_double(t, memory, 2) == -1.5);
    CHECK(fovea::load_as_double(t, memory, 1) == 0.0);
  }
}

// --------------------------------------------------------------------------------------------- rows, with the hardware's conversions
namespace {

template <class Arch>
void rows_equal_elements() {
  using namespace fovea;
  constexpr isize n = 65536;
  std::vector<f16> halves(n);
  std::vector<bf16> brains(n);
  for (isize i = 0; i < n; ++i)
    halves[static_cast<std::size_t>(i)].bits = brains[static_cast<std::size_t>(i)].bits = static_cast<std::uint16_t>(i);
  std::vector<float> wide(n), narrow_from(n);
  int wrong = 0;
  simd::load_row<Arch, float>(dtype::f16, halves.data(), n, wide.data());
  for (std::size_t i = 0; i < n; ++i)
    wrong += !same(static_cast<double>(wide[i]), static_cast<double>(static_cast<float>(halves[i])));
  CHECK(wrong == 0);
  simd::load_row<Arch, float>(dtype::bf16, brains.data(), n, wide.data());
  for (std::size_t i = 0; i < n; ++i)
    wrong += !same(static_cast<double>(wide[i]), static_cast<double>(static_cast<float>(brains[i])));
  CHECK(wrong == 0);

  test::random r(5);
  for (float& y : narrow_from) y = std::bit_cast<float>(static_cast<std::uint32_t>(r.bits()));
  for (std::size_t i = 0; i < 4096; ++i)
    narrow_from[i] = static_cast<float>(r.normal()) * std::ldexp(1.0F, static_cast<int>(r.integer(-26, 17)));
  std::vector<f16> h(n);
  std::vector<bf16> b(n);
  simd::store_row<Arch, float>(dtype::f16, narrow_from.data(), n, h.data());
  simd::store_row<Arch, float>(dtype::bf16, narrow_from.data(), n, b.data());
  for (std::size_t i = 0; i < n; ++i) {
    wrong += !same(static_cast<double>(static_cast<float>(h[i])),
                   static_cast<double>(static_cast<float>(f16(narrow_from[i]))));
    wrong += !same(static_cast<double>(static_cast<float>(b[i])),
                   static_cast<double>(static_cast<float>(bf16(narrow_from[i]))));
  }
  CHECK(wrong == 0);
}

template <class Arch, class Acc>
void short_rows_stay_inside() {
  using namespace fovea;
  for (dtype t : {dtype::f32, dtype::f64, dtype::bf16, dtype::f16})
    for (isize n = 0; n <= 67; ++n)
      for (isize shift = 0; shift < 3; ++shift) {
        CAPTURE(name_of(t), n, shift);
        test::random r(static_cast<std::uint64_t>(n));
        test::tensor x(t, 1, 1, 1, n + shift), y(t, 1, 1, 1, n + shift);
        x.fill_normal(r), y.fill([] { return 7.0; });
        std::vector<Acc> wide(static_cast<std::size_t>(n) + 2, Acc(-3));
        const std::size_t bytes = static_cast<std::size_t>(shift) * size_of(t);
        simd::load_row<Arch, Acc>(t, static_cast<const std::byte*>(static_cast<const void*>(x.ref().data)) + bytes, n,
                                  wide.data() + 1);
        bool right = wide.front() == Acc(-3) && wide.back() == Acc(-3);
        for (isize i = 0; i < n; ++i)
          right = right && wide[static_cast<std::size_t>(i) + 1] == static_cast<Acc>(x.get(0, 0, 0, i + shift));
        REQUIRE(right);
        simd::store_row<Arch, Acc>(t, wide.data() + 1, n, static_cast<std::byte*>(y.ref().data) + bytes);
        for (isize i = 0; i < shift; ++i) right = right && y.get(0, 0, 0, i) == 7.0;
        test::tensor expected(t, 1, 1, 1, n + shift);
        isize at = 0;
        expected.fill(
            [&] { return at++ < shift ? 7.0 : static_cast<double>(wide[static_cast<std::size_t>(at - shift)]); });
        REQUIRE(right);
        REQUIRE(test::bits_differ(y, expected) == std::string());
        REQUIRE(y.guards_intact());
        REQUIRE(x.guards_intact());
      }
}

}  // namespace

TEST_CASE("rows: every 16-bit pattern, and random floats, convert as the element types do") {
  rows_equal_elements<fovea::simd::native>();
  rows_equal_elements<fovea::simd::scalar>();
#if defined(FOVEA_HAS_AVX512)
  rows_equal_elements<fovea::simd::avx2>();
#endif
}

TEST_CASE("rows: any length and offset, nothing behind the row is read or written") {
  short_rows_stay_inside<fovea::simd::native, float>();
  short_rows_stay_inside<fovea::simd::native, double>();
  short_rows_stay_inside<fovea::simd::scalar, float>();
#if defined(FOVEA_HAS_AVX512)
  short_rows_stay_inside<fovea::simd::avx2, float>();
#endif
}
