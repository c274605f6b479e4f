// SPDX-License-Identifier: MIT
#pragma once
/// @file  Sequences of different lengths, one behind the other in one tensor, for any mechanism; states go on with them.
///
///   prefill_packed(exec, m, q, k, v, out, cu [, options])          sequence s: rows cu[s] .. cu[s + 1] of q, k, v [1, H, total, .]
///   prefill_packed(exec, m, q, k, v, out, cu, state [, options])   the same, after what item s of the state has seen
///
/// Contract   cu starts at 0, never falls and ends at the rows of q; k and v have as many. Each sequence is a problem of its own: bits are
///            those of a call for it alone, in whatever company. lse, gates, positions and skipped of the options are packed as q and k are. The state was
///            made for B = sequences by a mechanism whose items lie one behind the other (`state_by_item`: linear, dijiang); an empty
///            sequence leaves its item alone. tokens() rises by the longest. softmax_attention has the mask `packed`, and stores, besides.
/// Errors     contract_error before anything is written. Memory: allocated here, once, if options.workspace is not given.
/// Cost       sequences are tasks where they are at least as many as threads; else they come one after the other, each on all threads.

#include <fovea/core/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// The state of B items is B states of one item, one behind the other.
template <class M>
concept state_by_item = streaming_mechanism<M> && requires {
  requires M::items_apart;
};

namespace detail {

class packed_call {
 public:
  packed_call(const problem& whole, std::span<const std::int32_t> cu) : whole_(whole), cu_(cu) {
    require(whole.q.batch == 1 && whole.k.batch == 1 && whole.v.batch == 1 && whole.out.batch == 1,
            "q, k, v, out have batches of ", whole.q.batch, ", ", whole.k.batch, ", ", whole.v.batch, ", ",
            whole.out.batch, "; packed sequences lie in tensors [1, heads, total, width]");
    require(!cu.empty() && cu[0] == 0, "cu ", cu.empty() ? "is empty" : "does not start at 0",
            "; wanted the cumulative lengths 0, n_0, n_0 + n_1, ...");
    for (std::size_t s = 1; s < cu.size(); ++s)
      require(cu[s] >= cu[s - 1], "cu[", s, "] is ", cu[s], " after ", cu[s - 1], "; cumulative lengths do not fall");
    const isize total = cu.back();
    require(whole.q.length == total && whole.k.length == total && whole.v.length == total &&
                whole.out.length == total && (!whole.lse || whole.lse.length == total),
            "q, k, v, out have ", whole.q.length, ", ", whole.k.length, ", ", whole.v.length, ", ", whole.out.length,
            " rows and cu ends at ", total, "; they must be equal");
    const auto whole_rows = [&](const char* name, const auto& t) {
      require(!t || t.length == total, name, " has ", t.length, " rows and cu ends at ", total, "; they must be equal");
    };
    whole_rows("log_decay (g)", whole.gates.log_decay), whole_rows("beta", whole.gates.beta);
    whole_rows("erase (b)", whole.gates.erase), whole_rows("write (w)", whole.gates.write);
    whole_rows("skipped", whole.skipped);
    // A part sees its own rows only: the outputs of one sequence must not lie in the inputs of another.
    const auto apart = [&](const char* name, const tensor_mut& t) {
      check_apart(name, t, "q", whole.q), check_apart(name, t, "k", whole.k), check_apart(name, t, "v", whole.v);
    };
    apart("out", whole.out), apart("lse", whole.lse), apart("skipped", whole.skipped);
  }
  isize count() const { return static_cast<isize>(cu_.size()) - 1; }
  isize length(isize s) const { return cu_[static_cast<std::size_t>(s) + 1] - cu_[static_cast<std::size_t>(s)]; }
  isize longest() const {
    isize most = 0;
    for (isize s = 0; s < count(); ++s) most = length(s) > most ? length(s) : most;
    return most;
  }
  problem part(isize s) const {
    const isize first = cu_[static_cast<std::size_t>(s)], n = length(s);
    const auto rows = [&](const auto& t) { return t ? t.slice(first, n) : t; };
    problem p = whole_;
    p.q = rows(p.q), p.k = rows(p.k), p.v = rows(p.v), p.out = rows(p.out), p.lse = rows(p.lse);
    p.skipped = rows(p.skipped);
    if (p.positions != nullptr) p.positions += first;
    p.gates = {rows(p.gates.log_decay), rows(p.gates.beta), rows(p.gates.erase), rows(p.gates.write)};
    return p;
  }

