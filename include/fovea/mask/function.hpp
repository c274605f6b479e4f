// SPDX-License-Identifier: MIT
#pragma once
/// @file  Masks that are functions of the caller's: what FlexAttention calls mask_mod and create_block_mask.
///
///   mask m = mask_function{[](const mask_site& at, isize i, isize j) { return ...; }};    may row i see key j?
///
///   mask_blocks known(m, at, 64, 64);      asks every pair once and remembers of each block: none, some, all
///   softmax_attention a{.mask = mask_blocks_of{&known, mask_function{f}}};
///
/// Contract   f is trivially copyable (a lambda that captures numbers and pointers), without side effects, and does not throw.
///            A row's position among the keys is bottom_right.position(at, i). Blocks are made for a site: its n, m, and (where the
///            function depends on them) every item and head.
/// Cost       without blocks f is asked for every pair of a call; panels of keys that no row sees are left out all the same. With
///            blocks f is asked inside partial ones only, and keys and values of empty ones are not touched.
/// Source     Dong et al., Flex Attention, arXiv 2412.05496.

#include <vector>

#include <fovea/mask/mask.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

template <class F>
concept pair_function = std::is_trivially_copyable_v<F> && requires(const F& f, const mask_site& at, isize i) {
  { f(at, i, i) } -> std::convertible_to<bool>;
};

template <pair_function F>
struct mask_function {
  F f;
  bool causal = false;  ///< the caller's word that no row sees a key behind its position: states need it

  bool is_causal() const { return causal; }
  bool visible(const mask_site& at, isize i, isize j) const { return f(at, i, j); }
  range keys(const mask_site& at, isize, isize) const { return {0, at.m}; }
  tile_kind tile(const mask_site&, isize, isize, isize, isize) const { return tile_kind::partial; }
};
template <class F>
mask_function(F) -> mask_function<F>;
template <class F>
mask_function(F, bool) -> mask_function<F>;

/// Which blocks of queries and keys a mask shows in full, in part, or not at all.
class mask_blocks {
 public:
  mask_blocks() = default;
  /// Asks `m` about every pair of the site; of one item and head, or of all B and H.
  mask_blocks(const mask& m, mask_site at, isize block_q = 64, isize block_k = 64, bool per_item = false,
              bool per_head = false)
      : block_q_(block_q),
        block_k_(block_k),
        n_(at.n),
        m_(at.m),
        items_(per_item ? at.B : 1),
        heads_(per_head ? at.H : 1) {
    require(block_q >= 1 && block_k >= 1, "mask_blocks blocks are ", block_q, " x ", block_k,
            "; they must be at least 1 x 1");
    rows_ = (at.n + block_q - 1) / block_q, columns_ = (at.m + block_k - 1) / block_k;
    for (isize b = 0; b < items_; ++b)
      for (isize h = 0; h < heads_; ++h)
        for (isize r = 0; r < rows_; ++r)
          for (isize c = 0; c < columns_; ++c) {
            if (per_item) at.b = b;
            if (per_head) at.h = h;
            kinds_.push_back(look(m, at, {r * block_q, least((r + 1) * block_q, at.n)},
                                  {c * block_k, least((c + 1) * block_k, at.m)}));
          }
  }

