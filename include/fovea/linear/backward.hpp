// SPDX-License-Identifier: MIT
#pragma once
/// @file  linear_attention, backward: every rule and map, by q, k, v, gates, initial state and map weights.
///
/// A task is one key head of one batch item. It runs forwards for the states before every span of 64 tokens, then backwards: keys and
/// queries of a span become features again, kernel/linear_backward.hpp takes the span apart, the map's derivative does the rest.
///
/// Contract   q, k, v, gates, from as of the prefill; lse null. A decay of e^g = 0 passes nothing, and its gradient is 0. The survey of a
///            map counts as a constant. gamma has no gradient. Bits do not depend on the number of threads.
/// Cost       with chunks of 64: about 5 n r e multiply-adds more than the 5 n r e that a recurrence needs. Memory a thread: m / 64
///            states of r (e + 1) numbers, with grouped values (n + m) d more.
/// Reference  linear/reference_backward.hpp

#include <fovea/linear/backward_scratch.hpp>
#include <fovea/linear/check.hpp>
#include <fovea/linear/scratch.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
class linear_backward_run {
 public:
  linear_backward_run(const linear_attention& m, exec_ref exec, const backward_problem& p, arena memory)
      : m_(m),
        p_(p),
        map_(m.phi()),
        s_(m, p.shape(), by_channel(m.rule) && p.gates.log_decay.width == m.phi().features(p.q.width),
           p.gates.log_decay || !m.gamma.empty()),
        memory_(memory, s_, exec.concurrency()) {}

  static std::size_t workspace_size(const linear_attention& m, const shape& s, int threads) {
    std::size_t most = 0;
    for (const bool channel : {false, true}) {  // gates decide, which a shape does not tell
      arena measure;
      if (channel && !by_channel(m.rule)) continue;
      backward_layout<Acc>(measure, backward_sizes(m, s, channel, m.rule != rule::none), threads);
      most = std::max(most, measure.bytes());
    }
    return most;
  }

  void run(exec_ref exec) const {
    exec.for_tasks(s_.B * s_.K, [&](isize task, isize slot) { one_task(task, slot); });
    if (p_.to.dquery_map)
      for (isize h = 0; h < s_.query_heads(); ++h)
        sum_weights(p_.to.dquery_map, h, h / s_.R, h % s_.R * s_.query_weights, s_.query_weights);
    if (p_.to.dkey_map)
      for (isize h = 0; h < s_.K; ++h) sum_weights(p_.to.dkey_map, h, h, s_.R * s_.query_weights, s_.key_weights);
  }

 private:
  using scratch = backward_scratch<Acc>;
  using native = simd::native;
  static constexpr isize tokens = feature_rows;

  struct site {
    scratch* s;
    isize b, k_head, head, value;  // head: of the state; value: which of those of the key head
    Acc survey, peak;              // peak: log-scaled maps without causality, of all keys
    Acc* weights;
  };
  struct span {
    isize first, rows, query;  // keys; the first query, or negative: none
  };

  span span_at(isize i) const {
    const isize before = s_.causal && s_.m > s_.n ? s_.m - s_.n : 0, head = ceil_div(before, tokens);
    const isize first = i < head ? i * tokens : before + (i - head) * tokens, end = i < head ? before : s_.m;
    return {first, std::min(tokens, end - first), s_.causal ? first - (s_.m - s_.n) : -1};
  }
  Acc* saved(site& at, isize i) const { return at.s->saved + i * s_.states(); }

