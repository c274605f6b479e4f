// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a score policy says to the backward pass: its slope, and where the parameters lie that it adds.
///
/// Optional members of a score policy (score/score.hpp)
///   T slope(site, i, j, T s)            d(new logit) / d(old logit) at the old logit s; without it backward refuses the policy
///   static constexpr bool unit_slope    every slope is 1: nothing is computed
///   isize slot(site, i, j)              the place in a float table of the parameter that pair (i, j) adds to its logit: dbias
///   table_axis axis(site)               along which axis no two pairs share a slot, so that threads may be cut there
///
/// Contract   `slot` stays inside the table of the gradient, which is laid out as the policy's own.

#include <concepts>

#include <fovea/mask/mask.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// Pairs whose heads (rows, keys) differ never share a slot of the table. `none`: nothing is promised.
enum class table_axis : unsigned char { none, heads, rows, keys };

namespace detail {

template <class P>
concept sloped = requires(const P& p, const mask_site& at, isize i) {
  { p.slope(at, i, i, 0.0) } -> std::convertible_to<double>;
};
template <class P>
concept tabled = sloped<P> && requires(const P& p, const mask_site& at, isize i) {
  { p.slot(at, i, i) } -> std::same_as<isize>;
};
template <class P>
constexpr bool unit_sloped() {
  if constexpr (requires { P::unit_slope; })
    return P::unit_slope;
  else
    return false;
}
/// d(new logit) / d(parameter in the slot), at the old logit s.
template <class P, class T>
T slot_slope(const P& p, const mask_site& at, isize i, isize j, T s) {
  if constexpr (requires { p.slot_slope(at, i, j, s); })
    return static_cast<T>(p.slot_slope(at, i, j, s));
  else
    return T(1);
}
template <class P>
table_axis axis_of(const P& p, const mask_site& at) {
  if constexpr (requires { p.axis(at); })
    return p.axis(at);
  else
    return table_axis::none;
}

/// The axis of a table whose element of (b, h, i, j) is b, h, i, j times these strides: rows, or keys where rows broadcast, or
/// heads; none where the strides let elements of different pairs coincide.
inline table_axis axis_of_strides(const mask_site& at, isize batch, isize head, isize row, isize key) {
  const isize counts[] = {at.B, at.H, at.n, at.m}, strides[] = {batch, head, row, key};
  bool used[4] = {};
  isize reach = 1;
  for (isize step = 0; step < 4; ++step) {  // by rising stride, each must span what the smaller ones reach
    isize next = -1;
    for (isize x = 0; x < 4; ++x)
      if (!used[x] && strides[x] != 0 && counts[x] > 1 && (next < 0 || strides[x] < strides[next])) next = x;
    if (next < 0) break;
    if (strides[next] < reach) return table_axis::none;
    used[next] = true, reach += (counts[next] - 1) * strides[next];
  }
  return used[2] ? table_axis::rows : used[3] ? table_axis::keys : used[1] ? table_axis::heads : table_axis::none;
}

/// Rows i0 + l, l < count, and keys [j0, j1) of a tile: element (j, l) at [(j - j0) * stride + l].
struct score_area {
  isize i0, count, j0, j1, stride;
};
template <class Acc>
inline constexpr Acc nats = static_cast<Acc>(0.69314718055994530942);  // scores of a tile are in units of log2

/// to = slope at the old scores s
template <class P, class Acc>
void slope_tile(const void* policy, const mask_site& at, const score_area& x, const Acc* s, Acc* to) {
  const P& p = *static_cast<const P*>(policy);
  for (isize j = x.j0; j < x.j1; ++j, s += x.stride, to += x.stride)
    for (isize l = 0; l < x.count; ++l) to[l] = static_cast<Acc>(p.slope(at, x.i0 + l, j, s[l] * nats<Acc>));
}
/// table[slot] += ds * slot_slope for old scores s and gradients ds of the new ones, in the order of keys, then rows
template <class P, class Acc>
void add_tile(const void* policy, const mask_site& at, const score_area& x, const Acc* s, const Acc* ds, float* table) {
  const P& p = *static_cast<const P*>(policy);
  for (isize j = x.j0; j < x.j1; ++j, s += x.stride, ds += x.stride)
    for (isize l = 0; l < x.count; ++l)
      if (ds[l] != Acc(0))
        table[p.slot(at, x.i0 + l, j)] +=
            static_cast<float>(ds[l] * slot_slope(p, at, x.i0 + l, j, static_cast<Acc>(s[l] * nats<Acc>)));
}
template <class P>
void clear_tile(const void* policy, const mask_site& at, const score_area& x, float* table) {
  const P& p = *static_cast<const P*>(policy);
  for (isize l = 0; l < x.count; ++l)
    for (isize j = x.j0; j < x.j1; ++j) table[p.slot(at, x.i0 + l, j)] = 0.0F;
}

template <class Acc>
struct derivative_calls {
  void (*slope)(const void*, const mask_site&, const score_area&, const Acc*, Acc*) = nullptr;
  void (*add)(const void*, const mask_site&, const score_area&, const Acc*, const Acc*, float*) = nullptr;
};
struct derivative_table {
  bool has_slope = false, unit = false, has_table = false;
  derivative_calls<float> f32 = {};
  derivative_calls<double> f64 = {};
  void (*clear)(const void*, const mask_site&, const score_area&, float*) = nullptr;
  table_axis (*axis)(const void*, const mask_site&) = nullptr;
};
template <class P>
constexpr derivative_table make_derivative_table() {
  derivative_table t;
  if constexpr (sloped<P>) {
    t.has_slope = true, t.unit = unit_sloped<P>();
    t.f32.slope = slope_tile<P, float>, t.f64.slope = slope_tile<P, double>;
  }
  if constexpr (tabled<P>) {
    t.has_table = true;
    t.f32.add = add_tile<P, float>, t.f64.add = add_tile<P, double>, t.clear = clear_tile<P>;
    t.axis = [](const void* p, const mask_site& at) { return axis_of(*static_cast<const P*>(p), at); };
  }
  return t;
}
template <class P>
inline constexpr derivative_table derivative_table_of = make_derivative_table<P>();

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
