// SPDX-License-Identifier: MIT
/// @file  pack<T, Arch> lane by lane against plain C++, and exp2 against its stated bounds, for every Arch of this build.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>

#include "support/catch.hpp"
#include "support/tensors.hpp"

#include <fovea/simd/exp.hpp>
#include <fovea/simd/reduce.hpp>
#include <fovea/simd/transpose.hpp>

namespace {

using namespace fovea;

template <class T, class Arch>
struct on {
  using P = simd::pack<T, Arch>;
  using type = T;
  using arch = Arch;
  static constexpr isize W = P::size;
};
using packs =
    std::tuple<on<float, simd::scalar>, on<double, simd::scalar>, on<float, simd::native>, on<double, simd::native>
#if defined(FOVEA_HAS_AVX512)
               ,
               on<float, simd::avx2>, on<double, simd::avx2>
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
               ,
               on<float, simd::sse2>, on<double, simd::sse2>
#endif
               >;

template <class X>
using lanes = std::array<typename X::type, static_cast<std::size_t>(X::W)>;
template <class X>
lanes<X> lanes_of(typename X::P p) {
  lanes<X> out;
  p.store(out.data());
  return out;
}
template <class X>
lanes<X> normals(test::random& r) {
  lanes<X> x;
  for (auto& y : x) y = static_cast<typename X::type>(r.normal());
  return x;
}
/// Whether fma of this pack rounds once.
#if defined(__FMA__) || defined(__aarch64__)
template <class P>
inline constexpr bool fuses = !std::is_same_v<P, simd::pack<typename P::value_type, simd::sse2>>;
#else
template <class P>
inline constexpr bool fuses = false;
#endif
template <class T>
bool same(T a, T b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("pack: arithmetic, lane by lane", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  test::random r(1);
  for (int round = 0; round < 200; ++round) {
    const auto a = normals<X>(r), b = normals<X>(r), c = normals<X>(r);
    const P pa = P::load(a.data()), pb = P::load(b.data()), pc = P::load(c.data());
    const auto sum = lanes_of<X>(pa + pb), gap = lanes_of<X>(pa - pb), prod = lanes_of<X>(pa * pb),
               ratio = lanes_of<X>(pa / pb);
    const auto top = lanes_of<X>(simd::max(pa, pb)), low = lanes_of<X>(simd::min(pa, pb)),
               f = lanes_of<X>(simd::fma(pa, pb, pc));
    for (std::size_t l = 0; l < a.size(); ++l) {
      REQUIRE(sum[l] == a[l] + b[l]);
      REQUIRE(gap[l] == a[l] - b[l]);
      REQUIRE(prod[l] == a[l] * b[l]);
      REQUIRE(ratio[l] == a[l] / b[l]);
      REQUIRE(top[l] == std::max(a[l], b[l]));
      REQUIRE(low[l] == std::min(a[l], b[l]));
      const T once = std::fma(a[l], b[l], c[l]), size = std::fabs(a[l] * b[l]) + std::fabs(c[l]);
      REQUIRE(std::fabs(f[l] - once) <= size * std::numeric_limits<T>::epsilon());
    }
  }
}

TEMPLATE_LIST_TEST_CASE("pack: fma rounds once wherever the instruction set has it", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  if (!fuses<P>) return;
  const T tiny = std::numeric_limits<T>::epsilon();
  // (1 + u)(1 - u) - 1 = -u^2: a product that is rounded first gives 0
  const auto f = lanes_of<X>(simd::fma(P(1 + tiny), P(1 - tiny), P(T(-1))));
  for (T x : f) CHECK(x == -tiny * tiny);
}

TEMPLATE_LIST_TEST_CASE("pack: max and min return the second operand when either is NaN", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  const T bad = std::numeric_limits<T>::quiet_NaN();
  for (T x : lanes_of<X>(simd::max(P(T(3)), P(bad)))) CHECK(std::isnan(x));
  for (T x : lanes_of<X>(simd::max(P(bad), P(T(3))))) CHECK(x == 3);
  for (T x : lanes_of<X>(simd::min(P(T(3)), P(bad)))) CHECK(std::isnan(x));
  for (T x : lanes_of<X>(simd::min(P(bad), P(T(3))))) CHECK(x == 3);
}

TEMPLATE_LIST_TEST_CASE("pack: select and fma_where for every lane mask, dead lanes stay clean of NaN and infinity", "",
                        packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  test::random r(2);
  const auto a = normals<X>(r), b = normals<X>(r), c = normals<X>(r);
  auto poison = b;
  const unsigned all = (1U << X::W) - 1U;
  for (unsigned bits = 0; bits <= all; ++bits) {
    for (std::size_t l = 0; l < b.size(); ++l)
      poison[l] = ((bits >> l) & 1U) != 0 ? b[l]
                  : l % 2 == 0            ? std::numeric_limits<T>::quiet_NaN()
                                          : std::numeric_limits<T>::infinity();
    const auto chosen = lanes_of<X>(simd::select(bits, P::load(a.data()), P::load(c.data())));
    const auto clean = lanes_of<X>(simd::select(bits, P::load(poison.data()), P::load(c.data())));
    const auto fused = lanes_of<X>(simd::fma_where(bits, P::load(a.data()), P::load(poison.data()), P::load(c.data())));
    const auto wanted = lanes_of<X>(simd::fma(P::load(a.data()), P::load(b.data()), P::load(c.data())));
    // Where the product may be rounded first, g++ may still join it with the sum in one of the two places.
    const T slack = fuses<P> ? T(0) : 2 * std::numeric_limits<T>::epsilon();
    bool right = true;
    for (std::size_t l = 0; l < b.size(); ++l) {
      const bool live = ((bits >> l) & 1U) != 0;
      const T bound = slack * (std::fabs(a[l] * b[l]) + std::fabs(c[l]));
      right = right && chosen[l] == (live ? a[l] : c[l]) && clean[l] == (live ? b[l] : c[l]) &&
              (live ? std::fabs(fused[l] - wanted[l]) <= bound : fused[l] == c[l]);
    }
    CAPTURE(bits);
    REQUIRE(right);
  }
}

TEMPLATE_LIST_TEST_CASE("pack: lanes_above says where a is not at most b, NaN included", "", packs) {
  using X = TestType;
  using T = typename X::type;
  const T values[] = {T(0), T(1), T(-1), std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()};
  for (std::size_t shift = 0; shift < 25; ++shift) {
    lanes<X> a, b;
    simd::lane_bits want = 0;
    for (std::size_t l = 0; l < a.size(); ++l) {
      a[l] = values[(l + shift) % 5], b[l] = values[(l + shift) / 5 % 5];
      want |= static_cast<simd::lane_bits>(a[l] <= b[l] ? 0 : 1) << l;
    }
    CHECK(simd::lanes_above(X::P::load(a.data()), X::P::load(b.data())) == want);
  }
}

TEMPLATE_LIST_TEST_CASE("pack: load_n and store_n touch the first lanes and nothing else", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  for (isize count = 0; count <= X::W + 2; ++count) {
    CAPTURE(count);
    test::random r(4);
    const isize width = std::max<isize>(count, X::W);
    test::tensor from(dtype_of<T>, 1, 1, 1, width, test::layout::unaligned),
        to(dtype_of<T>, 1, 1, 1, width, test::layout::unaligned);
    from.fill_normal(r), to.fill([] { return 5.0; });
    const P x = simd::load_n<P>(static_cast<const T*>(from.ref().data), count);
    const auto got = lanes_of<X>(x);
    for (isize l = 0; l < X::W; ++l)
      CHECK(got[static_cast<std::size_t>(l)] == (l < count ? static_cast<T>(from.get(0, 0, 0, l)) : T(0)));
    simd::store_n(static_cast<T*>(to.ref().data), x, count);
    for (isize l = 0; l < width; ++l)
      CHECK(to.get(0, 0, 0, l) == (l < std::min(count, X::W) ? from.get(0, 0, 0, l) : 5.0));
    CHECK(to.guards_intact());
  }
}

TEMPLATE_LIST_TEST_CASE("pack: reductions", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  test::random r(6);
  for (int round = 0; round < 50; ++round) {
    auto a = normals<X>(r);
    double sum = 0;
    for (T x : a) sum += static_cast<double>(x);
    CHECK(std::fabs(static_cast<double>(simd::reduce_add(P::load(a.data()))) - sum) <=
          40.0 * static_cast<double>(std::numeric_limits<T>::epsilon()));
    CHECK(simd::reduce_max(P::load(a.data())) == *std::max_element(a.begin(), a.end()));
    a[static_cast<std::size_t>(round) % a.size()] = std::numeric_limits<T>::quiet_NaN();
    CHECK(std::isnan(simd::reduce_max(P::load(a.data()))));
  }
}

TEMPLATE_LIST_TEST_CASE("pack: W registers summed, transposed, and rows turned into columns and back", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  constexpr isize W = X::W;
  test::random r(12);
  T in[W][W], out[W];
  P x[W];
  for (isize i = 0; i < W; ++i) {
    for (isize l = 0; l < W; ++l) in[i][l] = static_cast<T>(r.normal());
    x[i] = P::load(in[i]);
  }
  simd::sum_each(x).store(out);
  for (isize i = 0; i < W; ++i) {
    double sum = 0;
    for (isize l = 0; l < W; ++l) sum += static_cast<double>(in[i][l]);
    CHECK(std::fabs(static_cast<double>(out[i]) - sum) <= 60.0 * test::eps(dtype_of<T>));
  }
  simd::max_each(x).store(out);
  for (isize i = 0; i < W; ++i) REQUIRE(out[i] == *std::max_element(in[i], in[i] + W));
  if constexpr (std::is_same_v<T, float>) {
    simd::most_magnitude(x[0], x[W - 1]).store(out);
    for (isize l = 0; l < W; ++l) REQUIRE(out[l] == std::fmax(std::fabs(in[0][l]), std::fabs(in[W - 1][l])));
  }
  simd::transpose(x);
  for (isize i = 0; i < W; ++i) {
    x[i].store(out);
    for (isize l = 0; l < W; ++l) REQUIRE(out[l] == in[l][i]);
  }
  for (isize width = 0; width <= 2 * W + 3; ++width) {
    CAPTURE(width);
    const dtype t = dtype_of<T>;
    test::tensor rows = test::normal(r, t, 1, 1, W, width, test::layout::strided),
                 turned(t, 1, 1, width, W, test::layout::strided);
    test::tensor back(t, 1, 1, W, width, test::layout::strided);
    const T* from[W];
    T *to[W], factors[W];
    for (isize l = 0; l < W; ++l) {
      from[l] = static_cast<const T*>(rows.ref().row(0, 0, l)), to[l] = static_cast<T*>(back.ref().row(0, 0, l));
      factors[l] = static_cast<T>(l + 1);
    }
    simd::rows_to_columns<T, typename X::arch>(from, width, T(2), static_cast<T*>(turned.ref().data),
                                               turned.ref().row_stride);
    simd::columns_to_rows<T, typename X::arch>(static_cast<const T*>(turned.ref().data), turned.ref().row_stride, width,
                                               factors, to);
    bool right = turned.guards_intact() && back.guards_intact();
    for (isize l = 0; l < W; ++l)
      for (isize c = 0; c < width; ++c)
        right = right && turned.get(0, 0, c, l) == 2 * rows.get(0, 0, l, c) &&
                back.get(0, 0, l, c) == static_cast<double>(factors[l] * static_cast<T>(turned.get(0, 0, c, l)));
    CHECK(right);
  }
}

TEMPLATE_LIST_TEST_CASE("exp2: error in units of the last place", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  constexpr bool single = std::is_same_v<T, float>;
  const double least = single ? -125.49 : -1021.49, most = single ? 127.0 : 1023.0;
  test::random r(8);
  double worst = 0;
  const auto look = [&](T x) {
    const T got = lanes_of<X>(simd::exp2(P(x)))[0];
    const long double want = std::exp2(static_cast<long double>(x));
    const long double unit = std::ldexp(1.0L, std::ilogb(want) - (single ? 23 : 52));
    worst = std::max(worst, static_cast<double>(std::fabs((static_cast<long double>(got) - want) / unit)));
  };
  for (int i = 0; i < 40000; ++i) {
    look(static_cast<T>(r.uniform(least, most)));
    look(static_cast<T>(r.uniform(-2.0, 1.0)));
    look(static_cast<T>(r.uniform(-1.0, 1.0) * 0x1p-20));
    look(static_cast<T>(static_cast<double>(r.integer(-100, 100)) + 0.5 +
                        r.uniform(-1.0, 1.0) * 0x1p-12));  // where n changes
  }
  INFO("worst error " << worst << " ulp");
  const double float_bound = P::size == 16 ? 2.1 : fuses<P> ? 1.9 : 2.0;  // AVX-512 rounds down
  CHECK(worst <= (single ? float_bound : fuses<P> ? 1.0 : 1.2));          // what simd/exp.hpp states
}

TEMPLATE_LIST_TEST_CASE("exp2: exact at integers, zero far below, never a denormal, NaN stays NaN", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  constexpr bool single = std::is_same_v<T, float>;
  const auto at = [](T x) { return lanes_of<X>(simd::exp2(P(x)))[0]; };
  const int least = single ? -126 : -1022, most = single ? 127 : 1023;
  for (int n = least + 1; n <= most; ++n) REQUIRE(at(static_cast<T>(n)) == std::ldexp(T(1), n));
  const T inf = std::numeric_limits<T>::infinity();
  for (T x : {static_cast<T>(least), static_cast<T>(least) - T(0.25), static_cast<T>(least) - 1, T(-1e4), T(-1e30),
              std::numeric_limits<T>::lowest(), -inf})
    CHECK(same(at(x), T(0)));
  CHECK(std::isnan(at(std::numeric_limits<T>::quiet_NaN())));
  test::random r(9);
  for (int i = 0; i < 2000;
       ++i) {  // at the edge: the right value or zero, and nothing between zero and the smallest normal number
    const T x = static_cast<T>(least + r.uniform(-1.0, 1.0)), y = at(x);
    const double want = std::exp2(static_cast<double>(x));
    REQUIRE((y == 0 || (y >= std::numeric_limits<T>::min() &&
                        std::fabs(static_cast<double>(y) - want) <=
                            want * 4 * static_cast<double>(std::numeric_limits<T>::epsilon()))));
    if (x > static_cast<T>(least) + T(0.5)) REQUIRE(y > 0);
  }
  CHECK(at(T(0)) == 1);
  CHECK(at(T(-0.0)) == 1);
}

TEMPLATE_LIST_TEST_CASE("exp2_shifted: 2^(x - shift), the same bits in both forms", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  using power = simd::exp2_shifted<T, typename X::arch>;
  test::random r(11);
  for (int i = 0; i < 5000; ++i) {
    const T most = static_cast<T>(r.uniform(-99.0, 99.0)), x = most - static_cast<T>(r.uniform(0.0, 124.0));
    const P shift = power::shift_for(P(most));
    const T by = lanes_of<X>(shift)[0], got = lanes_of<X>(power(shift)(P(x)))[0];
    REQUIRE((by >= most && by < most + 1 && power::near(shift)));
    const double want = std::exp2(static_cast<double>(x) - static_cast<double>(by));
    REQUIRE(std::fabs(static_cast<double>(got) - want) <=
            want * 300 * static_cast<double>(std::numeric_limits<T>::epsilon()));
    if constexpr (std::is_constructible_v<typename power::far_form, P>)
      REQUIRE(same(got, lanes_of<X>(typename power::far_form(shift)(P(x)))[0]));
  }
}

TEMPLATE_LIST_TEST_CASE("exp: relative error grows no faster than its argument", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  const double unit = std::is_same_v<T, float> ? 0x1p-24 : 0x1p-53;
  test::random r(10);
  for (int i = 0; i < 20000; ++i) {
    const T x = static_cast<T>(r.uniform(-86.0, 88.0));
    const double got = static_cast<double>(lanes_of<X>(simd::exp(P(x)))[0]);
    const long double want = std::exp(static_cast<long double>(x));
    REQUIRE(std::fabs((static_cast<long double>(got) - want) / want) <=
            unit * (6 + 2 * std::fabs(static_cast<double>(x))));
  }
}

TEMPLATE_LIST_TEST_CASE("exp_then_line: e^x below 0 and 1 + x above, zero far below, NaN stays NaN", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  const double unit = std::is_same_v<T, float> ? 0x1p-24 : 0x1p-53;
  const auto at = [](T x) { return lanes_of<X>(simd::exp_then_line(P(x)))[0]; };
  test::random r(11);
  for (int i = 0; i < 20000; ++i) {
    const T x = static_cast<T>(r.uniform(-86.0, i % 2 == 0 ? 0.5 : 88.0));
    const double v = static_cast<double>(x), want = v > 0 ? 1 + v : std::exp(v);
    REQUIRE(std::fabs(static_cast<double>(at(x)) - want) <= want * unit * (6 + 2 * std::fabs(std::min(v, 0.0))));
  }
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  CHECK(at(T(0)) == T(1));
  CHECK(at(-T(0)) == T(1));
  CHECK(at(inf) == inf);
  CHECK(at(T(-1e30)) == T(0));
  CHECK(at(-inf) == T(0));
  CHECK(std::isnan(at(nan)));
  CHECK(std::isnan(at(-nan)));
}

TEMPLATE_LIST_TEST_CASE("exp2_pair: both powers within a few units in the last place, NaN stays NaN", "", packs) {
  using X = TestType;
  using P = typename X::P;
  using T = typename X::type;
  const double unit = std::is_same_v<T, float> ? 0x1p-24 : 0x1p-53;
  test::random r(12);
  P up, down;
  for (int i = 0; i < 20000; ++i) {
    const T x = static_cast<T>(r.uniform(-57.0, 57.0));
    simd::exp2_pair(P(x), P(T(2)), up, down);
    const double want = std::exp2(2 * static_cast<double>(x));
    REQUIRE(std::fabs(static_cast<double>(lanes_of<X>(up)[0]) - want) <= want * unit * 6);
    REQUIRE(std::fabs(static_cast<double>(lanes_of<X>(down)[0]) * want - 1) <= unit * 6);
  }
  simd::exp2_pair(P(std::numeric_limits<T>::quiet_NaN()), P(T(2)), up, down);
  CHECK(std::isnan(lanes_of<X>(up)[0]));
  CHECK(std::isnan(lanes_of<X>(down)[0]));
}

TEST_CASE("architectures: names, and the one this build runs on") {
  CHECK(std::string(simd::name_of_arch<simd::scalar>) == "scalar");
  CHECK(std::string(simd::name_of_arch<simd::avx2>) == "avx2");
  CHECK(std::string(simd::name_of_arch<simd::avx512>) == "avx512");
#if defined(FOVEA_HAS_AVX512)
  STATIC_REQUIRE(simd::pack<float, simd::native>::size == 16);
#elif defined(FOVEA_HAS_AVX2)
  STATIC_REQUIRE(simd::pack<float, simd::native>::size == 8);
#endif
}
