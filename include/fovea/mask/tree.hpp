// SPDX-License-Identifier: MIT
#pragma once
/// @file  A tree of draft tokens: the mask of one call that verifies many continuations at once (speculative decoding).
///
///   rows are the draft tokens, in an order where parents come first; they are the last n of the m keys, behind the cache
///   row i sees every key before m - n, itself, its parent, its parent's parent, ...
///
/// Contract   draft_tree owns the ancestor sets of one tree of up to 4096 tokens, built once from its parents (-1: a root); `tree`
///            points to one of them for all items of a batch, or to one for each. No row sees a later row: a state may be used.
/// Cost       building: the depths summed. Memory: n^2 / 8 bytes. A tile: a few words a draft key.
/// Source     Miao et al., SpecInfer, arXiv 2305.09781; Cai et al., Medusa, arXiv 2401.10774.

#include <vector>

#include <fovea/mask/mask.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

class draft_tree {
 public:
  static constexpr isize most = 4096;

  draft_tree() = default;
  draft_tree(const std::int32_t* parents, isize rows) : rows_(rows), words_((rows + 63) / 64) {
    require(rows >= 0 && rows <= most && (parents != nullptr || rows == 0), "draft_tree has ", rows, " tokens",
            parents == nullptr ? " and null parents" : "", "; wanted parents of 0 to ", most);
    bits_.assign(static_cast<std::size_t>(rows * words_), 0);
    for (isize i = 0; i < rows; ++i) {
      require(parents[i] >= -1 && parents[i] < i, "draft_tree parents[", i, "] is ", parents[i],
              "; wanted -1 (a root) or an earlier token");
      for (isize a = i; a >= 0; a = parents[a])
        bits_[static_cast<std::size_t>(a * words_ + i / 64)] |= std::uint64_t{1} << (i % 64);
      depth_.push_back(parents[i] < 0 ? 0 : depth_[static_cast<std::size_t>(parents[i])] + 1);
    }
  }
  isize rows() const { return rows_; }
  /// How many ancestors each token has: its position is the cache's length plus this.
  const std::vector<std::int32_t>& depth() const { return depth_; }
  /// Bit l: row first + l sees draft token k (l < 64; 0 behind the last row).
  std::uint64_t seen_by(isize k, isize first) const {
    const std::uint64_t* row = bits_.data() + k * words_;
    const isize word = first / 64, shift = first % 64;
    const std::uint64_t low = row[word] >> shift;
    return shift == 0 || word + 1 == words_ ? low : low | row[word + 1] << (64 - shift);
  }

 private:
  isize rows_ = 0, words_ = 0;
  std::vector<std::uint64_t> bits_;  // [k][words]: the rows that see draft token k
  std::vector<std::int32_t> depth_;
};

struct tree {
  const draft_tree* trees = nullptr;
  isize count = 1;  ///< 1: the same tree for all items; else one an item

  void check(const mask_site& at) const {
    require(trees != nullptr && (count == 1 || count == at.B), "tree has ", trees == nullptr ? 0 : count,
            " trees; wanted 1 or one for each of ", at.B, " items");
    const draft_tree& own = of(at);
    require(own.rows() == at.n && at.n <= at.m, "tree has ", own.rows(), " draft tokens; wanted n = ", at.n,
            ", the last of m = ", at.m, " keys");
  }
  bool is_causal() const { return true; }
  bool visible(const mask_site& at, isize i, isize j) const {
    return j < at.m - at.n || (of(at).seen_by(j - (at.m - at.n), i) & 1U) != 0;
  }
  range keys(const mask_site& at, isize i0, isize i1) const {
    const isize cache = at.m - at.n;
    isize first = 0;
    if (cache == 0)
      while (first < i0 && seen(at, first, i0, i1) == 0) ++first;
    return {first, cache + i1};
  }
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const isize cache = at.m - at.n;
    if (j1 <= cache) return tile_kind::full;
    bool any = j0 < cache, all = true;
    for (isize k = j0 > cache ? j0 - cache : 0; k < j1 - cache && (all || !any); ++k)
      for (isize i = i0; i < i1; i += 64) {
        const isize last = i + 64 < i1 ? i + 64 : i1;
        const std::uint64_t rows = seen(at, k, i, last);
        any = any || rows != 0, all = all && rows == ~std::uint64_t{0} >> (64 - (last - i));
      }
    return all ? tile_kind::full : any ? tile_kind::partial : tile_kind::empty;
  }
  void lanes(const mask_site& at, isize i0, isize count_of_rows, isize j0, isize j1, std::uint64_t* out) const {
    const isize cache = at.m - at.n;
    for (isize j = j0; j < j1; ++j)
      out[j - j0] = j < cache ? ~std::uint64_t{0} >> (64 - count_of_rows) : seen(at, j - cache, i0, i0 + count_of_rows);
  }

 private:
  const draft_tree& of(const mask_site& at) const { return trees[count == 1 ? 0 : at.b]; }
  /// Rows [i0, min(i1, i0 + 64)) that see draft token k.
  std::uint64_t seen(const mask_site& at, isize k, isize i0, isize i1) const {
    const std::uint64_t rows = of(at).seen_by(k, i0);
    return i1 - i0 >= 64 ? rows : rows & (~std::uint64_t{0} >> (64 - (i1 - i0)));
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
