// SPDX-License-Identifier: MIT
#pragma once
/// @file  hybrid_attention: for each superblock of query blocks plan, absorb keys, absorb pooled tokens, finish.

#include <fovea/core/kv_cache.hpp>
#include <fovea/core/partial.hpp>
#include <fovea/hybrid/check.hpp>
#include <fovea/hybrid/decode.hpp>
#include <fovea/hybrid/int8.hpp>
#include <fovea/hybrid/linear_rest.hpp>
#include <fovea/hybrid/memory.hpp>
#include <fovea/hybrid/pattern.hpp>
#include <fovea/hybrid/target.hpp>
#include <fovea/kernel/decode.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
struct hybrid_run : hybrid_plan<Acc> {
  using base = hybrid_plan<Acc>;
  using base::m, base::s, base::rule, base::rows, base::parts, base::most_units, base::most_tiles, base::tile_height;
  using typename base::planner;
  using typename base::unit;
  using tiles = typename base::tiles;

  hybrid_run(const hybrid_attention& mechanism, const shape& sizes, isize tokens_before, bool stored = false,
             const kv_sequence* sequence = nullptr)
      : base(mechanism, sizes, tokens_before, stored, sequence) {}

  linear_rest<Acc> rest;  ///< with compensation::linear
  bool rests() const { return m.compensate == compensation::linear; }
  using rest_slot = std::optional<typename linear_rest<Acc>::slot>;

  struct tile_slot : planner {
    tiles run;
    rest_slot rest;
    kernel::tile_rows* rows;
    isize* unit_of;
    kernel::block_list *lists, *panels;
    tile_slot(arena& memory, const hybrid_run& x)
        : planner(memory, x), run(memory, x.most_tiles, x.s.d, x.s.e, x.tile_height) {
      rows = memory.take<kernel::tile_rows>(x.most_tiles);
      unit_of = memory.take<isize>(x.most_tiles);
      lists = memory.take<kernel::block_list>(x.most_tiles), panels = memory.take<kernel::block_list>(x.most_tiles);
      if (x.rests()) rest.emplace(memory, x.rest);
    }
  };
  struct row_slot : planner {
    kernel::decode_rows<simd::native, Acc> run;
    Acc *o, *part, *weights;
    rest_slot rest;
    row_slot(arena& memory, const hybrid_run& x)
        : planner(memory, x), run(memory, x.s.d, x.s.e), o(memory.take<Acc>(x.s.e)), part(memory.take<Acc>(x.s.e)) {
      weights = memory.take<Acc>(x.rule.pool ? x.rule.blocks() * x.parts : 0);
      if (x.rests()) rest.emplace(memory, x.rest);
    }
  };
  std::size_t slot_bytes() const {
    arena measure;
    if (m.target.on())
      typename hybrid_target<Acc>::slot(measure, *this);
    else if (this->few())
      row_slot(measure, *this);
    else
      tile_slot(measure, *this);
    if constexpr (std::is_same_v<Acc, float>)
      if (hybrid_int8::takes(*this)) measure = {}, hybrid_int8_slot(measure, *this);
    return measure.bytes();
  }

  /// What `attend` takes.
  isize slots_bytes(int threads) const {
    return this->plans() ? static_cast<isize>(slot_bytes()) * threads
                         : static_cast<isize>(hybrid_pattern<Acc>(m, s).workspace_size(threads));
  }

