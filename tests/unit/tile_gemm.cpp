// SPDX-License-Identifier: MIT
/// @file  tile::gemm against a triple loop in long double: all small sizes, every stride form, and nothing outside the matrices touched.

#include <tuple>

#include "support/catch.hpp"
#include "support/tensors.hpp"

#include <fovea/tile/gemm.hpp>

namespace {

using namespace fovea;

template <class T, class Arch>
struct on {
  using type = T;
  using arch = Arch;
};
using variants = std::tuple<on<float, simd::native>, on<double, simd::native>, on<float, simd::scalar>
#if defined(FOVEA_HAS_AVX512)
                            ,
                            on<float, simd::avx2>
#endif
                            >;

/// One product; "" or what is wrong. `gap` widens every leading dimension.
template <class T, class Arch>
std::string fault(isize M, isize N, isize K, bool transposed, bool add, isize gap) {
  test::random r(static_cast<std::uint64_t>(M * 10007 + N * 101 + K));
  const dtype t = dtype_of<T>;
  // one tensor row per matrix row; width + gap keeps a guard behind every row
  test::tensor a(t, 1, 1, transposed ? K : M, (transposed ? M : K) + gap), b(t, 1, 1, K, N + gap),
      c(t, 1, 1, M, N + gap);
  a.fill_normal(r), b.fill_normal(r), c.fill_normal(r);
  const test::array before = c.values();
  const isize lda = (transposed ? M : K) + gap;
  tile::gemm<Arch, T>(M, N, K, static_cast<const T*>(a.ref().data), transposed ? 1 : lda, transposed ? lda : 1,
                      static_cast<const T*>(b.ref().data), N + gap, static_cast<T*>(c.ref().data), N + gap, add);
  if (!c.guards_intact()) return "guards of C";
  for (isize i = 0; i < M; ++i)
    for (isize j = 0; j < N + gap; ++j) {
      const double old = before.data[static_cast<std::size_t>(i * (N + gap) + j)];
      long double want = add || j >= N ? old : 0.0, size = std::fabs(want);
      for (isize k = 0; k < K && j < N; ++k) {
        const long double term =
            static_cast<long double>(transposed ? a.get(0, 0, k, i) : a.get(0, 0, i, k)) * b.get(0, 0, k, j);
        want += term, size += std::fabs(term);
      }
      const double got = c.get(0, 0, i, j);
      if (j >= N ? got != old : !(std::fabs(got - want) <= static_cast<long double>(K + 1) * test::eps(t) * size))
        return test::detail::position({M, N}, i * N + j);
    }
  return {};
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("gemm: all small sizes", "", variants) {
  using T = typename TestType::type;
  using A = typename TestType::arch;
  for (isize M = 0; M <= 17; ++M)
    for (isize N : {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 47, 48, 49, 64, 65, 80})
      for (isize K : {0, 1, 2, 5, 17}) {
        CAPTURE(M, N, K);
        REQUIRE(fault<T, A>(M, N, K, false, (M + N + K) % 2 == 0, 0) == std::string());
      }
}

TEMPLATE_LIST_TEST_CASE("gemm: transposed A, wide leading dimensions, accumulation", "", variants) {
  using T = typename TestType::type;
  using A = typename TestType::arch;
  for (isize M : {1, 3, 8, 13, 24, 130})
    for (isize N : {1, 16, 17, 33, 64, 80, 130})
      for (isize K : {1, 17, 64, 256}) {
        CAPTURE(M, N, K);
        for (const bool transposed : {false, true})
          for (const bool add : {false, true}) REQUIRE(fault<T, A>(M, N, K, transposed, add, 3) == std::string());
      }
}

TEMPLATE_LIST_TEST_CASE("gemm: an element does not depend on M or N", "", variants) {
  using T = typename TestType::type;
  using A = typename TestType::arch;
  test::random r(2);
  constexpr isize M = 20, N = 70, K = 33;
  test::tensor a = test::normal(r, dtype_of<T>, 1, 1, M, K), b = test::normal(r, dtype_of<T>, 1, 1, K, N),
               whole(dtype_of<T>, 1, 1, M, N);
  const auto run = [&](isize m, isize n, T* c) {
    tile::gemm<A, T>(m, n, K, static_cast<const T*>(a.ref().data), K, 1, static_cast<const T*>(b.ref().data), N, c, N,
                     false);
  };
  run(M, N, static_cast<T*>(whole.ref().data));
  for (isize m : {1, 2, 7, 8, 19})
    for (isize n : {1, 5, 16, 31, 32, 64, 69}) {
      test::tensor part(dtype_of<T>, 1, 1, M, N);
      run(m, n, static_cast<T*>(part.ref().data));
      bool same = true;
      for (isize i = 0; i < m; ++i)
        for (isize j = 0; j < n; ++j) same = same && part.get(0, 0, i, j) == whole.get(0, 0, i, j);
      CAPTURE(m, n);
      CHECK(same);
    }
}
