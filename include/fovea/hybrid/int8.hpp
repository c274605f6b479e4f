// SPDX-License-Identifier: MIT
#pragma once
/// @file  hybrid_attention in int8: keys, values and pooled tokens of each KV head rounded once a call, and tiles of integers over the plan.
///
///   round every head;  then, for the planned units in batches of tiles:  what cannot be int8 in f32, the rest by kernel/sparse_int8.hpp
///
/// Contract   every token is rounded by itself, so a row depends on nothing that it does not see. log n_J of a pooled token is rounded to
///            1/64 octave. The selection is that of f32.
/// Cost       m (d + e + 30) bytes a KV head, and as much for each pooled token.
/// Reference  hybrid/reference_int8.hpp.

#include <fovea/hybrid/plan.hpp>
#include <fovea/kernel/sparse_int8.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

class hybrid_int8 {
 public:
  static constexpr kernel::int8_recipe recipe{};
  using plan = hybrid_plan<float>;
  using tiles = kernel::sparse_int8<simd::native>;
  using rounding = kernel::detail::int8_rounding<simd::native, recipe>;
  static constexpr isize blocks_of_task = 8;

  /// Is the plan computed in integers? Single rows are not, nor is what is wider than int8_most_width.
  static bool takes(const plan& x) {
    return x.m.arithmetic == precision::int8 && x.plans() && !x.few() && tiles::takes(x.s.d);
  }
  static isize most_tiles(const plan& x) { return std::max(x.most_tiles * x.tile_height / tiles::rows, isize{1}); }

  /// The rounded tokens of one KV head.
  struct head {
    kernel::int8_head keys, pool;
  };

  hybrid_int8() = default;
  hybrid_int8(arena& memory, const plan& x, int threads) {
    const isize all = takes(x) ? x.s.B * x.s.G : 0, tokens = x.rule.pool ? x.rule.blocks() * x.parts : 0;
    heads_ = memory.take<head>(all);
    for (isize h = 0; h < all; ++h) {
      const kernel::int8_head keys(memory, x.s.m, x.s.d, x.s.e, recipe.keys, recipe.fold),
          pool(memory, tokens, x.s.d, x.s.e, recipe.keys, recipe.fold);
      if (heads_ != nullptr) heads_[h] = {keys, pool};
    }
    rounders_ = memory.take<rounding>(all > 0 ? threads : 0);
    for (int t = 0; all > 0 && t < threads; ++t) {
      const rounding one(memory, x.s.d, x.s.e);
      if (rounders_ != nullptr) rounders_[t] = one;
    }
  }
  const head& of(isize index) const { return heads_[index]; }

  /// `summary(index)`: of KV head b * G + g.
  template <class Summary>
  void round(exec_ref exec, const plan& x, const problem& p, const Summary& summary) const {
    if (!takes(x) || x.s.B * x.s.G == 0) return;
    const isize keys = ceil_div(x.s.m, recipe.keys), all = keys + heads_[0].pool.blocks,
                tasks = ceil_div(all, blocks_of_task);
    exec.for_tasks(x.s.B * x.s.G * tasks, [&](isize task, isize slot) {
      const isize index = task / tasks, b = index / x.s.G, g = index % x.s.G;
      const kernel::block_summary<float> own = summary(index);
      const isize first = task % tasks * blocks_of_task, last = std::min(first + blocks_of_task, all);
      for (isize y = first; y < last; ++y)
        if (y < keys)
          rounders_[slot].block(x.keys_of(p, b, g), heads_[index].keys, y);
        else
          pooled_block(x, own, rounders_[slot], heads_[index].pool, y - keys);
    });
  }

 private:
  static void pooled_block(const plan& x, const kernel::block_summary<float>& summary, rounding& run,
                           kernel::int8_head& to, isize y) {
    kernel::key_set<float> pool;
    pool.k = dense_rows(summary.pool_k(), x.s.d), pool.v = dense_rows(summary.pool_v(), x.s.e);
    pool.count = x.rule.blocks() * x.parts;
    while (pool.count > 0 && summary.members[pool.count - 1] == 0) --pool.count;  // parts that have not begun
    run.block(pool, to, y);
    for (isize t = y * recipe.keys; t < std::min((y + 1) * recipe.keys, pool.count); ++t)
      if (summary.members[t] > 0)
        to.fold[t] += std::nearbyint(std::log2(static_cast<float>(summary.members[t])) * kernel::detail::int8_grid);
  }

