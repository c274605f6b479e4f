// SPDX-License-Identifier: MIT
#pragma once
/// @file  linformer_attention from a configuration: projection, slots, scale, causal, block; tensors E, F, wk, wv, lengths.
///
/// Contract   E and F are [m_max, slots], shared by the heads, or [G, m_max, slots]; wk and wv are [taps]; lengths is [B] (i32 or i64).

#include <vector>

#include <fovea/core/any.hpp>
#include <fovea/core/configure_lengths.hpp>
#include <fovea/linformer.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// What the views of one configured mechanism point to.
struct linformer_weights {
  std::vector<float> E, F, wk, wv;
  std::vector<std::int32_t> lengths;

  static view<const float> matrix(const char* name, const array* a, std::vector<float>& memory) {
    if (a == nullptr) return {};
    require(a->rank() == 2 || a->rank() == 3, "tensor ", name, " is ", a->describe(),
            "; wanted [positions, slots] or [G, positions, slots]");
    require(is_float(a->type()) && a->size() > 0, "tensor ", name, " is ", a->describe(),
            "; wanted numbers of a floating-point type");
    memory = a->floats();
    return bhnd<const float>(memory.data(), 1, a->rank() == 3 ? a->dim(0) : 1, a->dim(-2), a->dim(-1));
  }
  static std::span<const float> taps(const char* name, const array* a, std::vector<float>& memory) {
    if (a == nullptr) return {};
    require(a->rank() == 1 && is_float(a->type()) && a->size() > 0, "tensor ", name, " is ", a->describe(),
            "; wanted [taps] of a floating-point type");
    memory = a->floats();
    return memory;
  }
};

}  // namespace detail

inline any_attention configure_linformer(configuration_reader& r) {
  using kind = sequence_projection;
  auto weights = std::make_shared<detail::linformer_weights>();
  linformer_attention m;
  m.projection = r.choice<kind>(
      "projection", {{"linear", kind::linear}, {"mean", kind::mean}, {"max", kind::max}, {"conv", kind::conv}},
      kind::linear);
  m.slots = r.integer("slots", 0);
  m.scale = r.number("scale");
  m.causal = r.flag("causal", false);
  m.block = r.integer("block", 0);
  m.E = detail::linformer_weights::matrix("E", r.tensor("E"), weights->E);
  m.F = detail::linformer_weights::matrix("F", r.tensor("F"), weights->F);
  m.wk = detail::linformer_weights::taps("wk", r.tensor("wk"), weights->wk);
  m.wv = detail::linformer_weights::taps("wv", r.tensor("wv"), weights->wv);
  weights->lengths = detail::lengths_of(r);
  m.lengths = weights->lengths;
  m.check_settings();
  return any_attention::hold(m, weights);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
