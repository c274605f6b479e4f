// SPDX-License-Identifier: MIT
#pragma once
/// @file  Random linear-attention problems with gradients, run forward and backward, and the twin's answers for them.

#include <deque>

#include <fovea/dijiang.hpp>
#include <fovea/feature/cosformer.hpp>
#include <fovea/feature/favor.hpp>
#include <fovea/feature/learned.hpp>
#include <fovea/feature/polynomial.hpp>
#include <fovea/linear.hpp>
#include <fovea/linear/reference.hpp>
#include <fovea/linear/reference_backward.hpp>

#include "support/catch.hpp"
#include "support/tensors.hpp"

namespace backward_tests {

using namespace fovea;
using test::tensor;

/// Feature maps by number; what they point to lives in the store.
struct map_store {
  std::deque<projection> projections;
  std::deque<std::shared_ptr<const dijiang_tables>> tables;

  projection_ref draw(test::random& r, isize heads, isize rows, isize width, bool bias = true) {
    std::vector<float> w(static_cast<std::size_t>(heads * rows * width)), b(static_cast<std::size_t>(heads * rows));
    for (auto& x : w) x = static_cast<float>(0.6 * r.normal());
    for (auto& x : b) x = static_cast<float>(0.3 * r.normal());
    projections.emplace_back(w.data(), heads, rows, width, bias ? b.data() : nullptr);
    return projections.back().ref();
  }
  static constexpr int kinds = 15;
  /// Features that may all be 0, or sums that may be small.
  static constexpr bool may_vanish(int kind) { return kind == 2 || (kind >= 5 && kind <= 8); }
  feature_map make(int kind, test::random& r, const shape& s) {
    const isize K = std::min(s.H, s.G), f = r.integer(1, 9);
    const isize heads_q = r.coin() ? 1 : s.H, heads_k = r.coin() ? 1 : K;
    if (kind == 0) return identity_map{};
    if (kind == 1) return elu1{};
    if (kind == 2) return cosformer{200};
    if (kind == 3 || kind == 4) return taylor2{kind == 4};
    if (kind == 5) return square_map{r.coin()};
    if (kind == 6) {
      const projection_ref w = draw(r, heads_k, f, s.d);
      return t2r{w, w, 0.5};
    }
    if (kind == 7) return t2r{draw(r, heads_q, f, s.d), draw(r, heads_k, f, s.d), 1.0};
    if (kind == 8) {
      const projection_ref one = draw(r, heads_k, f, s.d), two = draw(r, 1, 5, f);
      return mlp_map{one, two, one, two, 0.5};
    }
    if (kind <= 10)
      return hedgehog{draw(r, heads_q, f, s.d), draw(r, heads_k, f, s.d),
                      kind == 9  ? hedgehog_form::joint
                      : r.coin() ? hedgehog_form::separate
                                 : hedgehog_form::paired};
    if (kind == 11) return favor_plain{draw(r, heads_k, f, s.d, false)};
    if (kind == 12) return favor{draw(r, heads_k, f, s.d, false), 1e-2};
    tables.push_back(make_dijiang_tables({.head_dim = s.d,
                                          .features = r.integer(1, 2) * s.d,
                                          .seed = 3,
                                          .form = kind == 13 ? dijiang_form::unbiased
                                                  : r.coin() ? dijiang_form::paper
                                                             : dijiang_form::released}));
    return dijiang_map{tables.back().get()};
  }
};

inline test::array shaped_as(const tensor& like, const std::vector<double>& data) {
  return {{like.batch(), like.heads(), like.length(), like.width()}, data};
}

/// A mechanism, its inputs, and room for every gradient.
struct linear_run {
  linear_attention m;
  map_store store;
  std::vector<double> gamma;
  shape s;
  isize K = 1, r = 1;
  tensor q, k, v, out, dout, g, beta, erase, write, S, z, dS_end, dz_end;
  tensor dq, dk, dv, dg, dbeta, derase, dwrite, dS, dz, dwq, dwk;
  bool state = false;

