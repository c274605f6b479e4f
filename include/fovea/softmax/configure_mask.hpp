// SPDX-License-Identifier: MIT
#pragma once
/// @file  The mask of a configured softmax_attention.
///
/// Rules by position (causal, window, left / right, chunk, prefix, a pattern, a tree) hold all at once; inside packed sequences they count from the
/// start of each; a boolean table and key lengths hold besides.

#include <fovea/mask/patterns.hpp>
#include <fovea/softmax/configure_tables.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// `align`, or the position of the first row: the key `offset`, the tensor `offsets` [B].
inline alignment_of_rows configure_rows(configuration_reader& c, softmax_tables& keep, bool positions_matter) {
  const array* offsets = c.tensor("offsets");
  const bool has_offset = c.has("offset");
  require((offsets != nullptr) + has_offset + c.has("align") <= 1,
          "align, offset and the tensor offsets say all where rows stand; wanted one of them");
  if (has_offset) return at_offset(c.integer("offset", 0));
  if (offsets == nullptr) return configure_align(c, positions_matter);
  keep.offsets = whole_numbers("offsets", *offsets, -2147483648.0, "the position of row 0 of each item");
  return at_offsets(keep.offsets.data());
}

inline void configure_tree(configuration_reader& c, softmax_tables& keep, const alignment_of_rows& align) {
  const array* parents = c.tensor("parents");
  if (parents == nullptr) return;
  require((parents->rank() == 1 || parents->rank() == 2) && !is_float(parents->type()), "parents is ",
          parents->describe(), "; wanted whole numbers, [n] or [B, n]");
  require(align.how == alignment_of_rows::kind::bottom_right,
          "parents was given with align or offset; a tree stands at the end of the keys, bottom-right");
  const isize n = parents->dim(-1);
  for (isize b = 0; b < parents->dim(-2); ++b) {
    std::vector<std::int32_t> own;
    for (isize i = 0; i < n; ++i) {
      require(std::abs(parents->at(b * n + i)) < 2147483648.0, "parents holds ", parents->at(b * n + i));
      own.push_back(static_cast<std::int32_t>(parents->at(b * n + i)));
    }
    keep.trees.emplace_back(own.data(), n);
  }
  keep.rules.emplace_back(tree{keep.trees.data(), static_cast<isize>(keep.trees.size())});
}

/// A fixed sparse pattern; all are causal but bigbird, which is if the configuration is.
inline void configure_pattern(configuration_reader& c, softmax_tables& keep, const alignment_of_rows& align) {
  if (!c.has("pattern")) return;
  enum class form : unsigned char { local, strided, sparse, fixed, dilated, bigbird };
  const form is = c.choice("pattern",
                           {{"local", form::local},
                            {"strided", form::strided},
                            {"sparse", form::sparse},
                            {"fixed", form::fixed},
                            {"dilated", form::dilated},
                            {"bigbird", form::bigbird}},
                           form::sparse);
  if (is == form::bigbird) {
    bigbird b{.is_causal = c.flag("causal", false), .align = align};
    b.block = c.integer("pattern_block", b.block), b.window = c.integer("pattern_window", b.window);
    b.global = c.integer("pattern_global", b.global), b.random = c.integer("pattern_random", b.random);
    b.seed = static_cast<std::uint64_t>(c.integer("pattern_seed", 0));
    b.check({});
    keep.rules.emplace_back(b);
  } else if (is == form::dilated) {
    dilated d{.align = align};
    d.window = c.integer("pattern_window", d.window), d.step = c.integer("stride", d.step);
    d.check({});
    keep.rules.emplace_back(d);
  } else {
    hsa_pattern h{.mode = static_cast<hsa_mode>(is), .align = align};
    h.stride = c.integer("stride", h.stride);
    h.check({});
    keep.rules.emplace_back(h);
  }
}

