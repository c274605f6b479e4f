// SPDX-License-Identifier: MIT
#pragma once
/// @file  Which key blocks a query block computes: scores from block summaries, a vote of its rows, the best within a budget.
///
///   e_rJ      estimated log-mass of block J for row r               mean      s q.mean_J + log n_J
///   share_rJ  = e^(e_rJ) / sum_{J' < past} e^(e_rJ')                variance  the same + s^2/4 sum_c q_c^2 var_Jc
///   vote_J    = sum of share_rJ over the rows of the query block    bound     s sum_c max(q_c low_Jc, q_c high_Jc) + log n_J
///   (of e_rJ itself for one row)                                    code      log sum_j e^(s q'.k'_j), q' and k' rounded;  exact: unrounded
///
/// Queries lie along the vector lanes, up to 64 rows of one or several query blocks in a panel: the scores are products of block
/// summaries with a panel, maxima and sums over blocks are vertical.
///
/// Contract   only blocks wholly before the query block (causal), or all (not causal), are looked at, and only the rows of the
///            query block in this call. Ties go to the earlier block; a NaN vote counts as the highest. Kept keys count nothing, nor do
///            blocks of a stretch that is not over, whose kept keys nobody knows yet (bound: as all keys, in the bounds of their blocks).
/// Cost       per row: blocks * d (mean), twice that (variance, bound), keys * d (code, exact).   Scratch 64 scores a block.

#include <algorithm>
#include <cmath>
#include <limits>

#include <fovea/kernel/block_choose.hpp>
#include <fovea/kernel/block_summary.hpp>
#include <fovea/kernel/code_rows.hpp>
#include <fovea/kernel/mean_scores.hpp>
#include <fovea/kernel/pooled_sums.hpp>
#include <fovea/simd/dot8.hpp>
#include <fovea/simd/exp.hpp>
#include <fovea/tile/gemm.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Keys of one KV head as stored, for exact token scores.
struct key_rows {
  const void* data = nullptr;
  dtype type = dtype::f32;
  isize stride = 0;
};

/// One query block of one head.
struct query_block {
  isize head, block;
};

template <class Arch, class Acc>
class block_select {
  using P = simd::pack<Acc, Arch>;
  static constexpr isize W = P::size, rows = 64;
  static constexpr isize most_few = 4;  // up to so many rows token scores are dot products along d, as in decoding
  static constexpr Acc none = -std::numeric_limits<Acc>::infinity();
  struct no_pass {
    no_pass(arena&, isize) {}
  };
  static constexpr bool has_pass = has_code_pass<Arch> && std::is_same_v<Acc, float>;

 public:
  block_select(arena& memory, const block_rule& rule, isize d)
      : rule_(rule),
        d_(d),
        chunk_(rule.block_k >= 128 ? rule.block_k : 128 / rule.block_k * rule.block_k),
        pass_(memory, d) {
    const isize blocks = rule.blocks();
    per_token_ = rule.score == block_score::code || rule.score == block_score::exact;
    two_ = rule.score == block_score::variance || rule.score == block_score::bound;
    q_ = memory.take<Acc>(d * rows);
    q2_ = memory.take<Acc>(two_ ? d * rows : 0);
    factor_ = memory.take<Acc>(rows);
    peak_ = memory.take<Acc>(blocks * rows * (per_token_ ? 2 : 1) + W * W);
    mass_ = per_token_ ? peak_ + blocks * rows : memory.take<Acc>(blocks);
    s_ = memory.take<Acc>(per_token_ ? chunk_ * rows : 0);
    k_ = memory.take<Acc>(per_token_ ? chunk_ * d : 0);
    few_ = memory.take<Acc>(rule.score == block_score::exact ? most_few * d : 0);
    few_code_ = memory.take<std::int8_t>(rule.score == block_score::code ? (most_few + 1) * d : 0);
    if constexpr (has_pass)
      few_ = rule.score == block_score::code ? memory.take<Acc>(code_rows<Arch>::scratch(d)) : few_;
    row_ = memory.take<Acc>(d);
    sorted_ = memory.take<Acc>(rule.top_p > 0 ? blocks : 0);
    weight_ = memory.take<Acc>(!rule.votes_are_logs() ? ceil_div(blocks, W) * W * W : 0);
    votes_ = memory.take<Acc>(blocks + 2 * W);
  }

