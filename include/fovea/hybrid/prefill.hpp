// SPDX-License-Identifier: MIT
#pragma once
/// @file  hybrid_attention: contract, then for each superblock of query rows plan, absorb keys, absorb pooled tokens, finish.

#include <fovea/core/kv_cache.hpp>
#include <fovea/core/partial.hpp>
#include <fovea/hybrid.hpp>
#include <fovea/hybrid/plan.hpp>
#include <fovea/hybrid/summaries.hpp>
#include <fovea/kernel/decode.hpp>
#include <fovea/kernel/sparse_tiles.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline hybrid_attention hybrid_attention::hsa(hsa_mode mode, isize stride) {
  hybrid_attention m;
  m.select = block_selector::pattern, m.is_causal = true, m.compensate = compensation::none;
  m.pattern = mode, m.stride = stride;
  return m;
}
inline hybrid_attention hybrid_attention::over(view<const std::uint8_t> blocks, isize block_q, isize block_k,
                                               bool is_causal) {
  hybrid_attention m;
  m.select = block_selector::given, m.compensate = compensation::none;
  m.blocks = blocks, m.block_q = block_q, m.block_k = block_k, m.is_causal = is_causal;
  return m;
}
inline hybrid_attention hybrid_attention::moba(isize block_k, isize top) {
  hybrid_attention m;
  m.select = block_selector::mean, m.is_causal = true, m.compensate = compensation::none;
  m.block_q = 1, m.block_k = block_k, m.top = top;
  m.budget = 0, m.at_least = 0, m.first = 0, m.window = 0;
  return m;
}

namespace detail {

inline void check_hybrid_options(const hybrid_attention& m) {
  require(m.block_q >= 1 && m.block_k >= 1, "block_q, block_k are ", m.block_q, ", ", m.block_k,
          "; they must be at least 1");
  require(m.block_q <= (isize{1} << 30) && m.block_k <= (isize{1} << 30), "block_q, block_k are ", m.block_q, ", ",
          m.block_k, "; wanted at most 2^30");
  if (m.scale) {
    require_finite("scale", *m.scale);
    require(*m.scale > 0, "scale is ", *m.scale, "; it must be positive");
  }
  require_finite("budget", m.budget);
  require(m.budget >= 0 && m.budget <= 1, "budget is ", m.budget,
          "; it is a share of the candidate blocks, from 0 to 1");
  require(m.top >= 0, "top is ", m.top, "; it counts blocks and must not be negative (0: go by budget)");
  require(m.at_least >= 0 && m.first >= 0 && m.window >= 0, "at_least, first, window are ", m.at_least, ", ", m.first,
          ", ", m.window, "; they count keys and must not be negative");
  if (m.select != block_selector::pattern) return;
  require(m.stride >= 1, "stride is ", m.stride, "; it must be at least 1");
  require(m.is_causal, "pattern ", name_of(m.pattern),
          " with is_causal = false; the patterns are causal by definition");
  require(m.compensate == compensation::none, "pattern ", name_of(m.pattern),
          " with compensation; it skips single tokens, and only whole blocks can be pooled");
}

/// `exact_fit`: the mask has just the blocks of the problem; else it may hold more (a state that grows).
inline void check_given_blocks(const hybrid_attention& m, const shape& s, isize n, isize keys, bool exact_fit) {
  const auto& t = m.blocks;
  const isize rows = ceil_div(n, m.block_q), columns = ceil_div(keys, m.block_k);
  require(t.data != nullptr || rows == 0 || columns == 0,
          "blocks is null; a given block mask needs [B or 1, H or G or 1, ", rows, ", ", columns, "]");
  const bool fits = exact_fit ? t.length == rows && t.width == columns : t.length >= rows && t.width >= columns;
  require(fits, "blocks is [", t.batch, ", ", t.heads, ", ", t.length, ", ", t.width, "]; ", n, " queries and ", keys,
          " keys in blocks of ", m.block_q, " x ", m.block_k, exact_fit ? " want [..., " : " want at least [..., ",
          rows, ", ", columns, "]");
  require(t.batch == 1 || t.batch == s.B, "blocks has ", t.batch, " batch items; wanted 1 or B = ", s.B);
  require(t.heads == 1 || t.heads == s.H || t.heads == s.G, "blocks has ", t.heads, " heads; wanted 1, G = ", s.G,
          " or H = ", s.H);
}

/// What the selector and the pooling ask of the block summaries.
inline kernel::summary_needs hybrid_needs(const hybrid_attention& m) {
  const bool pools = m.compensate != compensation::none;
  kernel::summary_needs needs;
  needs.means = pools || m.select == block_selector::mean || m.select == block_selector::variance;
  needs.spread = m.compensate == compensation::cumulant || m.select == block_selector::variance;
  needs.range = m.select == block_selector::bound;
  needs.levels = m.select == block_selector::int8 ? 127 : m.select == block_selector::int4 ? 7 : 0;
  return needs;
}

/// The summaries that lie in a state, behind its KV cache.
template <class Acc>
hybrid_summaries<Acc> hybrid_summaries_of(const hybrid_attention& m, const state& s) {
  hybrid_summaries<Acc> all(hybrid_needs(m), m.block_k, s.sizes(), s.sizes().m);
  all.base = s.as<std::byte>() + round_up(kv_cache::bytes(s.sizes()), alignment);
  return all;
}

inline std::size_t hybrid_state_bytes(const hybrid_attention& m, const shape& s) {
  const auto needs = hybrid_needs(m);
  const std::size_t cache = round_up(kv_cache::bytes(s), alignment);
  return cache + (s.type == dtype::f64 ? hybrid_summaries<double>(needs, m.block_k, s, s.m).bytes(s.B * s.G)
                                       : hybrid_summaries<float>(needs, m.block_k, s, s.m).bytes(s.B * s.G));
}

/// What one call works on: the problem with all its keys, `past` tokens of them from earlier calls.
template <class Acc>
struct hybrid_run {
  using loop = kernel::online_softmax<simd::native, Acc>;
  using selector = kernel::block_select<simd::native, Acc>;

