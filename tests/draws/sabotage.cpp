// SPDX-License-Identifier: MIT
/// @file  Libraries that are wrong on purpose, to see that the draws find it.

#include "draws/problem.hpp"

namespace draws {
namespace {

/// A mask that is right about pairs, and wrong about the tiles that hold one pair.
struct lying_mask {
  const fovea::mask* inner;
  std::atomic<bool>* applied;
  tile_kind lie;
  isize row, key;

  bool is_causal() const { return inner->is_causal(); }
  kept_keys kept() const { return inner->kept(); }
  void check(const mask_site& at) const { inner->check(at); }
  bool visible(const mask_site& at, isize i, isize j) const { return inner->visible(at, i, j); }
  range keys(const mask_site& at, isize i0, isize i1) const { return inner->keys(at, i0, i1); }
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const tile_kind kind = inner->tile(at, i0, i1, j0, j1);
    if (kind != tile_kind::partial || row < i0 || row >= i1 || key < j0 || key >= j1) return kind;
    *applied = true;
    return lie;
  }
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    inner->lanes(at, i0, count, j0, j1, out);
  }
};
struct off_score {
  const fovea::score* inner;
  std::atomic<bool>* applied;
  isize row, key;
  template <class T>
  T operator()(const mask_site& at, isize i, isize j, T s) const {
    const T x = static_cast<T>((*inner)(at, i, j, static_cast<double>(s)));
    if (i != row || j != key) return x;
    *applied = true;
    return x + T(0.01);
  }
};

}  // namespace

void problem_of_draw::spoil(softmax_attention& m, std::size_t call) {
  const auto& sizes = d.calls[call];
  switch (wanted) {
    case sabotage::tile_full:
    case sabotage::tile_empty: {
      // A pair of item 0 that the lie is about: hidden if all is to be seen, visible if nothing is.
      const bool full = wanted == sabotage::tile_full;
      for (isize j = sizes.m[0]; j-- > 0;)
        for (isize i = sizes.n[0]; i-- > 0;) {
          if (of_call[call]->sees({0, 0, sizes.n[0], sizes.m[0], d.H, d.G, d.B}, i, j) == full) continue;
          masks_.push_back(std::make_unique<fovea::mask>(m.mask));
          m.mask = lying_mask{masks_.back().get(), &applied, full ? tile_kind::full : tile_kind::empty, i, j};
          return;
        }
      break;
    }
    case sabotage::window_wider: {
      draw wider = d;
      wider.width += 1;
      other_rules_.push_back(std::make_unique<rules>(wider, call));
      const rules& other = *other_rules_.back();
      for (isize i = 0; i < sizes.n[0]; ++i)
        for (isize j = 0; j < sizes.m[0]; ++j) {
          const mask_site site{0, 0, sizes.n[0], sizes.m[0], d.H, d.G, d.B};
          if (other.sees(site, i, j) != of_call[call]->sees(site, i, j)) applied = true;
        }
      m.mask = other.mask;
      break;
    }
    case sabotage::score_off:
      for (isize i = 0; i < sizes.n[0]; ++i)
        for (isize j = 0, seen = 0; j < sizes.m[0]; ++j) {
          seen += of_call[call]->sees({0, 0, sizes.n[0], sizes.m[0], d.H, d.G, d.B}, i, j) ? 1 : 0;
          if (seen < 2) continue;  // alone, a logit has a weight of 1 whatever it is
          scores_.push_back(std::make_unique<fovea::score>(m.score));
          m.score = off_score{scores_.back().get(), &applied, i, j};
          return;
        }
      break;
    case sabotage::sink_left_out:
      applied = m.sinks != nullptr && sizes.n[0] > 0;
      m.sinks = nullptr;
      break;
    case sabotage::turned_late:
      applied = m.turn != nullptr && sizes.n[0] > 0;
      if (m.turn != nullptr) m.turn = &late_;
      break;
    default: break;
  }
}

void problem_of_draw::spoil(std::vector<kv_sequence>& kv) {
  if (wanted != sabotage::stale_page || kv[0].k.table == nullptr || kv[0].length <= kv[0].k.page) return;
  const isize pages = ceil_div(kv[0].length, kv[0].k.page);
  pages_.assign(kv[0].k.table, kv[0].k.table + pages);
  pages_.back() = pages_.front();
  kv[0].k.table = kv[0].v.table = pages_.data();
  applied = true;
}

void problem_of_draw::spoil(outputs& y) {
  const isize n = y.out.length();
  if (wanted == sabotage::row_unwritten && n > 0) {
    applied = true;
    for (isize c = 0; c < d.e; ++c) y.out.set(0, d.H - 1, n - 1, c, std::nan(""));
  }
  if (wanted == sabotage::lse_in_bits && n > 0) {
    applied = true;
    for (isize i = 0; i < n; ++i) y.lse.set(0, 0, i, 0, y.lse.get(0, 0, i, 0) * 1.4426950408889634);
  }
}

}  // namespace draws
