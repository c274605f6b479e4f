// SPDX-License-Identifier: MIT
#pragma once
/// @file  Packed batches: several sequences in one, told apart by cumulative lengths; alone, or with a rule inside each sequence.
///
///   row cu_q[s] <= i < cu_q[s + 1] sees keys cu_k[s] <= j < cu_k[s + 1]
///   packed       all of them, or causally (bottom-right within the sequence)
///   documents    those that the inner mask shows to row i - cu_q[s] of key j - cu_k[s]: window, chunks, prefix, tree ...
///
/// Contract   the inner mask is asked as if sequence s were item s of a batch: b = s, B = sequences, n and m its own lengths; so
///            positions are counted within the sequence, and [B] tables of a policy hold one entry a sequence.
/// Cost       a binary search a tile.

#include <fovea/mask/mask.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

template <mask_policy Inner>
struct documents;

/// Every key of the own sequence, or causally.
struct packed {
  const std::int32_t* cu_q = nullptr;  ///< sequences + 1 cumulative lengths, from 0 to n
  const std::int32_t* cu_k = nullptr;  ///< likewise, from 0 to m
  isize sequences = 0;
  bool is_causal = false;

  void check(const mask_site& at) const {
    require(cu_q != nullptr && cu_k != nullptr && sequences >= 1, "packed has ", sequences, " sequences and ",
            cu_q == nullptr || cu_k == nullptr ? "null" : "given", " cumulative lengths; wanted at least one sequence");
    for (isize s = 0; s < sequences; ++s)
      require(cu_q[s] <= cu_q[s + 1] && cu_k[s] <= cu_k[s + 1], "packed cumulative lengths fall at sequence ", s,
              "; they must not decrease");
    require(cu_q[0] == 0 && cu_k[0] == 0 && cu_q[sequences] == at.n && cu_k[sequences] == at.m,
            "packed cumulative lengths run from ", cu_q[0], ", ", cu_k[0], " to ", cu_q[sequences], ", ",
            cu_k[sequences], "; wanted 0, 0 to n = ", at.n, ", m = ", at.m);
  }
  FOVEA_HD bool visible(const mask_site&, isize i, isize j) const {
    const isize s = find(cu_q, i);
    return j >= cu_k[s] && j < (is_causal ? last_key(s, i) : cu_k[s + 1]);
  }
  FOVEA_HD range keys(const mask_site&, isize i0, isize i1) const {
    const isize s = find(cu_q, i1 - 1);
    return {cu_k[find(cu_q, i0)], is_causal && s == find(cu_q, i0) ? last_key(s, i1 - 1) : cu_k[s + 1]};
  }
  FOVEA_HD range queries(const mask_site&, isize j) const {
    const isize s = find(cu_k, j);
    const isize first = is_causal ? j - cu_k[s + 1] + cu_q[s + 1] : cu_q[s];
    return {first > cu_q[s] ? first : cu_q[s], cu_q[s + 1]};
  }
  FOVEA_HD tile_kind tile(const mask_site&, isize i0, isize i1, isize j0, isize j1) const {
    const isize s = find(cu_q, i0), t = find(cu_q, i1 - 1);
    bool any = false, all = true;
    for (isize r = s; r <= t && (all || !any); ++r) {
      const range rows = meet({i0, i1}, {cu_q[r], cu_q[r + 1]}), keys = meet({j0, j1}, {cu_k[r], cu_k[r + 1]});
      if (rows.empty()) continue;
      any = any || (!keys.empty() && (!is_causal || keys.first < last_key(r, rows.last - 1)));
      all = all && keys.last - keys.first == j1 - j0 && (!is_causal || keys.last <= last_key(r, rows.first));
    }
    return all ? tile_kind::full : any ? tile_kind::partial : tile_kind::empty;
  }

  /// The sequence that holds row i.
  FOVEA_HD isize sequence_of(isize i) const { return find(cu_q, i); }
  /// The site of sequence s: what the inner policy is asked with.
  FOVEA_HD mask_site site(const mask_site& at, isize s) const {
    mask_site own = at;
    own.b = s, own.B = sequences;
    own.n = cu_q[s + 1] - cu_q[s], own.m = cu_k[s + 1] - cu_k[s];
    return own;
  }

 private:
  template <mask_policy Inner>
  friend struct documents;
  FOVEA_HD isize find(const std::int32_t* cu, isize x) const {  // the sequence that holds element x
    isize low = 0, high = sequences;
    while (high - low > 1) {
      const isize mid = (low + high) / 2;
      (cu[mid] <= x ? low : high) = mid;
    }
    return low;
  }
  FOVEA_HD isize last_key(isize s, isize i) const {  // one past the last key that row i of sequence s sees
    const isize last = cu_k[s + 1] - (cu_q[s + 1] - i) + 1;
    return last > cu_k[s] ? last : cu_k[s];
  }
};