  /// Fates of all key blocks for `count` query blocks: row x of table [count x blocks] is that of list[x]. codes: of s, or null.
  /// What their pooled tokens add up to besides, where `sums` is on: of query blocks that lie in one panel.
  void run(const block_summary<Acc>& s, const code_keys* codes, const key_rows& keys, const tensor_ref& q, isize b,
           const query_block* list, isize count, std::uint8_t* table, pooled_sums<Arch, Acc>& sums) noexcept {
    codes_ = has_pass && rule_.score == block_score::code ? codes : nullptr, sums_ = &sums;
    if (!rule_.chooses()) {  // the blocks that are computed whatever their score
      for (isize x = 0; x < count; ++x) {
        std::fill_n(votes_, rule_.blocks(), Acc(0));
        choose_blocks<Arch>(rule_, list[x].block, votes_, table + x * rule_.blocks(), sorted_);
      }
      return;
    }
    isize at = 0, done = 0;  // rows of query block list[at] that earlier panels held
    while (at < count) {
      isize lanes = 0, segments = 0, past = 0;
      while (at < count && lanes < rows) {
        const range r = rule_.rows(list[at].block);
        const isize all = r.last - r.first, take = std::min(all - done, rows - lanes);
        for (isize x = 0; x < take; ++x) load(q, b, list[at].head, r.first + done + x, lanes + x);
        const bool whole = done + take == all;  // heads that share a selection stand side by side
        segments_[segments++] = {at,
                                 list[at].block,
                                 lanes,
                                 take,
                                 done == 0 && at % rule_.share == 0,
                                 whole && (at + 1) % rule_.share == 0,
                                 done == 0 && whole};
        past = std::max(past, rule_.reach_of(list[at].block).past);
        lanes += take, done = whole ? 0 : done + take, at += whole ? 1 : 0;
      }
      for (isize x = lanes; x < ceil_div(lanes, W) * W; ++x) clear(x);
      ld_ = codes_ != nullptr ? 2 * W : rows, vector_ = codes_ != nullptr ? past * 2 * W : W;
      if (choose_level(segments, past, lanes, table)) continue;
      estimate(s, keys, past, lanes);
      weighed_ = {-1, -1};
      for (isize x = 0; x < segments; ++x) {
        if (segments_[x].done) continue;
        vote(segments_[x]);
        if (!segments_[x].closes) continue;
        std::uint8_t* const fate = table + segments_[x].index * rule_.blocks();
        choose_blocks<Arch>(rule_, segments_[x].block, votes_, fate, sorted_);
        for (isize y = 1; y < rule_.share; ++y) std::copy_n(fate, rule_.blocks(), fate - y * rule_.blocks());
        for (isize y = x; sums.on() && y >= 0 && segments_[y].index > segments_[x].index - rule_.share; --y)
          pool(segments_[y], table + segments_[y].index * rule_.blocks());
      }
    }
  }

 private:
  struct segment {
    isize index, block, lane, count;
    bool opens, closes, whole, done = false;
  };

