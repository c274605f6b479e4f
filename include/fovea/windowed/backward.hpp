// SPDX-License-Identifier: MIT
#pragma once
/// @file  windowed_attention, backward: by q, k, v, the map's weights, log_weight and query_gate.
///
///   p_ij = u_ij e^(-lse_i),   delta_i = dO_i . o_i,   d loss / d log u_ij = p_ij (dO_i . v_j - delta_i)
///
/// For near keys that is the backward pass of softmax_attention under the joint lse and out. For the rest it is that of an unnormalised
/// linear_attention over values [v; 1] with dO' = e^(a - lse) [dO; -delta]; its sum over j is d loss / d a_i.
///
/// Contract   out and lse as prefill wrote them. Where several keys of a window score the same, the first takes the gradient of the maximum.
/// Cost       the two passes, and one forward pass of the rest.   Memory  linear in n and m: gradients of both parts, values once more.

#include <fovea/linear/check_backward.hpp>
#include <fovea/softmax/backward.hpp>
#include <fovea/windowed/prefill.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
class windowed_backward_run {
  using Arch = simd::native;

 public:
  windowed_backward_run(arena& memory, const windowed_attention& m, const shape& s, int threads)
      : m_(m), exact_(m.exact()), rest_(m.rest()), level_(m, s), s_(s) {
    x0_ = m.first + m.window - (s.m - s.n);
    x0_ = x0_ < 0 ? 0 : x0_ > s.n ? s.n : x0_;
    keys_ = s.m - m.window - m.first > 0 && x0_ < s.n ? s.m - m.window - m.first : 0;
    const auto take = [&](isize heads, isize rows, isize width, dtype type) {
      auto* data = memory.take<std::byte>(s.B * heads * rows * width * static_cast<isize>(size_of(type)));
      return tensor_mut(data, type, s.B, heads, rows, width, heads * rows * width, rows * width, width);
    };
    const dtype acc = dtype_of<Acc>;
    const isize rows = s.n - x0_;
    dq_ = take(s.H, s.n, s.d, acc), dk_ = take(s.G, s.m, s.d, acc), dv_ = take(s.G, s.m, s.e, acc);
    far_dq_ = take(s.H, rows, s.d, acc), far_dk_ = take(s.G, keys_, s.d, acc), far_dv_ = take(s.G, keys_, s.e + 1, acc);
    values_ = take(s.G, keys_, s.e + 1, s.type), dout_ = take(s.H, rows, s.e + 1, acc),
    far_ = take(s.H, rows, s.e + 1, acc);
    da_ = take(s.H, rows, 1, acc);
    scratch_of_thread_ = level_.scratch(s.d) + s.d;
    rows_ = memory.take<Acc>(threads * scratch_of_thread_);
    shape far = s;
    far.n = rows, far.m = keys_, far.e = s.e + 1;
    own_ = std::max({exact_.workspace_size_backward(s, threads), rest_.workspace_size(far, threads),
                     rest_.workspace_size_backward(far, threads)});
    own_memory_ = memory.take<std::byte>(static_cast<isize>(own_));
  }

  void run(exec_ref exec, const backward_problem& p) const {
    backward_problem near{p.q, p.k, p.v, p.out, p.lse, p.dout, {}};
    near.to.dq = dq_, near.to.dk = dk_, near.to.dv = dv_;
    exact_.backward(exec, near, arena({own_memory_, own_}));
    if (keys_ > 0) rest(exec, p);
    exec.for_tasks(s_.B * s_.G, [&](isize task, isize slot) {
      add(p, task / s_.G, task % s_.G, rows_ + slot * scratch_of_thread_);
    });
    for (isize h = 0; h < s_.H; ++h) sum_levels(p, h);
  }

 private:
  Acc& number(const tensor_mut& t, isize b, isize h, isize i) const { return *static_cast<Acc*>(t.row(b, h, i)); }

