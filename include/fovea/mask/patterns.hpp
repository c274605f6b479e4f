// SPDX-License-Identifier: MIT
#pragma once
/// @file  Fixed sparse patterns as masks that answer per tile: MST's hybrid sparse attention (token level), dilated
///        windows, BigBird, global tokens.
///
///   local    j <= p  and  p - j < stride
///   strided  j <= p  and  (p - j) mod stride = 0
///   sparse   local or strided                                                 (the Sparse Transformer's union)
///   fixed    j <= p  and  (same stretch of `stride` keys, or j the last key of its stretch)
///
/// Contract   p is the position of the query row (mask/causal.hpp); all four are causal by definition; stride >= 1. They are one
///            mask for every head, as in the released code, and depend on positions only: a prefill equals its steps.
/// Cost       a kernel that asks `tile` skips what a pattern leaves out; strided with stride < tile width leaves out nothing
///            (hybrid_attention computes strided tokens by residue classes: hybrid/pattern.hpp).
/// Source     Hu, Li, Wang, Huang, "Mixed Sparsity Training", arXiv 2408.11746, get_causal_attn_mask in model.py; Child et al.,
///            arXiv 1904.10509; Zaheer et al., "Big Bird", arXiv 2007.14062.

#include <fovea/mask/causal.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

enum class hsa_mode : unsigned char { local, strided, sparse, fixed };

constexpr const char* name_of(hsa_mode mode) {
  return mode == hsa_mode::local     ? "local"
         : mode == hsa_mode::strided ? "strided"
         : mode == hsa_mode::sparse  ? "sparse"
                                     : "fixed";
}

struct hsa_pattern {
  hsa_mode mode = hsa_mode::sparse;
  isize stride = 128;  ///< MST's default
  alignment_of_rows align = bottom_right;

  FOVEA_HD bool is_causal() const { return align.how == alignment_of_rows::kind::bottom_right; }
  void check(const mask_site&) const {
    align.check();
    require(stride >= 1, "pattern stride is ", stride, "; it must be at least 1");
  }

  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    const isize p = align.position(at, i);
    if (j > p) return false;
    switch (mode) {
      case hsa_mode::local: return p - j < stride;
      case hsa_mode::strided: return (p - j) % stride == 0;
      case hsa_mode::sparse: return p - j < stride || (p - j) % stride == 0;
      case hsa_mode::fixed: return p / stride == j / stride || j % stride == stride - 1;
    }
    return false;
  }
  FOVEA_HD range keys(const mask_site& at, isize i0, isize i1) const {
    const isize low = align.position(at, i0) - stride + 1;
    return {mode != hsa_mode::local || low < 0 ? 0 : low, align.position(at, i1 - 1) + 1};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const isize p1 = align.position(at, i1 - 1);
    if (p1 < j0) return tile_kind::empty;
    const isize p0 = align.position(at, i0);
    switch (mode) {
      case hsa_mode::local: return local_tile(p0, p1, j0, j1);
      case hsa_mode::strided: return strided_tile(p0, p1, j0, j1);
      case hsa_mode::sparse: {
        const tile_kind near = local_tile(p0, p1, j0, j1);
        return near != tile_kind::empty ? near : strided_tile(p0, p1, j0, j1);
      }
      case hsa_mode::fixed: return fixed_tile(p0, p1, j0, j1);
    }
    return tile_kind::partial;
  }
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    const isize p0 = align.position(at, i0), p1 = p0 + count - 1;
    const auto rows = [&](isize first, isize last) {  // the bits of positions [first, last]
      const isize a = first > p0 ? first - p0 : 0, b = (last < p1 ? last : p1) - p0;
      return a > b ? std::uint64_t{0} : (~std::uint64_t{0} >> (63 - (b - a))) << a;
    };
    for (isize j = j0; j < j1; ++j) {
      std::uint64_t bits = 0;
      if (mode == hsa_mode::fixed) bits = rows(j, j % stride == stride - 1 ? p1 : j / stride * stride + stride - 1);
      if (mode == hsa_mode::local || mode == hsa_mode::sparse) bits = rows(j, j + stride - 1);
      if (mode == hsa_mode::strided || mode == hsa_mode::sparse)
        for (isize p = j >= p0 ? j : j + (p0 - j + stride - 1) / stride * stride; p <= p1; p += stride)
          bits |= std::uint64_t{1} << (p - p0);
      out[j - j0] = bits;
    }
  }

 private:  // all with j0 <= p1, hence p1 >= 0
  FOVEA_HD tile_kind local_tile(isize p0, isize p1, isize j0, isize j1) const {
    if (j1 - 1 <= p0 - stride) return tile_kind::empty;
    return j1 - 1 <= p0 && j0 > p1 - stride ? tile_kind::full : tile_kind::partial;
  }
  FOVEA_HD tile_kind strided_tile(isize p0, isize p1, isize j0, isize j1) const {
    // The differences p - j of a tile are all integers of [p0 - j1 + 1, p1 - j0].
    const isize least = p0 - j1 + 1, low = least < 0 ? 0 : least, high = p1 - j0;
    if (high / stride * stride < low) return tile_kind::empty;
    return least >= 0 && (stride == 1 || high == least) ? tile_kind::full : tile_kind::partial;
  }
  FOVEA_HD tile_kind fixed_tile(isize p0, isize p1, isize j0, isize j1) const {
    const isize first = (p0 < 0 ? 0 : p0) / stride, last = p1 / stride;
    const isize end = j1 - 1 < p1 ? j1 - 1 : p1;
    const isize summary = j0 / stride * stride + stride - 1;  // the first summary key at or after j0
    if (summary > end && (end / stride < first || j0 / stride > last)) return tile_kind::empty;
    const bool same = first == last && j0 / stride == first && (j1 - 1) / stride == first;
    return p0 >= j1 - 1 && (same || (j1 - j0 == 1 && summary == j0)) ? tile_kind::full : tile_kind::partial;
  }
};