  void one_task(isize task, isize slot) const {
    arena room = memory_.memory_of(slot);
    scratch s(room, s_);
    site at{&s, task / s_.K, task % s_.K, 0, 0, Acc(0), Acc(0), memory_.weights + task * s_.task_weights()};
    for (isize i = 0; i < s_.task_weights(); ++i) at.weights[i] = Acc(0);
    if (map_.surveys()) at.survey = survey(at);
    for (isize h = 0; s_.causal && h < s_.R; ++h)  // queries before the first key see nothing
      for (isize i = 0; i < std::min(s_.n, s_.n - s_.m); ++i) zero(p_.to.dq, at.b, at.k_head * s_.R + h, i);
    for (at.value = 0; at.value < s_.V; ++at.value) {
      at.head = at.k_head * s_.V + at.value;
      begin_state(at);
      if (!s_.causal && s_.log_scaled) at.peak = largest_scale(at);
      for (isize i = 0; i < s_.spans(); ++i) forwards(at, i);
      begin_gradient(at);
      if (!s_.causal)
        for (isize i = 0; i < s_.n; i += tokens) all_keys(at, i);
      for (isize i = s_.spans() - 1; i >= 0; --i) backwards(at, i);
      store_state(at, p_.to.dS, s.dS, s_.e), store_state(at, p_.to.dz, s.dz, 1);
    }
  }
  void zero(const tensor_mut& t, isize b, isize h, isize i) const {
    for (isize c = 0; t && c < t.width; ++c) t.set(b, h, i, c, 0.0);
  }

  // States ---------------------------------------------------------------------------------------------------------------------------
  void load_state(const tensor_ref& t, site& at, Acc factor, isize width, Acc* to) const {
    for (isize c = 0; c < s_.r; ++c) {
      for (isize y = 0; y < width; ++y) to[c * width + y] = Acc(0);
      if (!t) continue;
      simd::load_row<native, Acc>(t.type, t.row(at.b, at.head, c), width, to + c * width);
      for (isize y = 0; factor != Acc(1) && y < width; ++y) to[c * width + y] *= factor;
    }
  }
  void store_state(site& at, const tensor_mut& t, const Acc* from, isize width) const {
    for (isize c = 0; t && c < s_.r; ++c)
      simd::store_row<native, Acc>(t.type, from + c * width, width, t.row(at.b, at.head, c));
  }
  void begin_state(site& at) const {
    load_state(p_.from.S, at, Acc(1), s_.e, saved(at, 0));
    load_state(p_.from.z, at, Acc(1), 1, saved(at, 0) + s_.r * s_.e);
    at.s->saved_peak[0] = s_.log_scaled && !p_.from.S && !p_.from.z ? -std::numeric_limits<Acc>::infinity() : Acc(0);
  }
  void begin_gradient(site& at) const {
    const Acc rise = s_.log_scaled && s_.causal ? std::exp(at.s->saved_peak[s_.spans()]) : Acc(1);
    load_state(p_.dS_end, at, rise, s_.e, at.s->dS), load_state(p_.dz_end, at, rise, 1, at.s->dz);
  }

  // Rows of a span -------------------------------------------------------------------------------------------------------------------
  feature_block<Acc> rows(const tensor_ref& from, isize b, isize head, isize first, isize count, Acc* to) const {
    feature_block<Acc> x;
    x.rows = count, x.width = from.width, x.x = to, x.x_stride = from.width;
    if (from.type == dtype_of<Acc>) {
      x.x = static_cast<const Acc*>(from.row(b, head, first)), x.x_stride = from.row_stride;
      return x;
    }
    for (isize i = 0; i < count; ++i)
      simd::load_row<native, Acc>(from.type, from.row(b, head, first + i), from.width, to + i * from.width);
    return x;
  }
  feature_block<Acc> key_block(site& at, isize first, isize count) const {
    auto x = rows(p_.k, at.b, at.k_head, first, count, at.s->x_k);
    x.head = at.k_head * s_.R, x.kv_head = at.k_head, x.position = p_.from.tokens + first, x.key = true;
    x.out = at.s->phi_k, x.out_stride = s_.ld, x.log_scale = at.s->log_k, x.survey = at.survey;
    return x;
  }
  feature_block<Acc> query_block(site& at, isize h, isize first, isize count) const {
    const isize head = at.k_head * s_.R + h;
    auto x = rows(p_.q, at.b, head, first, count, at.s->x_q + h * tokens * s_.d);
    const isize shift = s_.causal ? s_.m - s_.n : std::max(isize{0}, s_.m - s_.n);
    x.head = head, x.kv_head = at.k_head, x.position = p_.from.tokens + first + shift;
    x.out = at.s->phi_q + h * tokens * s_.ld, x.out_stride = s_.ld, x.log_scale = at.s->log_q + h * tokens;
    return x;
  }
  Acc survey(site& at) const {
    Acc top = -std::numeric_limits<Acc>::infinity();
    for (isize t = 0; t < s_.m; t += tokens) {
      auto x = key_block(at, t, std::min(tokens, s_.m - t));
      const Acc one = map_.survey(x, at.s->map);
      top = one > top || one != one ? one : top;
    }
    return top;
  }
  Acc largest_scale(site& at) const {
    Acc top = -std::numeric_limits<Acc>::infinity();
    for (isize t = 0; t < s_.m; t += tokens) {
      auto x = key_block(at, t, std::min(tokens, s_.m - t));
      map_.apply(x, at.s->map);
      for (isize i = 0; i < x.rows; ++i) top = std::max(top, at.s->log_k[i]);
    }
    return top;
  }