  /// Every superblock of every KV head; `summary(index)` and `codes(index)` are those of KV head b * G + g, and so is ints.of(index).
  template <class Summary, class Codes>
  void attend(exec_ref exec, const problem& p, arena scratch, const Summary& summary, const Codes& codes,
              [[maybe_unused]] const hybrid_int8& ints) const {
    if (!this->plans()) return hybrid_pattern<Acc>(m, s).run(exec, p, scratch);
    const isize all = this->units(), supers = ceil_div(all, std::max(most_units, isize{1}));
    const isize heads = s.B * s.G;
    const std::size_t piece = slot_bytes();
    auto* base_of = scratch.take<std::byte>(static_cast<isize>(piece) * exec.concurrency());
    exec.for_tasks(heads * supers, [&](isize task, isize index) {
      const isize sb = supers - 1 - task / heads, head = task % heads;  // the longest rows first
      const isize first = sb * most_units, last = std::min(first + most_units, all), b = head / s.G, g = head % s.G;
      arena own(std::span<std::byte>(base_of + static_cast<std::size_t>(index) * piece, piece));
      if (m.target.on()) {
        typename hybrid_target<Acc>::slot at(own, *this);
        this->plan(at, p, summary(head), codes(head), b, g, first, last);
        hybrid_target<Acc>{*this, p, summary(head), b, g}.run(at);
        if (this->record != nullptr) this->note(at.list, at.count, at.fate, b);
        return;
      }
      if (this->few()) {
        row_slot at(own, *this);
        this->plan(at, p, summary(head), codes(head), b, g, first, last);
        return each_row(at, p, summary(head), b, g);
      }
      if constexpr (std::is_same_v<Acc, float>)
        if (hybrid_int8::takes(*this)) {
          hybrid_int8_slot at(own, *this);
          this->plan(at, p, summary(head), codes(head), b, g, first, last);
          return at.each_tile(*this, p, summary(head), ints.of(head), b, g);
        }
      tile_slot at(own, *this);
      this->plan(at, p, summary(head), codes(head), b, g, first, last);
      each_tile(at, p, summary(head), b, g);
    });
  }

  /// The pooled tokens of `count` tiles, by lists; where a list leaves out only a few, by whole panels.
  void absorb_pool(tile_slot& at, const kernel::key_set<Acc>& pool, isize count) const {
    for (isize t = 0; t < count; ++t) {
      const kernel::block_list list = at.pooled[at.unit_of[t]];
      const bool whole =
          list.count > 0 && !this->cumulant() && 4 * list.count > 3 * (list.at[list.count - 1] + isize{1});
      at.lists[t] = whole ? kernel::block_list{} : list, at.panels[t] = whole ? list : kernel::block_list{};
    }
    at.run.absorb_dense(pool, at.panels), at.run.absorb(pool, at.lists, {});
  }

  static typename linear_rest<Acc>::fates fates_of(const planner& at, isize u) {
    return {at.computed[u], at.pooled[u], at.kept[u]};
  }

  /// The planned units, in batches of tiles.
  void each_tile(tile_slot& at, const problem& p, const kernel::block_summary<Acc>& summary, isize b, isize g) const {
    const kernel::key_set<Acc> keys = this->keys_of(p, b, g);
    kernel::key_set<Acc> pool;
    const score term = this->term_of(at, g);
    if (rests()) at.pools = false;
    if (at.pools) {
      pool = this->pool_of(at, p, summary, b, g);
      if (this->cumulant()) pool.modify = &term;
    }
    isize count = 0;
    const auto flush = [&] {
      if (count == 0) return;
      at.run.begin(p.q, b, at.rows, count, rule.scale);
      for (isize t = 0; t < count; ++t)
        if (const isize u = at.unit_of[t], y = (at.rows[t].first - this->unit_at(at.first + u).first) / tile_height;
            at.sums.done(u))
          at.run.start(t, at.sums.o(u, y), at.sums.m(u, y), at.sums.l(u, y), tile_height, 0);
      for (isize t = 0; t < count; ++t) at.lists[t] = at.computed[at.unit_of[t]];
      if (s.m > 0) at.run.absorb(keys, at.lists, {rule.block_k, rule.causal, rule.offset});
      if (at.pools) absorb_pool(at, pool, count);
      for (isize t = 0; t < count; ++t) at.lists[t] = at.kept[at.unit_of[t]];
      if (at.keeps) at.run.absorb(keys, at.lists, {});
      for (isize t = 0; rests() && t < count; ++t)
        rest.each_row(*at.rest, p, b, at.rows[t].head, at.rows[t].first, at.rows[t].count, fates_of(at, at.unit_of[t]),
                      [&](isize row, Acc sum, const Acc* o) { at.run.join(t, row, sum, o); });
      at.run.finish(p.out, p.lse);
      count = 0;
    };
    for (isize u = 0; u < at.count; ++u) {
      const unit x = this->unit_at(at.first + u);
      for (isize i = 0; i < x.count; i += tile_height) {
        at.rows[count] = {g * s.group() + x.head, x.first + i, std::min(tile_height, x.count - i)};
        at.unit_of[count] = u;
        if (++count == most_tiles) flush();
      }
    }
    flush();
  }