/// MST's schedule in time: the pattern from iteration first * interval on, dense causal attention again from last * interval on.
/// The released default, {100, 100}, is never sparse.
struct hsa_schedule {
  isize first = 100, last = 100;
  isize interval = 1000;

  bool sparse_at(isize iteration) const { return iteration >= first * interval && iteration < last * interval; }
  /// The mask of a training iteration: the pattern, or plain causal attention.
  mask at(isize iteration, const hsa_pattern& pattern) const {
    if (sparse_at(iteration)) return pattern;
    return causal{.align = pattern.align};
  }
};

/// Every step-th key of the past, `window` of them, the own one first: j <= p,
/// (p - j) mod step = 0 and p - j < window step.
struct dilated {
  isize window = 64, step = 2;
  alignment_of_rows align = bottom_right;

  FOVEA_HD bool is_causal() const { return align.how == alignment_of_rows::kind::bottom_right; }
  void check(const mask_site&) const {
    align.check();
    require(window >= 1 && step >= 1 && window <= PTRDIFF_MAX / step, "dilated window, step are ", window, ", ", step,
            "; they must be at least 1");
  }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    const isize gap = align.position(at, i) - j;
    return gap >= 0 && gap < window * step && gap % step == 0;
  }
  FOVEA_HD range keys(const mask_site& at, isize i0, isize i1) const {
    const isize low = align.position(at, i0) - (window - 1) * step;
    return {low < 0 ? 0 : low, align.position(at, i1 - 1) + 1};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    // The differences p - j of a tile are all integers of [least, most].
    const isize least = align.position(at, i0) - j1 + 1, most = align.position(at, i1 - 1) - j0;
    const isize far = (window - 1) * step, low = least < 0 ? 0 : least, high = most < far ? most : far;
    if (high < low || high / step * step < low) return tile_kind::empty;
    return least >= 0 && most <= far && (step == 1 || least == most) ? tile_kind::full : tile_kind::partial;
  }
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    const isize p0 = align.position(at, i0), p1 = p0 + count - 1;
    for (isize j = j0; j < j1; ++j) {
      const isize last = j + (window - 1) * step < p1 ? j + (window - 1) * step : p1;
      out[j - j0] = 0;
      for (isize p = j >= p0 ? j : j + (p0 - j + step - 1) / step * step; p <= last; p += step)
        out[j - j0] |= std::uint64_t{1} << (p - p0);
    }
  }
};

/// Rows at positions below `count` see every key, and keys below `count` are seen by every row; nothing else (join it with
/// another pattern by `either`, and with `causal` by `both`).
struct global_tokens {
  isize count = 1;
  alignment_of_rows align = bottom_right;

