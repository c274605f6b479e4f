// SPDX-License-Identifier: MIT
/// @file  Integer registers: every form that this build has (VNNI of both widths, plain AVX-512 and AVX2, portable) gives the same integers.

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"

#include <fovea/kernel/int8_turn.hpp>

namespace {

using namespace fovea;
constexpr std::size_t bytes = 64;  // of the longest register
using block = std::array<std::uint8_t, bytes>;

/// f(register ...) over blocks of 64 bytes, register by register.
template <class A, class F, class... Blocks>
block over(F f, const Blocks&... in) {
  block out;
  for (std::size_t x = 0; x < bytes; x += sizeof(simd::words<A>))
    f(simd::words<A>::load(in.data() + x)...).store(out.data() + x);
  return out;
}

/// Random bytes, some of them the extremes.
block draw(test::random& r, int most = 255) {
  block b;
  const int kind = static_cast<int>(r.integer(0, 3));
  for (auto& x : b) {
    const int extremes[] = {0, most, 127, most > 127 ? 128 : 1};
    x = static_cast<std::uint8_t>(kind == 0 ? extremes[r.integer(0, 3)] : r.integer(0, most));
  }
  return b;
}

/// What the sum is, from 64-bit integers.
block sums(const block& acc, const block& u, const block& s) {
  block out;
  for (std::size_t l = 0; l < bytes; l += 4) {
    std::int32_t first;
    std::memcpy(&first, acc.data() + l, 4);
    std::int64_t sum = first;
    for (std::size_t i = l; i < l + 4; ++i) sum += int{u[i]} * int{static_cast<std::int8_t>(s[i])};
    const auto low = static_cast<std::int32_t>(sum);
    std::memcpy(out.data() + l, &low, 4);
  }
  return out;
}

template <class A>
void check_dot(const block& acc, const block& u, const block& small, const block& s) {
  using W = simd::words<A>;
  const block want = sums(acc, u, s), want_small = sums(acc, small, s);
  CHECK(over<A>([](W a, W x, W y) { return simd::dot4(a, x, y); }, acc, u, s) == want);
  CHECK(over<A>([](W a, W x, W y) { return simd::dot4_small(a, x, y); }, acc, small, s) == want_small);
  CHECK(over<A>([](W a, W x, W y) { return simd::detail::dot4_portable(a, x, y); }, acc, u, s) == want);
  CHECK(over<A>([](W a, W x, W y) { return simd::detail::dot4_plain(a, x, y); }, acc, u, s) == want);
  CHECK(over<A>([](W a, W x, W y) { return simd::detail::dot4_small_plain(a, x, y); }, acc, small, s) == want_small);
}

/// Nothing here depends on the width of a register.
template <class A>
std::vector<block> all_operations(const block& a, const block& b, const block& c, const block& d, const block& down) {
  using W = simd::words<A>;
  std::vector<block> out;
  out.push_back(over<A>([](W x, W y) { return simd::add_i32(x, y); }, a, b));
  out.push_back(over<A>([](W x, W y) { return simd::sub_i32(x, y); }, a, b));
  out.push_back(over<A>([](W x, W y) { return simd::xor_bits(x, y); }, a, b));
  out.push_back(over<A>([](W x, W y) { return simd::add_i16(x, y); }, a, b));
  out.push_back(over<A>([](W x, W y) { return simd::sub_i16(x, y); }, a, b));
  out.push_back(over<A>([](W x, W y) { return simd::max_i16(x, y); }, a, b));
  out.push_back(over<A>([](W x, W y) { return simd::min_i16(x, y); }, a, b));
  out.push_back(over<A>([](W x, W y) { return simd::mulhrs_i16(x, y); }, a, b));
  out.push_back(over<A>([](W x, W y) { return simd::narrow_i16(x, y); }, a, b));
  out.push_back(over<A>([](W x, W y) { return simd::group4(x, y); }, a, b));
  out.push_back(over<A>([](W x) { return simd::exp2_i16(x); }, down));
  for (int i = 0; i < 4; ++i)
    out.push_back(over<A>(
        [i](W x, W y, W z, W w) {
          W rows[4] = {x, y, z, w};
          simd::zip4(rows);
          return rows[i];
        },
        a, b, c, d));
  return out;
}

template <class A>
void check_floats(test::random& r) {
  using W = simd::words<A>;
  using P = simd::pack<float, A>;
  float in[W::size], back[W::size];
  std::int32_t want[W::size], got[W::size];
  for (isize l = 0; l < W::size; ++l) {
    in[l] = r.coin() ? static_cast<float>(r.integer(-2000, 2000)) / 2.0F : static_cast<float>(r.normal() * 1e6);
    want[l] = static_cast<std::int32_t>(std::nearbyint(in[l]));
  }
  P x[simd::float_packs<A>];
  for (int i = 0; i < simd::float_packs<A>; ++i) x[i] = P::load(in + i * P::size);
  const W w = simd::to_nearest<A>(x);
  w.store(got);
  for (int i = 0; i < simd::float_packs<A>; ++i) simd::to_float(w, i).store(back + i * P::size);
  for (isize l = 0; l < W::size; ++l) {
    CHECK(got[l] == want[l]);
    CHECK(back[l] == static_cast<float>(want[l]));
  }
  std::uint8_t joined[2][4 * W::size];  // small numbers as bytes, in order
  std::int32_t numbers[2][4][W::size];
  for (auto& part : numbers)
    for (auto& row : part)
      for (std::int32_t& y : row) y = static_cast<std::int32_t>(r.integer(0, &part == &numbers[0] ? 255 : 127));
  for (std::int32_t& y : numbers[1][2]) y = -y;
  W four[4];
  for (int i = 0; i < 4; ++i) four[i] = W::load(numbers[0][i]);
  simd::join_bytes<true>(four).store(joined[0]);
  for (int i = 0; i < 4; ++i) four[i] = W::load(numbers[1][i]);
  simd::join_bytes<false>(four).store(joined[1]);
  for (int k = 0; k < 2; ++k)
    for (isize l = 0; l < 4 * W::size; ++l)
      REQUIRE(joined[k][l] == static_cast<std::uint8_t>(numbers[k][l / W::size][l % W::size]));
  for (auto& row : numbers[0])
    for (std::int32_t& y : row) y += static_cast<std::int32_t>(r.integer(-1000, 1000)) * 256;
  for (int i = 0; i < 4; ++i) four[i] = W::load(numbers[0][i]);
  simd::join_low_bytes(four).store(joined[0]);
  for (isize l = 0; l < 4 * W::size; ++l) REQUIRE(joined[0][l] == static_cast<std::uint8_t>(numbers[0][l % 4][l / 4]));
  W rows[W::size];
  std::int32_t sums[W::size] = {};
  for (isize i = 0; i < W::size; ++i)
    for (isize l = 0; l < W::size; ++l) {
      got[l] = static_cast<std::int32_t>(r.integer(-100000000, 100000000));
      sums[i] += got[l];
      rows[i] = W::load(got);
    }
  simd::sum_each(rows).store(got);
  for (isize i = 0; i < W::size; ++i) CHECK(got[i] == sums[i]);
}

/// Rows of `n` turned and rotated against simd::rotate_row, bit by bit, and their bytes; row `broken` holds a number that is not finite.
template <class A>
void check_turned(test::random& r, isize n, bool rotate, isize broken) {
  constexpr isize W = simd::words<A>::size;
  std::vector<float> rows(static_cast<std::size_t>(W * n)), t(rows.size()), row(static_cast<std::size_t>(n));
  std::vector<std::int8_t> turned(rows.size()), codes(rows.size());
  for (float& y : rows) y = static_cast<float>(r.normal());
  if (broken < W) rows[static_cast<std::size_t>(broken * n + n / 3)] = std::numeric_limits<float>::infinity();
  kernel::detail::row_extents<A> x;
  kernel::detail::turn_rows<A>({rows.data(), n}, n, rotate, t.data(), x);
  std::int32_t sums[W];
  kernel::detail::round_turned<A, false>(t.data(), n, x, reinterpret_cast<std::uint8_t*>(turned.data()), 4 * W)
      .store(sums);
  kernel::detail::rows_of_bytes<A>(turned.data(), n, codes.data(), n);
  for (isize l = 0; l < W; ++l) {
    if (rotate)
      simd::rotate_row<simd::scalar>(rows.data() + l * n, row.data(), n);
    else
      row.assign(rows.begin() + l * n, rows.begin() + (l + 1) * n);
    float most = 0;
    for (const float y : row) most = std::fmax(most, std::fabs(y));
    int sum = 0;
    for (isize c = 0; c < n; ++c) {
      const float y = row[static_cast<std::size_t>(c)];
      const int code = codes[static_cast<std::size_t>(l * n + c)];
      sum += code;
      if (l == broken) {
        REQUIRE(code == 0);
        continue;
      }
      REQUIRE(t[static_cast<std::size_t>(c * W + l)] == y);
      REQUIRE(code == static_cast<int>(std::nearbyint(static_cast<double>(y) * static_cast<double>(127.0F / most))));
    }
    CHECK(sums[l] == sum);
    CHECK(x.most[l] == (l == broken ? 0.0F : most));
    CHECK(std::isinf(x.length[l]) == (l == broken));
  }
}

template <class F>
void for_each_arch(F f) {
  f(simd::scalar{}), f(simd::native{});
#if defined(FOVEA_HAS_AVX512)
  f(simd::avx2{});
#endif
}

}  // namespace

