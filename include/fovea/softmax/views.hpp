// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention over views: batch items as a list of problems; keys that are turned (RoPE) are turned once per KV head.

#include <fovea/cache/write_rows.hpp>
#include <fovea/softmax/prefill.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Item b of a batch of views: its rows; the caller adds keys and values.
inline sequence_problem item_of(const problem& p, isize b) {
  sequence_problem s;
  s.q = p.q.part(b, 0, p.q.heads), s.out = p.out.part(b, 0, p.q.heads);
  if (p.lse) s.lse = p.lse.part(b, 0, p.q.heads);
  if (p.skipped) s.skipped = p.skipped.part(b, 0, p.q.heads);
  s.b = b, s.B = p.q.batch;
  s.positions = p.positions == nullptr ? nullptr : p.positions + b * p.q.length;
  return s;
}
inline sequence_problem item_with_keys(const problem& p, isize b) {
  sequence_problem s = item_of(p, b);
  kv_sequence& kv = s.kv;
  kv.heads = p.k.heads, kv.d = p.q.width, kv.e = p.v.width, kv.length = p.k.length;
  kv.k.type = p.k.type, kv.v.type = p.v.type;
  if (kv.length == 0) return s;
  kv.k = rows_of(p.k, b, 0), kv.v = rows_of(p.v, b, 0);
  kv.k_head_bytes = p.k.head_stride * static_cast<isize>(size_of(p.k.type));
  kv.v_head_bytes = p.v.head_stride * static_cast<isize>(size_of(p.v.type));
  return s;
}
/// A problem of these sizes, to be measured.
inline problem sized(const shape& s) {
  problem p;
  p.q.type = p.k.type = p.v.type = s.type;
  p.q.batch = p.k.batch = p.v.batch = s.B, p.q.heads = s.H, p.k.heads = p.v.heads = s.G;
  p.q.length = s.n, p.k.length = p.v.length = s.m, p.q.width = p.k.width = s.d, p.v.width = s.e;
  return p;
}

/// Where keys go that are turned for the length of a call: [B, G, m, d] in their own type, as a cache would hold them.
struct turned_keys {
  kv_layout layout;
  std::byte* rows = nullptr;
  double* scratch = nullptr;  // [threads][d]

  turned_keys(arena& memory, const softmax_attention& m, const shape& s, int threads) {
    if (m.turn == nullptr) return;
    layout = kv_layout({.heads = s.B * s.G, .d = s.d, .e = 0, .type = s.type}, s.m);
    rows = memory.take<std::byte>(static_cast<isize>(layout.bytes()));
    scratch = memory.take<double>(s.d * threads);
  }
  void fill(const softmax_attention& m, exec_ref exec, const problem& p) const {
    const shape s = p.shape();
    constexpr isize some = 256;  // keys of a task
    const isize parts = ceil_div(s.m, some), old = s.m - s.n;
    exec.for_tasks(s.B * s.G * parts, [&](isize task, isize slot) {
      const row_writer writer(layout.shape(), scratch + slot * s.d);
      const isize head = task / parts, b = head / s.G, g = head % s.G, first = task % parts * some;
      for (isize j = first; j < s.m && j < first + some; ++j)
        writer.write(p.k.type, p.k.row(b, g, j), s.d, m.turn,
                     p.positions != nullptr && j >= old ? p.positions[b * s.n + j - old] : j,
                     layout.key(rows, head, j));
    });
  }
  void use(sequence_problem& s) const {
    const kv_sequence own = layout.sequence(rows, s.b * s.kv.heads, s.kv.heads, s.kv.length);
    s.kv.k = own.k, s.kv.k_head_bytes = own.k_head_bytes;
  }
};

template <class Acc>
void attend_views(const softmax_attention& m, exec_ref exec, const problem& p, arena scratch) {
  const turned_keys turned(scratch, m, p.shape(), exec.concurrency());
  if (m.turn != nullptr) turned.fill(m, exec, p);
  attend<Acc>(m, exec,
              problem_list(p.q.batch,
                           [&](isize b) {
                             sequence_problem s = item_with_keys(p, b);
                             if (m.turn != nullptr) turned.use(s);
                             return s;
                           }),
              scratch);
}

/// A call that only attends: `s` as of a plain call.
template <class Acc>
std::size_t attend_workspace(const softmax_attention& m, const shape& s, int threads) {
  const problem p = sized(s);
  return softmax_workspace<Acc>(m, problem_list(s.B, [&](isize b) { return item_with_keys(p, b); }), threads);
}

}  // namespace detail

inline std::size_t softmax_attention::workspace_size(const shape& s, int threads) const {
  const auto plain = [&]<class Acc>(Acc) {
    arena turned;
    detail::turned_keys(turned, *this, s, threads);
    const std::size_t rest = detail::attend_workspace<Acc>(*this, s, threads);
    return turned.bytes() + rest;
  };
  const std::size_t views = s.type == dtype::f64 ? plain(double{}) : plain(float{});
  const std::size_t state = mask.is_causal() ? state_workspace_size(s, threads) : 0;
  return views > state ? views : state;
}

inline void softmax_attention::prefill(exec_ref exec, const problem& p, arena scratch) const {
  if (p.q.type == dtype::f64)
    detail::attend_views<double>(*this, exec, p, scratch);
  else
    detail::attend_views<float>(*this, exec, p, scratch);
}

inline double softmax_attention::macs(const shape& s) const {
  double pairs = 0;  // visible pairs of one head, by tiles of the mask's own answers along the rows
  mask_site at = site(s, 0);
  for (isize i = 0; i < s.n; ++i) {
    const range r = mask.keys(at, i, i + 1);
    if (r.empty()) continue;
    if (mask.tile(at, i, i + 1, r.first, r.last) == tile_kind::full)
      pairs += static_cast<double>(r.last - r.first);
    else
      for (isize j = r.first; j < r.last; ++j) pairs += mask.visible(at, i, j) ? 1 : 0;
  }
  return static_cast<double>(s.B * s.H * (s.d + s.e)) * pairs;
}

inline double softmax_attention::step_macs(const shape& s) const {
  shape last_row = s;
  last_row.n = 1;
  return macs(last_row);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
