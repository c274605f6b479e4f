// SPDX-License-Identifier: MIT
/// @file  What a draw is in words, its features, and which of them cannot meet.

#include <sstream>

#include "draws/draw.hpp"

namespace draws {
namespace {

constexpr const char* form_names[] = {"views", "state", "append", "packed", "batch"};
constexpr const char* store_names[] = {"none", "contiguous", "ring", "paged", "engine"};
constexpr const char* mask_names[] = {"none",      "causal",        "window",      "window_first", "two_sided",
                                      "prefix_lm", "chunked_local", "key_lengths", "packed",       "packed_causal",
                                      "documents", "boolean",       "block",       "tree",         "pattern",
                                      "both",      "either",        "every",       "functor",      "functor_blocks"};
constexpr const char* score_names[] = {"none",      "softcap",
                                       "alibi",     "bias",
                                       "relative",  "cap_bias",
                                       "alibi_cap", "cap_relative_alibi",
                                       "functor",   "functor_without_slope",
                                       "documents"};
constexpr const char* place_names[] = {"bottom_right", "top_left", "offset", "offsets"};
constexpr const char* rope_names[] = {"none", "neox", "gptj"};
constexpr const char* scaling_names[] = {"none", "linear", "yarn", "llama3"};
constexpr const char* poison_names[] = {"none", "nan", "infinity"};
constexpr const char* fault_names[] = {"none", "heads", "parameter", "sink",  "workspace", "positions",
                                       "rope", "out",   "full",      "table", "ring"};

template <class E, std::size_t N>
const char* name(const char* const (&names)[N], E x) {
  return names[static_cast<std::size_t>(x)];
}

constexpr const char* sabotage_names[sabotages] = {"none",          "tile_full",   "tile_empty",    "window_wider",
                                                   "score_off",     "stale_page",  "sink_left_out", "turned_late",
                                                   "row_unwritten", "lse_in_bits", "gradient_off"};

}  // namespace

const char* name_of(sabotage s) { return name(sabotage_names, s); }

std::string text(const draw& d) {
  std::ostringstream out;
  out << "FOVEA_DRAW=0x" << std::hex << d.seed << std::dec << "  " << name(form_names, d.form) << " "
      << fovea::name_of(d.type) << " -> " << fovea::name_of(d.out) << " " << test::name_of(d.layout)
      << ", B, H, G, d, e = " << d.B << ", " << d.H << ", " << d.G << ", " << d.d << ", " << d.e << ", rows of keys:";
  for (const lengths& c : d.calls) {
    out << " (";
    for (std::size_t b = 0; b < c.n.size(); ++b) out << (b > 0 ? " " : "") << c.n[b] << "/" << c.m[b];
    out << ")";
  }
  if (d.store != store_form::none) {
    out << ", " << name(store_names, d.store) << " of " << fovea::name_of(d.rows);
    if (d.rows == dtype::i8) out << (d.scale_of == scale_per::row ? " by rows" : " by groups");
    if (d.store == store_form::paged || d.store == store_form::engine) out << ", pages of " << d.page;
    if (d.store == store_form::ring)
      out << ", window " << d.ring_window << " first " << d.ring_first << " chunk " << d.chunk;
    if (d.stale) out << ", stale";
    if (d.shared) out << ", shared";
    if (d.rollback) out << ", rollback";
  }
  out << ", mask " << name(mask_names, d.mask) << " " << name(place_names, d.align) << " (width " << d.width
      << ", first " << d.first << ", right " << d.right << ", offset " << d.offset << "), tables by"
      << (d.per_item ? " item" : "") << (d.per_head ? " head" : "") << (d.per_row ? " row" : "")
      << (d.per_key ? " key" : "") << ", score " << name(score_names, d.score);
  if (d.sinks) out << ", sinks";
  if (d.scale != 0) out << ", scale " << d.scale;
  if (d.rope != rope_form::none)
    out << ", rope " << name(rope_names, d.rope) << " of " << d.turned << ", scaling " << name(scaling_names, d.scaling)
        << (d.positions ? ", positions" : "");
  out << ", " << d.threads << " threads" << (d.lse ? ", lse" : "") << (d.workspace ? ", workspace" : "")
      << (d.backward ? ", backward" : "") << (d.dbias ? ", dbias" : "");
  if (d.poison != poison_form::none) out << ", poison " << name(poison_names, d.poison);
  if (d.fault != fault::none) out << ", fault " << name(fault_names, d.fault);
  return out.str();
}

}  // namespace draws