  /// The query blocks whose masses need no peaks (code_pass.hpp), each a panel's whole segment: chosen, and `done`. True if all of them are.
  bool choose_level(isize segments, isize past, isize lanes, std::uint8_t* table) noexcept {
    bool all = false;
    if constexpr (has_pass) {
      if (codes_ == nullptr || past == 0 || rule_.share > 1 || rule_.votes_are_logs() || rule_.block_k % 4 != 0 ||
          past * rule_.block_k > rule_.m)
        return false;
      // A query block that goes on in another panel keeps its votes in votes_.
      for (isize x = 0; x < segments; ++x)
        if (!segments_[x].opens || !segments_[x].closes) return false;
      bool any = false;
      all = true;
      for (isize x = 0; x < segments; ++x) {
        segment& g = segments_[x];
        g.done = pass_.level(*codes_, rule_.reach_of(g.block).past, g.lane, g.count);
        any = any || g.done, all = all && g.done;
      }
      if (any) pass_.run_level(*codes_, rule_.block_k, past, lanes, peak_);
      for (isize x = 0; x < segments; ++x) {
        if (!segments_[x].done) continue;
        vote_level(segments_[x], past);
        choose_blocks<Arch>(rule_, segments_[x].block, votes_, table + segments_[x].index * rule_.blocks(), sorted_);
      }
    }
    return all;
  }
  /// The vote of a query block by masses without peaks, [vector][all][W].
  void vote_level(const segment& g, isize all) noexcept {
    const isize past = counted(g.block);
    std::fill_n(votes_, rule_.reach_of(g.block).past + W, Acc(0));
    for (isize x = g.lane / W * W; x < g.lane + g.count; x += W) {  // other rows' lanes do not count
      const isize low = std::max(g.lane - x, isize{0}), high = std::min(g.lane + g.count - x, W);
      const auto live = static_cast<simd::lane_bits>((~std::uint64_t{0} >> (64 - (high - low))) << low);
      const Acc* mass = peak_ + x * all;
      P sum[2] = {P(Acc(0)), P(Acc(0))};
      for (isize J = 0; J < past; ++J) sum[J % 2] = sum[J % 2] + P::load(mass + J * W);
      const P inverse = P(Acc(1)) / (sum[0] + sum[1]);
      for (isize J = 0; J < past; J += W) {  // what lies behind the last block is no candidate
        P share[W];
        for (isize y = 0; y < W; ++y) share[y] = simd::select(live, P::load(mass + (J + y) * W) * inverse, P(Acc(0)));
        (P::load(votes_ + J) + simd::sum_each(share)).store(votes_ + J);
      }
    }
    std::fill(votes_ + past, votes_ + rule_.reach_of(g.block).past + W, Acc(0));  // what the last vector took along
  }

  void clear(isize lane) noexcept {
    if constexpr (has_pass)
      if (codes_ != nullptr) return pass_.clear(lane);
    for (isize c = 0; c < d_; ++c) q_[c * rows + lane] = Acc(0);
    for (isize c = 0; two_ && c < d_; ++c) q2_[c * rows + lane] = Acc(0);
    factor_[lane] = Acc(0);
  }

  /// One query row into a lane of the panel, in the form that the score wants.
  void load(const tensor_ref& q, isize b, isize h, isize i, isize lane) noexcept {
    const Acc* x = simd::row_as<Arch, Acc>(q.type, q.row(b, h, i), d_, row_);
    const Acc to_log2 = static_cast<Acc>(rule_.scale * 1.4426950408889634074),
              quarter = static_cast<Acc>(rule_.scale * rule_.scale * 1.4426950408889634074 / 4);
    Acc* to = q_ + lane;
    switch (rule_.score) {
      case block_score::code: {
        if constexpr (has_pass)
          if (codes_ != nullptr) return pass_.load(x, to_log2, levels_, lane);
        std::int8_t* code = few_code_ + std::min(lane, most_few) * d_;
        factor_[lane] = to_log2 * round_row<Arch>(x, d_, levels_, code);
        for (isize c = 0; c < d_; ++c) to[c * rows] = static_cast<Acc>(code[c]);
        return;
      }
      case block_score::bound:
        for (isize c = 0; c < d_; ++c)
          to[c * rows] = x[c] > 0 ? x[c] * to_log2 : Acc(0), q2_[c * rows + lane] = x[c] > 0 ? Acc(0) : x[c] * to_log2;
        return;
      case block_score::variance:
        for (isize c = 0; c < d_; ++c) q2_[c * rows + lane] = x[c] * x[c] * quarter;
        [[fallthrough]];
      default:
        for (isize c = 0; c < d_; ++c) to[c * rows] = x[c] * to_log2;
        for (isize c = 0; rule_.score == block_score::exact && lane < most_few && c < d_; ++c)
          few_[lane * d_ + c] = x[c] * to_log2;
    }
  }