  /// Features of keys, values and gates of a span; the peak of log-scales moves on.
  kernel::backward_chunk<Acc> keys(site& at, const span& t, Acc& peak, feature_block<Acc>& x) const {
    scratch& s = *at.s;
    x = key_block(at, t.first, t.rows);
    map_.apply(x, s.map);
    kernel::backward_chunk<Acc> c;
    c.rows = t.rows, c.k = s_.log_scaled ? s.k : s.phi_k, c.u = c.k, c.v = s.v, c.v_row = s_.le, c.a = s.a,
    c.beta = s.beta;
    if (p_.v.type == dtype_of<Acc> && !p_.gates.write)
      c.v = static_cast<const Acc*>(p_.v.row(at.b, at.head, t.first)), c.v_row = p_.v.row_stride;
    else
      rows_of_values(at, t);
    decays(at, t);
    if (s_.log_scaled) log_scales(at, t, peak);
    if (!s_.erases) return c;
    for (isize i = 0; i < t.rows; ++i) {
      s.beta[i] = Acc(1);
      if (p_.gates.beta) load(p_.gates.beta, at, t.first + i, 1, s.beta + i);
      if (!p_.gates.erase) continue;
      load(p_.gates.erase, at, t.first + i, s_.r, s.erase + i * s_.ld);
      for (isize f = 0; f < s_.r; ++f) s.u[i * s_.ld + f] = s.erase[i * s_.ld + f] * c.k[i * s_.ld + f];
    }
    if (p_.gates.erase) c.u = s.u;
    return c;
  }
  void load(const tensor_ref& t, site& at, isize i, isize width, Acc* to) const {
    simd::load_row<native, Acc>(t.type, t.row(at.b, at.head, i), width, to);
  }
  void rows_of_values(site& at, const span& t) const {
    scratch& s = *at.s;
    for (isize i = 0; i < t.rows; ++i) {
      load(p_.v, at, t.first + i, s_.e, s.v + i * s_.le);
      if (!p_.gates.write) continue;
      load(p_.gates.write, at, t.first + i, s_.e, s.write + i * s_.le);
      for (isize c = 0; c < s_.e; ++c) {
        s.v_given[i * s_.le + c] = s.v[i * s_.le + c];
        s.v[i * s_.le + c] *= s.write[i * s_.le + c];
      }
    }
  }
  void decays(site& at, const span& t) const {
    Acc* a = at.s->a;
    const isize width = s_.channel ? s_.r : 1, ld = s_.channel ? s_.ld : 1;
    const double constant =
        m_.gamma.empty() ? 1.0 : m_.gamma[m_.gamma.size() == 1 ? 0 : static_cast<std::size_t>(at.head)];
    for (isize i = 0; s_.decays && i < t.rows; ++i) {
      if (!p_.gates.log_decay) {
        for (isize c = 0; c < width; ++c) a[i * ld + c] = static_cast<Acc>(constant);
        continue;
      }
      load(p_.gates.log_decay, at, t.first + i, width, a + i * ld);
      if (s_.channel) exponentials<native>(a + i * ld, width);
    }
    if (s_.decays && p_.gates.log_decay && !s_.channel) exponentials<native>(a, t.rows);
  }
  /// Keys without what they share with the largest key so far, whose growth acts as a decay.
  void log_scales(site& at, const span& t, Acc& peak) const {
    scratch& s = *at.s;
    for (isize i = 0; i < t.rows; ++i) {
      const Acc now = s_.causal ? std::max(peak, s.log_k[i]) : at.peak;
      s.own[i] = s.log_k[i] == now ? Acc(1) : std::exp(s.log_k[i] - now);
      if (s_.causal && now != peak) s.a[i] *= std::exp(peak - now);
      s.peaks[i] = peak = now;
      for (isize f = 0; f < s_.r; ++f) s.k[i * s_.ld + f] = s.own[i] * s.phi_k[i * s_.ld + f];
    }
  }