  const hybrid_attention& m;
  shape s;
  isize past;
  kernel::block_rule rule;
  isize rows, most, plan_rows;     ///< rows of a query group; of a superblock; table rows of a superblock
  std::uint8_t* record = nullptr;  ///< [B, H, query blocks, key blocks]: the fates, for who asks for them; null: nobody

  hybrid_run(const hybrid_attention& mechanism, const shape& sizes, isize tokens_before)
      : m(mechanism), s(sizes), past(tokens_before) {
    using enum block_selector;
    rule.score = m.select == variance                   ? kernel::block_score::variance
                 : m.select == bound                    ? kernel::block_score::bound
                 : m.select == int8 || m.select == int4 ? kernel::block_score::code
                 : m.select == exact                    ? kernel::block_score::exact
                                                        : kernel::block_score::mean;
    rule.block_q = m.block_q, rule.block_k = m.block_k, rule.origin = past;
    rule.n = s.n, rule.m = s.m, rule.offset = m.align.position({0, 0, s.n, s.m, s.H, s.G}, 0);
    rule.top = m.top, rule.at_least = m.at_least, rule.first = m.first, rule.window = m.window;
    rule.budget = m.budget, rule.scale = m.scale_for(s);
    rule.causal = m.is_causal, rule.pool = m.compensate != compensation::none;
    rows = s.group() * s.n;
    most = std::min(loop::superblock(rows, s.d, s.e), rows);
    const isize heads = s.n > 0 ? std::min(s.group(), most / s.n + 2) : 0;
    plan_rows = std::min(most, most / m.block_q + 2 * heads);
  }
  bool plans() const { return m.select != block_selector::pattern; }
  bool cumulant() const { return m.compensate == compensation::cumulant; }

  /// Scratch of the plan of one task; laid out over a null arena it measures.
  struct planner {
    selector choose;
    std::uint8_t* fate;
    range* hull;
    isize* first_row;
    kernel::query_block* list;
    Acc *term, *squares, *row, *bias;