  /// peak_[J][lane] (log2) and mass_: the estimated mass of block J is mass * 2^peak.
  void estimate(const block_summary<Acc>& s, const key_rows& keys, isize past, isize lanes) noexcept {
    const isize width = ceil_div(lanes, W) * W;
    if constexpr (has_pass)
      if (codes_ != nullptr) return pass_.run(*codes_, rule_.m, rule_.block_k, past, lanes, peak_);
    if (per_token_) return token_scores(s, keys, past, lanes);
    for (isize J = 0; J < past; ++J) mass_[J] = static_cast<Acc>(size_of_block(J));
    if (rule_.score == block_score::bound) {
      tile::gemm<Arch, Acc>(past, width, d_, s.high, d_, 1, q_, rows, peak_, rows, false);
      tile::gemm<Arch, Acc>(past, width, d_, s.low, d_, 1, q2_, rows, peak_, rows, true);
      return;
    }
    if (rule_.score == block_score::variance) {
      tile::gemm<Arch, Acc>(past, width, d_, s.spread, d_, 1, q2_, rows, peak_, rows, false);
      for (isize J = 0; J < past; ++J)
        for (isize x = 0; x < width; x += W)
          (P::load(peak_ + J * rows + x) * P(Acc(1) / mass_[J])).store(peak_ + J * rows + x);
    }
    if (rule_.score == block_score::mean) return mean_scores<Arch, Acc>(past, width, d_, s.mean_k, q_, peak_);
    tile::gemm<Arch, Acc>(past, width, d_, s.mean_k, d_, 1, q_, rows, peak_, rows, true);
  }

  isize size_of_block(isize J) const noexcept { return std::min(rule_.block_k, rule_.m - J * rule_.block_k); }

  void token_scores(const block_summary<Acc>& s, const key_rows& keys, isize past, isize lanes) noexcept {
    const isize last = std::min(past * rule_.block_k, rule_.m), width = ceil_div(lanes, W) * W;
    if constexpr (has_pass)
      if (rule_.score == block_score::code && lanes <= most_few && s.kept == 0 && code_rows<Arch>::takes(d_)) {
        for (isize J = 0; J < past; ++J) P(Acc(0)).store(peak_ + J * rows), P(Acc(0)).store(mass_ + J * rows);
        return code_rows<Arch>::run(s, few_code_, factor_, lanes, last, past, peak_, mass_, rows, few_);
      }
    for (isize j0 = 0; j0 < last; j0 += chunk_) {
      const isize count = std::min(chunk_, last - j0);
      if (rule_.score == block_score::code && lanes <= most_few)
        few_code_scores(s, j0, count, lanes, width);
      else
        panel_scores(s, keys, j0, count, lanes, width);
      for (isize J = j0 / rule_.block_k; J * rule_.block_k < j0 + count; ++J) fold_block(s, J, j0, width);
    }
  }