/// The rules by position, in keep.rules.
inline void configure_rules(configuration_reader& c, softmax_tables& keep, const alignment_of_rows& align) {
  const bool is_causal = c.flag("causal", false), has_window = c.has("window"),
             has_sides = c.has("left") || c.has("right");
  const array* prefixes = c.tensor("prefixes");
  const bool has_prefix = c.has("prefix") || prefixes != nullptr, has_chunk = c.has("chunk");
  const isize width = c.integer("window", 1), first = c.integer("first", 0), chunk = c.integer("chunk", 1);
  const isize far = PTRDIFF_MAX / 4, left = c.integer("left", far), right = c.integer("right", far);
  require(width >= 1, "window is ", width, "; it counts the query's own key and must be at least 1");
  require(first >= 0, "first is ", first, "; it must not be negative");
  require(left >= 0 && right >= 0, "left, right are ", left, ", ", right, "; they must not be negative");
  require(chunk >= 1, "chunk is ", chunk, "; it must be at least 1");
  require(!c.has("first") || (has_window && is_causal), "first was given; it goes with window and causal");
  require(!has_window || !has_sides, "window was given with left or right; wanted one or the other");
  require(!has_chunk || is_causal, "chunk was given; it goes with causal");
  require(!has_prefix || (is_causal && !has_window && !has_chunk),
          "prefix was given; it goes with causal, and not with window or chunk");
  require(!c.has("prefix") || prefixes == nullptr, "prefix and the tensor prefixes were given; wanted one of them");

  if (has_sides) keep.rules.emplace_back(two_sided{left, right, align});
  if (has_window && is_causal)
    keep.rules.emplace_back(window{width, first, align});
  else if (has_window)
    keep.rules.emplace_back(two_sided{width - 1, far, align});
  if (has_chunk) keep.rules.emplace_back(chunked_local{chunk, align});
  if (prefixes != nullptr)
    keep.prefixes = whole_numbers("prefixes", *prefixes, 0, "the length of each item's or sequence's prefix");
  if (has_prefix)
    keep.rules.emplace_back(
        prefix_lm{c.integer("prefix", 0), prefixes != nullptr ? keep.prefixes.data() : nullptr, align});
  else if (is_causal && !has_window && !has_chunk && !c.has("pattern"))
    keep.rules.emplace_back(causal{align});
  configure_pattern(c, keep, align);
  configure_tree(c, keep, align);
}

/// Packed sequences, by cu or cu_q and cu_k; none: sequences = 0.
inline packed configure_packed(configuration_reader& c, softmax_tables& keep) {
  const array *cu = c.tensor("cu"), *cu_q = c.tensor("cu_q"), *cu_k = c.tensor("cu_k");
  if (cu == nullptr && cu_q == nullptr && cu_k == nullptr) return {};
  require((cu != nullptr) != (cu_q != nullptr && cu_k != nullptr),
          "packed batches take the tensor cu, or both cu_q and cu_k");
  keep.cu_q = cumulative(cu != nullptr ? "cu" : "cu_q", cu != nullptr ? *cu : *cu_q);
  keep.cu_k = cumulative(cu != nullptr ? "cu" : "cu_k", cu != nullptr ? *cu : *cu_k);
  require(keep.cu_q.size() == keep.cu_k.size(), "cu_q names ", keep.cu_q.size() - 1, " sequences and cu_k ",
          keep.cu_k.size() - 1, "; they must be equal");
  return {keep.cu_q.data(), keep.cu_k.data(), static_cast<isize>(keep.cu_q.size()) - 1};
}

/// Puts the parts together; `keep` holds what the mask points to.
inline mask configure_mask(configuration_reader& c, softmax_tables& keep, const alignment_of_rows& align,
                           const packed& sequences) {
  configure_rules(c, keep, align);
  const isize rules = static_cast<isize>(keep.rules.size());
  const bool plain_causal = rules == 1 && c.flag("causal", false) && keep.trees.empty() && !c.has("window") &&
                            !c.has("chunk") && !c.has("pattern") && keep.rules[0].is_causal();
  const every all{keep.rules.data(), rules};
  if (sequences.sequences > 0) {
    packed own = sequences;
    own.is_causal = plain_causal;
    if (plain_causal || rules == 0)
      keep.parts.emplace_back(own);
    else if (rules == 1)
      keep.parts.emplace_back(documents{own, mask_ref{keep.rules.data()}});
    else
      keep.parts.emplace_back(documents{own, all});
  } else if (rules == 1) {
    keep.parts.push_back(keep.rules[0]);
  } else if (rules > 1) {
    keep.parts.emplace_back(all);
  }
  if (const array* lengths = c.tensor("lengths")) {
    require(sequences.sequences == 0, "lengths was given with packed sequences, whose lengths are known");
    keep.lengths = whole_numbers("lengths", *lengths, 0, "how many keys each item has");
    keep.parts.emplace_back(key_lengths{keep.lengths.data()});
  }
  if (const array* table = c.tensor("mask")) {
    require(table->type() == element::u8 || table->type() == element::boolean, "mask is ", table->describe(),
            "; wanted u8 or bool");
    keep.mask = *table;
    boolean_mask bits;
    bits.table = keep.mask.as<std::uint8_t>();
    set_strides(bits, extent_of("mask", *table));
    keep.parts.emplace_back(bits);
  }
  if (keep.parts.empty()) return no_mask{};
  return keep.parts.size() == 1 ? keep.parts[0] : mask(every{keep.parts.data(), static_cast<isize>(keep.parts.size())});
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