    planner(arena& memory, const hybrid_run& x) : choose(memory, x.m.selects() ? x.rule : kernel::block_rule{}, x.s.d) {
      const isize blocks = x.plans() ? x.rule.blocks() : 0, table = x.plans() ? x.plan_rows : 0;
      fate = memory.take<std::uint8_t>(table * blocks);
      hull = memory.take<range>(2 * table);
      list = memory.take<kernel::query_block>(table);
      first_row = memory.take<isize>(x.s.group());
      term = memory.take<Acc>(x.cumulant() ? blocks * x.most : 0);
      squares = memory.take<Acc>(x.cumulant() ? x.s.d * 64 : 0);
      row = memory.take<Acc>(std::max(x.s.d, x.s.e));
      bias = memory.take<Acc>(x.rule.pool ? blocks : 0);
    }
  };
  struct slot : planner {
    loop run;
    slot(arena& memory, const hybrid_run& x) : planner(memory, x), run(memory, x.rows, x.s.d, x.s.e) {}
  };
  /// A few rows, as in decoding: row by row over the runs of computed blocks.
  struct row_slot : planner {
    kernel::decode_rows<simd::native, Acc> run;
    Acc *o, *part;
    row_slot(arena& memory, const hybrid_run& x)
        : planner(memory, x), run(memory, x.s.d, x.s.e), o(memory.take<Acc>(x.s.e)), part(memory.take<Acc>(x.s.e)) {}
  };
  bool few() const { return plans() && rows <= 16; }
  std::size_t slot_bytes() const {
    arena measure;
    if (few())
      row_slot(measure, *this);
    else
      slot(measure, *this);
    return measure.bytes();
  }

  /// Every superblock of every KV head; `summary(index)` gives the block summary of KV head b * G + g.
  template <class Summary>
  void attend(exec_ref exec, const problem& p, arena scratch, Summary&& summary) const {
    const isize supers = ceil_div(rows, most), heads = s.B * s.G;
    const std::size_t piece = slot_bytes();
    auto* base = scratch.take<std::byte>(static_cast<isize>(piece) * exec.concurrency());
    exec.for_tasks(heads * supers, [&](isize task, isize index) {
      const isize sb = supers - 1 - task / heads, b = task % heads / s.G, g = task % s.G;  // the longest rows first
      arena own(std::span<std::byte>(base + static_cast<std::size_t>(index) * piece, piece));
      if (few()) {
        row_slot at(own, *this);
        return each_row(at, p, summary(b * s.G + g), b, g);
      }
      slot at(own, *this);
      superblock(at, p, summary(b * s.G + g), b, g, sb * most, std::min((sb + 1) * most, rows));
    });
  }

  void superblock(slot& at, const problem& p, const kernel::block_summary<Acc>& summary, isize b, isize g, isize r0,
                  isize r1) const {
    const isize head0 = g * s.group();
    at.run.begin({p.q, b, head0, r0, r1}, rule.scale, nullptr);
    kernel::key_set<Acc> keys = keys_of(p, b, g);
    if (s.m == 0) return at.run.finish(p.out, p.lse);
    if (!plans()) {
      const fovea::mask pattern = hsa_pattern{m.pattern, m.stride, m.align};
      keys.visible = &pattern;
      at.run.absorb(keys);
      return at.run.finish(p.out, p.lse);
    }
    const bool pooled = plan(at, p, summary, b, g, r0, r1);
    planned_blocks plan{at.fate,       at.hull,          at.first_row, head0,
                        rule.blocks(), rule.block_q,     rule.block_k, rule.origin,
                        rule.offset,   kernel::computed, rule.causal};
    const fovea::mask visible = plan;
    keys.visible = &visible;
    at.run.absorb(keys);
    if (pooled) {
      plan.hull += plan_rows, plan.block_k = 1, plan.wanted = kernel::pooled, plan.causal = false;
      const fovea::mask skipped = plan;
      const score term = variance_term<Acc>{at.term, most, head0, r0};
      kernel::key_set<Acc> pool = pool_of(at, p, summary, keys, head0, r0, r1);
      pool.visible = &skipped, pool.modify = cumulant() ? &term : nullptr;
      at.run.absorb(pool);
    }
    at.run.finish(p.out, p.lse);
  }

  /// The rows of a query group one by one: runs of neighbouring blocks of one fate, joined into one (m, l, o).
  void each_row(row_slot& at, const problem& p, const kernel::block_summary<Acc>& summary, isize b, isize g) const {
    const isize head0 = g * s.group();
    const bool pooled = s.m > 0 && plan(at, p, summary, b, g, 0, rows);
    const kernel::key_set<Acc> keys = keys_of(p, b, g);
    const score term = variance_term<Acc>{at.term, most, head0, 0};
    kernel::key_set<Acc> pool;
    if (pooled) pool = pool_of(at, p, summary, keys, head0, 0, rows), pool.modify = cumulant() ? &term : nullptr;
    for (isize r = 0; r < rows; ++r) {
      const isize h = head0 + r / s.n, i = r % s.n;
      partial<Acc> all{-std::numeric_limits<Acc>::infinity(), Acc(0), at.o};
      for (isize c = 0; c < s.e; ++c) at.o[c] = Acc(0);
      if (s.m > 0) {
        const isize line = at.first_row[r / s.n] + (i + rule.origin) / rule.block_q;
        at.run.begin({p.q, b, head0, r, r + 1}, rule.scale);
        join_runs(at, keys, line, kernel::computed, rule.block_k,
                  rule.causal ? std::min(i + rule.offset + 1, s.m) : s.m, all);
        if (pooled) join_runs(at, pool, line, kernel::pooled, 1, rule.blocks(), all);
      }
      const Acc lse = normalise(all, s.e);
      simd::store_row<simd::native, Acc>(p.out.type, at.o, s.e, p.out.row(b, h, i));
      if (p.lse) *static_cast<Acc*>(p.lse.row(b, h, i)) = lse;
    }
  }

