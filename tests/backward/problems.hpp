// SPDX-License-Identifier: MIT
#pragma once
/// @file  Random softmax problems with gradients, run forward and backward, and the twin's answers for them.

#include <algorithm>

#include <fovea/softmax.hpp>
#include <fovea/softmax/reference.hpp>
#include <fovea/softmax/reference_backward.hpp>

#include "support/catch.hpp"
#include "support/tensors.hpp"

namespace backward_tests {

using namespace fovea;
using test::tensor;

/// A mechanism and what it points to.
struct setting {
  softmax_attention m;
  std::vector<std::uint8_t> table;
  std::vector<float> bias, sinks, slopes;
  std::vector<std::int32_t> cu_q, cu_k;
};

inline std::vector<std::int32_t> cuts(test::random& r, isize sequences, isize total) {
  std::vector<std::int32_t> c{0};
  for (isize s = 1; s < sequences; ++s) c.push_back(static_cast<std::int32_t>(r.integer(c.back(), total)));
  c.push_back(static_cast<std::int32_t>(total));
  return c;
}
inline void fill(test::random& r, std::vector<float>& to, isize count, double deviation) {
  to.resize(static_cast<std::size_t>(count));
  for (float& y : to) y = static_cast<float>(deviation * r.normal());
}

constexpr int mask_kinds = 8;
inline mask make_mask(int kind, test::random& r, const shape& s, setting& x) {
  const auto table = [&](isize rows, isize columns) {
    x.table.resize(static_cast<std::size_t>(s.H * rows * columns));
    const double density = r.uniform();
    for (auto& y : x.table) y = r.coin(density);
    return x.table.data();
  };
  const alignment_of_rows align = r.coin() ? bottom_right : r.coin() ? top_left : at_offset(r.integer(-20, 60));
  switch (kind) {
    case 0: return no_mask{};
    case 1: return causal{align};
    case 2: return window{r.integer(1, 90), r.coin() ? r.integer(0, 20) : 0, align};
    case 3: return two_sided{r.integer(0, 60), r.integer(0, 60), align};
    case 4: return boolean_mask{table(s.n, s.m), 0, r.coin() ? 0 : s.n * s.m, s.m};
    case 5: {
      block_mask b{.block_q = r.integer(1, 40), .block_k = r.integer(1, 40), .per_kv_head = r.coin()};
      const isize rows = ceil_div(s.n, b.block_q), columns = ceil_div(s.m, b.block_k);
      b.table = table(rows, columns), b.row_stride = columns, b.head_stride = rows * columns;
      return b;
    }
    case 6:
      x.cu_q = cuts(r, 4, s.n), x.cu_k = cuts(r, 4, s.m);
      return packed{x.cu_q.data(), x.cu_k.data(), 4, r.coin()};
    default: return both{causal{}, boolean_mask{table(s.n, s.m), 0, 0, s.m}};
  }
}

/// A bias of a random extent: any of its dimensions may broadcast.
inline additive_bias make_bias(test::random& r, const shape& s, setting& x) {
  additive_bias b;
  b.extent = {r.coin() ? 1 : s.B, r.coin() ? 1 : s.H, r.coin(0.3) ? 1 : s.n, r.coin(0.3) ? 1 : s.m};
  fill(r, x.bias, b.extent.batch * b.extent.heads * b.extent.rows * b.extent.keys, 1.0);
  b.table = x.bias.data();
  b.key_stride = b.extent.keys == 1 ? 0 : 1;
  b.row_stride = b.extent.rows == 1 ? 0 : b.extent.keys;
  b.head_stride = b.extent.heads == 1 ? 0 : b.extent.rows * b.extent.keys;
  b.batch_stride = b.extent.batch == 1 ? 0 : b.extent.heads * b.extent.rows * b.extent.keys;
  return b;
}
/// A functor of one's own, with its slope.
struct bent {
  template <class T>
  T operator()(const mask_site& at, isize i, isize j, T s) const {
    return s * static_cast<T>(1 + 0.1 * static_cast<double>(at.h)) + static_cast<T>(0.01) * s * s +
           static_cast<T>(0.001) * static_cast<T>(i - j);
  }
  double slope(const mask_site& at, isize, isize, double s) const {
    return 1 + 0.1 * static_cast<double>(at.h) + 0.02 * s;
  }
};

constexpr int score_kinds = 7;
inline void make_score(int kind, test::random& r, const shape& s, setting& x) {
  if (r.coin(0.4)) fill(r, x.sinks, s.H, 2.0), x.m.sinks = x.sinks.data();
  if (r.coin(0.3)) x.m.scale = r.uniform(0.05, 0.4);
  if (kind == 2 || kind == 5) fill(r, x.slopes, s.H, 0.1);
  if (kind == 1) x.m.score = softcap{r.uniform(1.0, 20.0)};
  if (kind == 2) x.m.score = alibi{x.slopes.data()};
  if (kind == 3) x.m.score = make_bias(r, s, x);
  if (kind == 4) x.m.score = bent{};
  if (kind == 5) x.m.score = chain{softcap{3.0}, alibi{x.slopes.data()}};
  if (kind == 6) x.m.score = chain{softcap{2.0}, make_bias(r, s, x)};
}

inline dtype wide(dtype t) { return t == dtype::f64 ? dtype::f64 : dtype::f32; }

/// Inputs, the forward pass, and room for every gradient.
struct run {
  shape s;
  tensor q, k, v, out, lse, dout, dq, dk, dv;
  std::vector<float> dbias, dsinks;

  run(test::random& r, const shape& sizes, dtype out_type, bool any_layout = true) : s(sizes) {
    const auto layout = [&] { return any_layout ? test::layouts[r.integer(0, 3)] : test::layout::bhnd; };
    q = test::normal(r, s.type, s.B, s.H, s.n, s.d, layout());
    k = test::normal(r, s.type, s.B, s.G, s.m, s.d, layout());
    v = test::normal(r, s.type, s.B, s.G, s.m, s.e, layout());
    dout = test::normal(r, s.type, s.B, s.H, s.n, s.e, layout());
    out = test::unwritten(out_type, s.B, s.H, s.n, s.e, layout());
    lse = test::unwritten(wide(s.type), s.B, s.H, s.n, 1, layout());
    dq = test::unwritten(s.type, s.B, s.H, s.n, s.d, layout());
    dk = test::unwritten(s.type, s.B, s.G, s.m, s.d, layout());
    dv = test::unwritten(s.type, s.B, s.G, s.m, s.e, layout());
  }
  run(test::random& r, const shape& sizes) : run(r, sizes, wide(sizes.type)) {}

  void forward(const softmax_attention& m) { fovea::prefill(serial, m, q, k, v, out, {.lse = lse, .gates = {}}); }
  gradients wanted(const softmax_attention& m, std::size_t bias_size = 0) {
    dsinks.assign(static_cast<std::size_t>(s.H), std::nanf("")), dbias.assign(bias_size, std::nanf(""));
    return {dq, dk, dv, bias_size > 0 ? dbias.data() : nullptr, m.sinks != nullptr ? dsinks.data() : nullptr};
  }
  void backward(const softmax_attention& m, std::size_t bias_size = 0, exec_ref exec = serial) {
    fovea::backward(exec, m, q, k, v, out, lse, dout, wanted(m, bias_size));
  }
};

inline test::array shaped(const tensor& like, const std::vector<double>& data) {
  return {{like.batch(), like.heads(), like.length(), like.width()}, data};
}
inline double largest(const std::vector<double>& x) {
  double top = 0;
  for (double y : x) top = std::max(top, std::fabs(y));
  return top;
}

}  // namespace backward_tests
