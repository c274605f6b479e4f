// SPDX-License-Identifier: MIT
#pragma once
/// @file  Hybrid attention to an error target, in one pass: blocks are computed, best first, until every row's bound is under it.
///
///   proven      bound_i = sum_J c_iJ + R_i,            c_iJ = sum_{j in J} |w_j - t_j| (|v_j| + |o_i|) / (a + sum w)     (hybrid/row_bound.hpp)
///   estimated   ( sum_J c_iJ^2 )^(1/2)                 as if the errors of skipped blocks pointed in independent directions
///
/// Query blocks of 256 rows together: their selection is computed; one pass over the rounded keys gives c_iJ of every skipped block J; then, in rounds,
/// blocks with the largest sum of c_iJ / target_i over the rows that are not done, and on with the running (m, l, O) of their tiles.
///
/// Contract   when a query block is done, each of its rows is under the target, or every block that adds to its bound is computed. The bound that is
///            reported is the proven one, of the output that is written. Kept keys and pooled tokens stand in for skipped blocks as ever: they join
///            a branch of the running (m, l, O) in each round.
/// Cost       computed keys once; the rounded keys once (about a third of exact attention); in each round pooled tokens and kept keys. Scratch: 20
///            bytes for each row of 256 and key block.
/// Numerics   a list serves a query block, and what its last row leaves open decides for the first: see hybrid.hpp.

#include <algorithm>

#include <fovea/hybrid/plan.hpp>
#include <fovea/hybrid/row_bound.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline void check_error_target(const hybrid_attention& m) {
  const error_target& t = m.target;
  require_finite("target.relative", t.relative), require_finite("target.absolute", t.absolute);
  require(t.relative >= 0 && t.absolute >= 0, "the error target is ", t.relative, " relative, ", t.absolute,
          " absolute; wanted numbers that are not negative (0 and 0: none)");
  if (!t.on()) return;
  require(m.select != block_selector::pattern,
          "an error target with a pattern; it skips single tokens, and the target computes whole blocks");
  require(m.select != block_selector::int4,
          "an error target with select int4; the bounds need keys of 8 bits: wanted int8, or a score of blocks");
  require(m.compensate == compensation::none || m.compensate == compensation::zeroth,
          "an error target with compensation::", name_of(m.compensate),
          "; there is no bound for it: wanted none or zeroth");
  require(m.arithmetic == precision::f32, "an error target with arithmetic int8; the bounds are those of f32");
}

template <class Acc>
struct hybrid_target {
  using plan_type = hybrid_plan<Acc>;
  using tiles = typename plan_type::tiles;
  using bounds = kernel::mass_bounds<simd::native, Acc>;
  static constexpr isize lanes = bounds::rows, rounds = 8;
  static_assert(lanes % tiles::rows == 0);

  const plan_type& x;
  const problem& p;
  const kernel::block_summary<Acc>& summary;
  isize b, g;

  struct slot : plan_type::planner {
    tiles run, branch;  ///< of the computed keys; with what stands for the others
    bounds sum;
    kernel::tile_rows* rows;
    isize* unit_of;             ///< of a tile
    isize width = 0;            ///< blocks that some row may see
    isize tiles_used = 0;       ///< row r of tile t is lane t * tiles::rows + r
    kernel::block_list* lists;  ///< of the tiles
    kernel::block_list* added;  ///< of the units
    row_facts<Acc>* row;        ///< of the lanes
    bool* open;                 ///< units that are worked on
    Acc *bound, *wanted, *over, *weight, *size;
    Acc *parts, *worth, *line;  ///< [panels][blocks][bounds::kinds][64]; [blocks]
    std::int32_t *order, *next;

