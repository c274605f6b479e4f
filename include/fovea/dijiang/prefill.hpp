// SPDX-License-Identifier: MIT
#pragma once
/// @file  DiJiang attention in blocks of 64 tokens per KV head: features in scratch, then the sweep that all linear mechanisms share.
///
/// Tasks are (batch item, KV head); each holds its whole sequence, so results depend on nothing but the head's own data.

#include <fovea/dijiang/blocks.hpp>
#include <fovea/kernel/linear_step.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Arch, class Acc>
class dijiang_sweeper {
 public:
  dijiang_sweeper(const dijiang_attention& m, const problem& p, state* s, arena scratch)
      : m_(m),
        p_(p),
        t_(*m.tables),
        n_(sizes_of(m, p.shape())),
        log_(m.tables->logarithmic() || m.normalise),
        state_(s == nullptr ? nullptr : s->as<Acc>()),
        past_(s == nullptr ? 0 : s->tokens()),
        memory_(scratch) {}

  void run(exec_ref exec) const {
    exec.for_tasks(n_.B * n_.G, [&](isize task, isize slot) { sequence(task, slot); });
  }

 private:
  using scratch_type = dijiang_scratch<Arch, Acc>;

  struct site {
    scratch_type& s;
    isize b, g;
    dijiang_head<Acc> head;
  };

  void sequence(isize task, isize slot) const {
    arena a = memory_;
    for (isize i = 0; i < slot; ++i) scratch_type(a, n_, t_.d);
    scratch_type s(a, n_, t_.d);
    s.clear(n_);
    Acc* at = state_ != nullptr ? state_ + task * n_.head_elements() : s.state;
    if (state_ == nullptr) clear_head(at, n_);
    site here{s, task / n_.G, task % n_.G, dijiang_head<Acc>(at, n_)};
    const isize m = p_.k.length, n = p_.q.length;
    if (!m_.is_causal) {
      absorb(here, 0, m);
      for (isize i = 0; i < n; i += feature_rows) answer(here, i, std::min(feature_rows, n - i));
      return;
    }
    const isize first = m > n ? m - n : 0;  // keys that every query sees
    absorb(here, 0, first);
    const isize empty = n > m ? n - m : 0;  // queries that see none
    for (isize i = 0; i < empty; ++i) zero_row(here, i);
    for (isize i = empty, most = scratch_type::tokens; i < n;) {
      const isize done = block(here, i, i + m - n, std::min(most, n - i));
      most = std::min(
          scratch_type::tokens,
          done == most ? 2 * most : std::max(isize{4}, 2 * done));  // rising exponents: shorter blocks waste less
      i += done;
    }
  }

  void zero_row(site& at, isize i) const {
    for (isize c = 0; c < n_.e; ++c) at.s.out[c] = Acc(0);
    for (isize h = 0; h < n_.R; ++h)
      simd::store_row<Arch, Acc>(p_.out.type, at.s.out, n_.e, p_.out.row(at.b, at.g * n_.R + h, i));
  }

  /// Features of keys [j, j + count), and of queries [i, i + count) of each head, as logarithms where log_.
  void keys(site& at, isize j, isize count) const { features(at, p_.k, at.g, j, count, at.s.k); }
  void queries(site& at, isize i, isize count) const {
    for (isize h = 0; h < n_.R; ++h) features(at, p_.q, at.g * n_.R + h, i, count, at.s.q + h * at.s.q_head);
  }
  void features(site& at, const tensor_ref& from, isize head, isize first, isize count, Acc* out) const {
    isize stride = from.row_stride;
    const Acc* x = static_cast<const Acc*>(from.row(at.b, head, first));
    if (from.type != dtype_of<Acc>) {
      for (isize i = 0; i < count; ++i)
        simd::load_row<Arch, Acc>(from.type, from.row(at.b, head, first + i), t_.d, at.s.x + i * t_.d);
      x = at.s.x, stride = t_.d;
    }
    dijiang_features<Arch, Acc>(t_, at.g, x, stride, count, out, at.s.stride, at.s.map, log_);
  }