  void check(const mask_site&) const {
    align.check();
    require(count >= 0, "global_tokens count is ", count, "; it must not be negative");
  }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    return j < count || align.position(at, i) < count;
  }
  FOVEA_HD range keys(const mask_site& at, isize i0, isize) const {
    return {0, align.position(at, i0) < count ? at.m : count};
  }
  FOVEA_HD range queries(const mask_site& at, isize j) const {
    return {0, j < count ? at.n : count - align.position(at, 0)};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    if (j1 <= count || align.position(at, i1 - 1) < count) return tile_kind::full;
    return j0 >= count && align.position(at, i0) >= count ? tile_kind::empty : tile_kind::partial;
  }
};

/// BigBird at block level: `window` blocks around the query's own, the first `global` blocks in both directions, `random` blocks a
/// block row, drawn by a hash of (seed, head, block row). The random blocks are this library's draw, not a framework's.
struct bigbird {
  isize block = 64;
  isize window = 3, global = 1, random = 3;  ///< window counts the own block and is odd
  std::uint64_t seed = 0;
  bool is_causal = false;
  alignment_of_rows align = bottom_right;

  void check(const mask_site&) const {
    align.check();
    require(block >= 1, "bigbird block is ", block, "; it must be at least 1");
    require(window >= 1 && window % 2 == 1 && global >= 0 && random >= 0, "bigbird window, global, random are ", window,
            ", ", global, ", ", random, "; the window must be odd and positive, the others not negative");
  }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    const isize p = align.position(at, i);
    return p >= 0 && (!is_causal || j <= p) && sees(at, p / block, j / block);
  }
  FOVEA_HD range keys(const mask_site& at, isize, isize i1) const {
    return {0, is_causal ? align.position(at, i1 - 1) + 1 : at.m};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const isize p0 = align.position(at, i0), p1 = align.position(at, i1 - 1);
    if (p1 < 0 || (is_causal && j0 > p1)) return tile_kind::empty;
    const isize c0 = j0 / block, c1 = (j1 - 1) / block;
    bool all = p0 >= 0 && (!is_causal || j1 - 1 <= p0), any = false;
    for (isize r = (p0 < 0 ? 0 : p0) / block; r <= p1 / block && (all || !any); ++r) {
      for (isize c = c0; c <= c1 && all; ++c) all = sees(at, r, c);
      any = any || sees_some(at, r, c0, c1);
    }
    return all ? tile_kind::full : any ? tile_kind::partial : tile_kind::empty;
  }
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    const isize p0 = align.position(at, i0), p1 = p0 + count - 1;
    for (isize j = j0; j < j1; ++j) out[j - j0] = 0;
    for (isize r = (p0 < 0 ? 0 : p0) / block; p1 >= 0 && r <= p1 / block; ++r) {
      const isize end = (r + 1) * block - p0;
      const std::uint64_t rows = detail::bits_between(r * block - p0, end < count ? end : count);
      for (isize c = j0 / block; c <= (j1 - 1) / block; ++c) {
        if (!sees(at, r, c)) continue;
        const range keys = meet({c * block, (c + 1) * block}, {j0, j1});
        for (isize j = keys.first; j < keys.last; ++j)
          out[j - j0] |= is_causal ? rows & detail::bits_between(j - p0, 64) : rows;
      }
    }
  }

 private:
  FOVEA_HD static std::uint64_t mix(std::uint64_t x) {  // splitmix64
    x += 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
  }
  FOVEA_HD bool sees(const mask_site& at, isize r, isize c) const { return sees_some(at, r, c, c); }
  /// Does block row r see one of the blocks [c0, c1]?
  FOVEA_HD bool sees_some(const mask_site& at, isize r, isize c0, isize c1) const {
    if (r < global || c0 < global || (r - c1 <= window / 2 && c0 - r <= window / 2)) return true;
    const isize columns = is_causal ? r + 1 : (at.m + block - 1) / block;
    for (isize t = 0; t < random && c0 < columns; ++t) {
      const std::uint64_t key =
          mix(mix(seed + static_cast<std::uint64_t>(at.h)) + static_cast<std::uint64_t>(r * random + t));
      const auto c = static_cast<isize>(key % static_cast<std::uint64_t>(columns));
      if (c >= c0 && c <= c1) return true;
    }
    return false;
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