    slot(arena& memory, const plan_type& of)
        : plan_type::planner(memory, of),
          run(memory, of.most_tiles, of.s.d, of.s.e),
          branch(memory, of.most_tiles, of.s.d, of.s.e),
          sum(memory, of.s.d) {
      const isize t = of.most_tiles, all = ceil_div(t * tiles::rows, lanes) * lanes, blocks = of.rule.blocks();
      rows = memory.take<kernel::tile_rows>(t), unit_of = memory.take<isize>(t);
      lists = memory.take<kernel::block_list>(t), added = memory.take<kernel::block_list>(of.most_units);
      row = memory.take<row_facts<Acc>>(all), open = memory.take<bool>(of.most_units);
      bound = memory.take<Acc>(all), wanted = memory.take<Acc>(all), over = memory.take<Acc>(all);
      weight = memory.take<Acc>(all), size = memory.take<Acc>(all);
      parts = memory.take<Acc>(all * blocks * bounds::kinds), worth = memory.take<Acc>(blocks);
      line = memory.take<Acc>(std::max(of.s.d, of.s.e));
      order = memory.take<std::int32_t>(blocks), next = memory.take<std::int32_t>(blocks * of.most_units);
    }
  };

  void run(slot& at) const {
    const kernel::key_set<Acc> keys = x.keys_of(p, b, g);
    kernel::key_set<Acc> pool;
    if (at.pools) pool = x.pool_of(at, p, summary, b, g);
    lay_out(at);
    at.run.begin(p.q, b, at.rows, at.tiles_used, x.rule.scale);
    absorb(at, at.run, {0, at.tiles_used}, keys, at.computed, {x.rule.block_k, x.rule.causal, x.rule.offset});
    look(at, {0, at.tiles_used}, keys, pool);
    weigh(at);
    for (isize round = 0;; ++round) {  // side by side: the tiles share what they read
      bool any = false;
      for (isize u = 0; u < at.count; ++u) {
        const range own = tiles_of(at, u);
        at.open[u] = round == 0 || at.added[u].count > 0;
        if (at.open[u]) total(at, own);
        at.open[u] = at.open[u] && add(at, u, own, round >= rounds);
        if (!at.open[u]) at.added[u] = {};
        any = any || at.open[u];
      }
      if (!any) break;
      absorb(at, at.run, {0, at.tiles_used}, keys, at.added, {x.rule.block_k, x.rule.causal, x.rule.offset});
      for (isize u = 0; u < at.count; ++u)
        if (at.open[u]) look(at, tiles_of(at, u), keys, pool);
    }
    if (x.bound)
      for (isize lane = 0; lane < at.tiles_used * tiles::rows; ++lane)
        if (const kernel::tile_rows& r = at.rows[lane / tiles::rows]; lane % tiles::rows < r.count)
          x.bound.set(b, r.head, r.first + lane % tiles::rows, 0, upward(at.bound[lane], x.bound.type));
  }

 private:
  using P = simd::pack<Acc, simd::native>;
  static_assert(tiles::rows % P::size == 0);

  range tiles_of(const slot& at, isize u) const {
    isize first = 0;
    while (first < at.tiles_used && at.unit_of[first] != u) ++first;
    isize last = first;
    while (last < at.tiles_used && at.unit_of[last] == u) ++last;
    return {first, last};
  }
  static bool used(const slot& at, isize lane) {
    return lane < at.tiles_used * tiles::rows && lane % tiles::rows < at.rows[lane / tiles::rows].count;
  }
  isize end_of(const slot& at, isize lane) const {  // keys before it
    if (!x.rule.causal) return x.s.m;
    return std::clamp<isize>(at.rows[lane / tiles::rows].first + lane % tiles::rows + x.rule.offset + 1, 0, x.s.m);
  }
  const void* row_in(const tensor_ref& t, const slot& at, isize lane) const {
    const kernel::tile_rows& r = at.rows[lane / tiles::rows];
    return t.row(b, r.head, r.first + lane % tiles::rows);
  }

