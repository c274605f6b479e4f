// SPDX-License-Identifier: MIT
#pragma once
/// @file  hybrid_attention from a configuration.
///
/// Keys       block_q, block_k, causal, align ("bottom_right" | "top_left" | "none"), scale,
///            pattern ("local" | "strided" | "sparse" | "fixed") with stride,
///            or select ("given" | "mean" | "variance" | "bound" | "int8" | "int4" | "exact") with top (blocks) or budget (share of the
///            candidate blocks) or top_p (share of the estimated mass), at_least (keys), first and window (keys always computed), keep_small
///            (share of the keys, those of smallest |v|, kept exact), share_group (flag: one selection for a query group),
///            refresh (steps of a selection),
///            target (relative error of a row; prefill without a state), target_absolute, target_estimated (flag: an estimate, not the bound),
///            compensate ("none" | "zeroth" | "cumulant" | "sampled" | "linear"), parts (pooled tokens a block), variance_share and variance_cap
///            (nats; of the cumulant), seed (of the sampled keys), map and its keys (feature/configure.hpp; of the linear rest, default elu1),
///            precision ("f32" | "int8").
/// Tensors    of the linear rest: the map's weights; log_weight [H], query_gate [H, d], as windowed_attention has them.
///            blocks (u8 or bool, [.., query blocks, key blocks], broadcast to [B, H or G, ..], 1 = computed): makes select "given".
/// Defaults   select int8, block_q = block_k = 16, budget 1/4, at_least 256, first 16, window 64, keep_small 1/64, compensate zeroth,
///            parts 1. With `top`, MoBA's form: select mean, block_q 1, no floor, no first keys, no window, no kept keys. Compensation of a pattern, a given mask and of `top`: none.

#include <fovea/core/any.hpp>
#include <fovea/feature/configure.hpp>
#include <fovea/hybrid.hpp>
#include <fovea/softmax/configure.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline void configure_hybrid_pattern(configuration_reader& c, hybrid_attention& m) {
  require(!c.has("select"), "configuration of hybrid: pattern and select were both given; wanted one of them");
  m.select = block_selector::pattern;
  m.pattern = c.choice("pattern",
                       {{"local", hsa_mode::local},
                        {"strided", hsa_mode::strided},
                        {"sparse", hsa_mode::sparse},
                        {"fixed", hsa_mode::fixed}},
                       m.pattern);
  m.stride = c.integer("stride", m.stride);
}

inline void configure_hybrid_budget(configuration_reader& c, hybrid_attention& m) {
  using enum block_selector;
  const bool by_top = c.has("top");
  require(!by_top || !c.has("budget"), "configuration of hybrid: top and budget were both given; wanted one of them");
  m.select = c.choice("select",
                      {{"given", given},
                       {"mean", mean},
                       {"variance", variance},
                       {"bound", bound},
                       {"int8", int8},
                       {"int4", int4},
                       {"exact", exact}},
                      by_top ? mean : int8);
  require(m.select != given, "configuration of hybrid: select is \"given\" and the tensor blocks is missing");
  if (by_top) m.budget = 0, m.at_least = m.first = m.window = 0, m.keep_small = 0, m.compensate = compensation::none;
  m.top = c.integer("top", 0);
  require(!by_top || m.top >= 1, "configuration of hybrid: top is ", m.top,
          "; it counts blocks, the own one included, and must be at least 1");
  m.budget = c.number("budget", m.budget);
  m.top_p = c.number("top_p", m.top_p);
  require(m.top_p == 0 || (!by_top && !c.has("budget")),
          "configuration of hybrid: top_p and top or budget were both given; wanted one of them");
  m.keep_small = c.number("keep_small", m.keep_small);
  m.share_group = c.flag("share_group", m.share_group);
  m.refresh = c.integer("refresh", m.refresh);
  m.at_least = c.integer("at_least", m.at_least);
  m.first = c.integer("first", m.first);
  m.window = c.integer("window", m.window);
}

