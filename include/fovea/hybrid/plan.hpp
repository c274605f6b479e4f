// SPDX-License-Identifier: MIT
#pragma once
/// @file  The plan of some query blocks of one KV head's group: the fate of every key block, as lists that kernels take.
///
/// Query blocks of a group are counted head by head: unit u is block `first_block + u % per_head` of head u / per_head; where heads share
/// a selection, block by block. A superblock is a run of units that are planned together and share the reading of keys.
///
/// Contract   lists rise. Computed: key blocks. Pooled: tokens of block_summary's pool, without those that stand for nothing. Kept: keys in
///            blocks that are not computed.

#include <fovea/hybrid/mechanism.hpp>
#include <fovea/hybrid/summaries.hpp>
#include <fovea/kernel/block_select.hpp>
#include <fovea/kernel/sparse_tiles.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// What the selector and the pooling ask of the block summaries.
inline kernel::summary_needs hybrid_needs(const hybrid_attention& m) {
  const bool pools = m.compensate != compensation::none;
  kernel::summary_needs needs;
  needs.means = pools || m.select == block_selector::mean || m.select == block_selector::variance;
  needs.spread = m.compensate == compensation::cumulant || m.select == block_selector::variance;
  needs.range = m.select == block_selector::bound;
  needs.parts = pools ? m.parts : 1;
  needs.sampled = m.compensate == compensation::sampled, needs.seed = m.seed;
  if (m.kept_share() > 0) needs.keep(m.keep_small, m.block_k);
  needs.levels = m.select == block_selector::int8 || m.target.on() ? 127 : m.select == block_selector::int4 ? 7 : 0;
  needs.bounds = m.target.on();
  return needs;
}

/// The cumulant's variance term of pooled token j for row i, from a table [blocks x rows] of nats.
template <class Acc>
struct variance_term {
  const Acc* table = nullptr;
  isize ld = 0, first_head = 0, first = 0;  ///< rows r = (h - first_head) * n + i, from `first` on
  const std::int32_t* list = nullptr;       ///< token j is list[j]; null: j

  template <class T>
  T operator()(const mask_site& at, isize i, isize j, T s) const {
    const isize token = list != nullptr ? list[j] : j;
    return s + static_cast<T>(table[token * ld + (at.h - first_head) * at.n + i - first]);
  }
};

/// What one call works on: the problem with all its keys, `past` tokens of them from earlier calls.
template <class Acc>
struct hybrid_plan {
  using tiles = kernel::sparse_tiles<simd::native, Acc>;

  const hybrid_attention& m;
  shape s;
  isize past;
  kernel::block_rule rule;
  isize rows, parts;               ///< rows of a query group; pooled tokens a block
  isize keeps = 0;                 ///< kept keys
  isize first_block, per_head;     ///< query blocks of a head
  isize unit_rows, unit_tiles;     ///< of a query block, at most
  isize tile_height;               ///< rows of a tile
  isize most_units, most_tiles;    ///< of a superblock; of a batch
  std::uint8_t* record = nullptr;  ///< [B, H, query blocks, key blocks]: the fates, for who asks for them; null: nobody
  tensor_mut bound = {};  ///< [B, H, n, 1], with a target: what is proven of each row's error; null: nobody asks

  bool of_store = false;            ///< the keys are those of a KV store ...
  const kv_sequence* kv = nullptr;  ///< ... this one; null while measuring

