// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a configured softmax_attention points to, and how it is read from arrays.

#include <fovea/core/any.hpp>
#include <fovea/mask/tree.hpp>
#include <fovea/position/rope_table.hpp>
#include <fovea/softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

struct softmax_tables {
  array mask;
  std::vector<float> bias, slopes, sinks, distances;
  std::vector<std::int32_t> cu_q, cu_k, offsets, prefixes, lengths;
  std::vector<draft_tree> trees;
  std::vector<fovea::mask> rules;  // by position; all of them hold
  std::vector<fovea::mask> parts;  // what is joined in the end
  rope_table turn;
  rope turn_view;
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

/// Whole numbers of one dimension, within the limits given.
inline std::vector<std::int32_t> whole_numbers(const char* name, const array& a, double least, const char* wanted) {
  require(a.rank() == 1 && !is_float(a.type()), name, " is ", a.describe(), "; wanted ", wanted);
  std::vector<std::int32_t> out;
  for (isize i = 0; i < a.size(); ++i) {
    require(a.at(i) >= least && a.at(i) < 2147483648.0, name, " holds ", a.at(i), "; wanted ", wanted, ", from ", least,
            " to 2^31");
    out.push_back(static_cast<std::int32_t>(a.at(i)));
  }
  return out;
}
inline std::vector<std::int32_t> cumulative(const char* name, const array& a) {
  require(a.rank() == 1 && a.size() >= 2, name, " is ", a.describe(),
          "; wanted whole numbers, one more than there are sequences");
  return whole_numbers(name, a, 0, "cumulative lengths");
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

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
