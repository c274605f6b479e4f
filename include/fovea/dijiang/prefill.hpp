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
      : m_(m), p_(p), t_(*m.tables), n_(sizes_of(m, p.shape())), state_(s == nullptr ? nullptr : s->as<Acc>()), past_(s == nullptr ? 0 : s->tokens()), memory_(scratch) {}

  void run(exec_ref exec) const {
    exec.for_tasks(n_.B * n_.G, [&](isize task, isize slot) { sequence(task, slot); });
  }

 private:
  static constexpr int T = kernel::sweep_shape<Arch>::T;
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
    for (isize i = empty; i < n; i += feature_rows) {
      const isize count = std::min(feature_rows, n - i);
      if (count == 1)
        single(here, i, i + m - n);
      else
        block(here, i, i + m - n, count);
    }
  }

  void zero_row(site& at, isize i) const {
    for (isize c = 0; c < n_.e; ++c) at.s.out[c] = Acc(0);
    for (isize h = 0; h < n_.R; ++h) simd::store_row<Arch, Acc>(p_.out.type, at.s.out, n_.e, p_.out.row(at.b, at.g * n_.R + h, i));
  }

  /// Features of keys [j, j + count), and of queries [i, i + count) of each head, as logarithms (released: as they are).
  void keys(site& at, isize j, isize count) const { features(at, p_.k, at.g, j, count, at.s.k); }
  void queries(site& at, isize i, isize count) const {
    for (isize h = 0; h < n_.R; ++h) features(at, p_.q, at.g * n_.R + h, i, count, at.s.q + h * at.s.q_head);
  }
  void features(site& at, const tensor_ref& from, isize head, isize first, isize count, Acc* out) const {
    isize stride = from.row_stride;
    const Acc* x = static_cast<const Acc*>(from.row(at.b, head, first));
    if (from.type != dtype_of<Acc>) {
      for (isize i = 0; i < count; ++i) simd::load_row<Arch, Acc>(from.type, from.row(at.b, head, first + i), t_.d, at.s.x + i * t_.d);
      x = at.s.x, stride = t_.d;
    }
    dijiang_features<Arch, Acc>(t_, at.g, x, stride, count, out, at.s.stride, at.s.map);
  }

  /// ln of the gain of a query or key at a position.
  double gain(const std::vector<float>& log_d, isize head, isize position) const {
    return t_.gains() ? static_cast<double>(log_d[static_cast<std::size_t>(head * t_.positions + position)]) : 0.0;
  }
  double rate(isize g) const { return t_.gamma.empty() ? 1.0 : t_.gamma[t_.gamma.size() == 1 ? 0 : static_cast<std::size_t>(g)]; }

  /// Token i of the block enters: references, decays and the key's row become final; then the rows of its queries.
  void settle(site& at, isize i, isize query, isize key, bool& channel, bool& decays) const {
    auto& s = at.s;
    Acc* k = s.k + i * s.stride;
    Acc decay = static_cast<Acc>(rate(at.g));
    Acc own(1);
    if (t_.gains()) {
      const double b = gain(t_.log_d2, at.g, past_ + key);
      decay *= raise_one(b, at.head.g[0]);
      own = static_cast<Acc>(std::exp(b - static_cast<double>(at.head.g[0])));
    }
    const bool raised = t_.logarithmic() && raise<Arch, Acc>(k, n_.r, at.head.c, s.fade);
    if (t_.logarithmic()) key_row<Arch, Acc>(k, at.head.c, n_.r, k);
    if (own != Acc(1)) feature::row_scale<Arch, Acc>(k, n_.r, own);
    if (raised && !channel) {  // the block's first: until here every channel had decayed alike
      channel = true;
      for (isize t = 0; t < i; ++t) fill(s.channel + t * s.stride, s.decay[t]);
    }
    s.decay[i] = decay;
    decays = decays || decay != Acc(1);
    if (channel) {
      Acc* a = s.channel + i * s.stride;
      fill(a, decay);
      for (isize f = 0; raised && f < n_.r; ++f) a[f] *= s.fade[f];
    }
    for (isize h = 0; h < n_.R; ++h) query_weight(at, h, i, query + i, past_ + key);
  }
  void fill(Acc* a, Acc x) const {
    for (isize f = 0; f < n_.rows; ++f) a[f] = x;
  }

  /// Row i of head h of the queries: its features relative to the references, and what multiplies its output.
  void query_weight(site& at, isize h, isize i, isize, isize position) const {
    auto& s = at.s;
    Acc* q = s.q + h * s.q_head + i * s.stride;
    double log_gain = 0;
    if (t_.logarithmic()) log_gain = static_cast<double>(query_row<Arch, Acc>(q, at.head.c, n_.r, q));
    if (t_.gains()) log_gain += gain(t_.log_d1, at.g * n_.R + h, position) + static_cast<double>(at.head.g[0]);
    s.gain[h * feature_rows + i] = m_.normalise ? Acc(1) : log_gain == 0 ? Acc(1) : static_cast<Acc>(std::exp(log_gain));
  }

  /// Causal: queries [i, i + count) against keys up to [j, j + count), which join the state.
  void block(site& at, isize i, isize j, isize count) const {
    auto& s = at.s;
    const isize padded = ceil_div(count, isize{T}) * T;
    keys(at, j, count), queries(at, i, count);
    bool channel = false, decays = false;
    for (isize t = 0; t < count; ++t) settle(at, t, i, j + t, channel, decays);
    for (isize t = count; t < padded; ++t) {
      s.decay[t] = Acc(1);
      if (channel) fill(s.channel + t * s.stride, Acc(1));
      clear_row(s.k + t * s.stride);
      for (isize h = 0; h < n_.R; ++h) clear_row(s.q + h * s.q_head + t * s.stride), s.gain[h * feature_rows + t] = Acc(0);
    }
    load_values(at, j, count, padded);
    const kernel::sweep_block<Acc, T> sweep{padded / T, n_.r, s.stride, s.k, s.k, s.step, n_.R, s.q, s.q_head, s.read, feature_rows / T};
    const kernel::weight_block<Acc> w{decays ? s.decay : nullptr, s.channel, nullptr, m_.normalise, s.gain, s.zeros, s.zeros, at.head.z, s.scale, s.keep};
    if (channel)
      kernel::channel_weights<Arch, Acc, false>(sweep, w, s.k, s.q, nullptr, s.step, s.read);
    else
      kernel::scalar_weights<Arch, Acc, false>(sweep, w, s.step, s.read);
    constexpr isize columns = kernel::sweep_shape<Arch>::NR * simd::pack<Acc, Arch>::size;
    for (isize c = 0; c < n_.panels * n_.width; c += columns)
      kernel::sweep_panel<Arch, Acc, false>(sweep, at.head.S + c / n_.width * n_.r * n_.width + c % n_.width, s.v + c, s.e_stride, s.out + c, s.e_stride,
                                            feature_rows * s.e_stride);
    for (isize h = 0; h < n_.R; ++h)
      for (isize t = 0; t < count; ++t)
        simd::store_row<Arch, Acc>(p_.out.type, s.out + (h * feature_rows + t) * s.e_stride, n_.e, p_.out.row(at.b, at.g * n_.R + h, i + t));
  }
  void clear_row(Acc* x) const {
    for (isize f = 0; f < n_.rows; ++f) x[f] = Acc(0);
  }
  void load_values(site& at, isize j, isize count, isize padded) const {
    auto& s = at.s;
    for (isize t = 0; t < count; ++t) simd::load_row<Arch, Acc>(p_.v.type, p_.v.row(at.b, at.g, j + t), n_.e, s.v + t * s.e_stride);
    for (isize c = count * s.e_stride; c < padded * s.e_stride; ++c) s.v[c] = Acc(0);
  }

  /// One token: the decode step.
  void single(site& at, isize i, isize j) const {
    auto& s = at.s;
    keys(at, j, 1), queries(at, i, 1);
    bool channel = false, decays = false;
    settle(at, 0, i, j, channel, decays);
    const Acc* keep = channel ? s.channel : s.decay;
    const isize keep_step = channel ? 1 : 0;
    for (isize f = 0; f < n_.r; ++f) at.head.z[f] = keep[f * keep_step] * at.head.z[f] + s.k[f];
    load_values(at, j, 1, 1);
    for (isize panel = 0; panel < n_.panels; ++panel)
      kernel::step_panel<Arch, Acc>(n_.r, at.head.S + panel * n_.r * n_.width, keep, keep_step, s.k, s.v + panel * n_.width, n_.R, s.q, s.q_head,
                                    s.out + panel * n_.width, feature_rows * s.e_stride);
    for (isize h = 0; h < n_.R; ++h) finish(at, h, 0, i);
  }
  /// Divides row t of head h by its sum and stores it as output row i.
  void finish(site& at, isize h, isize t, isize i) const {
    auto& s = at.s;
    Acc factor = s.gain[h * feature_rows + t];
    if (m_.normalise) {
      const Acc den = row_dot<Arch, Acc>(s.q + h * s.q_head + t * s.stride, at.head.z, n_.r);
      factor = den == Acc(0) ? Acc(0) : factor / den;
    }
    Acc* out = s.out + (h * feature_rows + t) * s.e_stride;
    feature::row_scale<Arch, Acc>(out, n_.e, factor);
    simd::store_row<Arch, Acc>(p_.out.type, out, n_.e, p_.out.row(at.b, at.g * n_.R + h, i));
  }

  /// Keys [first, last) join the state; every later query sees them all, so a block is brought to its own largest exponents.
  void absorb(site& at, isize first, isize last) const {
    auto& s = at.s;
    for (isize j = first; j < last; j += feature_rows) {
      const isize count = std::min(feature_rows, last - j);
      keys(at, j, count);
      double fade = 1;
      for (isize t = 0; t < count; ++t) {
        fade *= rate(at.g) * (t_.gains() ? static_cast<double>(raise_one(gain(t_.log_d2, at.g, past_ + j + t), at.head.g[0])) : 1.0);
        if (t_.logarithmic() && raise<Arch, Acc>(s.k + t * s.stride, n_.r, at.head.c, s.fade)) rescale(at, s.fade);
      }
      if (fade != 1) {
        fill(s.fade, static_cast<Acc>(fade));
        rescale(at, s.fade);
      }
      for (isize t = 0; t < count; ++t) {
        Acc* k = s.k + t * s.stride;
        if (t_.logarithmic()) key_row<Arch, Acc>(k, at.head.c, n_.r, k);
        const double own = std::pow(rate(at.g), static_cast<double>(count - 1 - t)) *
                           (t_.gains() ? std::exp(gain(t_.log_d2, at.g, past_ + j + t) - static_cast<double>(at.head.g[0])) : 1.0);
        if (own != 1) feature::row_scale<Arch, Acc>(k, n_.r, static_cast<Acc>(own));
        for (isize f = 0; f < n_.r; ++f) at.head.z[f] += k[f];
      }
      load_values(at, j, count, count);
      for (isize panel = 0; panel < n_.panels; ++panel)
        tile::gemm<Arch, Acc>(n_.r, n_.width, count, s.k, isize{1}, s.stride, s.v + panel * n_.width, s.e_stride, at.head.S + panel * n_.r * n_.width, n_.width, true);
    }
  }
  void rescale(site& at, const Acc* fade) const {
    for (isize f = 0; f < n_.r; ++f) {
      if (fade[f] == Acc(1)) continue;
      at.head.z[f] *= fade[f];
      for (isize panel = 0; panel < n_.panels; ++panel) feature::row_scale<Arch, Acc>(at.head.S + (panel * n_.r + f) * n_.width, n_.width, fade[f]);
    }
  }

  /// Not causal: queries [i, i + count) against the finished state.
  void answer(site& at, isize i, isize count) const {
    auto& s = at.s;
    queries(at, i, count);
    for (isize h = 0; h < n_.R; ++h) {
      for (isize t = 0; t < count; ++t) query_weight(at, h, t, i + t, 0);
      for (isize panel = 0; panel < n_.panels; ++panel)
        tile::gemm<Arch, Acc>(count, n_.width, n_.r, s.q + h * s.q_head, s.stride, isize{1}, at.head.S + panel * n_.r * n_.width, n_.width,
                              s.out + h * feature_rows * s.e_stride + panel * n_.width, s.e_stride, false);
      for (isize t = 0; t < count; ++t) finish(at, h, t, i + t);
    }
  }

  const dijiang_attention& m_;
  const problem& p_;
  const dijiang_tables& t_;
  dijiang_sizes n_;
  Acc* state_;
  isize past_;
  arena memory_;
};

}  // namespace detail

template <class Arch, class Acc>
void dijiang_attention::run(exec_ref exec, const problem& p, state* s, arena scratch) const {
  detail::dijiang_sweeper<Arch, Acc>(*this, p, s, scratch).run(exec);
}
inline void dijiang_attention::prefill(exec_ref exec, const problem& p, arena scratch) const {
  p.q.type == dtype::f64 ? run<simd::native, double>(exec, p, nullptr, scratch) : run<simd::native, float>(exec, p, nullptr, scratch);
}
inline void dijiang_attention::prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
  p.q.type == dtype::f64 ? run<simd::native, double>(exec, p, &s, scratch) : run<simd::native, float>(exec, p, &s, scratch);
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