  hybrid_plan(const hybrid_attention& mechanism, const shape& sizes, isize tokens_before, bool stored = false,
              const kv_sequence* sequence = nullptr)
      : m(mechanism), s(sizes), past(tokens_before), of_store(stored), kv(sequence) {
    using enum block_selector;
    rule.score = m.select == variance                   ? kernel::block_score::variance
                 : m.select == bound                    ? kernel::block_score::bound
                 : m.select == int8 || m.select == int4 ? kernel::block_score::code
                 : m.select == exact                    ? kernel::block_score::exact
                                                        : kernel::block_score::mean;
    rule.block_q = m.block_q, rule.block_k = m.block_k, rule.origin = past;
    rule.n = s.n, rule.m = s.m, rule.offset = m.align.position({0, 0, s.n, s.m, s.H, s.G}, 0);
    rule.top = m.top, rule.at_least = m.at_least, rule.first = m.first, rule.window = m.window;
    rule.budget = m.budget, rule.scale = m.scale_for(s), rule.top_p = m.top_p;
    const kernel::summary_needs needs = hybrid_needs(m);
    rule.stretch = needs.stretch, rule.kept = needs.kept, rule.share = m.share_group && m.selects() ? s.group() : 1;
    keeps = needs.kept > 0 ? s.m / needs.stretch * needs.kept : 0;
    rule.causal = m.is_causal, rule.pool = m.compensate != compensation::none;
    rows = s.group() * s.n, parts = needs.parts;
    first_block = past / m.block_q;
    per_head = s.n > 0 ? (s.n - 1 + past) / m.block_q + 1 - first_block : 0;
    unit_rows = std::min(m.block_q, s.n), tile_height = tiles::rows_for(unit_rows);
    unit_tiles = ceil_div(unit_rows, tile_height);
    const isize room = s.group() * std::min(s.n, s.n / m.block_q + 2);  // units, wherever the blocks begin
    most_tiles = std::min(tiles::most(s.d, s.e, tile_height), room * unit_tiles);
    most_units = few() ? 64 / std::max(unit_rows, isize{1}) : unit_tiles > 0 ? most_tiles / unit_tiles : 0;
    most_units = std::min(std::max(most_units, isize{1}), room);
    if (m.target.on()) most_units = std::min(std::max(256 / std::max(unit_rows, isize{1}), isize{1}), room);
    if (rule.share > 1) most_units = std::max(most_units / rule.share, isize{1}) * rule.share;
    if (m.target.on()) most_tiles = most_units * ceil_div(unit_rows, tiles::rows);
  }
  bool plans() const { return m.select != block_selector::pattern; }
  bool cumulant() const { return m.compensate == compensation::cumulant; }
  /// A tile of so few rows is mostly empty: row by row, as in decoding.
  bool few() const { return plans() && unit_rows < 4 && !of_store; }
  isize units() const { return s.group() * per_head; }
  /// Are the scores of the selection those of the pooled tokens? Tiles in int8 have cheaper ones, of integers.
  bool sums_pool() const {
    return m.select == block_selector::mean && m.compensate == compensation::zeroth && parts == 1 && rule.chooses() &&
           !rule.votes_are_logs() && !few() && !m.target.on() && m.arithmetic == precision::f32;
  }

  /// One query block: rows [first, first + count) of a head of the group.
  struct unit {
    isize head, block, first, count;
  };
  unit unit_at(isize u) const {
    const isize block = first_block + (rule.share > 1 ? u / rule.share : u % per_head);
    const range r = rule.rows(block);
    return {rule.share > 1 ? u % rule.share : u / per_head, block, r.first, r.last - r.first};
  }

  /// Scratch of the plan of one task; laid out over a null arena it measures.
  struct planner {
    kernel::block_select<simd::native, Acc> choose;
    kernel::pooled_sums<simd::native, Acc> sums;  ///< of the units that it is done with: the start of their tiles
    std::uint8_t* fate;
    std::int32_t* tokens;  // of all lists
    kernel::block_list *computed, *pooled, *kept;
    kernel::query_block* list;
    Acc *term, *squares, *row, *bias;
    isize first = 0, count = 0;  // units that are planned
    bool pools = false, keeps = false;

    planner(arena& memory, const hybrid_plan& x)
        : choose(memory, x.m.selects() ? x.rule : kernel::block_rule{}, x.s.d) {
      const isize blocks = x.plans() ? x.rule.blocks() : 0, units = x.plans() ? x.most_units : 0;
      fate = memory.take<std::uint8_t>(units * blocks);
      tokens = memory.take<std::int32_t>(units * (blocks * (x.rule.pool ? 1 + x.parts : 1) + x.keeps) + 1);
      computed = memory.take<kernel::block_list>(units), pooled = memory.take<kernel::block_list>(units);
      kept = memory.take<kernel::block_list>(units);
      list = memory.take<kernel::query_block>(units);
      term = memory.take<Acc>(x.cumulant() ? blocks * units * x.unit_rows : 0);
      squares = memory.take<Acc>(x.cumulant() ? x.s.d * 64 : 0);
      row = memory.take<Acc>(std::max(x.s.d, x.s.e));
      bias = memory.take<Acc>(x.rule.pool ? blocks * x.parts : 0);
      if (x.sums_pool()) sums = {memory, units, x.unit_tiles, x.tile_height, blocks, x.s.e};
    }
  };

