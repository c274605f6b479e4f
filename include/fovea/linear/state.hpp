// SPDX-License-Identifier: MIT
#pragma once
/// @file  The state of linear attention: its layout, how it is made, merged, and exchanged as plain arrays.
///
///   per batch item and KV head:   S [panels][r][128 bytes]   z [r]   faded [r]   peak
///
/// Contract   S is cut into column panels of 128 bytes, on every machine alike; columns behind e are zero. `faded` is the product of all
///            decays since the state was made (in faded[0] where the decay is one number). With a log-scaled map S and z lack a
///            factor exp(peak), the running maximum of the keys' log-scales.

#include <algorithm>
#include <limits>

#include <fovea/kernel/linear_sweep.hpp>
#include <fovea/linear/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

struct linear_sizes {
  isize B, S, R, e, r, width, panels, rows;
  isize S_elements() const { return panels * r * width; }
  isize tail_elements() const { return 2 * rows + 16; }
  isize head_elements() const { return S_elements() + tail_elements(); }
};

inline linear_sizes sizes_of(const linear_attention& m, const shape& s) {
  const isize r = m.phi().features(s.d),
              width = s.type == dtype::f64 ? kernel::panel_width<double> : kernel::panel_width<float>;
  return {
      s.B, s.G, s.G > 0 && s.H > s.G ? s.H / s.G : 1, s.e, r, width, ceil_div(s.e, width), ceil_div(r, isize{16}) * 16};
}

/// z, faded and peak of one head.
template <class Acc>
struct state_tail {
  Acc *z, *faded, *peak;
  state_tail(Acc* at, const linear_sizes& n) : z(at), faded(at + n.rows), peak(at + 2 * n.rows) {}
};

template <class Acc>
void clear_tail(Acc* tail, const linear_sizes& n, bool log_scaled) {
  for (isize i = 0; i < n.tail_elements(); ++i) tail[i] = Acc(0);
  const state_tail<Acc> t(tail, n);
  for (isize i = 0; i < n.rows; ++i) t.faded[i] = Acc(1);
  if (log_scaled) *t.peak = -std::numeric_limits<Acc>::infinity();
}
template <class Acc>
void clear_head(Acc* head, const linear_sizes& n, bool log_scaled) {
  for (isize i = 0; i < n.S_elements(); ++i) head[i] = Acc(0);
  clear_tail(head + n.S_elements(), n, log_scaled);
}

inline bool by_channel(rule r) { return r == rule::gla || r == rule::kda || r == rule::gdn2; }

/// One head of `a` becomes the join of a and, after it, b.
template <class Acc>
void merge_heads(const linear_attention& m, const linear_sizes& n, Acc* a, const Acc* b) {
  const bool channel = by_channel(m.rule);
  const state_tail<Acc> ta(a + n.S_elements(), n), tb(const_cast<Acc*>(b) + n.S_elements(), n);
  Acc ga(1), gb(1);
  if (m.phi().log_scaled()) {
    const Acc top = std::max(*ta.peak, *tb.peak);
    ga = *ta.peak == top ? Acc(1) : std::exp(*ta.peak - top);
    gb = *tb.peak == top ? Acc(1) : std::exp(*tb.peak - top);
    *ta.peak = top;
  }
  for (isize i = 0; i < n.S_elements(); ++i) {
    const isize row = i / n.width % n.r;
    a[i] = ga * tb.faded[channel ? row : 0] * a[i] + gb * b[i];
  }
  for (isize i = 0; i < n.r; ++i) {
    const Acc faded = tb.faded[channel ? i : 0];
    ta.z[i] = ga * faded * ta.z[i] + gb * tb.z[i];
  }
  for (isize i = 0; i < n.rows; ++i) ta.faded[i] *= tb.faded[i];
}

template <class F>
void for_state_heads(const linear_sizes& n, F&& f) {
  for (isize i = 0; i < n.B * n.S; ++i) f(i);
}

}  // namespace detail

inline state linear_attention::make_state(const shape& s) const {
  require(streaming(), "this linear attention keeps no state: ",
          is_causal ? "its feature map needs all keys at once" : "is_causal is false");
  require(s.B >= 0 && s.G >= 1 && s.H >= 1 && s.d >= 1 && s.e >= 1, "make_state: B, H, G, d, e are ", s.B, ", ", s.H,
          ", ", s.G, ", ", s.d, ", ", s.e, "; wanted positive sizes");
  require(s.H % s.G == 0 || s.G % s.H == 0, "make_state: H is ", s.H, " and G is ", s.G,
          "; one must be a multiple of the other");
  state out(tag(), s, state_bytes(s));
  clear(out);
  return out;
}

inline void linear_attention::clear(state& s) const {
  const auto n = detail::sizes_of(*this, s.sizes());
  const bool log_scaled = phi().log_scaled();
  detail::for_state_heads(n, [&](isize i) {
    if (s.sizes().type == dtype::f64)
      detail::clear_head(s.as<double>() + i * n.head_elements(), n, log_scaled);
    else
      detail::clear_head(s.as<float>() + i * n.head_elements(), n, log_scaled);
  });
  s.set_tokens(0);
}

