// SPDX-License-Identifier: MIT
/// @file  Partials form a commutative monoid: identity, associativity, any split of the keys, and no NaN at the edges.

#include <algorithm>
#include <numeric>
#include <tuple>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

#include <fovea/core/partial.hpp>

namespace {

using fovea::isize;
constexpr isize e = 5;

template <class T>
struct owned {
  std::vector<T> o = std::vector<T>(e, T(0));
  T m = -std::numeric_limits<T>::infinity(), l = T(0);
  fovea::partial<T> ref() { return {m, l, o.data()}; }
  owned& merge(owned from) {
    auto into = ref();
    fovea::merge(into, from.ref(), e);
    m = into.m, l = into.l;
    return *this;
  }
  test::array values() const {  // normalised, and the log-sum-exp
    owned copy = *this;
    auto p = copy.ref();
    const T lse = fovea::normalise(p, e);
    test::array a{{e + 1}, {}};
    for (T x : copy.o) a.data.push_back(static_cast<double>(x));
    a.data.push_back(static_cast<double>(lse));
    return a;
  }
};
template <class T>
owned<T> join(owned<T> a, const owned<T>& b) {
  return a.merge(b);
}

/// The partial of keys with scores s and values v.
template <class T>
owned<T> of_keys(const std::vector<double>& s, const std::vector<double>& v, std::size_t first, std::size_t last) {
  owned<T> p;
  for (std::size_t j = first; j < last; ++j) p.m = std::max(p.m, static_cast<T>(s[j]));
  for (std::size_t j = first; j < last; ++j) {
    const T w = std::exp(static_cast<T>(s[j]) - p.m);
    p.l += w;
    for (std::size_t c = 0; c < e; ++c) p.o[c] += w * static_cast<T>(v[j * e + c]);
  }
  return p;
}

using reals = std::tuple<float, double>;

}  // namespace

TEMPLATE_LIST_TEST_CASE("partial: any split of the keys, merged in any order, gives the whole", "", reals) {
  using T = TestType;
  const test::dtype type = fovea::dtype_of<T>;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    test::random r(seed);
    const double spread = seed % 3 == 0 ? 1000.0 : 3.0;
    std::vector<double> s, v;
    for (int j = 0; j < 40; ++j) {
      s.push_back(static_cast<double>(static_cast<float>(spread * r.normal())));
      for (isize c = 0; c < e; ++c) v.push_back(static_cast<double>(static_cast<float>(r.normal())));
    }
    std::vector<owned<T>> parts;
    for (std::size_t at = 0; at < 40;) {
      const std::size_t next = std::min<std::size_t>(40, at + static_cast<std::size_t>(r.integer(1, 15)));
      parts.push_back(of_keys<T>(s, v, at, next));
      at = next;
    }
    const test::array want = of_keys<double>(s, v, 0, 40).values();
    for (std::size_t i = parts.size(); i-- > 1;)
      std::swap(parts[i], parts[static_cast<std::size_t>(r.integer(0, static_cast<isize>(i)))]);
    owned<T> left, right;
    for (const auto& p : parts) left.merge(p);
    for (const auto& p : parts) right = join(p, right);
    CAPTURE(seed, parts.size());
    CHECK_CLOSE(left.values(), want, {.c = 32, .acc = type});
    CHECK_CLOSE(right.values(), want, {.c = 32, .acc = type});
    if (parts.size() >= 3) {
      CHECK_CLOSE(join(join(parts[0], parts[1]), parts[2]).values(), join(parts[0], join(parts[1], parts[2])).values(),
                  {.c = 32, .acc = type});
      CHECK_CLOSE(join(parts[0], parts[1]).values(), join(parts[1], parts[0]).values(), {.c = 8, .acc = type});
    }
  }
}

TEMPLATE_LIST_TEST_CASE("partial: the identity changes no bit, on either side, two identities give zeros and -inf", "",
                        reals) {
  using T = TestType;
  const owned<T> none, x = of_keys<T>({1.5, -2.0, 700.0}, std::vector<double>(15, 0.75), 0, 3);
  CHECK(join(none, x).o == x.o);
  CHECK(join(none, x).m == x.m);
  CHECK(join(none, x).l == x.l);
  CHECK(join(x, none).o == x.o);
  CHECK(join(x, none).m == x.m);
  CHECK(join(x, none).l == x.l);
  const auto empty = join(none, none).values();
  for (isize c = 0; c < e; ++c) CHECK(empty.data[static_cast<std::size_t>(c)] == 0.0);
  CHECK(empty.data.back() == -HUGE_VAL);
}

TEMPLATE_LIST_TEST_CASE("partial: scores far apart neither overflow nor vanish wrongly", "", reals) {
  using T = TestType;
  const std::vector<double> v(2 * e, 1.0);
  const auto low = of_keys<T>({-30000.0, 30000.0}, v, 0, 1), high = of_keys<T>({-30000.0, 30000.0}, v, 1, 2);
  for (const auto& both : {join(low, high), join(high, low)}) {
    CHECK(both.m == T(30000));
    CHECK(both.l == T(1));
    CHECK(both.o[0] == T(1));
  }
}

TEMPLATE_LIST_TEST_CASE("partial: normalised results merge by their log-sum-exp", "", reals) {
  using T = TestType;
  test::random r(4);
  std::vector<double> s, v;
  for (int j = 0; j < 30; ++j) {
    s.push_back(static_cast<double>(static_cast<float>(5 * r.normal())));
    for (isize c = 0; c < e; ++c) v.push_back(static_cast<double>(static_cast<float>(r.normal())));
  }
  std::vector<T> o(e, T(0));
  T lse = -std::numeric_limits<T>::infinity();
  for (std::size_t first : {0U, 10U, 20U}) {
    auto part = of_keys<T>(s, v, first, first + 10);
    auto p = part.ref();
    const T part_lse = fovea::normalise(p, e);
    fovea::merge_normalised(o.data(), lse, part.o.data(), part_lse, e);
    const T before = lse;
    const std::vector<T> kept = o, zeros(e, T(0));
    fovea::merge_normalised(o.data(), lse, zeros.data(), -std::numeric_limits<T>::infinity(),
                            e);  // a part that saw nothing
    CHECK(lse == before);
    CHECK(o == kept);
  }
  test::array got{{e + 1}, {}};
  for (T x : o) got.data.push_back(static_cast<double>(x));
  got.data.push_back(static_cast<double>(lse));
  CHECK_CLOSE(got, of_keys<double>(s, v, 0, 30).values(), {.c = 32, .acc = fovea::dtype_of<T>});
}