TEST_CASE("words: u8 x s8 products of four give the same 32-bit sums in every form, extremes included") {
  test::random r(1);
  for (int round = 0; round < 300; ++round) {
    const block acc = draw(r), u = draw(r), small = draw(r, 127), s = draw(r);
    for_each_arch([&](auto arch) { check_dot<decltype(arch)>(acc, u, small, s); });
  }
  block top, small, bottom;
  top.fill(255), small.fill(127), bottom.fill(0x80);  // four times 255 * -128: 16-bit sums would saturate
  for_each_arch([&](auto arch) { check_dot<decltype(arch)>(bottom, top, small, bottom); });
}

TEST_CASE("words: the other operations give the same integers in every form") {
  test::random r(2);
  for (int round = 0; round < 300; ++round) {
    const block a = draw(r), b = draw(r), c = draw(r), d = draw(r);
    block down = draw(r);
    for (std::size_t x = 1; x < bytes; x += 2) down[x] = static_cast<std::uint8_t>(down[x] & (r.coin() ? 3 : 127));
    const auto want = all_operations<simd::scalar>(a, b, c, d, down);
    for_each_arch([&](auto arch) {
      using A = decltype(arch);
      const auto got = all_operations<A>(a, b, c, d, down);
      for (std::size_t x = 0; x < want.size(); ++x) {
        CAPTURE(round, x);
        CHECK(got[x] == want[x]);
      }
      check_floats<A>(r);
    });
  }
}

