// SPDX-License-Identifier: MIT
/// @file  The laws of softmax_attention: each mask, the score modifications, sinks, each way to keep a state, RoPE.

#include <fovea/position/rope_table.hpp>
#include <fovea/softmax.hpp>
#include <fovea/softmax/reference_skip.hpp>

#include "laws/laws.hpp"

namespace {

using namespace fovea;

struct softmax_base {
  static void reference(const softmax_attention& m, const problem& p) { fovea::reference::prefill(m, p); }
};
struct full : softmax_base {
  static constexpr const char* name = "softmax";
  static constexpr laws::promise promises{.permutable = true, .lse = true, .logits = true};
  softmax_attention make(const shape&) { return {}; }
};
struct causal_case : softmax_base {
  static constexpr const char* name = "softmax, causal";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true, .logits = true};
  softmax_attention make(const shape&) { return {.mask = causal{}}; }
};
struct windowed : softmax_base {
  static constexpr const char* name = "softmax, window of 9 after 3 first keys";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true};
  softmax_attention make(const shape&) { return {.mask = window{.width = 9, .first = 3}, .scale = 0.06}; }
};
/// Soft-cap, then ALiBi, and a sink for each head.
struct modified : softmax_base {
  static constexpr const char* name = "softmax, causal, soft-cap, ALiBi, sinks";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true};
  float slopes[16] = {0.5F, 0.25F, 0.125F, 0.0625F, 0.3F, 0.2F, 0.1F, 0.05F, 0.01F};
  float sinks[16] = {1.0F, -2.0F, 0.5F, 3.0F, 0.0F, -1.0F, 2.0F, 0.25F, -0.5F};
  softmax_attention make(const shape&) {
    return {.mask = causal{}, .score = chain{softcap{5.0}, alibi{slopes}}, .sinks = sinks};
  }
  bool accepts(const shape& s) const {
    return s.m >= s.n;
  }  // a row that sees nothing but its sink is tried in tests/golden
};
struct two_sided_case : softmax_base {
  static constexpr const char* name = "softmax, 7 keys before and 2 behind, top-left";
  static constexpr laws::promise promises{.lse = true};
  softmax_attention make(const shape&) { return {.mask = two_sided{7, 2, top_left}}; }
};
/// A random table and a bias, both broadcast over batch and heads.
struct tables : softmax_base {
  static constexpr const char* name = "softmax, boolean mask and bias";
  static constexpr laws::promise promises{.lse = true};
  std::vector<std::uint8_t> seen = std::vector<std::uint8_t>(200 * 200);
  std::vector<float> bias = std::vector<float>(200 * 200);
  softmax_attention make(const shape& s) {
    test::random r(3);
    for (auto& x : seen) x = r.coin(0.4);
    for (auto& x : bias) x = static_cast<float>(r.normal());
    return {.mask = boolean_mask{seen.data(), 0, 0, s.m}, .score = additive_bias{bias.data(), 0, 0, s.m}};
  }
};

/// What is left out of a tile of rows is theirs together: a later key may decide about an earlier row, within the bound that it reports.
struct skipping : softmax_base {
  static constexpr const char* name = "softmax, causal, skip 0.004";
  static constexpr laws::promise promises{.lse = true};
  softmax_attention make(const shape&) { return {.mask = causal{}, .skip = 0.004F}; }
  template <class Acc>
  static void twin(const softmax_attention& m, const problem& p) {
    using loop = kernel::online_softmax<simd::native, Acc>;
    fovea::reference::skip_twin(m, p, loop::tile_rows, loop::block_keys).prefill();
  }
  static void reference(const softmax_attention& m, const problem& p) {
    p.q.type == dtype::f64 ? twin<double>(m, p) : twin<float>(m, p);
  }
};

/// StreamingLLM: a state of first keys and a ring, of fewer tokens than most of the laws' shapes.
struct streaming : softmax_base {
  static constexpr const char* name = "softmax, window of 9 after 3 first keys, ring of calls up to 7";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true};
  float slopes[16] = {0.5F, 0.25F, 0.125F, 0.0625F, 0.3F, 0.2F, 0.1F, 0.05F, 0.01F};
  softmax_attention make(const shape&) {
    return {.mask = window{.width = 9, .first = 3},
            .score = alibi{slopes},
            .store = {.kind = state_store::form::ring, .chunk = 7}};
  }
};
/// States in another type than the calls. The numbers are such that the type holds them exactly, so that one twin serves all calls.
template <dtype Type, scale_per Scale>
struct stored_as : softmax_base {
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true};
  static constexpr bool ring = Scale == scale_per::group;
  softmax_attention make(const shape&) {
    softmax_attention m{.mask = window{.width = 40, .first = 2}};
    m.store = {.kind = ring ? state_store::form::ring : state_store::form::contiguous,
               .type = Type,
               .scale = Scale,
               .chunk = 16};
    return m;
  }
  bool accepts(const shape& s) const { return s.type != dtype::f64; }
  void adjust(test::random&, laws::inputs& x) const {
    for (test::tensor* t : {&x.k, &x.v})
      for (isize b = 0; b < t->batch(); ++b)
        for (isize g = 0; g < t->heads(); ++g)
          for (isize j = 0; j < t->length(); ++j)
            for (isize c = 0; c < t->width(); ++c) {
              const double step = std::nearbyint(t->get(b, g, j, c) * 24);  // |x| <= 6: at most 144
              const double code = c % 32 == 0 ? 127 : std::fmin(std::fmax(step, -127.0), 127.0);
              t->set(b, g, j, c, code / 32);
            }
  }
};
struct int8_rows : stored_as<dtype::i8, scale_per::row> {
  static constexpr const char* name = "softmax, state in int8, a scale a row";
};
struct int8_groups : stored_as<dtype::i8, scale_per::group> {
  static constexpr const char* name = "softmax, ring state in int8, a scale for 32 elements";
};
struct bf16_state : stored_as<dtype::bf16, scale_per::row> {
  static constexpr const char* name = "softmax, state in bf16";
};
/// q and k are turned in the call; in a state the keys are kept turned.
template <bool Ring>
struct turned : softmax_base {
  static constexpr const char* name = Ring ? "softmax, RoPE, ring" : "softmax, RoPE";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true};
  std::optional<rope_table> table;
  rope turn;
  softmax_attention make(const shape& s) {
    table.emplace(rope_options{.width = s.d / 4 * 2 + 2,
                               .positions = 200,
                               .pair = Ring ? rope::pairing::gptj : rope::pairing::neox,
                               .f64 = true});
    turn = *table;
    softmax_attention m{.mask = causal{}, .turn = &turn};
    if (Ring) m.mask = window{.width = 21, .first = 1}, m.store = {.kind = state_store::form::ring, .chunk = 10};
    return m;
  }
  /// 16-bit keys are rounded once more after they were turned: tests/cache.
  bool accepts(const shape& s) const {
    return s.n <= s.m && s.d >= 2 && (s.type == dtype::f32 || s.type == dtype::f64);
  }
};

using law_cases = std::tuple<streaming, int8_rows, int8_groups, bf16_state, turned<false>, turned<true>, full,
                             causal_case, windowed, modified, two_sided_case, tables, skipping>;

}  // namespace

#define FOVEA_LAWS_OF "softmax"
#include "laws/suite.hpp"