  void rest(exec_ref exec, const backward_problem& p) const {
    exec.for_tasks(s_.B * s_.G, [&](isize task, isize) {
      const isize b = task / s_.G, g = task % s_.G;
      for (isize j = 0; j < keys_; ++j) {
        for (isize c = 0; c < s_.e; ++c) values_.set(b, g, j, c, p.v.get(b, g, m_.first + j, c));
        values_.set(b, g, j, s_.e, 1.0);
      }
    });
    exec.for_tasks(s_.B * s_.H, [&](isize task, isize slot) {
      const isize b = task / s_.H, h = task % s_.H;
      for (isize x = 0; x < s_.n - x0_; ++x) scale_row(p, b, h, x, rows_ + slot * scratch_of_thread_);
    });
    backward_problem far;
    far.q = p.q.slice(x0_, s_.n - x0_), far.k = p.k.slice(m_.first, keys_), far.v = values_;
    problem again;  // the numerators and, in the last column, the sums; a log-scaled map's factor comes with them
    again.q = far.q, again.k = far.k, again.v = far.v, again.out = far_;
    rest_.prefill(exec, again, arena({own_memory_, own_}));
    far.out = far_, far.dout = dout_;
    far.to.dq = far_dq_, far.to.dk = far_dk_, far.to.dv = far_dv_;
    far.to.dquery_map = p.to.dquery_map, far.to.dkey_map = p.to.dkey_map;
    rest_.backward(exec, far, arena({own_memory_, own_}));
    exec.for_tasks(s_.B * s_.H, [&](isize task, isize) {
      const isize b = task / s_.H, h = task % s_.H;
      for (isize x = 0; x < s_.n - x0_; ++x) {
        const Acc *o = static_cast<const Acc*>(far_.row(b, h, x)), *g = static_cast<const Acc*>(dout_.row(b, h, x));
        Acc sum(0);
        for (isize c = 0; c <= s_.e; ++c) sum += o[c] * g[c];
        number(da_, b, h, x) = sum;
      }
    });
  }

  /// Row x of dO'. A row without a number for lse has seen nothing.
  void scale_row(const backward_problem& p, isize b, isize h, isize x, Acc* scratch) const {
    const isize i = x0_ + x;
    Acc* to = static_cast<Acc*>(dout_.row(b, h, x));
    const Acc a = level_.of(p.q, p.k, b, h, i, s_.m - s_.n + i, scratch);
    const Acc factor = std::exp(a - *static_cast<const Acc*>(p.lse.row(b, h, i)));
    Acc delta(0);
    for (isize c = 0; c < s_.e; ++c) {
      const Acc g = static_cast<Acc>(p.dout.get(b, h, i, c));
      delta += g * static_cast<Acc>(p.out.get(b, h, i, c));
      to[c] = factor * g;
    }
    to[s_.e] = -factor * delta;
  }

  /// Both parts into the gradients of one KV head and its queries.
  void add(const backward_problem& p, isize b, isize g, Acc* scratch) const {
    for (isize h = g * s_.group(); keys_ > 0 && h < (g + 1) * s_.group(); ++h)
      for (isize x = 0; x < s_.n - x0_; ++x) {
        Acc* dq = static_cast<Acc*>(dq_.row(b, h, x0_ + x));
        const Acc *more = static_cast<const Acc*>(far_dq_.row(b, h, x)), da = number(da_, b, h, x);
        for (isize c = 0; c < s_.d; ++c) dq[c] += more[c];
        if (m_.query_gate.data != nullptr) {
          const Acc* gate = level_.gate(h, scratch);
          for (isize c = 0; c < s_.d; ++c) dq[c] += da * gate[c];
        }
        if (m_.level == rest_level::window_maximum) add_maximum(p, b, h, x, da, scratch);
      }
    for (isize j = 0; j < keys_; ++j) {
      Acc *dk = static_cast<Acc*>(dk_.row(b, g, m_.first + j)), *dv = static_cast<Acc*>(dv_.row(b, g, m_.first + j));
      const Acc *far_k = static_cast<const Acc*>(far_dk_.row(b, g, j)),
                *far_v = static_cast<const Acc*>(far_dv_.row(b, g, j));
      for (isize c = 0; c < s_.d; ++c) dk[c] += far_k[c];
      for (isize c = 0; c < s_.e; ++c) dv[c] += far_v[c];
    }
    const auto store = [&](const tensor_mut& to, const tensor_mut& from, isize head, isize rows, isize width) {
      for (isize i = 0; to && i < rows; ++i)
        simd::store_row<Arch, Acc>(to.type, static_cast<const Acc*>(from.row(b, head, i)), width, to.row(b, head, i));
    };
    for (isize h = g * s_.group(); h < (g + 1) * s_.group(); ++h) store(p.to.dq, dq_, h, s_.n, s_.d);
    store(p.to.dk, dk_, g, s_.m, s_.d), store(p.to.dv, dv_, g, s_.m, s_.e);
  }
  void add_maximum(const backward_problem& p, isize b, isize h, isize x, Acc da, Acc* scratch) const {
    const isize i = x0_ + x, g = h / s_.group();
    isize top = s_.m - s_.n + i;
    level_.of(p.q, p.k, b, h, i, top, scratch, &top);
    Acc *dq = static_cast<Acc*>(dq_.row(b, h, i)), *dk = static_cast<Acc*>(dk_.row(b, g, top));
    for (isize c = 0; c < s_.d; ++c) {
      dq[c] += da * level_.scale() * static_cast<Acc>(p.k.get(b, g, top, c));
      dk[c] += da * level_.scale() * static_cast<Acc>(p.q.get(b, h, i, c));
    }
  }