  /// ln of the gain of a query or key at a position.
  double gain(const std::vector<float>& log_d, isize head, isize position) const {
    return t_.gains() ? static_cast<double>(log_d[static_cast<std::size_t>(head * t_.positions + position)]) : 0.0;
  }
  double rate(isize g) const {
    return t_.gamma.empty() ? 1.0 : t_.gamma[t_.gamma.size() == 1 ? 0 : static_cast<std::size_t>(g)];
  }

  /// Does key j (row i of s.k) lie above a reference?
  bool rises(const site& at, isize i, isize j) const {
    if (log_ && above<Arch, Acc>(at.s.k + i * at.s.stride, n_.r, at.head.c)) return true;
    return t_.gains() && gain(t_.log_d2, at.g, past_ + j) > static_cast<double>(at.head.g[0]);
  }
  /// Raises the references to key j (row i of s.k) and brings the state under them.
  void raise(site& at, isize i, isize j) const {
    auto& s = at.s;
    const Acc common = t_.gains() ? raise_one(gain(t_.log_d2, at.g, past_ + j), at.head.g[0]) : Acc(1);
    for (isize f = 0; f < n_.r; ++f)
      s.fade[f] = common * (log_ ? raise_one(static_cast<double>(s.k[i * s.stride + f]), at.head.c[f]) : Acc(1));
    rescale(at, s.fade);
  }
  /// Row i of s.k becomes the key's final row; then the rows of its queries.
  void settle(site& at, isize i, isize j) const {
    auto& s = at.s;
    Acc* k = s.k + i * s.stride;
    if (log_) key_row<Arch, Acc>(k, at.head.c, n_.r, k);
    if (t_.gains())
      feature::row_scale<Arch, Acc>(
          k, n_.r, static_cast<Acc>(std::exp(gain(t_.log_d2, at.g, past_ + j) - static_cast<double>(at.head.g[0]))));
    for (isize h = 0; h < n_.R; ++h) query_weight(at, h, i, past_ + j);
  }

  /// Row i of head h of the queries: its features relative to the references, and what multiplies its output.
  void query_weight(site& at, isize h, isize i, isize position) const {
    auto& s = at.s;
    Acc* q = s.q + h * s.q_head + i * s.stride;
    double log_gain = 0;
    if (log_) log_gain = static_cast<double>(query_row<Arch, Acc>(q, at.head.c, n_.r, q));
    if (t_.gains()) log_gain += gain(t_.log_d1, at.g * n_.R + h, position) + static_cast<double>(at.head.g[0]);
    s.gain[h * feature_rows + i] = m_.normalise    ? Acc(1)
                                   : log_gain == 0 ? Acc(1)
                                                   : static_cast<Acc>(std::exp(log_gain));
  }

  /// Causal: up to `count` queries from i on, against keys up to their own (from j on), which join the state. Returns how many were
  /// done: a key that raises a reference begins a block, so that no row depends on a later key, not even by rounding.
  isize block(site& at, isize i, isize j, isize count) const {
    keys(at, j, count), queries(at, i, count);
    if (rises(at, 0, j)) raise(at, 0, j);
    isize done = 0;
    do settle(at, done, j + done);
    while (++done < count && !rises(at, done, j + done));
    load_values(at, j, done);
    if (count == 1)
      single(at, i);
    else
      sweep(at, i, done);
    return done;
  }

