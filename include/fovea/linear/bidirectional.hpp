// SPDX-License-Identifier: MIT
#pragma once
/// @file  Linear attention over all keys (encoders, cross attention): the sums over keys first, then one product a query block.
///
///   S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j),   o_i = scale phi(q_i) S / (phi(q_i) . z)
///
/// Tasks of the first pass are (batch item, KV head, range of columns), of the second (batch item, head, block of queries).

#include <fovea/linear/scratch.hpp>
#include <fovea/tile/gemm.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Arch, class Acc>
class linear_bidirectional {
 public:
  linear_bidirectional(const linear_attention& m, const problem& p, arena scratch, int threads)
      : m_(m), p_(p), rows_(m, p), n_(sizes_of(m, p.shape())) {
    sums_ = scratch.take<Acc>(n_.B * n_.S * head_elements(n_));
    ranges_ = column_ranges(n_, threads);
    memory_ = scratch;
  }
  static void lay_out(arena& a, const linear_attention& m, const shape& s, int threads) {
    const auto n = sizes_of(m, s);
    a.take<Acc>(n.B * n.S * head_elements(n));
    for (int t = 0; t < threads; ++t) block_scratch(a, m, n, s.d);
  }

  void run(exec_ref exec) {
    exec.for_tasks(n_.B * n_.S * ranges_,
                   [&](isize task, isize slot) { sum_keys(task / ranges_, task % ranges_, slot); });
    const isize heads = n_.S * n_.R, blocks = ceil_div(p_.q.length, feature_rows);
    exec.for_tasks(n_.B * heads * blocks, [&](isize task, isize slot) {
      apply(task / blocks / heads, task / blocks % heads, task % blocks * feature_rows, slot);
    });
  }

 private:
  struct block_scratch {
    static constexpr isize tokens = feature_rows;
    isize stride, q_head = 0;
    Acc *x, *map, *q, *v, *out, *log_q, *peaks, *gain, *add, *floor;
    block_scratch(arena& a, const linear_attention& m, const linear_sizes& n, isize d)
        : stride(feature_stride<Acc>(n.r)) {
      x = a.take<Acc>(tokens * d), map = a.take<Acc>(m.phi().scratch(d)), q = a.take<Acc>(tokens * stride);
      v = a.take<Acc>(tokens * n.e), out = a.take<Acc>(tokens * n.e);
      log_q = a.take<Acc>(tokens), peaks = a.take<Acc>(tokens);
      gain = a.take<Acc>(tokens), add = a.take<Acc>(tokens), floor = a.take<Acc>(tokens);
    }
    void fill_factors(isize, isize first, isize count, Acc g, Acc b, Acc f) {
      for (isize i = first; i < first + count; ++i) gain[i] = g, add[i] = b, floor[i] = f;
    }
  };
  static isize head_elements(const linear_sizes& n) { return n.r * n.e + n.rows + 16; }  // S [r][e], z, peak
  static isize column_ranges(const linear_sizes& n, int threads) {
    const isize heads = n.B * n.S;
    return heads <= 0 || heads >= threads ? 1 : std::min(n.panels, ceil_div(threads, heads));
  }
  block_scratch scratch_of(isize slot) const {
    arena a = memory_;
    for (isize i = 0; i < slot; ++i) block_scratch(a, m_, n_, p_.q.width);
    return block_scratch(a, m_, n_, p_.q.width);
  }

