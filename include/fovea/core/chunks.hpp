// SPDX-License-Identifier: MIT
#pragma once
/// @file  One long sequence cut along its length into chunks that run in parallel, for mechanisms whose states merge.
///
///   prefill_chunks(exec, m, q, k, v, out, state, chunk [, options])        q, k, v: the tokens after those in the state
///
///   1   A_c = the state of chunk c's keys alone             tasks: chunks 1 to last - 1; chunk 0 whole, from the given state
///   2   S_c = merge(S_{c-1}, A_c)                           in order; S_c is the state behind chunk c
///   3   outputs of chunk c from S_{c-1}                     tasks: chunks from 1 on
///
/// Contract   as prefill(exec, m, ..., state). The cut depends on `chunk` alone, never on the threads: the same bits for any number of
///            them, and those of prefill to rounding (merge adds sums in another order). Mechanisms: linear_attention with rules none,
///            decay, gla and a map without positions; dijiang_attention without gains. Delta rules have no merge and are refused.
/// Cost       keys of the inner chunks go into a state twice, so the work is up to 1.5 times prefill's (features of keys are made
///            twice, too): for more threads than there are heads, where cutting columns no longer helps. One thread: use prefill.
/// Memory     a state for each chunk and one scratch a thread, allocated here; options.workspace is not used.
/// Errors     contract_error before anything is written.

#include <algorithm>
#include <cstring>
#include <vector>

#include <fovea/core/packed.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

template <class M>
  requires(mergeable_mechanism<M>&& state_by_item<M>)
void prefill_chunks(exec_ref exec, const M& m, tensor_ref q, tensor_ref k, tensor_ref v, tensor_mut out, state& s,
                    isize chunk, const call_options& options = {}) {
  require(chunk >= 1, "chunk is ", chunk, "; wanted at least one token");
  const problem whole = detail::problem_of(m, q, k, v, out, options);
  require(q.length == k.length, "q has ", q.length, " tokens and k has ", k.length,
          "; a call with a state takes the same new tokens in both");
  m.check(whole, s);
  if (detail::nothing_to_do(whole)) return;

  const isize chunks = ceil_div(q.length, chunk);
  std::vector<state> after(static_cast<std::size_t>(chunks - 1));
  for (state& x : after) x = m.make_state(s.sizes());
  if (chunks > 1) {  // refuses what has no merge; the empty state is its identity
    m.merge(after[0], m.make_state(s.sizes()));
    after[0] = s;
  }
  shape sizes = whole.shape();
  sizes.n = std::min(chunk, q.length), sizes.m += s.tokens();
  const std::size_t need = round_up(detail::state_workspace(m, sizes, 1) + alignment, alignment);
  const isize slots = std::min<isize>(exec.concurrency(), chunks);
  const buffer memory(need * static_cast<std::size_t>(slots));

  const auto run = [&](isize c, bool answers, state& from, isize slot) {
    const isize first = c * chunk, count = std::min(chunk, q.length - first);
    const auto rows = [&](const auto& t, isize n) { return t ? t.slice(first, n) : t; };
    problem p = whole;
    p.k = rows(p.k, count), p.v = rows(p.v, count);
    p.q = rows(p.q, answers ? count : 0), p.out = rows(p.out, answers ? count : 0);
    p.gates = {rows(p.gates.log_decay, count), rows(p.gates.beta, count), rows(p.gates.erase, count),
               rows(p.gates.write, count)};
    m.prefill(serial, p, from, arena(memory.span().subspan(static_cast<std::size_t>(slot) * need, need)));
  };
  const auto behind = [&](isize c) -> state& { return c + 1 < chunks ? after[static_cast<std::size_t>(c)] : s; };
  exec.for_tasks(std::max<isize>(chunks - 1, 1), [&](isize c, isize slot) { run(c, c == 0, behind(c), slot); });
  for (isize c = 1; c + 1 < chunks; ++c) {
    state sum = behind(c - 1);
    m.merge(sum, behind(c));
    behind(c) = std::move(sum);
  }
  exec.for_tasks(chunks - 1, [&](isize c, isize slot) { run(c + 1, true, behind(c), slot); });
  if (chunks == 1) return;
  std::memcpy(s.as<void>(), after.back().as<void>(), s.bytes());  // the memory may be the caller's
  s.set_tokens(after.back().tokens());
}

}  // namespace FOVEA_ABI
}  // namespace fovea