  linear_run(test::random& r0, rule u, int map_kind, const shape& sizes, bool with_state, bool causal = true)
      : s(sizes), state(with_state) {
    m.rule = u, m.is_causal = causal;
    m.map = store.make(map_kind, r0, s);
    m.scale = r0.uniform(0.2, 1.0);
    if (!is_delta(u)) m.normalise = map_kind != 0 && r0.coin(0.7);
    if (m.normalised()) {
      m.eps = r0.coin() || map_store::may_vanish(map_kind) ? 0.2 : 0.0, m.clamp = r0.coin(0.3) ? 0.3 : 0.0,
      m.key_sum_eps = r0.coin(0.3) ? 0.1 : 0.0;
    }
    K = std::min(s.H, s.G), r = m.map->features(s.d);
    const isize out_heads = std::max(s.H, s.G);
    const auto layout = [&] { return test::layouts[r0.integer(0, 3)]; };
    const auto draw = [&](isize heads, isize length, isize width, double deviation) {
      return test::normal(r0, s.type, s.B, heads, length, width, layout(), deviation);
    };
    q = draw(s.H, s.n, s.d, 0.7), k = draw(K, s.m, s.d, 0.7), v = draw(s.G, s.m, s.e, 1);
    dout = draw(out_heads, s.n, s.e, 1);
    if (is_delta(u)) k.fill([&] { return r0.uniform(-1, 1) / std::sqrt(static_cast<double>(s.d)); });  // |k| <= 1
    const bool channel = u == rule::gla || u == rule::kda || (u == rule::gdn2 && r0.coin());
    if (u != rule::none && u != rule::delta) {
      if (u == rule::decay && r0.coin(0.3)) {
        gamma = {0.9}, m.gamma = gamma;
      } else {
        g = draw(s.G, s.m, channel ? r : 1, 1);
        const bool harsh = r0.coin(0.3);
        g.fill([&] {
          return harsh && r0.coin(0.1) ? -std::numeric_limits<double>::infinity()
                                       : -0.3 * r0.uniform() * (harsh ? 20 : 1);
        });
      }
    }
    if (is_delta(u) && u != rule::gdn2)
      beta = draw(s.G, s.m, 1, 1), beta.fill([&] { return r0.coin(0.1) ? 0.0 : r0.uniform(); });
    if (u == rule::gdn2) {
      erase = draw(s.G, s.m, r, 1), write = draw(s.G, s.m, s.e, 1);
      erase.fill([&] { return r0.uniform(); }), write.fill([&] { return r0.uniform(); });
    }
    if (state) {
      S = draw(s.G, r, s.e, 0.5), z = draw(s.G, r, 1, 0.3), dS_end = draw(s.G, r, s.e, 0.5);
      z.fill([&] { return 0.1 + r0.uniform(); });
      if (m.normalised()) dz_end = draw(s.G, r, 1, 0.5);
    }
    const dtype wide = s.type == dtype::f64 ? dtype::f64 : dtype::f32;
    const auto unwritten = [&](const tensor& like) {
      return test::unwritten(like.type(), like.batch(), like.heads(), like.length(), like.width(), layout());
    };
    out = test::unwritten(wide, s.B, out_heads, s.n, s.e, layout());
    dq = unwritten(q), dk = unwritten(k), dv = unwritten(v), dg = unwritten(g), dbeta = unwritten(beta);
    derase = unwritten(erase), dwrite = unwritten(write), dS = unwritten(S), dz = unwritten(z);
    const isize w = m.map->weights(s.d);
    if (w > 0) dwq = test::unwritten(wide, 1, s.H, 1, w), dwk = test::unwritten(wide, 1, K, 1, w);
  }

  static tensor_ref ref(const tensor& t) { return t.size() > 0 ? t.ref() : tensor_ref{}; }
  static tensor_mut mut(tensor& t) { return t.size() > 0 ? t.ref() : tensor_mut{}; }
  fovea::gates gates() const { return {ref(g), ref(beta), ref(erase), ref(write)}; }
  initial_state from() const { return {ref(S), ref(z), 0}; }
  gradients wanted() {
    gradients to{.dq = dq, .dk = dk, .dv = dv};
    to.dlog_decay = mut(dg), to.dbeta = mut(dbeta), to.derase = mut(derase), to.dwrite = mut(dwrite);
    to.dS = mut(dS), to.dz = m.normalised() ? mut(dz) : tensor_mut{};
    to.dquery_map = mut(dwq), to.dkey_map = mut(dwk);
    return to;
  }
  backward_problem problem_of() { return {q, k, v, out, {}, dout, {}, gates(), from(), ref(dS_end), ref(dz_end)}; }

  /// The twin's forward pass, with the loss of the final state.
  double loss() {
    tensor o = test::unwritten(dtype::f64, out.batch(), out.heads(), out.length(), out.width());
    const problem p{q, k, v, o, {}, gates(), nullptr};
    reference::linear_state end;
    if (state) {
      end.S = S.values().data;
      end.z = z.values().data;
    }
    reference::prefill(m, p, state ? &end : nullptr);
    double sum = 0;
    const auto add = [&](const std::vector<double>& x, const std::vector<double>& y) {
      for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
    };
    add(o.values().data, dout.values().data);
    if (state) add(end.S, dS_end.values().data);
    if (state && m.normalised()) add(end.z, dz_end.values().data);
    return sum;
  }
  /// Rows of `out` by the twin, rounded to its type.
  void forward() {
    reference::linear_state begin;
    if (state) begin.S = S.values().data, begin.z = z.values().data;
    reference::prefill(m, {q, k, v, out, {}, gates(), nullptr}, state ? &begin : nullptr);
  }
  void backward(exec_ref exec = serial) {
    fovea::backward(exec, m, q, k, v, out, {}, dout, wanted(),
                    {.gates = gates(), .from = from(), .dS_end = ref(dS_end), .dz_end = ref(dz_end)});
  }
};

}  // namespace backward_tests
