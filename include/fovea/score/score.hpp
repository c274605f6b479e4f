// SPDX-License-Identifier: MIT
#pragma once
/// @file  Score modifications: what happens to a logit between the dot product and the mask.
///
/// A score policy is a trivially copyable struct with
///   T operator()(site, i, j, T s)   the new logit of row i and key j, s = scale * q.k in nats; T is float or double
/// and optionally a form that takes registers (`wide`) or whole tiles (`lanes`): score/lanes.hpp; and
///   static constexpr bool positionless   the new logit depends on the old one alone, not on site, row or key
/// Policies apply in the order of `chain`. Kernels ask once per tile through a function pointer; without one nothing is paid.
///
///   softcap   cap tanh(s / cap)                                    alibi           s - slopes[h] (p - j), p the row's position
///   chain     first a, then b                                      biases          score/bias.hpp
/// The backward pass needs a member `slope` (and takes `slot` for the gradient of a table): score/derivative.hpp.
///
/// Contract   a policy is called for every (i, j) of a tile that is not wholly masked, also where the mask will hide the result.
///            -inf hides a key; +inf and NaN are the caller's responsibility.

#include <cmath>

#include <fovea/score/bias.hpp>
#include <fovea/score/derivative.hpp>
#include <fovea/simd/tanh.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

template <class P>
concept score_policy = std::is_trivially_copyable_v<P> && requires(const P& p, const mask_site& at, isize i) {
  { p(at, i, i, 0.0F) } -> std::convertible_to<float>;
};

/// cap * tanh(s / cap)
struct softcap {
  double cap = 0;
  static constexpr bool positionless = true;
  void check(const mask_site&) const {
    require(cap > 0 && std::isfinite(cap), "softcap is ", cap, "; it must be positive and finite");
  }
  template <class T>
  FOVEA_HD T operator()(const mask_site&, isize, isize, T s) const {
    return static_cast<T>(cap) * std::tanh(s / static_cast<T>(cap));
  }
  template <class P>
  P wide(const mask_site&, P, P, P s) const {
    using T = typename P::value_type;
    return P(static_cast<T>(cap)) * simd::tanh(s * P(static_cast<T>(1 / cap)));
  }
  template <class T>
  FOVEA_HD T slope(const mask_site&, isize, isize, T s) const {
    const T t = std::tanh(s / static_cast<T>(cap));
    return T(1) - t * t;
  }
};

