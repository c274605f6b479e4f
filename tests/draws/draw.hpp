// SPDX-License-Identifier: MIT
#pragma once
/// @file  A draw: one combination of everything that a call of softmax_attention can be asked for, made from one number.
///
///   const draw d = make_draw(seed);      what is combined: types, call form, store, heads, sizes, mask, score, rope, ...
///   refused(d)                           why the library must refuse it, or ""
///   run(d)                               what came of it: the library's refusal, and the first thing that is wrong
///
/// Contract   a draw depends on its seed alone, on every machine. All tables, weights and numbers of a run come from the seed, too.

#include <string>
#include <vector>

#include <fovea/core/kv_layout.hpp>

#include "support/tensors.hpp"

namespace draws {

using namespace fovea;

enum class call_form : unsigned char {
  views,   ///< a plain call
  state,   ///< a state, in several calls
  append,  ///< one store that each call appends to
  packed,  ///< sequences of different lengths, told apart by cu_q
  batch,   ///< sequences with equally many rows, [B, H, n, d]
};
enum class store_form : unsigned char { none, contiguous, ring, paged, engine };
enum class mask_form : unsigned char {
  none,
  causal,
  window,
  window_first,
  two_sided,
  prefix,
  chunked,
  key_lengths,
  packed,
  packed_causal,
  documents,
  boolean,
  block,
  tree,
  pattern,
  both,
  either,
  every,
  functor,
  functor_blocks,
};
enum class score_form : unsigned char {
  none,
  softcap,
  alibi,
  bias,
  relative,
  cap_bias,
  alibi_cap,
  cap_relative_alibi,
  functor,
  functor_without_slope,
  documents,
};
enum class place : unsigned char { bottom_right, top_left, offset, offsets };
enum class rope_form : unsigned char { none, neox, gptj };
enum class scaling_form : unsigned char { none, linear, yarn, llama3 };
enum class poison_form : unsigned char { none, nan, infinity };
enum class fault : unsigned char {  ///< what is wrong on purpose
  none,
  heads,
  parameter,  ///< of the mask, or of the score, or the scale
  sink,
  workspace,
  positions,
  rope,
  out,
  full,
  table,
  ring,
};

/// Rows and keys of each item in one call; keys count the tokens that came before.
struct lengths {
  std::vector<isize> n, m;
};

struct draw {
  std::uint64_t seed = 0;
  dtype type = dtype::f32, out = dtype::f32;
  test::layout layout = test::layout::bhnd;
  call_form form = call_form::views;

  store_form store = store_form::none;
  dtype rows = dtype::f32;  ///< what the store keeps
  scale_per scale_of = scale_per::row;
  isize page = 16, chunk = 16;
  isize ring_window = 1, ring_first = 0;
  bool stale = false;     ///< the store has held other rows before
  bool shared = false;    ///< sequences begin with pages of sequence 0
  bool rollback = false;  ///< before each call tokens come that are taken back

  isize B = 1, G = 1, H = 1, d = 1, e = 1;
  std::vector<lengths> calls;

  mask_form mask = mask_form::none;
  place align = place::bottom_right;
  isize width = 1, first = 0, right = 0, offset = 0;  ///< of the mask
  bool per_item = false, per_head = false;            ///< tables of mask and score have these dimensions
  bool per_row = true, per_key = true;                ///< those of an additive bias

  score_form score = score_form::none;
  double cap = 1;
  bool sinks = false;
  double scale = 0;  ///< 0: the default

  rope_form rope = rope_form::none;
  scaling_form scaling = scaling_form::none;
  isize turned = 0;        ///< elements of a row
  bool positions = false;  ///< given

  bool lse = true, workspace = false;
  int threads = 1;
  bool backward = false, dbias = false;
  poison_form poison = poison_form::none;
  draws::fault fault = fault::none;
};

draw make_draw(std::uint64_t seed);
/// Seeds of streams that have nothing in common.
constexpr std::uint64_t stream(std::uint64_t seed, std::uint64_t number) {
  std::uint64_t z = seed + 0x9e3779b97f4a7c15ULL * (number + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}
/// Why the library must refuse this, in words; "" if it must not.
std::string refused(const draw& d);
/// One line, and how to run it again.
std::string text(const draw& d);

/// What a feature is called, and to which group of alternatives it belongs.
struct feature {
  std::string group, name;
};
const std::vector<feature>& features();
/// The seeds of so many draws: the last twentieth is picked so that pairs of features that have been met less than three times are met.
std::vector<std::uint64_t> seeds(isize count);
/// features()[i] is in the draw.
std::vector<bool> features_of(const draw& d);
/// Two features that no accepted draw can have at once.
bool apart(const feature& a, const feature& b);

/// The library as it is, or one that is wrong on purpose: the machinery must say so.
enum class sabotage : unsigned char {
  none,
  tile_full,      ///< a mask calls a partial tile full
  tile_empty,     ///< ... or empty
  window_wider,   ///< by one key
  score_off,      ///< one logit is off by 0.01
  stale_page,     ///< a page table names the page of another place
  sink_left_out,  ///< the denominator lacks it
  turned_late,    ///< queries are turned one position too far
  row_unwritten,  ///< one row of the output stays as it was
  lse_in_bits,    ///< log2 in place of the natural logarithm
  gradient_off,   ///< one element of dk is off by 0.01
};
inline constexpr int sabotages = 11;
const char* name_of(sabotage s);
struct outcome {
  std::string refusal;   ///< what the library said when it refused
  std::string wrong;     ///< "" if all is as it must be
  bool applied = false;  ///< the sabotage has had something to spoil
};
outcome run(const draw& d, sabotage s = sabotage::none);

}  // namespace draws