  /// Features of queries, dout, and the factors of output rows.
  void queries(site& at, isize first, isize count, feature_block<Acc>* x) const {
    scratch& s = *at.s;
    for (isize h = 0; h < s_.R; ++h) {
      x[h] = query_block(at, h, first, count);
      map_.apply(x[h], s.map);
      const isize head = at.head * s_.R + h;
      for (isize i = 0; i < count; ++i) {
        const isize row = h * tokens + i;
        factors(at, row, s_.causal ? s.peaks[i] : at.peak, x[h].out + i * s_.ld);
        Acc* g = s.dout + row * s_.le;
        if (p_.dout.type != dtype_of<Acc>)
          simd::load_row<native, Acc>(p_.dout.type, p_.dout.row(at.b, head, first + i), s_.e, g);
        if (!s_.normalised) continue;
        const auto* given = static_cast<const Acc*>(p_.dout.row(at.b, head, first + i));
        const Acc* o = simd::row_as<native, Acc>(p_.out.type, p_.out.row(at.b, head, first + i), s_.e, s.line);
        s.delta[row] = kernel::chunk_pairs<native, Acc>::dot(p_.dout.type == dtype_of<Acc> ? given : g, o, s_.e);
      }
    }
  }
  void factors(site& at, isize row, Acc peak, const Acc* q) const {
    scratch& s = *at.s;
    const Acc lacks = s_.log_scaled ? s.log_q[row] + peak : Acc(0), rise = s_.log_scaled ? std::exp(-lacks) : Acc(1);
    s.gain[row] = static_cast<Acc>(m_.scale) * (s_.normalised ? Acc(1) : s_.log_scaled ? std::exp(lacks) : Acc(1));
    s.add[row] = m_.eps > 0 ? static_cast<Acc>(m_.eps) * rise : Acc(0);
    s.floor[row] = m_.clamp > 0 ? static_cast<Acc>(m_.clamp) * rise : -std::numeric_limits<Acc>::infinity();
    s.key_eps[row] = Acc(0);
    if (!(m_.key_sum_eps > 0)) return;
    s.key_eps[row] = static_cast<Acc>(m_.key_sum_eps) * (s_.log_scaled ? std::exp(-peak) : Acc(1));
    for (isize f = 0; f < s_.r; ++f) s.add[row] += s.key_eps[row] * q[f];
  }
  void attach(kernel::backward_chunk<Acc>& c, site& at, isize first) const {
    scratch& s = *at.s;
    c.q = s.phi_q, c.q_head = tokens * s_.ld, c.row_head = tokens;
    c.dout = s.dout, c.dout_head = tokens * s_.le, c.dout_row = s_.le;
    if (p_.dout.type == dtype_of<Acc>) {
      c.dout = static_cast<const Acc*>(p_.dout.row(at.b, at.head * s_.R, first));
      c.dout_head = p_.dout.head_stride, c.dout_row = p_.dout.row_stride;
    }
    c.delta = s.delta, c.gain = s.gain, c.add = s.add, c.floor = s.floor, c.dq = s.dq;
    c.key_eps = m_.key_sum_eps > 0 ? s.key_eps : nullptr;
    for (isize i = 0; i < s_.R * tokens * s_.ld; ++i) s.dq[i] = Acc(0);
  }
  void gradients_of(kernel::backward_chunk<Acc>& c, scratch& s) const {
    c.dk = s.dk, c.du = s.du, c.dv = s.dv, c.dbeta = p_.to.dbeta ? s.dbeta : nullptr;
    c.dlog = p_.to.dlog_decay ? s.dlog : nullptr;
    for (isize i = 0; i < tokens * s_.ld; ++i) s.dk[i] = Acc(0);
    for (isize i = 0; s_.erases && i < tokens * s_.ld; ++i) s.du[i] = Acc(0);
  }
  /// Tokens [first, first + rows) of a span.
  kernel::backward_chunk<Acc> part(kernel::backward_chunk<Acc> c, isize first, isize rows) const {
    const auto move = [&](auto*& x, isize step) { x = x == nullptr ? nullptr : x + first * step; };
    c.rows = rows;
    move(c.k, s_.ld), move(c.u, s_.ld), move(c.v, c.v_row), move(c.beta, 1), move(c.a, s_.channel ? s_.ld : 1);
    move(c.q, s_.ld), move(c.dout, c.dout_row), move(c.delta, 1), move(c.gain, 1), move(c.add, 1), move(c.floor, 1);
    move(c.key_eps, 1), move(c.dq, s_.ld), move(c.dk, s_.ld), move(c.du, s_.ld), move(c.dv, s_.le), move(c.dbeta, 1);
    move(c.dlog, s_.channel ? s_.ld : 1);
    return c;
  }