/// s - slopes[h] * (position of the row - j)
struct alibi {
  const float* slopes = nullptr;           ///< [H]
  isize count = 0;                         ///< how many there are; 0: not checked
  alignment_of_rows align = bottom_right;  ///< that of the mask, where it has one
  void check(const mask_site& at) const {
    align.check();
    require(slopes != nullptr && (count == 0 || count == at.H), "alibi has ", slopes == nullptr ? 0 : count,
            " slopes; wanted one for each of ", at.H, " heads");
    for (isize h = 0; h < at.H; ++h)
      require(std::isfinite(slopes[h]), "alibi slopes[", h, "] is ", slopes[h], "; it must be finite");
  }
  template <class T>
  FOVEA_HD T operator()(const mask_site& at, isize i, isize j, T s) const {
    return s - static_cast<T>(slopes[at.h]) * static_cast<T>(align.position(at, i) - j);
  }
  template <class P>
  P wide(const mask_site& at, P i, P j, P s) const {
    using T = typename P::value_type;
    return simd::fma(P(-static_cast<T>(slopes[at.h])), i + P(static_cast<T>(align.position(at, 0))) - j, s);
  }
  static constexpr bool unit_slope = true;
  template <class T>
  FOVEA_HD T slope(const mask_site&, isize, isize, T) const {
    return T(1);
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
  template <class Acc>
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, Acc* tile, isize stride) const {
    detail::score_lanes<A, Acc>(a, at, i0, count, j0, j1, tile, stride);
    detail::score_lanes<B, Acc>(b, at, i0, count, j0, j1, tile, stride);
  }
  static constexpr bool positionless = detail::positionless_score<A>() && detail::positionless_score<B>();
  static constexpr bool unit_slope = detail::unit_sloped<A>() && detail::unit_sloped<B>();
  template <class T>
    requires(detail::sloped<A>&& detail::sloped<B>)
  FOVEA_HD T slope(const mask_site& at, isize i, isize j, T s)
  const { return static_cast<T>(b.slope(at, i, j, static_cast<T>(a(at, i, j, s))) * a.slope(at, i, j, s)); }
  /// The table of the one policy that has one.
  isize slot(const mask_site& at, isize i, isize j) const requires(detail::tabled<A> != detail::tabled<B>) {
    if constexpr (detail::tabled<A>)
      return a.slot(at, i, j);
    else
      return b.slot(at, i, j);
  }
  template <class T>
    requires(detail::tabled<A> != detail::tabled<B>)
  T slot_slope(const mask_site& at, isize i, isize j, T s)
  const {
    const T between = static_cast<T>(a(at, i, j, s));
    if constexpr (detail::tabled<A>)
      return static_cast<T>(b.slope(at, i, j, between)) * detail::slot_slope(a, at, i, j, s);
    else
      return detail::slot_slope(b, at, i, j, between);
  }
  table_axis axis(const mask_site& at) const requires(detail::tabled<A> != detail::tabled<B>) {
    if constexpr (detail::tabled<A>)
      return detail::axis_of(a, at);
    else
      return detail::axis_of(b, at);
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
void score_tile_of(const void* policy, const mask_site& at, isize i0, isize count, isize j0, isize j1, Acc* tile,
                   isize stride) {
  score_lanes(*static_cast<const P*>(policy), at, i0, count, j0, j1, tile, stride);
}
struct score_table {
  bool positionless;
  score_tile<float> f32;
  score_tile<double> f64;
  void (*check)(const void*, const mask_site&);
  double (*one)(const void*, const mask_site&, isize, isize, double);
};
template <score_policy P>
inline constexpr score_table score_table_of{positionless_score<P>(), score_tile_of<P, float>, score_tile_of<P, double>,
                                            [](const void* p, const mask_site& at) {
                                              if constexpr (requires { static_cast<const P*>(p)->check(at); })
                                                static_cast<const P*>(p)->check(at);
                                              (void)p, (void)at;
                                            },
                                            [](const void* p, const mask_site& at, isize i, isize j, double s) {
                                              return static_cast<double>((*static_cast<const P*>(p))(at, i, j, s));
                                            }};
}  // namespace detail

/// Any score policy by value (up to 192 bytes), or none.
class score {
 public:
  score() = default;
  template <score_policy P>
    requires(!std::same_as<P, score>)
  score(const P& p)  // NOLINT(google-explicit-constructor)
      : table_(&detail::score_table_of<P>), derivative_(&detail::derivative_table_of<P>) {
    static_assert(sizeof(P) <= sizeof storage_,
                  "a score policy may hold up to 192 bytes; keep tables outside and point to them");
    ::new (static_cast<void*>(storage_)) P(p);
  }
  explicit operator bool() const { return table_ != nullptr; }
  bool positionless() const { return table_ == nullptr || table_->positionless; }
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

  /// For the backward pass (score/derivative.hpp): may it run, does it change slopes, is there a table to take gradients of.
  bool has_slope() const { return table_ == nullptr || derivative_->has_slope; }
  bool unit_slope() const { return table_ == nullptr || derivative_->unit; }
  bool has_table() const { return table_ != nullptr && derivative_->has_table; }
  table_axis axis(const mask_site& at) const { return derivative_->axis(storage_, at); }
  template <class Acc>
  void slopes(const mask_site& at, const detail::score_area& x, const Acc* s, Acc* to) const {
    calls<Acc>().slope(storage_, at, x, s, to);
  }
  template <class Acc>
  void add_gradient(const mask_site& at, const detail::score_area& x, const Acc* s, const Acc* ds, float* table) const {
    calls<Acc>().add(storage_, at, x, s, ds, table);
  }
  void clear_gradient(const mask_site& at, const detail::score_area& x, float* table) const {
    derivative_->clear(storage_, at, x, table);
  }

 private:
  template <class Acc>
  const detail::derivative_calls<Acc>& calls() const {
    if constexpr (std::is_same_v<Acc, float>)
      return derivative_->f32;
    else
      return derivative_->f64;
  }

  const detail::score_table* table_ = nullptr;
  const detail::derivative_table* derivative_ = nullptr;
  alignas(16) std::byte storage_[192]{};
};

}  // namespace FOVEA_ABI
}  // namespace fovea
