// SPDX-License-Identifier: MIT
#pragma once
/// @file  Contracts of the calls that bidirectional mechanisms offer instead of a causal state, and of padded batches.
///
///   absorb(exec, m, k, v, state)      tokens join a state of constant size
///   attend(exec, m, q, out, state)    every row sees all that was absorbed so far
///
/// Contract   the state's own shape fixes B, H, G, d, e; lengths[b] in [0, m]: the keys of batch item b, padding behind them.

#include <cstdint>
#include <span>

#include <fovea/core/state.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline void check_lengths(std::span<const std::int32_t> lengths, isize batch, isize m) {
  if (lengths.empty()) return;
  require(static_cast<isize>(lengths.size()) == batch, "lengths has ", lengths.size(),
          " entries; wanted one for each of ", batch, " batch items");
  for (std::size_t b = 0; b < lengths.size(); ++b)
    require(lengths[b] >= 0 && lengths[b] <= m, "lengths[", b, "] is ", lengths[b], "; wanted 0 to m = ", m);
}

inline void check_absorbed(const char* mechanism, std::uint64_t tag, const tensor_ref& k, const tensor_ref& v,
                           const state& s) {
  check_tensor("k", k), check_tensor("v", v);
  require(k.batch == v.batch && k.heads == v.heads && k.length == v.length && k.type == v.type, "k is ", describe(k),
          " and v is ", describe(v), "; their batch, heads, length and type must be equal");
  s.check(tag, {k.batch, s.sizes().H, k.heads, k.length, k.length, k.width, v.width, k.type}, mechanism);
}

inline void check_asked(const char* mechanism, std::uint64_t tag, const tensor_ref& q, const tensor_mut& out,
                        const tensor_mut& lse, const state& s) {
  check_tensor("q", q), check_tensor("out", out);
  s.check(tag, {q.batch, q.heads, s.sizes().G, q.length, 0, q.width, out.width, q.type}, mechanism);
  require(out.batch == q.batch && out.heads == q.heads && out.length == q.length, "out is ", describe(out),
          "; wanted [", q.batch, ", ", q.heads, ", ", q.length, ", ", s.sizes().e, "]");
  const bool wide = q.type == dtype::f64;
  require((out.type == dtype::f64) == wide, "out is ", name_of(out.type), " and q is ", name_of(q.type),
          "; f64 goes with f64 only");
  check_apart("out", out, "q", q);
  if (!lse) return;
  check_tensor("lse", lse);
  require(lse.batch == q.batch && lse.heads == q.heads && lse.length == q.length && lse.width == 1 &&
              lse.type == (wide ? dtype::f64 : dtype::f32),
          "lse is ", describe(lse), "; wanted [", q.batch, ", ", q.heads, ", ", q.length,
          ", 1] f32, or f64 when q is f64");
  check_apart("lse", lse, "q", q), check_apart("lse", lse, "out", out);
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