  /// The tiles of the planned units, and what is known of their rows beforehand.
  void lay_out(slot& at) const {
    at.tiles_used = 0;
    for (isize u = 0; u < at.count; ++u) {
      const auto unit = x.unit_at(at.first + u);
      for (isize i = 0; i < unit.count; i += tiles::rows) {
        at.rows[at.tiles_used] = {g * x.s.group() + unit.head, unit.first + i, std::min(tiles::rows, unit.count - i)};
        at.unit_of[at.tiles_used++] = u;
      }
    }
    isize first = x.s.m;
    const isize all = ceil_div(at.tiles_used * tiles::rows, lanes) * lanes;
    for (isize lane = 0; lane < all; ++lane)
      if (used(at, lane)) first = std::min(first, end_of(at, lane));
    largest_sizes<Acc> common;
    common.extend(summary, 0, first);
    at.width = 0;
    for (isize lane = 0; lane < all; ++lane)
      if (used(at, lane)) at.width = std::max(at.width, ceil_div(end_of(at, lane), x.rule.block_k));
    for (isize lane = 0; lane < all; ++lane) {
      row_facts<Acc>& r = at.row[lane] = {};
      at.bound[lane] = at.over[lane] = at.weight[lane] = at.size[lane] = Acc(0);
      at.wanted[lane] = Acc(1);
      if (!used(at, lane)) continue;
      r.seen = end_of(at, lane);
      largest_sizes<Acc> own = common;
      own.extend(summary, first, r.seen);
      r.key = own.key, r.value = own.value;
      const Acc* q = simd::row_as<simd::native, Acc>(p.q.type, row_in(p.q, at, lane), x.s.d, at.line);
      r.length = kernel::norm_above<simd::native, Acc>(q, x.s.d);
    }
  }

  /// Lists of units for tiles `which`, nothing for the others.
  void absorb(slot& at, tiles& to, range which, const kernel::key_set<Acc>& set, const kernel::block_list* of_units,
              const kernel::block_cut& cut) const {
    for (isize t = 0; t < at.tiles_used; ++t)
      at.lists[t] = t >= which.first && t < which.last ? of_units[at.unit_of[t]] : kernel::block_list{};
    if (set.count > 0) to.absorb(set, at.lists, cut);
  }

  /// What the rows of tiles `which` would return if they ended here. The branch holds these tiles alone.
  void look(slot& at, range which, const kernel::key_set<Acc>& keys, const kernel::key_set<Acc>& pool) const {
    constexpr Acc ln2 = static_cast<Acc>(0.69314718055994530942);
    const auto join = [&](const kernel::key_set<Acc>& set, const kernel::block_list* of_units) {
      for (isize t = which.first; t < which.last; ++t) at.lists[t - which.first] = of_units[at.unit_of[t]];
      at.branch.absorb(set, at.lists, {});
    };
    at.branch.follow(at.run, which.first, which.last);
    if (at.keeps) join(keys, at.kept);
    for (isize lane = which.first * tiles::rows; lane < which.last * tiles::rows; ++lane) {
      const isize t = lane / tiles::rows, r = lane % tiles::rows, u = at.unit_of[t];
      at.row[lane].lse = at.branch.maxima(t - which.first)[r] * ln2 + std::log(at.branch.sums(t - which.first)[r]);
      at.row[lane].terms = at.computed[u].count * x.rule.block_k + at.pooled[u].count + at.kept[u].count + 4 * rounds;
    }
    if (at.pools) join(pool, at.pooled);
    at.branch.finish(p.out, p.lse);
    const bool half = size_of(p.out.type) == 2;  // the output was rounded: its length before, from above
    for (isize lane = which.first * tiles::rows; lane < which.last * tiles::rows; ++lane) {
      if (!used(at, lane)) continue;
      const Acc* o = simd::row_as<simd::native, Acc>(p.out.type, row_in(p.out, at, lane), x.s.e, at.line);
      const Acc size = kernel::norm_above<simd::native, Acc>(o, x.s.e);
      at.row[lane].size = half ? size * Acc(1.01) + static_cast<Acc>(x.s.e) * Acc(0x1p-24) : size;
    }
  }

