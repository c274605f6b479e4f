// SPDX-License-Identifier: MIT
#pragma once
/// @file  A contiguous KV cache inside a `state`, in the storage type: one block of core/kv_layout.hpp with B G heads.

#include <cstring>

#include <fovea/core/kv_layout.hpp>
#include <fovea/core/state.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kv_cache {

inline kv_layout layout(const shape& s) { return {{.heads = s.B * s.G, .d = s.d, .e = s.e, .type = s.type}, s.m}; }
inline std::size_t bytes(const shape& s) { return layout(s).bytes(); }

/// The first `tokens` keys (values) as views into the state.
inline tensor_mut keys(const state& s, isize tokens) {
  const shape& z = s.sizes();
  return {s.as<void>(), z.type, z.B, z.G, tokens, z.d, z.G * z.m * z.d, z.m * z.d, z.d};
}
inline tensor_mut values(const state& s, isize tokens) {
  const shape& z = s.sizes();
  return {
      layout(z).value(s.as<std::byte>(), 0, 0).data, z.type, z.B, z.G, tokens, z.e, z.G * z.m * z.e, z.m * z.e, z.e};
}

inline void check_room(const problem& p, const state& s) {
  require(p.q.type == s.sizes().type, "the state stores ", name_of(s.sizes().type), " and the call brings ",
          name_of(p.q.type));
  // A mechanism may keep more behind its keys and values (and then checks that itself).
  require(s.bytes() >= bytes(s.sizes()), "the state holds ", s.bytes(), " bytes; its sizes ask for ", bytes(s.sizes()));
  require(s.tokens() + p.k.length <= s.sizes().m, "the state holds ", s.tokens(), " of at most ", s.sizes().m,
          " tokens; ", p.k.length, " more do not fit (make_state with a larger shape.m)");
}

/// Copies the call's k and v behind the tokens held, and counts them.
inline void append(const problem& p, state& s) {
  const isize at = s.tokens(), all = at + p.k.length;
  const tensor_mut k = keys(s, all), v = values(s, all);
  const std::size_t size = size_of(p.k.type);
  for (isize b = 0; b < p.k.batch; ++b)
    for (isize g = 0; g < p.k.heads; ++g)
      for (isize j = 0; j < p.k.length; ++j) {
        std::memcpy(k.row(b, g, at + j), p.k.row(b, g, j), static_cast<std::size_t>(p.k.width) * size);
        std::memcpy(v.row(b, g, at + j), p.v.row(b, g, j), static_cast<std::size_t>(p.v.width) * size);
      }
  s.set_tokens(all);
}

/// Forgets all but the first `tokens` (rejected draft tokens).
inline void truncate(state& s, isize tokens) {
  require(tokens >= 0 && tokens <= s.tokens(), "truncate to ", tokens, " tokens; the state holds ", s.tokens());
  s.set_tokens(tokens);
}

}  // namespace kv_cache
}  // namespace FOVEA_ABI
}  // namespace fovea
