// SPDX-License-Identifier: MIT
#pragma once
/// @file  A call of softmax_attention as a list of independent problems: batch items of views, of a state, or sequences of KV stores.
///
/// Contract   problem s has its own rows, keys and lengths. Everything about it follows from itself alone: the same bits in any list.
///            Masks and scores see token numbers: where a store has dropped tokens, row j of the store is not token j.

#include <fovea/core/kv_layout.hpp>
#include <fovea/kernel/online_softmax.hpp>
#include <fovea/softmax/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

struct sequence_problem {
  tensor_ref q;         ///< [1, H, n, d]
  tensor_mut out, lse;  ///< [1, H, n, e], [1, H, n, 1]
  tensor_mut skipped;   ///< [1, H, n, 1] f32, or null
  kv_sequence kv;
  isize b = 0, B = 1;                       ///< the place in the batch, for masks and scores
  const std::int32_t* positions = nullptr;  ///< of the rows, for rope; null: the last n tokens
  /// Where a call is cut into several: rows [first_row, first_row + n) of all_rows, the last of all_tokens, on some of the keys. 0: it is not.
  isize first_row = 0, all_rows = 0, all_tokens = 0;

  isize group() const { return kv.heads > 0 ? q.heads / kv.heads : 0; }
  isize rows() const { return group() * q.length; }
  mask_site site() const { return {b, 0, q.length, kv.tokens(), q.heads, kv.heads, B}; }
  bool part() const { return all_rows > 0 && (all_rows != q.length || all_tokens != kv.tokens()); }
};

/// problem s of `count` is made when it is asked for: no memory for the list.
class problem_list {
 public:
  template <class F>
  problem_list(isize count, const F& make)
      : count_(count),
        context_(&make),
        make_([](const void* f, isize s) -> sequence_problem { return (*static_cast<const F*>(f))(s); }) {}
  isize count() const { return count_; }
  sequence_problem operator[](isize s) const { return make_(context_, s); }

 private:
  isize count_;
  const void* context_;
  sequence_problem (*make_)(const void*, isize);
};

/// Rows [0, kept) are tokens [0, kept), row j >= kept is token j + dropped.
struct token_numbers {
  isize kept = 0, dropped = 0;
  isize first_row = 0, all_rows = 0, all_tokens = 0;  // as in sequence_problem

  /// The site that the caller's mask and score know: that of the whole call.
  mask_site whole(mask_site at) const {
    if (all_rows > 0) at.n = all_rows, at.m = all_tokens;
    return at;
  }
  isize row(isize token) const {
    const isize behind = token - dropped;
    return token < kept ? token : behind < kept ? kept : behind;
  }
  /// f(first row, last row, number of the first one), for the one or two stretches of rows [j0, j1) that are numbered in a row.
  template <class F>
  void stretches(isize j0, isize j1, F&& f) const {
    const isize seam = j0 > kept ? j0 : j1 < kept ? j1 : kept;
    if (j0 < seam) f(j0, seam, j0);
    if (seam < j1) f(seam, j1, seam + dropped);
  }
};

/// A mask, asked about the rows of a store.
struct mask_of_rows {
  const fovea::mask* mask;
  token_numbers at_row;

  bool visible(const mask_site& at, isize i, isize j) const {
    return mask->visible(at_row.whole(at), i + at_row.first_row, j < at_row.kept ? j : j + at_row.dropped);
  }
  range keys(const mask_site& at, isize i0, isize i1) const {
    const range r = mask->keys(at_row.whole(at), i0 + at_row.first_row, i1 + at_row.first_row);
    return r.empty() ? r : range{at_row.row(r.first), at_row.row(r.last - 1) + 1};
  }
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    bool any = false, all = true;
    at_row.stretches(j0, j1, [&](isize first, isize last, isize token) {
      const isize i = at_row.first_row;
      const tile_kind kind = mask->tile(at_row.whole(at), i0 + i, i1 + i, token, token + last - first);
      any = any || kind != tile_kind::empty, all = all && kind == tile_kind::full;
    });
    return !any ? tile_kind::empty : all ? tile_kind::full : tile_kind::partial;
  }
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    at_row.stretches(j0, j1, [&](isize first, isize last, isize token) {
      mask->lanes(at_row.whole(at), i0 + at_row.first_row, count, token, token + last - first, out + (first - j0));
    });
  }
  key_band band(const mask_site& at) const {
    if (at_row.kept > 0 && at_row.dropped > 0) return {};
    const key_band all = mask->band(at_row.whole(at));
    const isize shift = at_row.first_row - at_row.dropped;
    return all.any() ? key_band{all.first + shift, all.last + shift} : all;
  }
};

/// A score modification, the same way.
struct score_of_rows {
  const fovea::score* score;
  token_numbers at_row;

  template <class T>
  T operator()(const mask_site& at, isize i, isize j, T s) const {
    return static_cast<T>((*score)(at_row.whole(at), i + at_row.first_row, j < at_row.kept ? j : j + at_row.dropped,
                                   static_cast<double>(s)));
  }
  template <class Acc>
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, Acc* tile, isize stride) const {
    at_row.stretches(j0, j1, [&](isize first, isize last, isize token) {
      score->apply<Acc>(at_row.whole(at), i0 + at_row.first_row, count, token, token + last - first,
                        tile + (first - j0) * stride, stride);
    });
  }
};

/// Keys, values, mask and score of one KV head, as kernels take them.
template <class Acc>
class problem_keys {
 public:
  problem_keys(const softmax_attention& m, const sequence_problem& p, isize g) {
    set.k = p.kv.keys(g), set.v = p.kv.values(g), set.count = p.kv.length, set.site = p.site();
    set.visible = m.mask.is_none() ? nullptr : &m.mask;
    set.modify = m.score ? &m.score : nullptr;
    if (p.kv.dropped == 0 && !p.part()) return;
    token_numbers numbers{p.kv.kept, p.kv.dropped, 0, 0, 0};
    if (p.part()) numbers.first_row = p.first_row, numbers.all_rows = p.all_rows, numbers.all_tokens = p.all_tokens;
    if (set.visible != nullptr) seen_ = mask_of_rows{set.visible, numbers}, set.visible = &seen_;
    if (set.modify != nullptr) changed_ = score_of_rows{set.modify, numbers}, set.modify = &changed_;
  }
  problem_keys(const problem_keys&) = delete;
  problem_keys& operator=(const problem_keys&) = delete;

  kernel::key_set<Acc> set;

 private:
  mask seen_;
  score changed_;
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