  void join_runs(row_slot& at, const kernel::key_set<Acc>& set, isize line, std::uint8_t wanted, isize block, isize end,
                 partial<Acc>& all) const {
    const range hull = at.hull[line + (wanted == kernel::computed ? 0 : plan_rows)];
    const std::uint8_t* fate = at.fate + line * rule.blocks();
    for (isize J = hull.first; J < hull.last;) {
      isize last = J;
      while (last < hull.last && fate[last] == wanted) ++last;
      const isize j0 = J * block, j1 = std::min(last * block, end);
      if (j0 < j1) {
        partial<Acc> one{Acc(0), Acc(0), at.part};
        at.run.run(set, j0, j1, &one.m, &one.l, one.o);
        one.m *= static_cast<Acc>(0.69314718055994530942);
        merge(all, one, s.e);
      }
      J = last > J ? last : J + 1;
    }
  }

  kernel::key_set<Acc> keys_of(const problem& p, isize b, isize g) const {
    kernel::key_set<Acc> keys;
    keys.k = rows_of(p.k, b, g), keys.v = rows_of(p.v, b, g), keys.count = s.m;
    keys.site = {b, 0, s.n, s.m, s.H, s.G};
    return keys;
  }

  /// Fills the fates and hulls of rows [r0, r1); true if any block is pooled.
  bool plan(planner& at, const problem& p, const kernel::block_summary<Acc>& summary, isize b, isize g, isize r0,
            isize r1) const {
    const isize blocks = rule.blocks();
    isize next = 0;
    at.choose.levels_ = summary.levels;
    for (isize hl = r0 / s.n; hl * s.n < r1; ++hl) {
      const isize i0 = std::max<isize>(r0 - hl * s.n, 0), i1 = std::min(r1 - hl * s.n, s.n), h = g * s.group() + hl;
      const isize b0 = (i0 + rule.origin) / rule.block_q, b1 = (i1 - 1 + rule.origin) / rule.block_q + 1;
      FOVEA_ASSERT(next + b1 - b0 <= plan_rows);
      at.first_row[hl] = next - b0;
      for (isize x = b0; x < b1; ++x) {
        at.list[next] = {h, x};
        if (!m.selects()) copy_given(b, h, x, at.fate + next * blocks);
        ++next;
      }
    }
    if (m.selects())
      at.choose.run(summary, {p.k.row(b, g, 0), p.k.type, p.k.row_stride}, p.q, b, at.list, next, at.fate);
    if (record != nullptr) note(at.list, next, at.fate, b);
    bool any = false;
    for (isize r = 0; r < next; ++r)
      for (const bool pool : {false, true}) {
        const std::uint8_t* fate = at.fate + r * blocks;
        range& hull = at.hull[r + (pool ? plan_rows : 0)];
        hull = {blocks, 0};
        for (isize J = 0; J < blocks; ++J)
          if (fate[J] == (pool ? kernel::pooled : kernel::computed)) hull = {std::min(hull.first, J), J + 1};
        any = any || (pool && !hull.empty());
      }
    return any;
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

  /// The pooled tokens of all blocks: mean key, mean value, log n_J, and the variance terms of rows [r0, r1) where asked for.
  kernel::key_set<Acc> pool_of(planner& at, const problem& p, const kernel::block_summary<Acc>& summary,
                               const kernel::key_set<Acc>& keys, isize head0, isize r0, isize r1) const {
    kernel::key_set<Acc> pool = keys;
    pool.k = dense_rows(summary.mean_k, s.d), pool.v = dense_rows(summary.mean_v, s.e);
    pool.count = rule.blocks(), pool.site.m = rule.blocks();
    for (isize J = 0; J < rule.blocks(); ++J)
      at.bias[J] = std::log(static_cast<Acc>(std::min(rule.block_k, s.m - J * rule.block_k)));
    pool.bias = at.bias;
    if (cumulant()) variances(at, p, summary, keys.site.b, head0, r0, r1);
    return pool;
  }

  /// term[J][r - r0] = scale^2 / 2 sum_c q_rc^2 var_c(k_J), nats.
  void variances(planner& at, const problem& p, const kernel::block_summary<Acc>& summary, isize b, isize head0,
                 isize r0, isize r1) const {
    const isize blocks = rule.blocks();
    const Acc half = static_cast<Acc>(rule.scale * rule.scale / 2);
    for (isize x = r0; x < r1; x += 64) {
      const isize count = std::min<isize>(64, r1 - x);
      for (isize y = 0; y < count; ++y) {
        const Acc* q =
            simd::row_as<simd::native, Acc>(p.q.type, p.q.row(b, head0 + (x + y) / s.n, (x + y) % s.n), s.d, at.row);
        for (isize c = 0; c < s.d; ++c) at.squares[c * 64 + y] = q[c] * q[c] * half;
      }
      Acc* term = at.term + x - r0;
      tile::gemm<simd::native, Acc>(blocks, count, s.d, summary.spread, s.d, 1, at.squares, 64, term, most, false);
      for (isize J = 0; J < blocks; ++J) {
        const Acc inverse = Acc(1) / static_cast<Acc>(std::min(rule.block_k, s.m - J * rule.block_k));
        for (isize y = 0; y < count; ++y) term[J * most + y] *= inverse;
      }
    }
  }

  // ---- entries ----

  struct shared {  // scratch of the whole call, before the slots: summaries of a call without a state, rows for folding
    hybrid_summaries<Acc> all;
    Acc* fold;
    shared(arena& memory, const hybrid_run& x, int threads) : all(hybrid_needs(x.m), x.m.block_k, x.s, x.s.m) {
      all.base = memory.take<std::byte>(all.any() ? static_cast<isize>(all.bytes(x.s.B * x.s.G)) : 0);
      fold = memory.take<Acc>(std::max(x.s.d, x.s.e) * threads);
    }
  };
  static std::size_t workspace_size(const hybrid_attention& m, const shape& s, int threads) {
    const hybrid_run run(m, s, 0);
    arena measure;
    shared(measure, run, threads);
    measure.take<std::byte>(static_cast<isize>(run.slot_bytes()) * threads);
    return measure.bytes();
  }
  static void prefill(const hybrid_attention& m, exec_ref exec, const problem& p, arena scratch,
                      std::uint8_t* record = nullptr) {
    hybrid_run run(m, p.shape(), 0);
    run.record = record;
    const shared at(scratch, run, exec.concurrency());
    at.all.append(exec, p.k, p.v, 0, at.fold);
    run.attend(exec, p, scratch,
               [&](isize index) { return at.all.any() ? at.all.head(index) : kernel::block_summary<Acc>{}; });
  }
  static void prefill(const hybrid_attention& m, exec_ref exec, const problem& p, state& st, arena scratch) {
    const isize past = st.tokens();
    const auto all = hybrid_summaries_of<Acc>(m, st);
    kv_cache::append(p, st);
    problem whole = p;
    whole.k = kv_cache::keys(st, st.tokens()), whole.v = kv_cache::values(st, st.tokens());
    const hybrid_run run(m, whole.shape(), past);
    const shared at(scratch, run, exec.concurrency());
    all.append(exec, whole.k, whole.v, past, at.fold);
    run.attend(exec, whole, scratch,
               [&](isize index) { return all.any() ? all.head(index) : kernel::block_summary<Acc>{}; });
  }
};

}  // namespace detail

inline void hybrid_attention::check(const problem& p) const {
  detail::check_problem(p);
  detail::check_hybrid_options(*this);
  if (select == block_selector::given) detail::check_given_blocks(*this, p.shape(), p.q.length, p.k.length, true);
}

inline std::size_t hybrid_attention::workspace_size(const shape& s, int threads) const {
  return s.type == dtype::f64 ? detail::hybrid_run<double>::workspace_size(*this, s, threads)
                              : detail::hybrid_run<float>::workspace_size(*this, s, threads);
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

#include <fovea/hybrid/certificate.hpp>
#include <fovea/hybrid/cost.hpp>
#include <fovea/hybrid/recall.hpp>
#include <fovea/hybrid/step.hpp>