  void sweep(site& at, isize i, isize count) const {
    auto& s = at.s;
    const bool decays = rate(at.g) != 1.0;
    for (isize t = 0; t < count; ++t) s.decay[t] = static_cast<Acc>(rate(at.g));
    kernel::sweep_block<Acc> b{};
    b.tokens = count, b.r = n_.r, b.heads = n_.R;
    b.k = b.u = s.k, b.q = s.q, b.k_stride = b.u_stride = b.q_stride = s.stride, b.q_head_stride = s.q_head;
    kernel::weight_block<Acc> w{};
    w.decay = decays ? s.decay : nullptr;
    w.sum = m_.normalise ? kernel::row_sum::divide : kernel::row_sum::none;
    w.gain = s.gain, w.add = w.floor = s.zeros, w.factor = s.factor, w.sums = s.sums,
    w.head_tokens = scratch_type::tokens;
    w.z = at.head.z, w.x_gain = s.x_gain, w.scale = s.scale, w.spare = s.spare, w.keep = s.keep, w.settles = s.settles,
    w.stride = s.stride;
    kernel::row_weights<Arch, Acc, false>(b, w, 0, count, nullptr, nullptr, nullptr);
    kernel::token_weights<Arch, Acc, false>(b, w);
    kernel::sweep_panels<Arch, Acc, false>(b, at.head.S, 0, n_.panels,
                                           {s.v, s.e_stride, s.out, s.e_stride, scratch_type::tokens * s.e_stride});
    for (isize h = 0; h < n_.R; ++h)
      for (isize t = 0; t < count; ++t)
        simd::store_row<Arch, Acc>(p_.out.type, s.out + (h * feature_rows + t) * s.e_stride, n_.e,
                                   p_.out.row(at.b, at.g * n_.R + h, i + t));
  }
  void load_values(site& at, isize j, isize count) const {
    auto& s = at.s;
    for (isize t = 0; t < count; ++t)
      simd::load_row<Arch, Acc>(p_.v.type, p_.v.row(at.b, at.g, j + t), n_.e, s.v + t * s.e_stride);
  }

  /// A block of one token: the decode step.
  void single(site& at, isize i) const {
    auto& s = at.s;
    const Acc keep = static_cast<Acc>(rate(at.g));
    for (isize f = 0; f < n_.r; ++f) at.head.z[f] = keep * at.head.z[f] + s.k[f];
    for (isize panel = 0; panel < n_.panels; ++panel)
      kernel::step_panel<Arch, Acc>(n_.r, at.head.S + panel * n_.r * n_.width, &keep, 0, s.k, s.v + panel * n_.width,
                                    n_.R, s.q, s.q_head, s.out + panel * n_.width, feature_rows * s.e_stride);
    for (isize h = 0; h < n_.R; ++h) finish(at, h, 0, i);
  }
  /// Divides row t of head h by its sum and stores it as output row i.
  void finish(site& at, isize h, isize t, isize i) const {
    auto& s = at.s;
    Acc factor = s.gain[h * feature_rows + t];
    if (m_.normalise) {
      const Acc den = feature::row_dot<Arch, Acc>(s.q + h * s.q_head + t * s.stride, at.head.z, n_.r);
      factor = den == Acc(0) ? Acc(0) : factor / den;
    }
    Acc* out = s.out + (h * feature_rows + t) * s.e_stride;
    feature::row_scale<Arch, Acc>(out, n_.e, factor);
    simd::store_row<Arch, Acc>(p_.out.type, out, n_.e, p_.out.row(at.b, at.g * n_.R + h, i));
  }