inline void configure_hybrid_blocks(configuration_reader& c, hybrid_attention& m, const array& blocks) {
  c.choice("select", {{"given", 0}}, 0);
  require(blocks.type() == element::u8 || blocks.type() == element::boolean, "blocks is ", blocks.describe(),
          "; wanted u8 or bool");
  require(blocks.rank() >= 2 && blocks.rank() <= 4, "blocks is ", blocks.describe(),
          "; wanted 2 to 4 dimensions that broadcast to [B, H, query blocks, key blocks]");
  m.select = block_selector::given, m.compensate = compensation::none;
  m.blocks = bhnd(blocks.as<std::uint8_t>(), blocks.dim(-4), blocks.dim(-3), blocks.dim(-2), blocks.dim(-1));
}

/// What a configured mechanism points to.
struct hybrid_weights {
  std::vector<float> log_weight, query_gate;
  std::shared_ptr<const void> map, blocks;
};

inline void configure_linear_rest(configuration_reader& c, hybrid_attention& m, hybrid_weights& keep) {
  if (const auto map = configure_map(c, keep.map)) m.map = *map;
  if (const array* w = c.tensor("log_weight"); w != nullptr) {
    keep.log_weight = w->floats();
    m.log_weight = bhnd<const float>(keep.log_weight.data(), 1, w->size(), 1, 1);
  }
  if (const array* w = c.tensor("query_gate"); w != nullptr) {
    require(w->rank() >= 2, "tensor query_gate is ", w->describe(), "; wanted [H, d]");
    keep.query_gate = w->floats();
    m.query_gate = bhnd<const float>(keep.query_gate.data(), 1, w->size() / w->dim(-1), 1, w->dim(-1));
  }
}

inline void configure_hybrid_rest(configuration_reader& c, hybrid_attention& m, hybrid_weights& keep) {
  using enum compensation;
  m.compensate =
      c.choice("compensate",
               {{"none", none}, {"zeroth", zeroth}, {"cumulant", cumulant}, {"sampled", sampled}, {"linear", linear}},
               m.compensate);
  if (m.compensate == linear) configure_linear_rest(c, m, keep);
  m.parts = c.integer("parts", m.parts);
  m.variance_share = c.number("variance_share", m.variance_share);
  m.variance_cap = c.number("variance_cap", m.variance_cap);
  const isize seed = c.integer("seed", static_cast<isize>(m.seed));
  require(seed >= 0, "configuration of hybrid: seed is ", seed, "; it must not be negative");
  m.seed = static_cast<std::uint64_t>(seed);
}

}  // namespace detail

inline any_attention configure_hybrid(configuration_reader& c) {
  hybrid_attention m;
  m.scale = c.number("scale");
  m.is_causal = c.flag("causal", false);
  m.align = detail::configure_align(c, m.is_causal);
  const array* blocks = c.tensor("blocks");
  require(blocks == nullptr || !c.has("pattern"),
          "configuration of hybrid: the tensor blocks and a pattern were both given; wanted one of them");
  if (c.has("pattern")) {
    detail::configure_hybrid_pattern(c, m);
    m.compensate = compensation::none;
  } else if (blocks != nullptr) {
    detail::configure_hybrid_blocks(c, m, *blocks);
  } else {
    detail::configure_hybrid_budget(c, m);
    m.block_q = m.top > 0 ? 1 : m.block_q;
  }
  m.block_q = c.integer("block_q", m.block_q);
  m.block_k = c.integer("block_k", m.block_k);
  auto keep = std::make_shared<detail::hybrid_weights>();
  detail::configure_hybrid_rest(c, m, *keep);
  m.target.relative = c.number("target", 0);
  m.target.absolute = c.number("target_absolute", 0);
  m.target.estimated = c.flag("target_estimated", false);
  m.arithmetic = c.choice("precision", {{"f32", precision::f32}, {"int8", precision::int8}}, m.arithmetic);
  detail::check_hybrid_options(m);
  if (blocks != nullptr) keep->blocks = blocks->owner();
  return any_attention::hold(m, keep);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