  /// The planned units row by row: the listed blocks are pages, the pooled tokens pages of one row.
  void each_row(row_slot& at, const problem& p, const kernel::block_summary<Acc>& summary, isize b, isize g) const {
    const kernel::key_set<Acc> keys = this->keys_of(p, b, g);
    variance_term<Acc> variance = this->term_of(at, g);
    kernel::key_set<Acc> pool;
    if (rests()) at.pools = false;
    if (at.pools) pool = this->pool_of(at, p, summary, b, g);
    for (isize u = 0; u < at.count; ++u) {
      const unit x = this->unit_at(at.first + u);
      for (isize i = x.first; i < x.first + x.count; ++i) {
        const isize h = g * s.group() + x.head, r = x.head * s.n + i;
        partial<Acc> all{-std::numeric_limits<Acc>::infinity(), Acc(0), at.o};
        for (isize c = 0; c < s.e; ++c) at.o[c] = Acc(0);
        at.run.begin({p.q, b, g * s.group(), r, r + 1}, rule.scale);
        const isize end = rule.causal ? std::min(i + rule.offset + 1, s.m) : s.m;
        join(at, paged(keys, at.computed[u], rule.block_k, end), all);
        join(at, paged(keys, at.kept[u], 1, end), all);
        kernel::key_set<Acc> tokens = paged(pool, at.pools ? at.pooled[u] : kernel::block_list{}, 1, pool.count);
        variance.list = at.pooled[u].at;
        const score term = variance;
        if (this->cumulant()) tokens.modify = &term;
        for (isize y = 0; y < tokens.count; ++y) at.weights[y] = at.bias[at.pooled[u].at[y]];
        tokens.bias = at.weights;
        join(at, tokens, all);
        if (rests())
          rest.each_row(*at.rest, p, b, h, i, 1, fates_of(at, u), [&](isize, Acc sum, const Acc* o) {
            std::copy_n(o, s.e, at.part);
            merge(all, partial<Acc>{sum, Acc(1), at.part}, s.e);
          });
        const Acc lse = normalise(all, s.e);
        simd::store_row<simd::native, Acc>(p.out.type, at.o, s.e, p.out.row(b, h, i));
        if (p.lse) *static_cast<Acc*>(p.lse.row(b, h, i)) = lse;
      }
    }
  }
  /// The keys of a set that lie in listed blocks and before `end`, as pages.
  static kernel::key_set<Acc> paged(const kernel::key_set<Acc>& from, const kernel::block_list& list, isize size,
                                    isize end) {
    kernel::key_set<Acc> set = from;
    isize count = list.count;
    while (count > 0 && list.at[count - 1] * size >= end) --count;
    set.count = count == 0 ? 0 : (count - 1) * size + std::min(size, end - list.at[count - 1] * size);
    for (row_source* x : {&set.k, &set.v}) x->table = list.at, x->page = size, x->page_bytes = size * x->row_bytes;
    return set;
  }
  void join(row_slot& at, const kernel::key_set<Acc>& set, partial<Acc>& all) const {
    if (set.count == 0) return;
    partial<Acc> one{Acc(0), Acc(0), at.part};
    at.run.run(set, 0, set.count, &one.m, &one.l, one.o);
    one.m *= static_cast<Acc>(0.69314718055994530942);
    merge(all, one, s.e);
  }

  // ---- entries ----