  void sum_levels(const backward_problem& p, isize h) const {
    double weight = 0;
    float* gate = p.to.dquery_gate != nullptr ? p.to.dquery_gate + h * s_.d : nullptr;
    for (isize c = 0; gate != nullptr && c < s_.d; ++c) {
      double sum = 0;
      for (isize b = 0; keys_ > 0 && b < s_.B; ++b)
        for (isize x = 0; x < s_.n - x0_; ++x)
          sum += static_cast<double>(number(da_, b, h, x)) * p.q.get(b, h, x0_ + x, c);
      gate[c] = static_cast<float>(sum);
    }
    for (isize b = 0; keys_ > 0 && b < s_.B; ++b)
      for (isize x = 0; x < s_.n - x0_; ++x) weight += static_cast<double>(number(da_, b, h, x));
    if (p.to.dlog_weight != nullptr) p.to.dlog_weight[h] = static_cast<float>(weight);
  }

  const windowed_attention& m_;
  softmax_attention exact_;
  linear_attention rest_;
  windowed_level<Acc> level_;
  shape s_;
  isize x0_ = 0, keys_ = 0, scratch_of_thread_ = 0;  // the first row with a rest; keys in any rest
  tensor_mut dq_, dk_, dv_, far_dq_, far_dk_, far_dv_, values_, dout_, far_, da_;
  Acc* rows_;
  std::byte* own_memory_;
  std::size_t own_;
};

}  // namespace detail

inline void windowed_attention::check(const backward_problem& p) const {
  detail::check_problem(p.forward());
  detail::check_windowed(*this, p.shape());
  require(map.differentiable(), "the feature map of this windowed_attention has no derivative");
  const gradients& to = p.to;
  require(to.dE == nullptr && to.dF == nullptr && to.dbias == nullptr && to.dsinks == nullptr && !to.dlog_decay &&
              !to.dbeta && !to.derase && !to.dwrite && !to.dS && !to.dz && !p.from.given() && !p.dS_end && !p.dz_end,
          "gradients of projections, biases, sinks, gates or a state were asked for, or a state was given; "
          "windowed_attention has none");
  require(p.lse || p.q.batch * p.q.heads * p.q.length == 0,
          "lse is null; backward makes the weights anew from the lse that prefill wrote");
  require(to.dlog_weight == nullptr || log_weight.data != nullptr, "dlog_weight was asked for; there is no log_weight");
  require(to.dquery_gate == nullptr || query_gate.data != nullptr, "dquery_gate was asked for; there is no query_gate");
  const isize w = map.weights(p.q.width);
  const auto fits = [&](const char* what, const tensor_mut& g, isize heads) {
    if (!g) return;
    detail::check_tensor(what, g);
    require(g.batch == 1 && g.heads == heads && g.length == 1 && g.width == w, what, " is ", detail::describe(g),
            "; wanted [1, ", heads, ", 1, ", w, "]");
    require((g.type == dtype::f64) == (p.q.type == dtype::f64), what, " is ", name_of(g.type), " and q is ",
            name_of(p.q.type), "; f64 goes with f64 only");
  };
  fits("dquery_map", to.dquery_map, p.q.heads), fits("dkey_map", to.dkey_map, p.k.heads);
  detail::check_gradients(p);
}

inline std::size_t windowed_attention::workspace_size_backward(const shape& s, int threads) const {
  arena measure;
  if (s.type == dtype::f64)
    detail::windowed_backward_run<double>(measure, *this, s, threads);
  else
    detail::windowed_backward_run<float>(measure, *this, s, threads);
  return measure.bytes();
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void windowed_attention::backward(exec_ref exec, const backward_problem& p, arena scratch) const {
  for (const tensor_mut& g : {p.to.dquery_map, p.to.dkey_map})  // nothing, should no row have a rest
    for (isize h = 0; g && h < g.heads; ++h)
      for (isize c = 0; c < g.width; ++c) g.set(0, h, 0, c, 0.0);
  if (p.q.type == dtype::f64)
    detail::windowed_backward_run<double>(scratch, *this, p.shape(), exec.concurrency()).run(exec, p);
  else
    detail::windowed_backward_run<float>(scratch, *this, p.shape(), exec.concurrency()).run(exec, p);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
