// SPDX-License-Identifier: MIT
#pragma once
/// @file  Cascade: sequences that begin with the same tokens attend to them together, and to their own tokens apart; merged by LSE.
///
///   cascade(exec, m, q, prefix, kv, out [, options])        as prefill(exec, m, q, prefix + kv[s], out): softmax/stores.hpp
///   (o, lse) = merge((o, lse) over prefix, (o, lse) over kv[s])                              core/partial.hpp, merge_normalised
///
/// Contract   sequence s is the tokens of `prefix`, then those of kv[s]; rows are the last of them, positions count from the prefix's
///            start. Every row sees all of the prefix (a causal mask; no window that cuts it). The prefix is one problem for all rows where
///            the score does not depend on positions (none, softcap) and the rows lie as [1, H, total, d]: cu_q, one row each, or heads
///            inside tokens; else it is one problem a sequence, right but not shared. Bits depend on which sequences come together.
/// Cost       keys and values of the prefix are read once for all sequences, not once for each; two f32 outputs a row of scratch.
/// Recipe     a tree of prefixes: call prefill once a level with lse, over the level's keys and without a mask, then merge_normalised
///            in any order; sinks join at one level only.
/// Source     Ye et al., Cascade Inference (FlashInfer); Juravsky et al., Hydragen, arXiv 2402.05099.

#include <fovea/softmax/stores.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

struct cascade_call {
  sequence_call own;
  const kv_sequence& prefix;

  isize total() const { return own.q.batch * own.q.length; }
  isize first_row(isize s) const { return own.packed() ? own.first_row(s) : s * own.q.length; }
  isize tokens(isize s) const { return prefix.length + own.kv[static_cast<std::size_t>(s)].length; }
  /// May all rows be one view [1, H, total, d]?
  bool one_view() const {
    const tensor_ref& q = own.q;
    return q.batch == 1 || q.length == 1 || q.batch_stride == q.length * q.row_stride;
  }
  bool shared(const softmax_attention& m) const { return m.score.positionless() && one_view(); }

  void check(const softmax_attention& m) const {
    sequence_call plain = own;
    plain.options.positions = {};
    require(m.skip == 0, "skip is ", m.skip, "; a cascade merges parts and skips nothing (skip = 0)");
    softmax_attention open = m;
    open.mask = no_mask{}, open.score = {}, open.turn = nullptr;
    plain.check(open);
    const isize heads = own.kv.empty() ? prefix.heads : own.kv[0].heads;
    require(prefix.heads == heads && prefix.dropped == 0, "the prefix has ", prefix.heads, " KV heads and has dropped ",
            prefix.dropped, " tokens; wanted ", heads, " heads, as the sequences have, and all tokens");
    require(prefix.d == own.q.width && prefix.e == own.out.width, "the prefix has keys ", prefix.d, " and values ",
            prefix.e, " wide; q and out are ", own.q.width, " and ", own.out.width);
    check_sequence(open, own.count(), prefix, own.q, own.out, own.options.lse, 0);
    require(own.options.positions.empty() ||
                (m.turn != nullptr && static_cast<isize>(own.options.positions.size()) == total()),
            "positions holds ", own.options.positions.size(), " numbers; wanted one for each of ", total(),
            " rows of q, and softmax_attention::turn");
    for (isize s = 0; s < own.count(); ++s) {
      const kv_sequence& x = own.kv[static_cast<std::size_t>(s)];
      const isize n = own.rows(s);
      require(x.dropped == 0, "sequence ", s, " has dropped ", x.dropped, " tokens; a cascade wants all of them");
      m.check_items({own.count(), own.q.heads, heads, n, tokens(s), x.d, x.e, own.q.type}, s, s + 1);
      if (n == 0) continue;
      if (m.turn != nullptr) check_turn(*m.turn, x.d, own.problem_of(s).positions, n, tokens(s) - n, n);
      for (isize h = 0; h < own.q.heads && prefix.length > 0; ++h)
        require(m.mask.tile({s, h, n, tokens(s), own.q.heads, heads, own.count()}, 0, n, 0, prefix.length) ==
                    tile_kind::full,
                "sequence ", s, ": the mask hides part of the prefix from a row; a cascade wants it seen as a whole");
    }
  }
};

template <class Acc>
class cascade_run {
 public:
  cascade_run(arena& memory, const softmax_attention& m, const cascade_call& call)
      : call_(call), shared_(call.shared(m)) {
    const isize rows = call.total(), H = call.own.q.heads, e = call.own.out.width;
    const auto take = [&](isize width) {
      return tensor_mut(memory.take<Acc>(H * rows * width), dtype_of<Acc>, 1, H, rows, width, H * rows * width,
                        rows * width, width);
    };
    for (level& x : levels_) x.out = take(e), x.lse = take(1);
    positions_ = memory.take<std::int32_t>(rows);
  }