  /// c_iJ of every block that is not computed, but for the row's own factors.
  void weigh(slot& at) const {
    constexpr Acc log2e = static_cast<Acc>(1.4426950408889634074), none = -std::numeric_limits<Acc>::infinity();
    const isize part = x.rule.block_k / x.parts;
    for (isize first = 0; first < at.tiles_used * tiles::rows; first += lanes) {
      for (isize l = 0; l < lanes; ++l) {
        if (!used(at, first + l)) {
          at.sum.clear(l);
          continue;
        }
        row_facts<Acc>& r = at.row[first + l];
        r.reference = r.lse > none ? r.lse : Acc(0);
        const Acc* q = simd::row_as<simd::native, Acc>(p.q.type, row_in(p.q, at, first + l), x.s.d, at.line);
        at.sum.load(l, q, x.rule.scale, r.reference * log2e);
      }
      for (isize J = 0; J < at.width; ++J) {
        block(at, first, J, part);
        at.sum.take(part_of(at, first, J));
      }
    }
  }
  Acc* part_of(slot& at, isize lane, isize J) const {
    return at.parts + (lane / lanes * x.rule.blocks() + J) * bounds::kinds * lanes;
  }
  void block(slot& at, isize first, isize J, isize part) const {
    constexpr isize W = tiles::rows;
    const isize j0 = J * x.rule.block_k, j1 = std::min(j0 + x.rule.block_k, x.s.m);
    std::uint64_t open = 0, pooled = 0;
    isize whole = x.s.m;  // keys that every row sees
    for (isize t = first / W; t < std::min((first + lanes) / W, at.tiles_used); ++t) {
      const isize count = at.rows[t].count;
      const std::uint64_t bits = (count == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1) << (t * W - first);
      const std::uint8_t fate = fate_of(at, at.unit_of[t])[J];
      whole = std::min(whole, at.row[t * W].seen);
      if (fate != kernel::computed && j0 < at.row[t * W + count - 1].seen) open |= bits;
      if (fate == kernel::pooled) pooled |= bits;
    }
    if (open == 0) return;
    std::uint64_t left_out[bounds::chunk];
    for (isize j = j0; j < j1; j += bounds::chunk) {
      const isize end = std::min(j + bounds::chunk, j1);
      for (isize y = j; y < end; ++y) {
        left_out[y - j] = open;
        for (isize l = 0; y >= whole && l < lanes; ++l)
          if (used(at, first + l) && y >= at.row[first + l].seen) left_out[y - j] &= ~(std::uint64_t{1} << l);
      }
      const isize stretch = summary.kept > 0 ? j0 / summary.stretch : 0;
      if (summary.kept > 0 && (stretch + 1) * summary.stretch <= x.s.m)
        for (isize y = stretch * summary.kept; y < (stretch + 1) * summary.kept; ++y)
          if (summary.small[y] >= j && summary.small[y] < end) left_out[summary.small[y] - j] = 0;
      at.sum.absorb(summary, j, end, lanes, left_out, pooled, part);
    }
  }
  std::uint8_t* fate_of(slot& at, isize u) const { return at.fate + u * x.rule.blocks(); }

  /// Bounds and targets of the rows of tiles `which`, and the factor that makes their parts shares of the target.
  void total(slot& at, range which) const {
    for (isize t = which.first; t < which.last; ++t) {
      alignas(64) Acc all[bounds::kinds][tiles::rows] = {};
      for (isize J = 0; J < at.width; ++J)
        for (isize kind = 0; kind < bounds::kinds; ++kind) {
          const Acc* from = part_of(at, t * tiles::rows, J) + kind * lanes + t * tiles::rows % lanes;
          for (isize l = 0; l < tiles::rows; l += P::size)
            (P::load(all[kind] + l) + P::load(from + l)).store(all[kind] + l);
        }
      for (isize l = 0; l < at.rows[t].count; ++l) {
        const isize lane = t * tiles::rows + l;
        const row_facts<Acc>& r = at.row[lane];
        const typename bounds::sums sum{all[0][l], all[1][l], all[2][l], all[3][l], all[4][l]};
        at.bound[lane] = row_bound(x.rule, x.s.d, r, sum, r.seen + at.width);
        const Acc length = r.size * (1 - static_cast<Acc>(2 * x.s.e + 16) * std::numeric_limits<Acc>::epsilon());
        at.wanted[lane] = std::max(
            {static_cast<Acc>(x.m.target.absolute), static_cast<Acc>(x.m.target.relative) * length, Acc(1e-30)});
        const Acc grown = std::exp(std::min(r.lse - r.reference, Acc(60)));
        at.weight[lane] = 1 / ((grown + sum.lower) * at.wanted[lane]);
        at.size[lane] = r.size;
      }
    }
  }

