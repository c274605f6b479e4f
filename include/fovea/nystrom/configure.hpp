// SPDX-License-Identifier: MIT
#pragma once
/// @file  nystrom_attention from a configuration: landmarks, iterations, scale; tensors skip, lengths, query_lengths.
///
/// Contract   skip is [taps], for all heads, or [H, taps]; lengths and query_lengths are [B] (i32 or i64).

#include <vector>

#include <fovea/core/any.hpp>
#include <fovea/core/configure_lengths.hpp>
#include <fovea/nystrom.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

namespace detail {
struct nystrom_weights {
  std::vector<float> skip;
  std::vector<std::int32_t> lengths, query_lengths;
};
}  // namespace detail

inline any_attention configure_nystrom(configuration_reader& r) {
  auto weights = std::make_shared<detail::nystrom_weights>();
  nystrom_attention m;
  m.landmarks = r.integer("landmarks", 64);
  m.iterations = r.integer("iterations", 6);
  m.scale = r.number("scale");
  if (const array* a = r.tensor("skip")) {
    require((a->rank() == 1 || a->rank() == 2) && is_float(a->type()) && a->size() > 0, "tensor skip is ",
            a->describe(), "; wanted [taps] or [H, taps] of a floating-point type");
    weights->skip = a->floats();
    m.skip = bhnd<const float>(weights->skip.data(), 1, a->rank() == 2 ? a->dim(0) : 1, 1, a->dim(-1));
  }
  weights->lengths = detail::lengths_of(r), weights->query_lengths = detail::lengths_of(r, "query_lengths");
  m.lengths = weights->lengths, m.query_lengths = weights->query_lengths;
  m.check_settings();
  return any_attention::hold(m, weights);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