  void panel_scores(const block_summary<Acc>& s, const key_rows& keys, isize j0, isize count, isize lanes,
                    isize width) noexcept {
    const isize element = static_cast<isize>(size_of(keys.type));
    const Acc* k = k_;
    isize stride = d_;
    if (rule_.score == block_score::code) {
      for (isize x = 0; x < count * d_; ++x) k_[x] = static_cast<Acc>(s.code[j0 * d_ + x]);
    } else if (keys.type == dtype_of<Acc>) {
      k = static_cast<const Acc*>(keys.data) + j0 * keys.stride, stride = keys.stride;
    } else {
      for (isize x = 0; x < count; ++x)
        simd::load_row<Arch, Acc>(keys.type,
                                  static_cast<const unsigned char*>(keys.data) + (j0 + x) * keys.stride * element, d_,
                                  k_ + x * d_);
    }
    if (lanes > most_few) return tile::gemm<Arch, Acc>(count, width, d_, k, stride, 1, q_, rows, s_, rows, false);
    for (isize x = 0; x < count; ++x) {
      clear_scores(x, width);
      for (isize r = 0; r < lanes; ++r) {
        P sum(Acc(0));
        for (isize c = 0; c < d_; c += W)
          sum = simd::fma(simd::load_n<P>(k + x * stride + c, d_ - c), simd::load_n<P>(few_ + r * d_ + c, d_ - c), sum);
        s_[x * rows + r] = simd::reduce_add(sum);
      }
    }
  }
  /// The integers that the product of a panel gives too, where it is exact (d < 1024).
  void few_code_scores(const block_summary<Acc>& s, isize j0, isize count, isize lanes, isize width) noexcept {
    for (isize x = 0; x < count; ++x) {
      clear_scores(x, width);
      for (isize r = 0; r < lanes; ++r)
        s_[x * rows + r] = static_cast<Acc>(simd::dot8<Arch>(s.code + (j0 + x) * d_, few_code_ + r * d_, d_));
    }
  }
  void clear_scores(isize x, isize width) noexcept {
    for (isize r = 0; r < width; r += W) P(Acc(0)).store(s_ + x * rows + r);
  }

  /// Maximum and sum of exponentials of the tokens of block J, for every lane.
  void fold_block(const block_summary<Acc>& s, isize J, isize j0, isize width) noexcept {
    const isize first = J * rule_.block_k, count = size_of_block(J);
    const bool code = rule_.score == block_score::code;
    for (isize x = 0; x < width; x += W) {
      Acc* at = s_ + (first - j0) * rows + x;
      P top(none), sum(Acc(0));
      for (isize y = 0; y < count; ++y) {
        P v = P::load(at + y * rows);
        if (code) v = v * (P::load(factor_ + x) * P(s.step[first + y])), v.store(at + y * rows);
        if (!s.keeps(first + y, rule_.m)) top = simd::max(top, v);
      }
      if (code) top = whole_below(top);
      for (isize y = 0; y < count; ++y) {
        if (s.keeps(first + y, rule_.m)) continue;
        const P v = P::load(at + y * rows) - top;
        sum = sum + (code ? chord(v) : simd::exp2(v));
      }
      top.store(peak_ + J * rows + x);
      sum.store(mass_ + J * rows + x);
    }
  }
  static P whole_below(P x) noexcept {
    const P magic(static_cast<Acc>(sizeof(Acc) == 4 ? 12582912.0 : 6755399441055744.0)), near = (x + magic) - magic;
    return near - simd::select_greater(near, x, P(Acc(1)), P(Acc(0)));
  }
  /// code_pass.hpp's chord2.
  static P chord(P x) noexcept {
    const P n = whole_below(x);
    return simd::exp2(n) * (P(Acc(1)) + (x - n));
  }

  /// Of W rows from lane x on. The pass keeps a vector's peaks and masses side by side, [vector][past][2][W].
  const Acc* peak_at(isize J, isize x) const noexcept { return peak_ + x / W * vector_ + J * ld_ + x % W; }
  const Acc* mass_at(isize J, isize x) const noexcept {
    return codes_ != nullptr ? peak_at(J, x) + W : mass_ + J * rows + x;
  }

