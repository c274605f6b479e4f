// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention: how one problem is cut into tasks, and how the parts of its keys are joined again.
///
///   few rows    group * n <= 8: all rows of a KV head in one task, split over the keys (decoding)
///   blocks      superblocks of query rows; where these give few tasks, split over the keys as well (a chunk against a long cache)
///
/// Contract   a problem is cut by its own sizes alone, so that bits depend neither on threads nor on what else is in the list. Parts are
///            joined in the order of their keys.

#include <fovea/core/partial.hpp>
#include <fovea/kernel/decode.hpp>
#include <fovea/softmax/problems.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
struct softmax_cut {
  using few_loop = kernel::decode_rows<simd::native, Acc>;
  using block_loop = kernel::online_softmax<simd::native, Acc>;
  static constexpr isize most_pieces = 16, least_keys = 4096, enough_tasks = 8;
  static constexpr isize least_keys_few = 1024;  // few rows: three pieces leave one of two threads idle

  bool few = false;
  isize heads = 0, rows = 0;             // KV heads; rows of each
  isize block = 0, blocks = 0;           // rows of a task, tasks by rows
  isize most = most_pieces;              // pieces that there may be
  isize pieces = 1, keys = PTRDIFF_MAX;  // of each task by rows: parts of the keys, keys of a part

  explicit softmax_cut(const sequence_problem& p) : heads(p.q.heads > 0 ? p.kv.heads : 0), rows(p.rows()) {
    if (rows == 0 || heads == 0) return;
    few = rows <= few_loop::most_rows;
    block = few ? rows : block_loop::superblock(rows, p.kv.d, p.kv.e);
    blocks = ceil_div(rows, block);
    if (!few) most = heads * blocks < enough_tasks ? enough_tasks / (heads * blocks) : 1;
    if (most > most_pieces) most = most_pieces;
    const isize m = p.kv.length, share = ceil_div(ceil_div(m, most), 128) * 128;
    const isize least = few ? least_keys_few : least_keys;
    keys = share < least ? least : share;
    pieces = m > keys ? ceil_div(m, keys) : 1;
  }
  isize tasks() const { return heads * blocks * pieces; }  // 0: no row
  /// Numbers that the parts of a split problem leave: (m, l, o) of each row of each piece. Few rows: whatever the number of keys.
  isize partial_size(isize e) const {
    const isize parts = few ? most : pieces;
    return parts > 1 ? parts * heads * rows * (e + 2) : 0;
  }
};

/// (m, l, o) of the rows of one problem, piece by piece; m in nats. Row r of KV head g is row g * rows + r.
template <class Acc>
struct softmax_partials {
  Acc *m, *l, *o;
  isize all, e;  // rows of all heads

  softmax_partials(Acc* memory, isize all_rows, isize pieces, isize width) : all(all_rows), e(width) {
    m = memory, l = m + pieces * all, o = l + pieces * all;
  }
  partial<Acc> at(isize piece, isize row) const {
    const isize x = piece * all + row;
    return {m[x], l[x], o + x * e};
  }
};

/// Joins the pieces of row `at`, in order, with the sink, and writes it: query i of head h is row h * n + i of the problem.
template <class Acc>
void finish_row(const softmax_attention& a, const sequence_problem& p, const softmax_partials<Acc>& parts, isize pieces,
                isize at, isize row) noexcept {
  const isize h = row / p.q.length, i = row % p.q.length, e = parts.e;
  partial<Acc> all = parts.at(0, at);
  for (isize x = 1; x < pieces; ++x) merge(all, parts.at(x, at), e);
  if (a.sinks != nullptr && a.sinks[h] > -std::numeric_limits<float>::infinity()) {
    const Acc sink = static_cast<Acc>(a.sinks[h]), top = all.m > sink ? all.m : sink, shrink = std::exp(all.m - top);
    all.l = all.l * shrink + std::exp(sink - top);
    for (isize c = 0; c < e; ++c) all.o[c] *= shrink;
    all.m = top;
  }
  const Acc lse = normalise(all, e);
  simd::store_row<simd::native, Acc>(p.out.type, all.o, e, p.out.row(0, h, i));
  if (p.lse) *static_cast<Acc*>(p.lse.row(0, h, i)) = lse;
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
