// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention from a configuration.
///
/// Keys       scale, causal, align, offset, window (own key included), left / right, first, chunk, prefix, pattern with stride and
///            pattern_window, _block, _global, _random, _seed, softcap, max_distance,
///            bidirectional, relative_left, rope_theta and rope_*, store, store_type, store_scale, store_layout,
///            store_rotated, store_chunk, precision ("f32" or "int8"), skip.
/// Tensors    mask (u8 or bool, broadcast to [B, H, n, m], 1 = may see), bias (float, likewise), slopes [H], sinks [H],
///            t5 [buckets, H], relative [H or 1, distances], cu or cu_q and cu_k (cumulative lengths of packed sequences), offsets [B],
///            prefixes [B], lengths [B], parents [n] or [B, n], rope_factors [width / 2]; with each call: positions [B, n] or [n].

#include <fovea/score/packed.hpp>
#include <fovea/softmax/configure_mask.hpp>
#include <fovea/softmax/configure_rope.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Soft-cap, then the table, then what depends on positions; each where it is there.
struct score_parts {
  std::optional<softcap> cap;
  std::optional<additive_bias> bias;

  template <class Line>
  score with(const Line& line) const {
    if (cap && bias) return chain{chain{*cap, *bias}, line};
    if (cap) return chain{*cap, line};
    return bias ? score(chain{*bias, line}) : score(line);
  }
  score alone() const {
    if (cap && bias) return chain{*cap, *bias};
    if (cap) return *cap;
    return bias ? score(*bias) : score{};
  }
};

/// T5's buckets, or a table by distance.
inline std::optional<relative_bias> configure_distances(configuration_reader& c, softmax_tables& keep,
                                                        const alignment_of_rows& align) {
  const array *t5 = c.tensor("t5"), *relative = c.tensor("relative");
  const isize left = c.integer("relative_left", 0), far = c.integer("max_distance", 128);
  const bool both_ways = c.flag("bidirectional", !c.flag("causal", false));
  require(t5 == nullptr || relative == nullptr, "t5 and relative were given; wanted one of them");
  require(t5 != nullptr || (!c.has("max_distance") && !c.has("bidirectional")),
          "max_distance and bidirectional go with the tensor t5");
  require((relative != nullptr) == c.has("relative_left"), "relative and relative_left go together");
  if (t5 != nullptr) {
    require(t5->rank() == 2 && is_float(t5->type()), "t5 is ", t5->describe(), "; wanted floats, [buckets, H]");
    keep.distances = t5_distances(t5->floats().data(), t5->dim(1), t5->dim(0), far, both_ways);
    return relative_bias{keep.distances.data(), far, both_ways ? far : 0, t5->dim(1), align};
  }
  if (relative == nullptr) return std::nullopt;
  require(relative->rank() == 2 && is_float(relative->type()) && left >= 0 && relative->dim(1) > left, "relative is ",
          relative->describe(), " and relative_left ", left, "; wanted [H or 1, relative_left + 1 + right]");
  keep.distances = relative->floats();
  return relative_bias{keep.distances.data(), left, relative->dim(1) - left - 1, relative->dim(0), align};
}

inline score configure_score(configuration_reader& c, softmax_tables& keep, const alignment_of_rows& align,
                             const packed& sequences) {
  score_parts parts;
  if (const auto cap = c.number("softcap")) {
    require(*cap > 0, "softcap is ", *cap, "; it must be positive");
    parts.cap = softcap{*cap};
  }
  if (const array* bias = c.tensor("bias")) {
    require(is_float(bias->type()), "bias is ", bias->describe(), "; wanted a float type");
    keep.bias = bias->floats();
    parts.bias = additive_bias{keep.bias.data()};
    set_strides(*parts.bias, extent_of("bias", *bias));
  }
  const array* slopes = c.tensor("slopes");
  const auto distances = configure_distances(c, keep, align);
  require(slopes == nullptr || !distances, "slopes and t5 or relative were given; wanted one of them");
  const bool inside = sequences.sequences > 0 && keep.cu_q != keep.cu_k;  // distances differ from those of the whole
  if (slopes != nullptr) {
    keep.slopes = slopes->floats();
    const alibi line{keep.slopes.data(), slopes->size(), align};
    return inside ? parts.with(documents_score{sequences, line}) : parts.with(line);
  }
  if (distances) return inside ? parts.with(documents_score{sequences, *distances}) : parts.with(*distances);
  return parts.alone();
}

inline state_store configure_store(configuration_reader& c) {
  state_store s;
  s.kind =
      c.choice("store", {{"contiguous", state_store::form::contiguous}, {"ring", state_store::form::ring}}, s.kind);
  if (c.has("store_type"))
    s.type = c.choice(
        "store_type",
        {{"f32", dtype::f32}, {"f64", dtype::f64}, {"bf16", dtype::bf16}, {"f16", dtype::f16}, {"i8", dtype::i8}},
        dtype::f32);
  s.scale = c.choice("store_scale", {{"row", scale_per::row}, {"group", scale_per::group}}, s.scale);
  s.layout = c.choice("store_layout", {{"rows", kv_form::rows}, {"packed", kv_form::packed}}, s.layout);
  s.rotated = c.flag("store_rotated", s.rotated);
  s.chunk = c.integer("store_chunk", s.chunk);
  require(s.chunk >= 1, "store_chunk is ", s.chunk, "; it must be at least 1");
  return s;
}

}  // namespace detail

inline any_attention configure_softmax(configuration_reader& c) {
  auto keep = std::make_shared<detail::softmax_tables>();
  softmax_attention m;
  m.scale = c.number("scale");
  require(!m.scale || *m.scale > 0, "scale is ", m.scale.value_or(0), "; it must be positive");
  m.arithmetic = c.choice("precision", {{"f32", precision::f32}, {"int8", precision::int8}}, m.arithmetic);
  m.skip = static_cast<float>(c.number("skip", 0));
  const bool positions_matter =
      c.flag("causal", false) || c.has("window") || c.has("left") || c.has("right") || c.has("pattern");
  const packed sequences = detail::configure_packed(c, *keep);
  const alignment_of_rows align = detail::configure_rows(c, *keep, positions_matter);
  m.mask = detail::configure_mask(c, *keep, align, sequences);
  m.score = detail::configure_score(c, *keep, align, sequences);
  m.turn = detail::configure_rope(c, *keep);
  m.store = detail::configure_store(c);
  if (const array* sinks = c.tensor("sinks")) {
    keep->sinks = sinks->floats();
    m.sinks = keep->sinks.data(), m.sink_count = sinks->size();
  }
  return any_attention::hold(m, keep);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