  void run(const softmax_attention& m, exec_ref exec, arena scratch) {
    const isize count = call_.own.count(), H = call_.own.q.heads, rows = call_.total(), some = 64;
    for (isize s = 0; s < count; ++s)
      for (isize i = 0, n = call_.own.rows(s); i < n; ++i) {
        const isize r = call_.first_row(s) + i;
        positions_[r] = call_.own.options.positions.empty() ? static_cast<std::int32_t>(call_.tokens(s) - n + i)
                                                            : call_.own.options.positions[static_cast<std::size_t>(r)];
      }
    softmax_attention over_prefix = m;
    over_prefix.mask = no_mask{}, over_prefix.sinks = nullptr;
    with_prefix([&](const problem_list& list) { attend<Acc>(over_prefix, exec, list, scratch); });
    with_own([&](const problem_list& list) { attend<Acc>(m, exec, list, scratch); });
    exec.for_tasks(H * ceil_div(rows, some), [&](isize task, isize) {
      const isize h = task % H, first = task / H * some;
      for (isize r = first; r < rows && r < first + some; ++r) join(h, r);
    });
  }
  std::size_t workspace(const softmax_attention& m, int threads) const {
    std::size_t most = 0;
    const auto measure = [&](const problem_list& list) {
      const std::size_t need = softmax_workspace<Acc>(m, list, threads);
      most = need > most ? need : most;
    };
    with_prefix(measure), with_own(measure);
    return most;
  }

 private:
  struct level {
    tensor_mut out, lse;
  };
  /// Rows of sequence s in a level's outputs.
  void to_level(sequence_problem& p, const level& x, isize s) const {
    p.out = x.out.slice(call_.first_row(s), call_.own.rows(s)),
    p.lse = x.lse.slice(call_.first_row(s), call_.own.rows(s));
  }
  template <class F>
  void with_prefix(F&& f) const {
    const auto all = [this](isize) {
      const tensor_ref& q = call_.own.q;
      sequence_problem p;
      p.q = q;
      if (q.batch > 1) p.q.row_stride = q.length == 1 ? q.batch_stride : q.row_stride;
      p.q.batch = 1, p.q.length = call_.total();
      p.out = levels_[0].out, p.lse = levels_[0].lse, p.kv = call_.prefix, p.positions = positions_;
      return p;
    };
    const auto each = [this](isize s) {
      sequence_problem p = call_.own.problem_of(s);
      to_level(p, levels_[0], s);
      p.kv = call_.prefix, p.positions = positions_ + call_.first_row(s);
      p.all_rows = call_.own.rows(s), p.all_tokens = call_.tokens(s);
      return p;
    };
    if (shared_)
      f(problem_list(1, all));
    else
      f(problem_list(call_.own.count(), each));
  }
  template <class F>
  void with_own(F&& f) const {
    const auto each = [this](isize s) {
      sequence_problem p = call_.own.problem_of(s);
      to_level(p, levels_[1], s);
      p.kv.kept = 0, p.kv.dropped = call_.prefix.length, p.positions = positions_ + call_.first_row(s);
      return p;
    };
    f(problem_list(call_.own.count(), each));
  }
  void join(isize h, isize r) const noexcept {
    const isize b = call_.own.packed() ? 0 : r / call_.own.q.length,
                i = call_.own.packed() ? r : r % call_.own.q.length;
    const auto row = [&](const tensor_mut& t) { return static_cast<Acc*>(t.row(0, h, r)); };
    Acc* o = row(levels_[0].out);
    Acc& lse = *row(levels_[0].lse);
    const isize e = levels_[0].out.width;
    merge_normalised(o, lse, row(levels_[1].out), *row(levels_[1].lse), e);
    simd::store_row<simd::native, Acc>(call_.own.out.type, o, e, call_.own.out.row(b, h, i));
    if (call_.own.options.lse) *static_cast<Acc*>(call_.own.options.lse.row(b, h, i)) = lse;
  }

  const cascade_call& call_;
  bool shared_;
  level levels_[2];
  std::int32_t* positions_;
};

template <class Acc>
std::size_t cascade_bytes(const softmax_attention& m, const cascade_call& call, int threads) {
  arena measure;
  const cascade_run<Acc> run(measure, m, call);
  return measure.bytes() + run.workspace(m, threads);
}

}  // namespace detail

/// Bytes of scratch of one call; `out` as of the call.
inline std::size_t cascade_workspace_size(const softmax_attention& m, const tensor_ref& q, const kv_sequence& prefix,
                                          std::span<const kv_sequence> kv, const tensor_mut& out, int threads,
                                          std::span<const std::int32_t> cu_q = {}) {
  const detail::cascade_call call{{q, kv, out, {.cu_q = cu_q}}, prefix};
  return q.type == dtype::f64 ? detail::cascade_bytes<double>(m, call, threads)
                              : detail::cascade_bytes<float>(m, call, threads);
}

inline void cascade(exec_ref exec, const softmax_attention& m, const tensor_ref& q, const kv_sequence& prefix,
                    std::span<const kv_sequence> kv, const tensor_mut& out, const sequence_options& options = {}) {
  const detail::cascade_call call{{q, kv, out, options}, prefix};
  call.check(m);
  if (q.heads == 0 || q.length == 0 || kv.empty()) return;
  buffer own;
  const auto run = [&]<class Acc>(Acc) {
    const std::size_t need = detail::cascade_bytes<Acc>(m, call, exec.concurrency());
    arena memory = detail::scratch_of(need, options.workspace, own);
    detail::cascade_run<Acc>(memory, m, call).run(m, exec, memory);
  };
  if (q.type == dtype::f64)
    run(double{});
  else
    run(float{});
}

}  // namespace FOVEA_ABI
}  // namespace fovea