  /// one(exec, p, s, scratch) for every sequence that has rows; `need(p, threads)` bytes each.
  template <class Need, class One>
  void run(exec_ref exec, std::span<std::byte> workspace, Need&& need, One&& one) const {
    const int threads = exec.concurrency();
    const bool apart = count() >= threads;
    std::size_t most = 0;
    for (isize s = 0; s < count(); ++s)
      if (length(s) > 0) most = std::max(most, round_up(need(part(s), apart ? 1 : threads) + alignment, alignment));
    const auto places = static_cast<std::size_t>(apart ? threads : 1);
    buffer own;
    arena memory = scratch_of(most * places, workspace, own);
    std::byte* base = memory.take<std::byte>(static_cast<isize>(most * places));
    const auto at = [&](isize slot) {
      return arena(std::span<std::byte>(base + static_cast<std::size_t>(slot) * most, most));
    };
    if (apart)
      exec.for_tasks(count(), [&](isize s, isize slot) {
        if (length(s) > 0) one(exec_ref(serial), part(s), s, at(slot));
      });
    else
      for (isize s = 0; s < count(); ++s)
        if (length(s) > 0) one(exec, part(s), s, at(0));
  }

 private:
  problem whole_;
  std::span<const std::int32_t> cu_;
};

}  // namespace detail

template <mechanism M>
void prefill_packed(exec_ref exec, const M& m, tensor_ref q, tensor_ref k, tensor_ref v, tensor_mut out,
                    std::span<const std::int32_t> cu, const call_options& options = {}) {
  const detail::packed_call call(detail::problem_of(m, q, k, v, out, options), cu);
  for (isize s = 0; s < call.count(); ++s) m.check(call.part(s));
  call.run(
      exec, options.workspace, [&](const problem& p, int threads) { return m.workspace_size(p.shape(), threads); },
      [&](exec_ref with, const problem& p, isize, arena scratch) { m.prefill(with, p, scratch); });
}

template <state_by_item M>
void prefill_packed(exec_ref exec, const M& m, tensor_ref q, tensor_ref k, tensor_ref v, tensor_mut out,
                    std::span<const std::int32_t> cu, state& s, const call_options& options = {}) {
  const detail::packed_call call(detail::problem_of(m, q, k, v, out, options), cu);
  require(s.sizes().B == call.count(), "the state was made for ", s.sizes().B, " items and cu names ", call.count(),
          " sequences; make_state with B = sequences");
  shape one = s.sizes();
  one.B = 1;
  const std::size_t bytes = call.count() > 0 ? s.bytes() / static_cast<std::size_t>(call.count()) : 0;
  const auto item = [&](isize i) {
    return state::over(s.tag(), one, s.tokens(), {s.as<std::byte>() + static_cast<std::size_t>(i) * bytes, bytes});
  };
  for (isize i = 0; i < call.count(); ++i) m.check(call.part(i), item(i));
  if constexpr (requires { m.positional(); })
    require(!m.positional(),
            "the mechanism depends on positions, and the sequences of a packed call stand at different "
            "ones; use a state for each");
  call.run(
      exec, options.workspace,
      [&](const problem& p, int threads) {
        shape z = p.shape();
        z.m += s.tokens();
        return detail::state_workspace(m, z, threads);
      },
      [&](exec_ref with, const problem& p, isize i, arena scratch) {
        state own = item(i);
        m.prefill(with, p, own, scratch);
      });
  s.set_tokens(s.tokens() + call.longest());
}

}  // namespace FOVEA_ABI
}  // namespace fovea