  /// The lists of units [u0, u1).
  void plan(planner& at, const problem& p, const kernel::block_summary<Acc>& summary, const kernel::code_keys* codes,
            isize b, isize g, isize u0, isize u1) const {
    const isize blocks = rule.blocks();
    at.first = u0, at.count = u1 - u0, at.pools = at.keeps = false;
    FOVEA_ASSERT(at.count <= most_units);
    for (isize u = u0; u < u1; ++u) {
      const unit x = unit_at(u);
      at.list[u - u0] = {g * s.group() + x.head, x.block};
      if (!m.selects()) copy_given(b, g * s.group() + x.head, x.block, at.fate + (u - u0) * blocks);
    }
    at.choose.levels_ = summary.levels;
    at.sums.open(sums_pool() ? summary.mean_v : nullptr, summary.members, rule.block_k, s.m, at.count);
    if (m.selects() && s.m > 0)
      at.choose.run(summary, codes, stored_keys(p, b, g), p.q, b, at.list, at.count, at.fate, at.sums);
    if (record != nullptr) note(at.list, at.count, at.fate, b);
    std::int32_t* to = at.tokens;
    const auto fill = [&](isize u, std::uint8_t wanted, isize pieces) {
      const std::uint8_t* fate = at.fate + u * blocks;
      const std::int32_t* first = to;
      const bool all = wanted == kernel::computed;
      const isize end = m.selects() ? rule.reach_of(unit_at(u0 + u).block).seen : blocks;
      for (isize J = 0; J < end && pieces == 1; ++J) {  // no branch: which ones they are cannot be foreseen
        *to = static_cast<std::int32_t>(J);
        to += fate[J] == wanted && (all || summary.members[J] > 0) ? 1 : 0;
      }
      for (isize J = 0; J < end && pieces != 1; ++J)
        if (fate[J] == wanted)
          for (isize x = J * pieces; x < (J + 1) * pieces; ++x) {
            *to = static_cast<std::int32_t>(x);
            to += all || summary.members[x] > 0 ? 1 : 0;
          }
      return kernel::block_list{first, to - first};
    };
    for (isize u = 0; u < at.count; ++u) {
      at.computed[u] = fill(u, kernel::computed, 1);
      at.pooled[u] = {};
      if (rule.pool && !at.sums.done(u)) at.pooled[u] = fill(u, kernel::pooled, parts);
      at.pools = at.pools || at.pooled[u].count > 0;
      at.kept[u] = kept_of(at.fate + u * blocks, summary, rule.start(unit_at(u0 + u).block), to);
      at.keeps = at.keeps || at.kept[u].count > 0;
    }
  }

  /// Keys of stretches that are over before `position` (causal) whose blocks are not computed.
  kernel::block_list kept_of(const std::uint8_t* fate, const kernel::block_summary<Acc>& summary, isize position,
                             std::int32_t*& to) const {
    const std::int32_t* first = to;
    for (isize x = 0; x < keeps; x += summary.kept) {
      const isize end = (x / summary.kept + 1) * summary.stretch;
      if (rule.causal && end > position) break;
      std::int32_t* const begin = to;
      for (isize y = x; y < x + summary.kept; ++y)
        if (fate[summary.small[y] / rule.block_k] != kernel::computed) *to++ = summary.small[y];
      std::sort(begin, to);
    }
    return {first, to - first};
  }

  void note(const kernel::query_block* list, isize count, const std::uint8_t* fate, isize b) const {
    const isize blocks = rule.blocks();
    for (isize r = 0; r < count; ++r)
      std::copy_n(fate + r * blocks, blocks,
                  record + ((b * s.H + list[r].head) * ceil_div(s.n, rule.block_q) + list[r].block) * blocks);
  }