  head* heads_ = nullptr;
  rounding* rounders_ = nullptr;
};

/// Scratch of a task, and its loop.
struct hybrid_int8_slot : hybrid_plan<float>::planner {
  using plan = hybrid_int8::plan;
  using tiles = hybrid_int8::tiles;
  using floats = plan::tiles;
  struct set_of_keys {
    const kernel::int8_head& head;
    const kernel::key_set<float>& keys;
    const kernel::block_list* of_unit;
    kernel::block_cut cut;
    kernel::block_list* lists;
  };

  isize most;
  tiles run;
  floats in_f32;  // one tile
  kernel::tile_rows* rows;
  isize* unit_of;
  kernel::block_list *computed_of, *pooled_of, *kept_of;

  hybrid_int8_slot(arena& memory, const plan& x)
      : planner(memory, x),
        most(hybrid_int8::most_tiles(x)),
        run(memory, most, x.s.d, x.s.e),
        in_f32(memory, 1, x.s.d, x.s.e) {
    rows = memory.take<kernel::tile_rows>(most), unit_of = memory.take<isize>(most);
    computed_of = memory.take<kernel::block_list>(most), pooled_of = memory.take<kernel::block_list>(most);
    kept_of = memory.take<kernel::block_list>(most);
  }

  /// The planned units, in batches of tiles.
  void each_tile(const plan& x, const problem& p, const kernel::block_summary<float>& summary,
                 const hybrid_int8::head& head, isize b, isize g) {
    const kernel::key_set<float> keys = x.keys_of(p, b, g);
    kernel::key_set<float> pool;
    if (pools) pool = x.pool_of(*this, p, summary, b, g);
    const set_of_keys sets[] = {
        {head.keys, keys, computed, {x.rule.block_k, x.rule.causal, x.rule.offset}, computed_of},
        {head.pool, pool, pooled, {}, pooled_of},
        {head.keys, keys, kept, {}, kept_of}};
    isize tiles_held = 0;
    const auto flush = [&] {
      if (tiles_held > 0) attend(x, p, b, sets, tiles_held);
      tiles_held = 0;
    };
    for (isize u = 0; u < count; ++u) {
      const plan::unit unit = x.unit_at(first + u);
      for (isize i = 0; i < unit.count; i += tiles::rows) {
        rows[tiles_held] = {g * x.s.group() + unit.head, unit.first + i, std::min(tiles::rows, unit.count - i)};
        unit_of[tiles_held] = u;
        if (++tiles_held == most) flush();
      }
    }
    flush();
  }

 private:
  void attend(const plan& x, const problem& p, isize b, const set_of_keys (&sets)[3], isize held) {
    run.begin(p.q, b, rows, held, x.rule.scale);
    bool broken = false;
    for (const set_of_keys& set : sets) {
      for (isize t = 0; t < held; ++t) set.lists[t] = set.of_unit[unit_of[t]];
      if (set.keys.count > 0) broken = run.in_floats(set.head, set.keys.count, set.lists, set.cut) || broken;
    }
    for (isize t = 0; broken && t < held; ++t) {
      const std::uint8_t* left = run.left(t);
      if (std::any_of(left, left + rows[t].count, [](std::uint8_t y) { return y != 0; })) float_tile(x, p, b, sets, t);
    }
    for (const set_of_keys& set : sets)
      if (set.keys.count > 0) run.absorb(set.head, set.keys.count, set.lists, set.cut);
    run.finish(p.out, p.lse);  // and what float_tile wrote of rows that are not left
  }

  void float_tile(const plan& x, const problem& p, isize b, const set_of_keys (&sets)[3], isize t) {
    for (isize i = 0; i < rows[t].count; i += floats::rows) {
      const kernel::tile_rows some{rows[t].head, rows[t].first + i, std::min(floats::rows, rows[t].count - i)};
      in_f32.begin(p.q, b, &some, 1, x.rule.scale);
      for (const set_of_keys& set : sets)
        if (set.keys.count > 0) in_f32.absorb(set.keys, set.lists + t, set.cut);
      in_f32.finish(p.out, p.lse);
    }
  }
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