template <mask_policy Inner>
struct documents {
  packed sequences;  ///< its is_causal joins the inner rule
  Inner inner;

  void check(const mask_site& at) const {
    sequences.check(at);
    for (isize s = 0; s < sequences.sequences; ++s)
      if constexpr (requires { inner.check(at); }) inner.check(sequences.site(at, s));
  }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    if (!sequences.visible(at, i, j)) return false;
    const isize s = sequences.sequence_of(i);
    return inner.visible(sequences.site(at, s), i - sequences.cu_q[s], j - sequences.cu_k[s]);
  }
  FOVEA_HD range keys(const mask_site& at, isize i0, isize i1) const {
    const isize s = sequences.sequence_of(i0), t = sequences.sequence_of(i1 - 1);
    range all{at.m, 0};
    for (isize r = s; r <= t; ++r) {
      const range rows = meet({i0, i1}, of(sequences.cu_q, r)), own = of(sequences.cu_k, r);
      if (rows.empty() || own.empty()) continue;
      const range seen =
          meet(inner.keys(sequences.site(at, r), rows.first - sequences.cu_q[r], rows.last - sequences.cu_q[r]),
               {0, own.last - own.first});
      if (seen.empty()) continue;
      if (all.first > own.first + seen.first) all.first = own.first + seen.first;
      if (all.last < own.first + seen.last) all.last = own.first + seen.last;
    }
    return meet(all, sequences.keys(at, i0, i1));
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const tile_kind outer = sequences.tile(at, i0, i1, j0, j1);
    if (outer == tile_kind::empty) return outer;
    bool any = false, all = outer == tile_kind::full;
    for (isize r = sequences.sequence_of(i0); r <= sequences.sequence_of(i1 - 1); ++r) {
      const range rows = meet({i0, i1}, of(sequences.cu_q, r)), keys = meet({j0, j1}, of(sequences.cu_k, r));
      if (rows.empty() || keys.empty()) continue;
      const tile_kind kind =
          inner.tile(sequences.site(at, r), rows.first - sequences.cu_q[r], rows.last - sequences.cu_q[r],
                     keys.first - sequences.cu_k[r], keys.last - sequences.cu_k[r]);
      any = any || kind != tile_kind::empty, all = all && kind == tile_kind::full;
    }
    return all ? tile_kind::full : any ? tile_kind::partial : tile_kind::empty;
  }
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    for (isize j = j0; j < j1; ++j) out[j - j0] = 0;
    constexpr isize most = 64;
    std::uint64_t bits[most];
    for (isize r = sequences.sequence_of(i0); r <= sequences.sequence_of(i0 + count - 1); ++r) {
      const range rows = meet({i0, i0 + count}, of(sequences.cu_q, r)), keys = meet({j0, j1}, of(sequences.cu_k, r));
      for (isize j = keys.first; j < keys.last && !rows.empty(); j += most) {
        const isize last = j + most < keys.last ? j + most : keys.last, q = sequences.cu_q[r], k = sequences.cu_k[r];
        detail::mask_lanes(inner, sequences.site(at, r), rows.first - q, rows.last - rows.first, j - k, last - k, bits);
        for (isize x = j; x < last; ++x) out[x - j0] |= bits[x - j] << (rows.first - i0);
      }
    }
    if (!sequences.is_causal) return;
    for (isize j = j0; j < j1; ++j) {
      const range seen = meet(sequences.queries(at, j), {i0, i0 + count});
      out[j - j0] &= seen.empty() ? 0 : (~std::uint64_t{0} >> (64 - (seen.last - seen.first))) << (seen.first - i0);
    }
  }

 private:
  FOVEA_HD static range of(const std::int32_t* cu, isize s) { return {cu[s], cu[s + 1]}; }
};
template <class Inner>
documents(packed, Inner) -> documents<Inner>;

/// A mask that stands elsewhere, as a policy: the inner rule that only the run knows.
struct mask_ref {
  const mask* to = nullptr;

  void check(const mask_site& at) const {
    require(to != nullptr, "mask_ref is null; wanted a mask");
    to->check(at);
  }
  bool is_causal() const { return to->is_causal(); }
  kept_keys kept() const { return to->kept(); }
  bool visible(const mask_site& at, isize i, isize j) const { return to->visible(at, i, j); }
  range keys(const mask_site& at, isize i0, isize i1) const { return to->keys(at, i0, i1); }
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    return to->tile(at, i0, i1, j0, j1);
  }
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    to->lanes(at, i0, count, j0, j1, out);
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
