// SPDX-License-Identifier: MIT
#pragma once
/// @file  Score modifications: what happens to a logit between the dot product and the mask.
///
/// A score policy is a trivially copyable struct with
///   double operator()(site, i, j, double s)   the new logit of row i and key j, s = scale * q.k in nats
/// Policies apply in the order of `chain`. Kernels ask once per tile through a function pointer; without one nothing is paid.
///
/// Contract   a policy is called for every (i, j) of a tile that is not wholly masked, also where the mask will hide the result.
///            -inf hides a key; +inf and NaN are the caller's responsibility.

#include <cmath>

#include <fovea/mask/mask.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

template <class P>
concept score_policy = std::is_trivially_copyable_v<P> && requires(const P& p, const mask_site& at, isize i) {
  { p(at, i, i, 0.0F) } -> std::convertible_to<float>;
};

/// cap * tanh(s / cap)
struct softcap {
  double cap = 0;
  void check(const mask_site&) const {
    require(cap > 0 && std::isfinite(cap), "softcap is ", cap, "; it must be positive and finite");
  }
  template <class T>
  FOVEA_HD T operator()(const mask_site&, isize, isize, T s) const {
    return static_cast<T>(cap) * std::tanh(s / static_cast<T>(cap));
  }
};

/// s - slopes[h] * (position of the row - j), bottom-right positions
struct alibi {
  const float* slopes = nullptr;  ///< [H]
  isize count = 0;                ///< how many there are; 0: not checked
  void check(const mask_site& at) const {
    require(slopes != nullptr && (count == 0 || count == at.H), "alibi has ", slopes == nullptr ? 0 : count,
            " slopes; wanted one for each of ", at.H, " heads");
    for (isize h = 0; h < at.H; ++h)
      require(std::isfinite(slopes[h]), "alibi slopes[", h, "] is ", slopes[h], "; it must be finite");
  }
  template <class T>
  FOVEA_HD T operator()(const mask_site& at, isize i, isize j, T s) const {
    return s - static_cast<T>(slopes[at.h]) * static_cast<T>(i + at.m - at.n - j);
  }
};

/// s + table[b * batch_stride + h * head_stride + i * row_stride + j * key_stride]
struct additive_bias {
  const float* table = nullptr;
  isize batch_stride = 0, head_stride = 0, row_stride = 0, key_stride = 1;
  table_extent extent = {};
  void check(const mask_site& at) const {
    require(table != nullptr || at.n == 0 || at.m == 0, "additive_bias has a null table; wanted ", at.n, " x ", at.m);
    extent.check("bias", at);
  }
  template <class T>
  FOVEA_HD T operator()(const mask_site& at, isize i, isize j, T s) const {
    return s + static_cast<T>(table[at.b * batch_stride + at.h * head_stride + i * row_stride + j * key_stride]);
  }
};

/// First a, then b.
template <score_policy A, score_policy B>
struct chain {
  A a;
  B b;
  void check(const mask_site& at) const {
    if constexpr (requires { a.check(at); }) a.check(at);
    if constexpr (requires { b.check(at); }) b.check(at);
  }
  template <class T>
  FOVEA_HD T operator()(const mask_site& at, isize i, isize j, T s) const {
    return static_cast<T>(b(at, i, j, static_cast<T>(a(at, i, j, s))));
  }
};
template <class A, class B>
chain(A, B) -> chain<A, B>;

namespace detail {
/// tile[(j - j0) * stride + l], rows i0 + l: scores in units of log2, as kernels keep them.
template <class Acc>
using score_tile = void (*)(const void*, const mask_site&, isize i0, isize count, isize j0, isize j1, Acc* tile,
                            isize stride);

template <score_policy P, class Acc>
void score_lanes(const void* policy, const mask_site& at, isize i0, isize count, isize j0, isize j1, Acc* tile,
                 isize stride) {
  const P& p = *static_cast<const P*>(policy);
  constexpr Acc to_nats = static_cast<Acc>(0.69314718055994530942), to_log2 = static_cast<Acc>(1.4426950408889634074);
  for (isize j = j0; j < j1; ++j, tile += stride)
    for (isize l = 0; l < count; ++l) tile[l] = static_cast<Acc>(p(at, i0 + l, j, tile[l] * to_nats)) * to_log2;
}
struct score_table {
  score_tile<float> f32;
  score_tile<double> f64;
  void (*check)(const void*, const mask_site&);
  double (*one)(const void*, const mask_site&, isize, isize, double);
};
template <score_policy P>
inline constexpr score_table score_table_of{score_lanes<P, float>, score_lanes<P, double>,
                                            [](const void* p, const mask_site& at) {
                                              if constexpr (requires { static_cast<const P*>(p)->check(at); })
                                                static_cast<const P*>(p)->check(at);
                                              (void)p, (void)at;
                                            },
                                            [](const void* p, const mask_site& at, isize i, isize j, double s) {
                                              return static_cast<double>((*static_cast<const P*>(p))(at, i, j, s));
                                            }};
}  // namespace detail

/// Any score policy by value (up to 128 bytes), or none.
class score {
 public:
  score() = default;
  template <score_policy P>
    requires(!std::same_as<P, score>)
  score(const P& p) : table_(&detail::score_table_of<P>) {  // NOLINT(google-explicit-constructor)
    static_assert(sizeof(P) <= sizeof storage_,
                  "a score policy may hold up to 128 bytes; keep tables outside and point to them");
    ::new (static_cast<void*>(storage_)) P(p);
  }
  explicit operator bool() const { return table_ != nullptr; }
  void check(const mask_site& at) const {
    if (table_ != nullptr) table_->check(storage_, at);
  }
  double operator()(const mask_site& at, isize i, isize j, double s) const {
    return table_ != nullptr ? table_->one(storage_, at, i, j, s) : s;
  }
  template <class Acc>
  void apply(const mask_site& at, isize i0, isize count, isize j0, isize j1, Acc* tile, isize stride) const {
    if constexpr (std::is_same_v<Acc, float>)
      table_->f32(storage_, at, i0, count, j0, j1, tile, stride);
    else
      table_->f64(storage_, at, i0, count, j0, j1, tile, stride);
  }

 private:
  const detail::score_table* table_ = nullptr;
  alignas(16) std::byte storage_[128]{};
};

}  // namespace FOVEA_ABI
}  // namespace fovea