  /// The shares of the targets that block J takes, of rows lane, lane + 1, ..., P::size of them; 0 of rows that are done.
  P share(slot& at, isize lane, isize J) const {
    const Acc* from = part_of(at, lane, J) + lane % lanes;
    const P c = simd::fma(P::load(at.size + lane), P::load(from + 2 * lanes), P::load(from + 3 * lanes)) *
                P::load(at.weight + lane);
    const P most(Acc(1e15)), y = simd::select_greater(most, c, c, most);  // NaN is not below
    return simd::select_greater(P::load(at.over + lane), P(Acc(0)), x.m.target.estimated ? y * y : y, P(Acc(0)));
  }

  /// The most worthy blocks for unit u, until every row of it should be under its target; true if any was added.
  bool add(slot& at, isize u, range which, bool everything) const {
    const isize first = which.first * tiles::rows, last = which.last * tiles::rows;
    bool open = false;
    for (isize lane = first; lane < last; lane += P::size) {
      for (isize l = lane; l < lane + P::size; ++l)
        at.over[l] = used(at, l) && !(at.bound[l] <= at.wanted[l]) ? Acc(1) : Acc(0);
      P sum(Acc(0));
      for (isize J = 0; J < at.width; ++J) sum = sum + share(at, lane, J);
      alignas(64) Acc all[P::size];
      sum.store(all);
      for (isize l = lane; l < lane + P::size; ++l) {
        if (at.over[l] == 0) continue;
        at.over[l] = !x.m.target.estimated ? std::max(all[l - lane], at.bound[l] / at.wanted[l])
                     : all[l - lane] <= 1  ? Acc(0)
                                           : all[l - lane];
        open = open || at.over[l] > 0;
      }
    }
    if (!open) return false;
    for (isize J = 0; J < at.width; ++J) {
      P sum(Acc(0));
      for (isize lane = first; lane < last; lane += P::size) sum = sum + share(at, lane, J);
      at.worth[J] = simd::reduce_add(sum);
    }
    return pick(at, u, first, last, everything);
  }
  bool pick(slot& at, isize u, isize first, isize last, bool everything) const {
    const isize blocks = x.rule.blocks();
    std::uint8_t* const fate = fate_of(at, u);
    std::int32_t* end = at.order;
    for (isize J = 0; J < at.width; ++J)
      if (fate[J] != kernel::computed && at.worth[J] > 0) *end++ = static_cast<std::int32_t>(J);
    const auto less = [&](std::int32_t y, std::int32_t z) {
      return at.worth[y] != at.worth[z] ? at.worth[y] < at.worth[z] : y > z;
    };
    std::make_heap(at.order, end, less);
    std::int32_t* const list = at.next + u * blocks;
    isize count = 0;
    while (end > at.order && (everything || !under(at, first, last))) {
      std::pop_heap(at.order, end, less);
      const isize J = *--end;
      fate[J] = kernel::computed, list[count++] = static_cast<std::int32_t>(J);
      for (isize lane = first; lane < last; lane += P::size) {
        const P over = P::load(at.over + lane), less_by = share(at, lane, J);
        simd::max(over - less_by, simd::min(over, P(std::numeric_limits<Acc>::min()))).store(at.over + lane);
        for (isize kind = 0; kind < bounds::kinds; ++kind)
          P(Acc(0)).store(part_of(at, lane, J) + kind * lanes + lane % lanes);
      }
    }
    std::sort(list, list + count);
    at.added[u] = {list, count};
    at.computed[u].count += count;  // its list is read no more
    drop(at.pooled[u], x.parts, fate), drop(at.kept[u], x.rule.block_k, fate);
    return count > 0;
  }
  static bool under(const slot& at, isize first, isize last) {
    P most(Acc(0));
    for (isize lane = first; lane < last; lane += P::size) most = simd::max(most, P::load(at.over + lane));
    return simd::highest(most) <= Acc(0.95);
  }
  /// Without the entries whose block is computed by now; `size` entries a block.
  static void drop(kernel::block_list& list, isize size, const std::uint8_t* fate) {
    auto* const to = const_cast<std::int32_t*>(list.at);  // the slot's own memory
    isize count = 0;
    for (isize y = 0; y < list.count; ++y)
      if (fate[to[y] / size] != kernel::computed) to[count++] = to[y];
    list.count = count;
  }
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
