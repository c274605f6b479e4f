// SPDX-License-Identifier: MIT
#pragma once
/// @file  Masks that are stored, and combinations: a boolean matrix, a block mask, `both`, `either`, `every`.
///
///   both, either   two policies of any type                  every   any number of masks that stand elsewhere
///
/// Packed sequences stand in mask/packed.hpp, trees of draft tokens in mask/tree.hpp, functions in mask/function.hpp.
///
/// Contract   tables are views of the caller's memory with explicit strides (in elements; 0 broadcasts over batch or heads).

#include <fovea/mask/packed.hpp>

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
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const { return row(at, i)[j * key_stride] != 0; }
  FOVEA_HD range keys(const mask_site& at, isize, isize) const { return {0, at.m}; }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    bool any = false, all = true;
    for (isize i = i0; i < i1 && (all || !any); ++i) {
      const std::uint8_t* t = row(at, i);
      for (isize j = j0; j < j1; ++j) any |= t[j * key_stride] != 0, all &= t[j * key_stride] != 0;
    }
    return all ? tile_kind::full : any ? tile_kind::partial : tile_kind::empty;
  }
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    for (isize j = j0; j < j1; ++j) out[j - j0] = 0;
    for (isize l = 0; l < count; ++l) {
      const std::uint8_t* t = row(at, i0 + l);
      for (isize j = j0; j < j1; ++j) out[j - j0] |= static_cast<std::uint64_t>(t[j * key_stride] != 0) << l;
    }
  }

 private:
  FOVEA_HD const std::uint8_t* row(const mask_site& at, isize i) const {
    return table + at.b * batch_stride + at.h * head_stride + i * row_stride;
  }
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
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    for (isize j = j0; j < j1; ++j) out[j - j0] = 0;
    for (isize r = i0 / block_q; r <= (i0 + count - 1) / block_q; ++r) {
      const std::uint8_t* t = row(at, r);
      const isize end = (r + 1) * block_q - i0;
      const std::uint64_t rows = detail::bits_between(r * block_q - i0, end < count ? end : count);
      for (isize c = j0 / block_k; c <= (j1 - 1) / block_k; ++c) {
        if ((t[c] != 0) == inverted) continue;
        const range keys = meet({c * block_k, (c + 1) * block_k}, {j0, j1});
        for (isize j = keys.first; j < keys.last; ++j) out[j - j0] |= rows;
      }
    }
  }

 private:
  FOVEA_HD static isize ceil_blocks(isize x, isize block) { return (x + block - 1) / block; }
  FOVEA_HD const std::uint8_t* row(const mask_site& at, isize r) const {
    return table + at.b * batch_stride + (per_kv_head ? at.h / (at.H / at.G) : at.h) * head_stride + r * row_stride;
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
template <class P>
FOVEA_HD constexpr kept_keys kept_by(const P& p) {
  if constexpr (requires { p.kept(); })
    return p.kept();
  else
    return {};
}
/// out = join(out, the lanes of p)
template <mask_policy P, class Join>
void joined_lanes(const P& p, const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out,
                  Join&& join) {
  constexpr isize most = 64;
  std::uint64_t bits[most];
  for (isize j = j0; j < j1; j += most) {
    const isize last = j + most < j1 ? j + most : j1;
    mask_lanes(p, at, i0, count, j, last, bits);
    for (isize x = j; x < last; ++x) out[x - j0] = join(out[x - j0], bits[x - j]);
  }
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
  FOVEA_HD kept_keys kept() const { return tighter(detail::kept_by(a), detail::kept_by(b)); }
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
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    detail::mask_lanes(a, at, i0, count, j0, j1, out);
    detail::joined_lanes(b, at, i0, count, j0, j1, out, [](std::uint64_t x, std::uint64_t y) { return x & y; });
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
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    detail::mask_lanes(a, at, i0, count, j0, j1, out);
    detail::joined_lanes(b, at, i0, count, j0, j1, out, [](std::uint64_t x, std::uint64_t y) { return x | y; });
  }
};
template <class A, class B>
either(A, B) -> either<A, B>;

/// Visible in every one of `count` masks, which stay where they are: for combinations that only the run knows.
struct every {
  const mask* parts = nullptr;
  isize count = 0;

  void check(const mask_site& at) const {
    require(parts != nullptr || count == 0, "every has ", count, " masks and a null pointer");
    for (isize x = 0; x < count; ++x) parts[x].check(at);
  }
  bool is_causal() const {
    for (isize x = 0; x < count; ++x)
      if (parts[x].is_causal()) return true;
    return false;
  }
  kept_keys kept() const {
    kept_keys all;
    for (isize x = 0; x < count; ++x) all = tighter(all, parts[x].kept());
    return all;
  }
  bool visible(const mask_site& at, isize i, isize j) const {
    for (isize x = 0; x < count; ++x)
      if (!parts[x].visible(at, i, j)) return false;
    return true;
  }
  range keys(const mask_site& at, isize i0, isize i1) const {
    range all{0, at.m};
    for (isize x = 0; x < count; ++x) all = meet(all, parts[x].keys(at, i0, i1));
    return all;
  }
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    tile_kind all = tile_kind::full;
    for (isize x = 0; x < count && all != tile_kind::empty; ++x) {
      const tile_kind kind = parts[x].tile(at, i0, i1, j0, j1);
      if (kind != tile_kind::full) all = kind;
    }
    return all;
  }
  void lanes(const mask_site& at, isize i0, isize rows, isize j0, isize j1, std::uint64_t* out) const {
    for (isize j = j0; j < j1; ++j) out[j - j0] = ~std::uint64_t{0} >> (64 - rows);
    for (isize x = 0; x < count; ++x)
      if (parts[x].tile(at, i0, i0 + rows, j0, j1) != tile_kind::full)
        detail::joined_lanes(parts[x], at, i0, rows, j0, j1, out,
                             [](std::uint64_t a, std::uint64_t b) { return a & b; });
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