  // The passes -----------------------------------------------------------------------------------------------------------------------
  void forwards(site& at, isize i) const {
    const span t = span_at(i);
    feature_block<Acc> x;
    Acc peak = at.s->saved_peak[i];
    const auto c = keys(at, t, peak, x);
    Acc *from = saved(at, i), *to = saved(at, i + 1);
    for (isize f = 0; f < s_.states(); ++f) to[f] = from[f];
    for (isize j = 0; j < t.rows; j += scratch::loop::chunk(s_.channel))
      at.s->run.advance(part(c, j, std::min(scratch::loop::chunk(s_.channel), t.rows - j)), to, to + s_.r * s_.e);
    at.s->saved_peak[i + 1] = peak;
  }

  void backwards(site& at, isize i) const {
    scratch& s = *at.s;
    const span t = span_at(i);
    const isize step = scratch::loop::chunk(s_.channel), parts = ceil_div(t.rows, step), state = s_.r * s_.e;
    feature_block<Acc> x, y[most_group];
    Acc peak = s.saved_peak[i];
    auto c = keys(at, t, peak, x);
    gradients_of(c, s);
    if (t.query >= 0 && s_.causal) queries(at, t.query, t.rows, y), attach(c, at, t.query);
    Acc* before = saved(at, i);
    for (isize j = 0; j + 1 < parts; ++j) {  // states inside the span
      Acc *from = j == 0 ? before : s.inner + j * s_.states(), *to = s.inner + (j + 1) * s_.states();
      for (isize f = 0; f < s_.states(); ++f) to[f] = from[f];
      s.run.advance(part(c, j * step, step), to, to + state);
    }
    for (isize j = parts - 1; j >= 0; --j) {
      const Acc *from = j == 0 ? before : s.inner + j * s_.states(),
                *to = j + 1 == parts ? saved(at, i + 1) : s.inner + (j + 1) * s_.states();
      s.run.backward(part(c, j * step, std::min(step, t.rows - j * step)), from, from + state, to, to + state, s.dS,
                     s.dz);
    }
    for (isize h = 0; c.q != nullptr && h < s_.R; ++h) query_gradient(at, h, t.query, y[h]);
    key_gradient(at, t, x);
  }
  /// Not causal: 64 queries against the sums over all keys.
  void all_keys(site& at, isize first) const {
    scratch& s = *at.s;
    feature_block<Acc> y[most_group];
    const isize count = std::min(tokens, s_.n - first);
    kernel::backward_chunk<Acc> c;
    for (isize i = 0; i < tokens * s_.ld; ++i) s.phi_k[i] = Acc(0);
    for (isize i = 0; i < tokens * s_.le; ++i) s.v[i] = Acc(0);
    c.rows = count, c.k = c.u = s.phi_k, c.v = s.v, c.v_row = s_.le, c.beta = s.beta;
    gradients_of(c, s);
    queries(at, first, count, y), attach(c, at, first);
    const Acc* S = saved(at, s_.spans());
    s.run.backward(c, S, S + s_.r * s_.e, S, S + s_.r * s_.e, s.dS, s.dz);
    for (isize h = 0; h < s_.R; ++h) query_gradient(at, h, first, y[h]);
  }

