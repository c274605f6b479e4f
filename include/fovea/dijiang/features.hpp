// SPDX-License-Identifier: MIT
#pragma once
/// @file  DiJiang's features of a block of rows, as logarithms, and the same as a feature map for linear_attention.
///
///   out[t][f] = ln phi_f(x_t)         or phi_f(x_t) itself, where `logarithms` is false (released form only: it is a softmax)
///
/// Cost       per row: blocks * (transform.macs() + 2 d) multiply-adds, r exponentials.
/// Reference  dijiang_tables::define.

#include <fovea/dijiang/tables.hpp>
#include <fovea/feature/feature_map.hpp>
#include <fovea/feature/rows.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

namespace detail {

/// out = x * w (+ add) - shift
template <class Arch, class Acc>
FOVEA_INLINE void dijiang_row(const Acc* x, const Acc* w, const Acc* add, isize n, Acc shift, Acc* out) {
  using P = simd::pack<Acc, Arch>;
  const P s(shift);
  for (isize c = 0; c < n; c += P::size) {
    const P base = add != nullptr ? simd::load_n<P>(add + c, n - c) - s : P(Acc(0));
    simd::store_n(out + c, simd::fma(simd::load_n<P>(x + c, n - c), simd::load_n<P>(w + c, n - c), base), n - c);
  }
}

/// `scratch` holds 2 * rows * d elements.
template <class Arch, class Acc>
void dijiang_features(const dijiang_tables& m, isize kv_head, const Acc* x, isize x_stride, isize rows, Acc* out,
                      isize out_stride, Acc* scratch, bool logarithms) noexcept {
  const auto& table = m.transform.template table<Acc>();
  const auto& c = m.constants<Acc>();
  const Acc *after = c.after.data() + m.pick(kv_head) * m.r, *offset = c.offset.data() + m.pick(kv_head) * m.r;
  Acc *a = scratch, *b = scratch + rows * m.d;
  const Acc shrink = static_cast<Acc>(0.5 / std::sqrt(static_cast<double>(m.d)));
  for (isize block = 0; block < m.blocks; ++block) {
    const isize first = block * m.d;
    for (isize t = 0; t < rows; ++t)
      dijiang_row<Arch, Acc>(x + t * x_stride, c.before.data() + first, nullptr, m.d, Acc(0), a + t * m.d);
    if (m.form == dijiang_form::released)
      feature::cosine_type3<Arch, Acc>(table, rows, a, b);
    else
      feature::cosine_type2<Arch, Acc>(table, rows, a, b);
    for (isize t = 0; t < rows; ++t) {
      const Acc half_square =
          m.form == dijiang_form::unbiased ? shrink * feature::row_square<Arch, Acc>(x + t * x_stride, m.d) : Acc(0);
      dijiang_row<Arch, Acc>(b + t * m.d, after + first, offset + first, m.d, half_square,
                             out + t * out_stride + first);
    }
  }
  if (m.form != dijiang_form::released) return;
  for (isize t = 0; t < rows; ++t) {
    Acc* y = out + t * out_stride;
    const Acc top = feature::row_max<Arch, Acc>(y, m.r);
    if (logarithms)
      feature::row_shift<Arch, Acc>(y, m.r, -(top + std::log(feature::row_sum_exp<Arch, Acc>(y, m.r, top))));
    else
      feature::row_scale<Arch, Acc>(y, m.r, 1 / feature::row_exp<Arch, Acc>(y, m.r, Acc(1), top, y));
  }
}

}  // namespace detail

/// DiJiang's map for linear_attention: `linear_attention{.map = dijiang_map{tables.get()}}`. Keep the tables alive.
/// dijiang_attention itself keeps a log-scale per feature and so stands larger exponents than one log-scale per row does.
struct dijiang_map {
  const dijiang_tables* tables = nullptr;

  static constexpr bool log_scaled = true;
  isize features(isize) const { return tables->r; }
  isize scratch(isize d) const { return 2 * feature_rows * d; }
  double macs(isize) const {
    return static_cast<double>(tables->blocks) * (tables->transform.macs() + 2.0 * static_cast<double>(tables->d));
  }
  bool trained() const { return tables->trained; }
  isize derive_scratch(isize d) const { return 4 * feature_rows * d; }
  isize weights(isize) const { return 2 * tables->r; }  // D [r], t [r]
  void check(const shape& s) const {
    require(tables != nullptr, "dijiang_map has no tables");
    require(tables->d == s.d, "dijiang_map is made for head_dim = ", tables->d, " and q, k are ", s.d, " wide");
    require(tables->heads() == 1 || tables->heads() == s.G, "dijiang_map has tables for ", tables->heads(),
            " heads; wanted 1, or ", s.G, " (KV heads)");
    require(tables->gamma.empty() && !tables->gains(), "dijiang_map: gamma and gains belong to dijiang_attention");
  }
  void fingerprint(detail::fingerprint& f) const {
    f.text("dijiang").number(static_cast<double>(tables->form)).number(static_cast<double>(tables->r));
    for (const float t : tables->t) f.number(static_cast<double>(t));
  }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc* scratch) const noexcept {
    detail::dijiang_features<Arch, Acc>(*tables, b.kv_head, b.x, b.x_stride, b.rows, b.out, b.out_stride, scratch,
                                        tables->logarithmic());
    for (isize t = 0; t < b.rows; ++t) {
      Acc* y = b.out + t * b.out_stride;
      b.log_scale[t] = tables->logarithmic() ? feature::row_max<Arch, Acc>(y, tables->r) : Acc(0);
      if (tables->logarithmic()) feature::row_exp<Arch, Acc>(y, tables->r, Acc(1), b.log_scale[t], y);
    }
  }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept;
  double define(const feature_site& at, const double* x, isize, double* out) const {
    tables->define(at.kv_head, x, out);
    double top = tables->logarithmic() ? out[0] : 0.0;
    for (isize f = 0; f < tables->r && tables->logarithmic(); ++f) top = std::fmax(top, out[f]);
    for (isize f = 0; f < tables->r; ++f) out[f] = std::exp(out[f] - top);
    return top;
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea

#include <fovea/dijiang/derivative.hpp>