  void check(const mask_site& at) const {
    require(n_ == at.n && m_ == at.m && (items_ == 1 || items_ == at.B) && (heads_ == 1 || heads_ == at.H),
            "mask_blocks was made for ", items_, " items, ", heads_, " heads, ", n_, " x ", m_,
            " pairs; this call has ", at.B, ", ", at.H, ", ", at.n, " x ", at.m);
  }
  isize rows_of_block() const { return block_q_; }
  isize keys_of_block() const { return block_k_; }
  /// Of the block that holds row i and key j.
  tile_kind kind(const mask_site& at, isize i, isize j) const { return row(at, i / block_q_)[j / block_k_]; }
  range keys(const mask_site& at, isize i0, isize i1) const {
    isize low = columns_, high = 0;
    for (isize r = i0 / block_q_; r <= (i1 - 1) / block_q_; ++r) {
      const tile_kind* k = row(at, r);
      for (isize c = 0; c < low; ++c)
        if (k[c] != tile_kind::empty) low = c;
      for (isize c = columns_; c > high; --c)
        if (k[c - 1] != tile_kind::empty) high = c;
    }
    return {low * block_k_, high * block_k_};
  }
  /// partial may stand for empty or full where the tile cuts through blocks.
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    bool any = false, all = true;
    for (isize r = i0 / block_q_; r <= (i1 - 1) / block_q_; ++r)
      for (isize c = j0 / block_k_; c <= (j1 - 1) / block_k_; ++c) {
        const tile_kind kind = row(at, r)[c];
        any = any || kind != tile_kind::empty, all = all && kind == tile_kind::full;
      }
    return all ? tile_kind::full : any ? tile_kind::partial : tile_kind::empty;
  }
  /// The share of blocks that are not empty.
  double density() const {
    double some = 0;
    for (const tile_kind k : kinds_) some += k != tile_kind::empty ? 1 : 0;
    return kinds_.empty() ? 0 : some / static_cast<double>(kinds_.size());
  }

 private:
  static isize least(isize a, isize b) { return a < b ? a : b; }
  static tile_kind look(const mask& m, const mask_site& at, range rows, range keys) {
    bool any = false, all = true;
    for (isize i = rows.first; i < rows.last; ++i)
      for (isize j = keys.first; j < keys.last; ++j) {
        const bool sees = m.visible(at, i, j);
        any = any || sees, all = all && sees;
      }
    return all ? tile_kind::full : any ? tile_kind::partial : tile_kind::empty;
  }
  const tile_kind* row(const mask_site& at, isize r) const {
    const isize b = items_ == 1 ? 0 : at.b, h = heads_ == 1 ? 0 : at.h;
    return kinds_.data() + ((b * heads_ + h) * rows_ + r) * columns_;
  }

  isize block_q_ = 64, block_k_ = 64, n_ = 0, m_ = 0, items_ = 1, heads_ = 1, rows_ = 0, columns_ = 0;
  std::vector<tile_kind> kinds_;
};

/// A mask whose blocks are known: `inner` (a policy, or a function in mask_function) is asked inside partial blocks only.
template <mask_policy Inner>
struct mask_blocks_of {
  const mask_blocks* known = nullptr;
  Inner inner;

  void check(const mask_site& at) const {
    require(known != nullptr, "mask_blocks_of has no blocks");
    known->check(at);
    if constexpr (requires { inner.check(at); }) inner.check(at);
  }
  bool is_causal() const {
    if constexpr (requires { inner.is_causal(); })
      return inner.is_causal();
    else
      return false;
  }
  bool visible(const mask_site& at, isize i, isize j) const { return inner.visible(at, i, j); }
  range keys(const mask_site& at, isize i0, isize i1) const { return known->keys(at, i0, i1); }
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    return known->tile(at, i0, i1, j0, j1);
  }
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    constexpr isize most = 64;
    std::uint64_t bits[most];
    for (isize j = j0; j < j1; ++j) out[j - j0] = 0;
    const isize block_q = known->rows_of_block(), block_k = known->keys_of_block(), end = i0 + count;
    for (isize i = i0, below; i < end; i = below) {  // block by block: rows [i, below), keys [j, last)
      below = (i / block_q + 1) * block_q < end ? (i / block_q + 1) * block_q : end;
      for (isize j = j0, last; j < j1; j = last) {
        last = (j / block_k + 1) * block_k < j1 ? (j / block_k + 1) * block_k : j1;
        if (last - j > most) last = j + most;
        const tile_kind kind = known->kind(at, i, j);
        if (kind == tile_kind::empty) continue;
        if (kind == tile_kind::partial) detail::mask_lanes(inner, at, i, below - i, j, last, bits);
        for (isize x = j; x < last; ++x)
          out[x - j0] |= (kind == tile_kind::full ? detail::bits_between(0, below - i) : bits[x - j]) << (i - i0);
      }
    }
  }
};
template <class Inner>
mask_blocks_of(const mask_blocks*, Inner) -> mask_blocks_of<Inner>;

}  // namespace FOVEA_ABI
}  // namespace fovea