  /// Keys [first, last) join the state; every later query sees them all.
  void absorb(site& at, isize first, isize last) const {
    auto& s = at.s;
    for (isize j = first; j < last; j += feature_rows) {
      const isize count = std::min(feature_rows, last - j);
      keys(at, j, count);
      for (isize t = 0; t < count; ++t)
        if (rises(at, t, j + t)) raise(at, t, j + t);
      const double g = rate(at.g);
      for (isize f = 0; f < n_.r; ++f) s.fade[f] = static_cast<Acc>(std::pow(g, static_cast<double>(count)));
      rescale(at, s.fade);
      for (isize t = 0; t < count; ++t) {
        Acc* k = s.k + t * s.stride;
        if (log_) key_row<Arch, Acc>(k, at.head.c, n_.r, k);
        const double own =
            std::pow(g, static_cast<double>(count - 1 - t)) *
            (t_.gains() ? std::exp(gain(t_.log_d2, at.g, past_ + j + t) - static_cast<double>(at.head.g[0])) : 1.0);
        if (own != 1) feature::row_scale<Arch, Acc>(k, n_.r, static_cast<Acc>(own));
        for (isize f = 0; f < n_.r; ++f) at.head.z[f] += k[f];
      }
      load_values(at, j, count);
      for (isize panel = 0; panel < n_.panels; ++panel)
        tile::gemm<Arch, Acc>(n_.r, n_.width, count, s.k, isize{1}, s.stride, s.v + panel * n_.width, s.e_stride,
                              at.head.S + panel * n_.r * n_.width, n_.width, true);
    }
  }
  void rescale(site& at, const Acc* fade) const {
    for (isize f = 0; f < n_.r; ++f) {
      if (fade[f] == Acc(1)) continue;
      at.head.z[f] *= fade[f];
      for (isize panel = 0; panel < n_.panels; ++panel)
        feature::row_scale<Arch, Acc>(at.head.S + (panel * n_.r + f) * n_.width, n_.width, fade[f]);
    }
  }

  /// Not causal: queries [i, i + count) against the finished state.
  void answer(site& at, isize i, isize count) const {
    auto& s = at.s;
    queries(at, i, count);
    for (isize h = 0; h < n_.R; ++h) {
      for (isize t = 0; t < count; ++t) query_weight(at, h, t, 0);
      for (isize panel = 0; panel < n_.panels; ++panel)
        tile::gemm<Arch, Acc>(count, n_.width, n_.r, s.q + h * s.q_head, s.stride, isize{1},
                              at.head.S + panel * n_.r * n_.width, n_.width,
                              s.out + h * feature_rows * s.e_stride + panel * n_.width, s.e_stride, false);
      for (isize t = 0; t < count; ++t) finish(at, h, t, i + t);
    }
  }

  const dijiang_attention& m_;
  const problem& p_;
  const dijiang_tables& t_;
  dijiang_sizes n_;
  bool
      log_;  // features as logarithms: exponentials, and the released form's softmax where a quotient of tiny products is wanted
  Acc* state_;
  isize past_;
  arena memory_;
};

}  // namespace detail

#if FOVEA_DEFINES_LOOPS
template <class Arch, class Acc>
void dijiang_attention::run(exec_ref exec, const problem& p, state* s, arena scratch) const {
  detail::dijiang_sweeper<Arch, Acc>(*this, p, s, scratch).run(exec);
}
FOVEA_INSTANTIATE(template void dijiang_attention::run<simd::native, float>(exec_ref, const problem&, state*, arena)
                      const;
                  template void dijiang_attention::run<simd::native, double>(exec_ref, const problem&, state*, arena)
                      const;)
#endif
inline void dijiang_attention::prefill(exec_ref exec, const problem& p, arena scratch) const {
  p.q.type == dtype::f64 ? run<simd::native, double>(exec, p, nullptr, scratch)
                         : run<simd::native, float>(exec, p, nullptr, scratch);
}
inline void dijiang_attention::prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
  p.q.type == dtype::f64 ? run<simd::native, double>(exec, p, &s, scratch)
                         : run<simd::native, float>(exec, p, &s, scratch);
  s.set_tokens(s.tokens() + p.k.length);
}
inline std::size_t dijiang_attention::workspace_size(const shape& s, int threads) const {
  arena a;
  const auto n = detail::sizes_of(*this, s);
  for (int t = 0; t < threads; ++t) {
    if (s.type == dtype::f64)
      detail::dijiang_scratch<simd::native, double>(a, n, tables->d);
    else
      detail::dijiang_scratch<simd::native, float>(a, n, tables->d);
  }
  return a.bytes();
}

}  // namespace FOVEA_ABI
}  // namespace fovea