  /// Scratch of the whole call, before the slots: summaries of a call without a state, rows for folding, the codes as products read them,
  /// what tiles in int8 read.
  struct shared {
    hybrid_summaries<Acc> all;
    Acc* fold;
    kernel::code_keys* codes = nullptr;
    hybrid_int8 ints;
    linear_rest<Acc> rest;
    shared(arena& memory, const hybrid_run& x, int threads) : all(hybrid_needs(x.m), x.m.block_k, x.s, x.s.m) {
      all.base = memory.take<std::byte>(all.any() ? static_cast<isize>(all.bytes(x.s.B * x.s.G)) : 0);
      fold = memory.take<Acc>(std::max(x.s.d, x.s.e) * threads);
      if constexpr (std::is_same_v<Acc, float>) ints = hybrid_int8(memory, x, threads);
      if (x.rests()) rest = linear_rest<Acc>(memory, x.m, x.s, threads);
      if (!passes(x)) return;
      codes = memory.take<kernel::code_keys>(x.s.B * x.s.G);
      for (isize head = 0; head < x.s.B * x.s.G; ++head) {
        const kernel::code_keys one(memory, x.s.m, x.m.block_k, x.s.d);
        if (codes != nullptr) codes[head] = one;
      }
    }
    static bool passes(const hybrid_run& x) {
      return kernel::has_code_pass<simd::native> && std::is_same_v<Acc, float> && x.rows >= 8 && x.m.selects() &&
             x.rule.score == kernel::block_score::code;
    }
    void prepare(exec_ref exec, const hybrid_run& x, const hybrid_summaries<Acc>& from) const {
      if constexpr (kernel::has_code_pass<simd::native> && std::is_same_v<Acc, float>)
        if (passes(x))
          exec.for_tasks(x.s.B * x.s.G, [&](isize head, isize) {
            kernel::detail::prepare_codes<simd::native>(from.head(head), x.s.m, codes[head]);
          });
    }
  };
  void attend(exec_ref exec, const problem& p, arena scratch, const shared& at,
              const hybrid_summaries<Acc>& all) const {
    const auto summary = [&](isize head) { return all.any() ? all.head(head) : kernel::block_summary<Acc>{}; };
    at.prepare(exec, *this, all);
    if constexpr (std::is_same_v<Acc, float>) at.ints.round(exec, *this, p, summary);
    attend(
        exec, p, scratch, summary, [&](isize head) { return at.codes == nullptr ? nullptr : at.codes + head; },
        at.ints);
  }
  static std::size_t workspace_size(const hybrid_attention& m, const shape& s, int threads) {
    hybrid_run run(m, s, 0);
    arena measure;
    run.rest = shared(measure, run, threads).rest;
    measure.take<std::byte>(run.slots_bytes(threads));
    return measure.bytes();
  }
  static void prefill(const hybrid_attention& m, exec_ref exec, const problem& p, arena scratch,
                      std::uint8_t* record = nullptr, const tensor_mut& bound = {}) {
    hybrid_run run(m, p.shape(), 0);
    run.record = record, run.bound = bound;
    const shared at(scratch, run, exec.concurrency());
    run.rest = at.rest;
    if (run.rests()) run.rest.prepare(exec, p);
    at.all.append(exec, p.k, p.v, 0, at.fold);
    run.attend(exec, p, scratch, at, at.all);
  }

  using decode = hybrid_decode<simd::native>;