  void query_gradient(site& at, isize h, isize first, const feature_block<Acc>& x) const {
    scratch& s = *at.s;
    Acc* weights = p_.to.dquery_map ? at.weights + h * s_.query_weights : nullptr;
    map_.derive(x, {s.dq + h * tokens * s_.ld, s_.ld, s.dx, s_.d, weights}, s.map);
    put(p_.to.dq, at, at.k_head * s_.R + h, first, x.rows, s.sum_q);
  }
  void key_gradient(site& at, const span& t, const feature_block<Acc>& x) const {
    scratch& s = *at.s;
    for (isize i = 0; i < t.rows; ++i) {
      Acc *dk = s.dk + i * s_.ld, *du = s.du + i * s_.ld;
      const Acc* k = (s_.log_scaled ? s.k : s.phi_k) + i * s_.ld;
      if (p_.gates.erase) {
        for (isize f = 0; f < s_.r; ++f) s.line[f] = du[f] * k[f], du[f] *= s.erase[i * s_.ld + f];
        store(p_.to.derase, at, t.first + i, s_.r, s.line);
      }
      for (isize f = 0; s_.erases && f < s_.r; ++f) dk[f] += du[f];
      for (isize f = 0; s_.log_scaled && f < s_.r; ++f) dk[f] *= s.own[i];
      Acc* dv = s.dv + i * s_.le;
      if (p_.gates.write) {
        for (isize c = 0; c < s_.e; ++c) s.line[c] = dv[c] * s.v_given[i * s_.le + c], dv[c] *= s.write[i * s_.le + c];
        store(p_.to.dwrite, at, t.first + i, s_.e, s.line);
      }
      store(p_.to.dv, at, t.first + i, s_.e, dv);
      store(p_.to.dbeta, at, t.first + i, 1, s.dbeta + i);
      store(p_.to.dlog_decay, at, t.first + i, s_.channel ? s_.r : 1, s.dlog + i * (s_.channel ? s_.ld : 1));
    }
    Acc* weights = p_.to.dkey_map ? at.weights + s_.R * s_.query_weights : nullptr;
    map_.derive(x, {s.dk, s_.ld, s.dx, s_.d, weights}, s.map);
    put(p_.to.dk, at, at.k_head, t.first, t.rows, s.sum_k);
  }
  void store(const tensor_mut& t, site& at, isize i, isize width, const Acc* from) const {
    if (t) simd::store_row<native, Acc>(t.type, from, width, t.row(at.b, at.head, i));
  }
  /// dx, summed over the values that share a key head.
  void put(const tensor_mut& t, site& at, isize head, isize first, isize count, Acc* sums) const {
    for (isize i = 0; t && i < count; ++i) {
      Acc* row = at.s->dx + i * s_.d;
      if (s_.V > 1) {
        Acc* sum = sums + (first + i) * s_.d;
        for (isize c = 0; c < s_.d; ++c) sum[c] = at.value == 0 ? row[c] : sum[c] + row[c];
        row = sum;
      }
      if (at.value + 1 == s_.V) simd::store_row<native, Acc>(t.type, row, s_.d, t.row(at.b, head, first + i));
    }
  }
  void sum_weights(const tensor_mut& t, isize head, isize k_head, isize offset, isize count) const {
    for (isize x = 0; x < count; ++x) {
      Acc sum(0);
      for (isize b = 0; b < s_.B; ++b) sum += memory_.weights[(b * s_.K + k_head) * s_.task_weights() + offset + x];
      t.set(0, head, 0, x, static_cast<double>(sum));
    }
  }

 public:
  static constexpr isize most_group = 128;  // query heads of one state

 private:
  const linear_attention& m_;
  const backward_problem& p_;
  feature_map map_;
  backward_sizes s_;
  backward_layout<Acc> memory_;
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea

#include <fovea/linear/check_backward.hpp>