inline std::size_t linear_attention::state_bytes(const shape& s) const {
  const auto n = detail::sizes_of(*this, s);
  return static_cast<std::size_t>(n.B * n.S * n.head_elements()) * (s.type == dtype::f64 ? 8 : 4);
}

inline std::uint64_t linear_attention::tag() const {
  detail::fingerprint f;
  f.text(name).number(static_cast<double>(rule)).number(scale).number(normalised() ? 1.0 : 0.0);
  f.number(eps).number(clamp).number(key_sum_eps);
  for (const double g : gamma) f.number(g);
  phi().fingerprint(f);
  return f.value;
}

inline void linear_attention::merge(state& earlier, const state& later) const {
  require(!is_delta(rule), "merge: states of rule ", name_of(rule),
          " have none (the later stretch multiplies the earlier state by an r x r matrix that is not kept)");
  require(!phi().positional(), "merge: the feature map depends on positions, which the later state counted from 0");
  earlier.check(tag(), later.sizes(), name);
  later.check(tag(), earlier.sizes(), name);
  require(earlier.bytes() == later.bytes(), "merge: the states hold ", earlier.bytes(), " and ", later.bytes(),
          " bytes");
  const auto n = detail::sizes_of(*this, earlier.sizes());
  detail::for_state_heads(n, [&](isize i) {
    if (earlier.sizes().type == dtype::f64)
      detail::merge_heads(*this, n, earlier.as<double>() + i * n.head_elements(),
                          static_cast<const double*>(later.as<double>()) + i * n.head_elements());
    else
      detail::merge_heads(*this, n, earlier.as<float>() + i * n.head_elements(),
                          static_cast<const float*>(later.as<float>()) + i * n.head_elements());
  });
  earlier.set_tokens(earlier.tokens() + later.tokens());
}

namespace detail {

template <class Acc>
void load_heads(const linear_sizes& n, Acc* to, const array* S0, const array* z0, bool log_scaled) {
  for_state_heads(n, [&](isize i) {
    Acc* head = to + i * n.head_elements();
    clear_head(head, n, false);
    const state_tail<Acc> t(head + n.S_elements(), n);
    if (log_scaled && S0 == nullptr && z0 == nullptr) *t.peak = -std::numeric_limits<Acc>::infinity();
    for (isize f = 0; f < n.r; ++f) {
      if (S0 != nullptr)
        for (isize c = 0; c < n.e; ++c)
          head[(c / n.width * n.r + f) * n.width + c % n.width] = static_cast<Acc>(S0->at((i * n.r + f) * n.e + c));
      if (z0 != nullptr) t.z[f] = static_cast<Acc>(z0->at(i * n.r + f));
    }
  });
}

template <class Acc>
void store_heads(const linear_sizes& n, const Acc* from, Acc* S, Acc* z, bool log_scaled) {
  for_state_heads(n, [&](isize i) {
    const Acc* head = from + i * n.head_elements();
    const state_tail<Acc> t(const_cast<Acc*>(head) + n.S_elements(), n);
    const Acc gain = log_scaled ? std::exp(*t.peak) : Acc(1);
    for (isize f = 0; f < n.r; ++f) {
      for (isize c = 0; c < n.e; ++c)
        S[(i * n.r + f) * n.e + c] = gain * head[(c / n.width * n.r + f) * n.width + c % n.width];
      z[i * n.r + f] = gain * t.z[f];
    }
  });
}

}  // namespace detail

inline void linear_attention::load_state(state& s, const arrays& from) const {
  s.check(tag(), s.sizes(), name);
  const auto n = detail::sizes_of(*this, s.sizes());
  const auto at = [&](const char* key, isize elements, const char* wanted) -> const array* {
    const auto found = from.find(key);
    if (found == from.end()) return nullptr;
    require(found->second.size() == elements && is_float(found->second.type()), key, " is ", found->second.describe(),
            "; wanted floats ", wanted, " with B, G, r, e = ", n.B, ", ", n.S, ", ", n.r, ", ", n.e);
    return &found->second;
  };
  const array* S0 = at("S0", n.B * n.S * n.r * n.e, "[B, G, r, e]");
  const array* z0 = at("z0", n.B * n.S * n.r, "[B, G, r]");
  if (s.sizes().type == dtype::f64)
    detail::load_heads(n, s.as<double>(), S0, z0, phi().log_scaled());
  else
    detail::load_heads(n, s.as<float>(), S0, z0, phi().log_scaled());
}

inline arrays linear_attention::store_state(const state& s) const {
  s.check(tag(), s.sizes(), name);
  const auto n = detail::sizes_of(*this, s.sizes());
  const bool wide = s.sizes().type == dtype::f64;
  array S(wide ? element::f64 : element::f32, {n.B, n.S, n.r, n.e}),
      z(wide ? element::f64 : element::f32, {n.B, n.S, n.r});
  if (wide)
    detail::store_heads(n, s.as<double>(), static_cast<double*>(S.mutable_data()),
                        static_cast<double*>(z.mutable_data()), phi().log_scaled());
  else
    detail::store_heads(n, s.as<float>(), static_cast<float*>(S.mutable_data()), static_cast<float*>(z.mutable_data()),
                        phi().log_scaled());
  arrays out{{"S", S}};
  if (normalised()) out.emplace("z", z);
  return out;
}

}  // namespace FOVEA_ABI
}  // namespace fovea