  /// Scratch of a call with a state before the slots: the summaries as loops over many rows read them.
  struct opened {
    kernel::block_summary<Acc>* heads;
    kernel::kv_rows<Acc>* rows;
    kernel::code_keys* codes = nullptr;
    hybrid_int8 ints;
    opened(arena& memory, const hybrid_run& x, int threads) {
      const isize count = x.s.B * x.s.G;
      if constexpr (std::is_same_v<Acc, float>) ints = hybrid_int8(memory, x, threads);
      heads = memory.take<kernel::block_summary<Acc>>(count), rows = memory.take<kernel::kv_rows<Acc>>(count);
      codes = shared::passes(x) ? memory.take<kernel::code_keys>(count) : nullptr;
      const auto needs = hybrid_kv_needs<Acc>(x.m, x.s);
      for (isize head = 0; head < count; ++head) {
        const kernel::kv_rows<Acc> one(memory, needs, x.s.m, x.m.block_k, x.s.d, x.s.e);
        if (rows != nullptr) rows[head] = one;
        if (!shared::passes(x)) continue;
        const kernel::code_keys keys(memory, x.s.m, x.m.block_k, x.s.d);
        if (codes != nullptr) codes[head] = keys;
      }
    }
  };
  void attend_opened(exec_ref exec, const problem& p, const hybrid_memory<Acc>& memory, arena scratch) const {
    const opened at(scratch, *this, exec.concurrency());
    exec.for_tasks(s.B * s.G, [&](isize head, isize) {
      at.heads[head] = kernel::unfolded<simd::native>(memory.head(head), s.m, at.rows[head]);
      if constexpr (kernel::has_code_pass<simd::native> && std::is_same_v<Acc, float>)
        if (at.codes != nullptr) kernel::detail::prepare_codes<simd::native>(at.heads[head], s.m, at.codes[head]);
    });
    const auto summary = [&](isize head) { return at.heads[head]; };
    if constexpr (std::is_same_v<Acc, float>) at.ints.round(exec, *this, p, summary);
    attend(
        exec, p, scratch, summary, [&](isize head) { return at.codes == nullptr ? nullptr : at.codes + head; },
        at.ints);
  }
  static std::size_t state_workspace_size(const hybrid_attention& m, const shape& s, int threads, bool stored = false) {
    arena measure;
    measure.take<Acc>(hybrid_settling<Acc>(m, s, threads));
    std::size_t slots = 0;
    if constexpr (decode::template can<Acc>)
      if (decode::template takes<Acc>(m, s)) slots = decode(m, s, s.m - s.n).slot_bytes();
    if (slots == 0) {
      const hybrid_run run(m, s, s.m - s.n, stored);
      opened(measure, run, threads);
      measure.take<std::byte>(run.slots_bytes(threads));
    }
    measure.take<std::byte>(static_cast<isize>(slots) * threads);
    return measure.bytes();
  }
  /// `whole`: the problem with all `past` and new keys. `memory` has those before `taken`.
  static void extend(const hybrid_attention& m, exec_ref exec, const problem& whole, const hybrid_rows& rows,
                     const hybrid_memory<Acc>& memory, isize taken, isize past, arena scratch) {
    const shape all = whole.shape();
    memory.append(exec, rows, all.B, all.G, taken, all.m,
                  scratch.take<Acc>(hybrid_settling<Acc>(m, all, exec.concurrency())));
    if constexpr (decode::template can<Acc>)
      if (decode::template takes<Acc>(m, all)) return decode(m, all, past).attend(exec, whole, rows, memory, scratch);
    hybrid_run(m, all, past, rows.kv != nullptr, rows.kv).attend_opened(exec, whole, memory, scratch);
  }
  static void prefill(const hybrid_attention& m, exec_ref exec, const problem& p, state& st, arena scratch) {
    const isize past = st.tokens();
    kv_cache::append(p, st);
    problem whole = p;
    whole.k = kv_cache::keys(st, st.tokens()), whole.v = kv_cache::values(st, st.tokens());
    extend(m, exec, whole, {whole.k, whole.v}, hybrid_memory_of<Acc>(m, st), past, past, scratch);
  }
};

}  // namespace detail

inline void hybrid_attention::check(const problem& p) const {
  detail::check_problem(p);
  detail::check_hybrid_call(*this, p.shape(), nullptr);
}

/// Enough for calls with a state as well.
inline std::size_t hybrid_attention::workspace_size(const shape& s, int threads) const {
  const std::size_t own = s.type == dtype::f64 ? detail::hybrid_run<double>::workspace_size(*this, s, threads)
                                               : detail::hybrid_run<float>::workspace_size(*this, s, threads);
  return std::max(own, streaming() ? state_workspace_size(s, threads) : 0);
}

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void hybrid_attention::prefill(exec_ref exec, const problem& p, arena scratch) const {
  if (p.q.type == dtype::f64)
    detail::hybrid_run<double>::prefill(*this, exec, p, scratch);
  else
    detail::hybrid_run<float>::prefill(*this, exec, p, scratch);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