  void sum_keys(isize index, isize range, isize slot) const {
    auto s = scratch_of(slot);
    const isize b = index / n_.S, head = index % n_.S, k_head = head / (n_.S / p_.k.heads);
    const isize c0 = n_.panels * range / ranges_ * n_.width,
                c1 = std::min(n_.e, n_.panels * (range + 1) / ranges_ * n_.width);
    Acc* S = sums_ + index * head_elements(n_);
    Acc* z = S + n_.r * n_.e;
    for (isize f = 0; f < n_.r; ++f)
      for (isize c = c0; c < c1; ++c) S[f * n_.e + c] = Acc(0);
    if (range == 0)
      for (isize f = 0; f < n_.rows; ++f) z[f] = Acc(0);
    Acc peak = -std::numeric_limits<Acc>::infinity();
    const Acc survey = rows_.map.surveys() ? rows_.template survey<Arch, Acc>(s.x, s.map, b, k_head) : Acc(0);
    for (isize t = 0; t < p_.k.length; t += feature_rows) {
      const isize count = std::min(feature_rows, p_.k.length - t);
      auto keys = rows_.template block<Arch, Acc>(p_.k, s.x, b, k_head, t, count);
      keys.head = head * n_.R, keys.kv_head = k_head, keys.position = t, keys.key = true, keys.survey = survey;
      keys.out = s.q, keys.out_stride = s.stride, keys.log_scale = s.log_q;
      rows_.map.apply(keys, s.map);
      if (rows_.map.log_scaled()) peak = rescale(s, count, peak, S, c0, c1, range == 0 ? z : nullptr);
      const auto v = rows_.template block<Arch, Acc>(p_.v, s.v, b, head, t, count);
      tile::gemm<Arch, Acc>(n_.r, c1 - c0, count, s.q, 1, s.stride, v.x + c0, v.x_stride, S + c0, n_.e, true);
      if (range == 0)
        for (isize i = 0; i < count; ++i)
          for (isize f = 0; f < n_.r; ++f) z[f] += s.q[i * s.stride + f];
    }
    if (range == 0) z[n_.rows] = peak;
  }

  /// Log-scaled features: brings the sums and the block to the new maximum of the log-scales.
  Acc rescale(block_scratch& s, isize count, Acc peak, Acc* S, isize c0, isize c1, Acc* z) const {
    Acc top = peak;
    for (isize i = 0; i < count; ++i) top = s.log_q[i] > top ? s.log_q[i] : top;
    if (top != peak) {
      const Acc fade = std::exp(peak - top);
      for (isize f = 0; f < n_.r; ++f) {
        for (isize c = c0; c < c1; ++c) S[f * n_.e + c] *= fade;
        if (z != nullptr) z[f] *= fade;
      }
    }
    for (isize i = 0; i < count; ++i) {
      const Acc own = s.log_q[i] == top ? Acc(1) : std::exp(s.log_q[i] - top);
      for (isize f = 0; f < n_.r; ++f) s.q[i * s.stride + f] *= own;
    }
    return top;
  }

  void apply(isize b, isize head, isize first, isize slot) const {
    auto s = scratch_of(slot);
    const isize state_head = head / n_.R, k_head = state_head / (n_.S / p_.k.heads),
                q_head = p_.q.heads >= n_.S ? head : k_head;
    const Acc* S = sums_ + (b * n_.S + state_head) * head_elements(n_);
    const Acc* z = S + n_.r * n_.e;
    const isize count = std::min(feature_rows, p_.q.length - first);
    auto x = rows_.template block<Arch, Acc>(p_.q, s.x, b, q_head, first, count);
    x.head = q_head, x.kv_head = k_head, x.position = first + std::max(isize{0}, p_.k.length - p_.q.length);
    x.out = s.q, x.out_stride = s.stride, x.log_scale = s.log_q;
    rows_.map.apply(x, s.map);
    for (isize i = 0; i < count; ++i) s.peaks[i] = z[n_.rows];
    rows_.template output_factors<Arch, Acc>(s, 0, n_.r, 0, count);
    tile::gemm<Arch, Acc>(count, n_.e, n_.r, s.q, s.stride, 1, S, n_.e, s.out, n_.e, false);
    for (isize i = 0; i < count; ++i) {
      Acc gain = s.gain[i], den(0);
      for (isize f = 0; rows_.normalised && f < n_.r; ++f) den += s.q[i * s.stride + f] * z[f];
      if (rows_.normalised) gain = linear_rows::normalise(gain, den, s.add[i], s.floor[i]);
      for (isize c = 0; c < n_.e; ++c) s.out[i * n_.e + c] *= gain;
      simd::store_row<Arch, Acc>(p_.out.type, s.out + i * n_.e, n_.e, p_.out.row(b, head, first + i));
    }
  }

  const linear_attention& m_;
  const problem& p_;
  linear_rows rows_;
  linear_sizes n_;
  isize ranges_ = 1;
  Acc* sums_ = nullptr;
  arena memory_;
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
