// SPDX-License-Identifier: MIT
#pragma once
/// @file  DiJiang's diagonal of signs merged into the model's query and key projections.
///
///   phi(q) = D exp(T C S q),  q = P h + c      S q = (S P) h + S c:  the transform then takes the merged rows as they are
///
///   merged_projection q = merge_map(m, P, c), k = merge_map(m, Pk, ck);     dijiang_attention bare = without_signs(m);
///
/// Contract   one block (features = head_dim): with more, each block has signs of its own and shares the row. T stands behind the transform
///            and D behind the exponential: neither is linear in q. Not where RoPE or a norm stands between projection and map.
/// Numerics   a sign costs no rounding: the same bits, if the model's layer gives them.

#include <fovea/dijiang/mechanism.hpp>
#include <fovea/feature/merge_map.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// P [1, heads, d, model], c [heads d] or null.
inline merged_projection merge_map(const dijiang_attention& m, const view<const float>& P, const float* c = nullptr) {
  require(m.tables != nullptr && m.tables->blocks == 1, "merge_map: this dijiang has ",
          m.tables == nullptr ? isize{0} : m.tables->blocks, " blocks; signs are merged where there is one");
  const dijiang_tables& t = *m.tables;
  require(P.data != nullptr && P.batch == 1 && P.length == t.d && P.width >= 1, "merge_map: the projection is [",
          P.batch, ", ", P.heads, ", ", P.length, ", ", P.width, "]; wanted [1, heads, ", t.d, ", model]");
  merged_projection out{P.heads, t.d, P.width, {}, {}};
  for (isize h = 0; h < P.heads; ++h)
    for (isize x = 0; x < t.d; ++x) {
      const float sign = t.signs[static_cast<std::size_t>(x)];
      for (isize i = 0; i < P.width; ++i) out.weight.push_back(sign * P.row(0, h, x)[i]);
      if (c != nullptr) out.bias.push_back(sign * c[h * t.d + x]);
    }
  return out;
}

/// The same mechanism for rows whose signs the projection has taken.
inline dijiang_attention without_signs(const dijiang_attention& m) {
  require(m.tables != nullptr && m.tables->blocks == 1, "without_signs: wanted a dijiang of one block");
  const dijiang_tables& t = *m.tables;
  dijiang_options o{
      .head_dim = t.d, .features = t.r, .form = t.form, .is_causal = m.is_causal, .normalise = m.normalise};
  o.t = t.t, o.D = t.D, o.gamma = t.gamma, o.log_d1 = t.log_d1, o.log_d2 = t.log_d2, o.positions = t.positions;
  o.signs.assign(static_cast<std::size_t>(t.r), 1.0F);
  return dijiang_attention::make(o);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
