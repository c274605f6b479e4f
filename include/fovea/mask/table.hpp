// SPDX-License-Identifier: MIT
#pragma once
/// @file  Masks that are stored, and combinations: a boolean matrix, a block mask, packed sequences, `both` and `either`.
///
/// Contract   tables are views of the caller's memory with explicit strides (in elements; 0 broadcasts over batch or heads).

#include <fovea/mask/mask.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// table[b * batch_stride + h * head_stride + i * row_stride + j] != 0: row i sees key j.
struct boolean_mask {
  const std::uint8_t* table = nullptr;
  isize batch_stride = 0, head_stride = 0, row_stride = 0, key_stride = 1;
  table_extent extent = {};

  void check(const mask_site& at) const {
    require(table != nullptr || at.n == 0 || at.m == 0, "boolean_mask has a null table; wanted ", at.n, " x ", at.m);
    extent.check("mask", at);
  }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    return table[at.b * batch_stride + at.h * head_stride + i * row_stride + j * key_stride] != 0;
  }
  FOVEA_HD range keys(const mask_site& at, isize, isize) const { return {0, at.m}; }
  FOVEA_HD tile_kind tile(const mask_site&, isize, isize, isize, isize) const { return tile_kind::partial; }
};

/// Key blocks of `block_k` that query blocks of `block_q` see: table[... + (i / block_q) * row_stride + j / block_k] != 0.
/// `per_kv_head`: the table's head index is the KV head, shared by its query group. `inverted`: 0 means visible.
struct block_mask {
  const std::uint8_t* table = nullptr;
  isize block_q = 64, block_k = 64;
  isize batch_stride = 0, head_stride = 0, row_stride = 0;
  bool per_kv_head = false, inverted = false;

  void check(const mask_site& at) const {
    require(block_q >= 1 && block_k >= 1, "block_mask blocks are ", block_q, " x ", block_k,
            "; they must be at least 1 x 1");
    require(table != nullptr || at.n == 0 || at.m == 0, "block_mask has a null table; wanted ",
            ceil_blocks(at.n, block_q), " x ", ceil_blocks(at.m, block_k));
  }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    return row(at, i / block_q)[j / block_k] != static_cast<std::uint8_t>(0) ? !inverted : inverted;
  }
  FOVEA_HD range keys(const mask_site& at, isize i0, isize i1) const {
    const isize blocks = ceil_blocks(at.m, block_k);
    isize low = blocks, high = 0;
    for (isize r = i0 / block_q; r <= (i1 - 1) / block_q; ++r) {
      const std::uint8_t* t = row(at, r);
      for (isize c = 0; c < low; ++c)
        if ((t[c] != 0) != inverted) low = c;
      for (isize c = blocks; c > high; --c)
        if ((t[c - 1] != 0) != inverted) high = c;
    }
    return {low * block_k, high * block_k};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    bool all = true, any = false;
    for (isize r = i0 / block_q; r <= (i1 - 1) / block_q; ++r)
      for (isize c = j0 / block_k; c <= (j1 - 1) / block_k; ++c) {
        const bool on = (row(at, r)[c] != 0) != inverted;
        all = all && on, any = any || on;
      }
    return all ? tile_kind::full : any ? tile_kind::partial : tile_kind::empty;
  }

 private:
  FOVEA_HD static isize ceil_blocks(isize x, isize block) { return (x + block - 1) / block; }
  FOVEA_HD const std::uint8_t* row(const mask_site& at, isize r) const {
    return table + at.b * batch_stride + (per_kv_head ? at.h / (at.H / at.G) : at.h) * head_stride + r * row_stride;
  }
};

/// Packed sequences: rows cu_q[s] .. cu_q[s + 1] see keys cu_k[s] .. cu_k[s + 1], causally (bottom-right within the sequence) if asked.
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
    if (j1 <= cu_k[s] || j0 >= cu_k[t + 1]) return tile_kind::empty;
    if (s != t || j0 < cu_k[s] || j1 > cu_k[s + 1]) return tile_kind::partial;
    if (!is_causal) return tile_kind::full;
    return j0 >= last_key(s, i1 - 1) ? tile_kind::empty : j1 <= last_key(s, i0) ? tile_kind::full : tile_kind::partial;
  }

 private:
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

namespace detail {
template <class P>
FOVEA_HD constexpr bool causal_policy(const P& p) {
  if constexpr (requires { p.is_causal(); })
    return p.is_causal();
  else
    return false;
}
}  // namespace detail

/// Visible in a and in b.
template <mask_policy A, mask_policy B>
struct both {
  A a;
  B b;
  void check(const mask_site& at) const {
    if constexpr (requires { a.check(at); }) a.check(at);
    if constexpr (requires { b.check(at); }) b.check(at);
  }
  FOVEA_HD bool is_causal() const { return detail::causal_policy(a) || detail::causal_policy(b); }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    return a.visible(at, i, j) && b.visible(at, i, j);
  }
  FOVEA_HD range keys(const mask_site& at, isize i0, isize i1) const {
    return meet(a.keys(at, i0, i1), b.keys(at, i0, i1));
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const tile_kind x = a.tile(at, i0, i1, j0, j1);
    if (x == tile_kind::empty) return x;
    const tile_kind y = b.tile(at, i0, i1, j0, j1);
    return x == tile_kind::full ? y : y == tile_kind::empty ? y : tile_kind::partial;
  }
};
template <class A, class B>
both(A, B) -> both<A, B>;

/// Visible in a or in b.
template <mask_policy A, mask_policy B>
struct either {
  A a;
  B b;
  void check(const mask_site& at) const {
    if constexpr (requires { a.check(at); }) a.check(at);
    if constexpr (requires { b.check(at); }) b.check(at);
  }
  FOVEA_HD bool is_causal() const { return detail::causal_policy(a) && detail::causal_policy(b); }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    return a.visible(at, i, j) || b.visible(at, i, j);
  }
  FOVEA_HD range keys(const mask_site& at, isize i0, isize i1) const {
    const range x = a.keys(at, i0, i1), y = b.keys(at, i0, i1);
    if (x.empty()) return y;
    if (y.empty()) return x;
    return {x.first < y.first ? x.first : y.first, x.last > y.last ? x.last : y.last};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const tile_kind x = a.tile(at, i0, i1, j0, j1);
    if (x == tile_kind::full) return x;
    const tile_kind y = b.tile(at, i0, i1, j0, j1);
    return x == tile_kind::empty ? y : y == tile_kind::full ? y : tile_kind::partial;
  }
};
template <class A, class B>
either(A, B) -> either<A, B>;

}  // namespace FOVEA_ABI
}  // namespace fovea