  /// The blocks whose masses a vote shares out. Kept keys count nothing there (but for `bound`): those of a stretch that is not over are not
  /// known yet.
  isize counted(isize block) const noexcept {
    return rule_.score == block_score::bound ? rule_.reach_of(block).past : rule_.settled(block);
  }
  void vote(const segment& g) noexcept {
    const isize past = counted(g.block);
    if (g.opens) std::fill_n(votes_, rule_.reach_of(g.block).past + W, Acc(0));
    if (rule_.votes_are_logs()) {  // one row: the order of the masses themselves, which cannot underflow
      for (isize J = 0; J < past && g.count > 0; ++J)
        votes_[J] = *peak_at(J, g.lane) + std::log2(per_token_ ? *mass_at(J, g.lane) : mass_[J]);
      return;
    }
    for (isize x = g.lane / W * W; x < g.lane + g.count; x += W) {  // other rows' lanes do not count
      const isize low = std::max(g.lane - x, isize{0}), high = std::min(g.lane + g.count - x, W);
      const auto live = static_cast<simd::lane_bits>((~std::uint64_t{0} >> (64 - (high - low))) << low);
      const P inverse = weigh(past, x);
      for (isize J = 0; J < past; J += W) {
        P share[W];
        for (isize y = 0; y < W; ++y)
          share[y] = simd::select(live, P::load(weight_ + (J + y) * W) * inverse, P(Acc(0)));
        (P::load(votes_ + J) + simd::sum_each(share)).store(votes_ + J);
      }
    }
  }

  /// The pooled tokens of a segment, from the weights of its rows; those of its last vector may be there.
  void pool(const segment& g, const std::uint8_t* fate) noexcept {
    if (!g.whole) return;
    const isize past = counted(g.block);
    sums_->begin(g.index);
    for (isize x = g.lane / W * W; x < g.lane + g.count; x += W) {
      const isize low = std::max(g.lane - x, isize{0}), high = std::min(g.lane + g.count - x, W);
      if (weighed_.first != past || weighed_.last != x) weigh(past, x);
      sums_->add(g.index, std::max(x - g.lane, isize{0}), low, high, weight_, P::load(top_), past, fate);
    }
  }

  /// weight_ [J] = mass 2^(peak - top) of W rows, zeros behind the last block: the shares but for one factor, which is returned.
  P weigh(isize past, isize x) noexcept {
    P top(none), sum(Acc(0));
    for (isize J = 0; J < past; ++J) top = simd::max(top, P::load(peak_at(J, x)));
    const bool whole = rule_.score == block_score::code;  // the peaks are whole numbers
    for (isize J = 0; J < past; ++J) {
      const P below = P::load(peak_at(J, x)) - top, mass = per_token_ ? P::load(mass_at(J, x)) : P(mass_[J]);
      const P weight = mass * (whole ? power(below) : simd::exp2(below));
      weight.store(weight_ + J * W);
      sum = sum + weight;
    }
    for (isize J = past; J < ceil_div(past, W) * W; ++J) P(Acc(0)).store(weight_ + J * W);
    weighed_ = {past, x}, top.store(top_);
    return P(Acc(1)) / sum;
  }
  static P power(P whole) noexcept {
    if constexpr (has_pass)
      return chord_of_bits<Arch>(whole);
    else
      return simd::exp2(whole);
  }

 public:
  int levels_ = 127;  ///< of the rounded copy

 private:
  block_rule rule_;
  isize d_, chunk_, ld_ = rows, vector_ = W;
  bool per_token_ = false, two_ = false;
  const code_keys* codes_ = nullptr;
  std::conditional_t<has_pass, code_pass<Arch>, no_pass> pass_;
  pooled_sums<Arch, Acc>* sums_ = nullptr;
  segment segments_[rows];
  range weighed_{-1, -1};  // weight_ and top_ are of so many blocks, of the rows from this lane on
  alignas(64) Acc top_[W];
  Acc *q_, *q2_, *factor_, *peak_, *mass_, *s_, *k_, *few_, *row_, *weight_, *votes_, *sorted_;
  std::int8_t* few_code_;  // most_few rows, one to spare
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
