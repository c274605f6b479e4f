// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention from a configuration.
///
/// Keys       scale, causal, align, window (own key included), left / right, first, softcap, precision ("f32").
/// Tensors    mask (u8 or bool, broadcast to [B, H, n, m], 1 = may see), bias (float, likewise), slopes [H], sinks [H],
///            cu or cu_q and cu_k (cumulative lengths of packed sequences).

#include <fovea/core/any.hpp>
#include <fovea/softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// What a configured softmax_attention points to.
struct softmax_tables {
  array mask;
  std::vector<float> bias, slopes, sinks;
  std::vector<std::int32_t> cu_q, cu_k;
};

inline table_extent extent_of(const char* name, const array& a) {
  require(a.rank() >= 2 && a.rank() <= 4, name, " is ", a.describe(),
          "; wanted 2 to 4 dimensions that broadcast to [B, H, n, m]");
  return {a.dim(-4), a.dim(-3), a.dim(-2), a.dim(-1)};
}
/// Strides of a dense row-major table of these sizes; 0 where it broadcasts.
template <class Policy>
void set_strides(Policy& p, const table_extent& x) {
  p.extent = x;
  p.key_stride = x.keys == 1 ? 0 : 1;
  p.row_stride = x.rows == 1 ? 0 : x.keys;
  p.head_stride = x.heads == 1 ? 0 : x.keys * x.rows;
  p.batch_stride = x.batch == 1 ? 0 : x.keys * x.rows * x.heads;
}

inline std::vector<std::int32_t> lengths(const char* name, const array& a) {
  require(a.rank() == 1 && a.size() >= 2 && !is_float(a.type()), name, " is ", a.describe(),
          "; wanted whole numbers, one more than there are sequences");
  std::vector<std::int32_t> out;
  for (isize i = 0; i < a.size(); ++i) {
    require(a.at(i) >= 0 && a.at(i) < 2147483648.0, name, " holds ", a.at(i), "; wanted cumulative lengths below 2^31");
    out.push_back(static_cast<std::int32_t>(a.at(i)));
  }
  return out;
}

template <class P>
mask with_table(const P& p, const boolean_mask* table) {
  return table == nullptr ? mask(p) : mask(both{p, *table});
}

/// Where rows stand, by the key `align`. "none" leaves bottom-right, and is right only where no position matters.
inline alignment_of_rows configure_align(configuration_reader& c, bool positions_matter) {
  enum class where { bottom, top, none };
  const where at = c.choice("align", {{"bottom_right", where::bottom}, {"top_left", where::top}, {"none", where::none}},
                            where::bottom);
  require(at != where::none || !positions_matter,
          "align is \"none\"; a causal or window mask needs \"bottom_right\" or \"top_left\"");
  return at == where::top ? top_left : bottom_right;
}

inline mask configure_mask(configuration_reader& c, softmax_tables& keep) {
  const bool is_causal = c.flag("causal", false), has_window = c.has("window"),
             has_sides = c.has("left") || c.has("right");
  const alignment_of_rows align = configure_align(c, is_causal || has_window || has_sides);
  const isize width = c.integer("window", 1), first = c.integer("first", 0);
  const isize far = PTRDIFF_MAX / 4, left = c.integer("left", far), right = c.integer("right", far);
  require(width >= 1, "window is ", width, "; it counts the query's own key and must be at least 1");
  require(first >= 0, "first is ", first, "; it must not be negative");
  require(left >= 0 && right >= 0, "left, right are ", left, ", ", right, "; they must not be negative");
  require(!c.has("first") || (has_window && is_causal), "first was given; it goes with window and causal");
  require(!has_window || !has_sides, "window was given with left or right; wanted one or the other");

  boolean_mask bits;
  const array* table = c.tensor("mask");
  if (table != nullptr) {
    require(table->type() == element::u8 || table->type() == element::boolean, "mask is ", table->describe(),
            "; wanted u8 or bool");
    keep.mask = *table;
    bits.table = keep.mask.as<std::uint8_t>();
    set_strides(bits, extent_of("mask", *table));
  }
  const boolean_mask* more = table != nullptr ? &bits : nullptr;

  const array *cu = c.tensor("cu"), *cu_q = c.tensor("cu_q"), *cu_k = c.tensor("cu_k");
  if (cu != nullptr || cu_q != nullptr || cu_k != nullptr) {
    require((cu != nullptr) != (cu_q != nullptr && cu_k != nullptr),
            "packed batches take the tensor cu, or both cu_q and cu_k");
    keep.cu_q = lengths(cu != nullptr ? "cu" : "cu_q", cu != nullptr ? *cu : *cu_q);
    keep.cu_k = lengths(cu != nullptr ? "cu" : "cu_k", cu != nullptr ? *cu : *cu_k);
    require(keep.cu_q.size() == keep.cu_k.size(), "cu_q names ", keep.cu_q.size() - 1, " sequences and cu_k ",
            keep.cu_k.size() - 1, "; they must be equal");
    require(!has_window && !has_sides && align.how == alignment_of_rows::kind::bottom_right,
            "packed batches take causal, bottom-right, and no window in this version");
    return with_table(packed{keep.cu_q.data(), keep.cu_k.data(), static_cast<isize>(keep.cu_q.size()) - 1, is_causal},
                      more);
  }
  if (has_window && is_causal) return with_table(window{width, first, align}, more);
  if (has_window) return with_table(two_sided{width - 1, far, align}, more);
  if (has_sides && is_causal) return with_table(both{causal{align}, two_sided{left, right, align}}, more);
  if (has_sides) return with_table(two_sided{left, right, align}, more);
  if (is_causal) return with_table(causal{align}, more);
  return more != nullptr ? mask(bits) : mask(no_mask{});
}

inline score configure_score(configuration_reader& c, softmax_tables& keep) {
  const std::optional<double> cap = c.number("softcap");
  require(!cap || *cap > 0, "softcap is ", cap.value_or(0), "; it must be positive");
  const array *bias = c.tensor("bias"), *slopes = c.tensor("slopes");
  additive_bias table;
  alibi line;
  if (bias != nullptr) {
    require(is_float(bias->type()), "bias is ", bias->describe(), "; wanted a float type");
    keep.bias = bias->floats();
    table.table = keep.bias.data();
    set_strides(table, extent_of("bias", *bias));
  }
  if (slopes != nullptr) {
    keep.slopes = slopes->floats();
    line = {keep.slopes.data(), slopes->size()};
  }
  const softcap cut{cap.value_or(1)};
  if (cap && bias != nullptr && slopes != nullptr) return chain{chain{cut, table}, line};
  if (cap && bias != nullptr) return chain{cut, table};
  if (cap && slopes != nullptr) return chain{cut, line};
  if (bias != nullptr && slopes != nullptr) return chain{table, line};
  if (cap) return cut;
  if (bias != nullptr) return table;
  return slopes != nullptr ? score(line) : score{};
}

}  // namespace detail

inline any_attention configure_softmax(configuration_reader& c) {
  auto keep = std::make_shared<detail::softmax_tables>();
  softmax_attention m;
  m.scale = c.number("scale");
  require(!m.scale || *m.scale > 0, "scale is ", m.scale.value_or(0), "; it must be positive");
  c.choice("precision", {{"f32", 0}}, 0);
  m.mask = detail::configure_mask(c, *keep);
  m.score = detail::configure_score(c, *keep);
  if (const array* sinks = c.tensor("sinks")) {
    keep->sinks = sinks->floats();
    m.sinks = keep->sinks.data(), m.sink_count = sinks->size();
  }
  return any_attention::hold(m, keep);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