TEST_CASE("words: exp2_i16 is 32640 * 2^(-d / 64) within 1.1, for every d") {
  for (int d = 0; d < 32768; d += 4) {
    std::int16_t in[8] = {}, got[8];
    for (int i = 0; i < 4; ++i) in[i] = static_cast<std::int16_t>(d + i);
    simd::exp2_i16(simd::words<simd::scalar>::load(in)).store(got);
    for (int i = 0; i < 4; ++i) {
      if (std::abs(got[i] - 32640.0 * std::exp2(-in[i] / 64.0)) > 1.1) FAIL_CHECK(in[i] << " gave " << got[i]);
    }
  }
}

TEST_CASE("words: rows that are rotated and rounded across lanes have the numbers of rotate_row") {
  test::random r(3);
  for (const isize n : {16, 32, 48, 64, 80, 128, 256})
    for (const bool rotate : {false, true})
      for (const isize broken : {99, 1})
        for_each_arch([&](auto arch) {
          INFO("n " << n << " rotate " << rotate << " broken " << broken);
          check_turned<decltype(arch)>(r, n, rotate, broken);
        });
}

TEST_CASE("words: bytes of four keys, whose scores lie in four registers, come together") {
  using W = simd::words<simd::native>;
  W keys[4];
  for (int i = 0; i < 4; ++i) {
    std::int32_t lanes[W::size];
    for (isize l = 0; l < W::size; ++l) lanes[l] = static_cast<std::int32_t>(4 * l + i);
    keys[i] = W::load(lanes);
  }
  std::uint8_t got[4 * W::size];
  simd::group4(simd::narrow_i16(keys[0], keys[1]), simd::narrow_i16(keys[2], keys[3])).store(got);
  for (isize x = 0; x < 4 * W::size; ++x) CHECK(got[x] == x);
}