  void copy_given(isize b, isize h, isize block, std::uint8_t* fate) const {
    const auto& t = m.blocks;
    const isize head = t.heads == s.H ? h : t.heads == 1 ? 0 : h / s.group();
    const std::uint8_t* given = t.row(t.batch == 1 ? 0 : b, head, block);
    for (isize J = 0; J < rule.blocks(); ++J) {
      const bool open =
          !rule.causal || (J + 1) * rule.block_k - 1 <= rule.start(block);  // whole and past, as it will stay
      fate[J] = given[J] != 0 ? kernel::computed : rule.pool && open ? kernel::pooled : kernel::skipped;
    }
  }

  /// For exact token scores; a store has them in one stretch.
  kernel::key_rows stored_keys(const problem& p, isize b, isize g) const {
    if (kv == nullptr) return {p.k.row(b, g, 0), p.k.type, p.k.row_stride};
    const row_source k = kv->keys(g);
    return {k.data, k.type, k.row_bytes / static_cast<isize>(size_of(k.type))};
  }
  kernel::key_set<Acc> keys_of(const problem& p, isize b, isize g) const {
    kernel::key_set<Acc> keys;
    keys.k = kv != nullptr ? kv->keys(g) : rows_of(p.k, b, g),
    keys.v = kv != nullptr ? kv->values(g) : rows_of(p.v, b, g);
    keys.count = s.m;
    keys.site = {b, 0, s.n, s.m, s.H, s.G};
    return keys;
  }

  /// The pooled tokens of all blocks: mean key, mean value, log of their number, and the variance terms of the planned rows where asked for.
  kernel::key_set<Acc> pool_of(planner& at, const problem& p, const kernel::block_summary<Acc>& summary, isize b,
                               isize g) const {
    kernel::key_set<Acc> pool;
    pool.k = dense_rows(summary.pool_k(), s.d), pool.v = dense_rows(summary.pool_v(), s.e);
    pool.count = rule.blocks() * parts;
    pool.site = {b, 0, s.n, pool.count, s.H, s.G};
    for (isize x = 0; x < pool.count; ++x)
      at.bias[x] = x > 0 && summary.members[x] == summary.members[x - 1]
                       ? at.bias[x - 1]
                       : std::log(static_cast<Acc>(summary.members[x]));
    pool.bias = at.bias;
    if (cumulant()) variances(at, p, summary, b, g);
    return pool;
  }
  isize row_of(isize u) const { return unit_at(u).head * s.n + unit_at(u).first; }
  variance_term<Acc> term_of(const planner& at, isize g) const {
    return {at.term, most_units * unit_rows, g * s.group(), row_of(at.first), nullptr};
  }

  /// term[J][r - r0] = min(cap, share scale^2 / 2 sum_c q_rc^2 var_c(k_J)), nats.
  void variances(planner& at, const problem& p, const kernel::block_summary<Acc>& summary, isize b, isize g) const {
    const isize blocks = rule.blocks(), ld = most_units * unit_rows, r0 = row_of(at.first);
    const isize r1 = row_of(at.first + at.count - 1) + unit_at(at.first + at.count - 1).count;
    const Acc half = static_cast<Acc>(m.variance_share * rule.scale * rule.scale / 2),
              cap = static_cast<Acc>(m.variance_cap);
    for (isize x = r0; x < r1; x += 64) {
      const isize count = std::min<isize>(64, r1 - x);
      for (isize y = 0; y < count; ++y) {
        const void* from = p.q.row(b, g * s.group() + (x + y) / s.n, (x + y) % s.n);
        const Acc* q = simd::row_as<simd::native, Acc>(p.q.type, from, s.d, at.row);
        for (isize c = 0; c < s.d; ++c) at.squares[c * 64 + y] = q[c] * q[c] * half;
      }
      Acc* term = at.term + x - r0;
      tile::gemm<simd::native, Acc>(blocks, count, s.d, summary.spread, s.d, 1, at.squares, 64, term, ld, false);
      for (isize J = 0; J < blocks; ++J) {
        const Acc inverse = Acc(1) / static_cast<Acc>(std::max<std::int32_t>(summary.members[J], 1));
        for (isize y = 0; y < count; ++y) term[J * ld + y] = std::min(term[J * ld + y] * inverse, cap);
      }
    }
  }
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
