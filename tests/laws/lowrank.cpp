// SPDX-License-Identifier: MIT
/// @file  The laws of linformer_attention, efficient_attention, kfree_reconstruction and nystrom_attention.
///
/// Max pooling and the k-free context form are not linear in v and stand in tests/unit/{linformer,efficient}.cpp instead. linformer promises a state in its block-causal form only, and no merge: not any two of its states can be joined.

#include <fovea/efficient.hpp>
#include <fovea/efficient/reference.hpp>
#include <fovea/linformer.hpp>
#include <fovea/linformer/reference.hpp>
#include <fovea/nystrom.hpp>
#include <fovea/nystrom/reference.hpp>

#include "laws/laws.hpp"

namespace {

using namespace fovea;

std::vector<float> weights(isize count, std::uint64_t seed) {
  test::random r(seed);
  std::vector<float> w(static_cast<std::size_t>(count));
  for (auto& x : w) x = static_cast<float>(r.normal() / 8);
  return w;
}

struct linformer_base {
  static constexpr isize longest = 130;
  std::vector<float> E, F;
  static void reference(const linformer_attention& m, const problem& p) { fovea::reference::prefill(m, p); }
};
/// E and F of their own for each KV head.
struct per_head : linformer_base {
  static constexpr const char* name = "linformer, E and F of each head";
  static constexpr laws::promise promises{.lse = true, .c = 64};
  linformer_attention make(const shape& s) {
    E = weights(s.G * longest * 9, 1), F = weights(s.G * longest * 9, 2);
    return {.E = bhnd<const float>(E.data(), 1, s.G, longest, 9), .F = bhnd<const float>(F.data(), 1, s.G, longest, 9)};
  }
};
/// One E for all heads, keys and values; more slots than a panel of the projection.
struct shared_key_value : linformer_base {
  static constexpr const char* name = "linformer, one E for all, 70 slots";
  static constexpr laws::promise promises{.lse = true, .c = 64};
  linformer_attention make(const shape&) {
    E = weights(longest * 70, 3);
    return {.E = bhnd<const float>(E.data(), 1, 1, longest, 70)};
  }
};
template <sequence_projection Kind>
struct pooled : linformer_base {
  static constexpr laws::promise promises{.lse = true, .c = 64};
  linformer_attention make(const shape&) { return {.projection = Kind, .slots = 12}; }
};
struct mean_pool : pooled<sequence_projection::mean> {
  static constexpr const char* name = "linformer, mean pooling";
};
struct convolution : linformer_base {
  static constexpr const char* name = "linformer, convolution of 7 taps";
  static constexpr laws::promise promises{.lse = true, .c = 64};
  linformer_attention make(const shape&) {
    E = weights(7, 4), F = weights(7, 5);
    return {.projection = sequence_projection::conv, .wk = E, .wv = F, .slots = 20};
  }
};
struct block_causal : linformer_base {
  static constexpr const char* name = "linformer, blocks of 16 into 3 slots";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true, .c = 64};
  linformer_attention make(const shape&) {
    E = weights(16 * 3, 6), F = weights(16 * 3, 7);
    return {.E = bhnd<const float>(E.data(), 1, 1, 16, 3),
            .F = bhnd<const float>(F.data(), 1, 1, 16, 3),
            .causal = true,
            .block = 16};
  }
};
struct block_causal_mean : linformer_base {
  static constexpr const char* name = "linformer, blocks of 50 into 4 means";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true, .c = 64};
  linformer_attention make(const shape&) {
    return {.projection = sequence_projection::mean, .slots = 4, .causal = true, .block = 50};
  }
};

struct efficient_base {
  static void reference(const efficient_attention& m, const problem& p) { fovea::reference::prefill(m, p); }
};
struct efficient_full : efficient_base {
  static constexpr const char* name = "efficient";
  static constexpr laws::promise promises{.permutable = true};
  efficient_attention make(const shape&) { return {}; }
};
struct efficient_causal : efficient_base {
  static constexpr const char* name = "efficient, causal";
  static constexpr laws::promise promises{.causal = true, .streams = true};
  efficient_attention make(const shape&) { return {.causal = true}; }
};
struct scaling_full : efficient_base {
  static constexpr const char* name = "efficient, scaling normalisation";
  static constexpr laws::promise promises{.permutable = true};
  efficient_attention make(const shape&) { return {.normalisation = efficient_normalisation::scaling, .scale = 0.5}; }
};
struct scaling_causal : efficient_base {
  static constexpr const char* name = "efficient, scaling normalisation, causal";
  static constexpr laws::promise promises{.causal = true, .streams = true};
  efficient_attention make(const shape&) { return {.normalisation = efficient_normalisation::scaling, .causal = true}; }
};

template <kfree_reconstruction::form_type Form>
struct kfree_case {
  static constexpr laws::promise promises{.permutable = Form != kfree_reconstruction::form_type::channel};
  kfree_reconstruction make(const shape&) { return {.form = Form, .scale = 0.25}; }
  static void reference(const kfree_reconstruction& m, const problem& p) { fovea::reference::prefill(m, p); }
};
struct kfree_efficient : kfree_case<kfree_reconstruction::form_type::efficient> {
  static constexpr const char* name = "kfree_reconstruction, efficient form";
};
struct kfree_channel : kfree_case<kfree_reconstruction::form_type::channel> {
  static constexpr const char* name = "kfree_reconstruction, channel form";
  bool accepts(const shape& s) const { return s.n == s.m && s.d == s.e; }
};

/// Segments of unequal length; more landmarks than some of the shapes have rows.
struct nystrom_case {
  static constexpr const char* name = "nystrom, 7 landmarks";
  static constexpr laws::promise promises{.c = 256};
  nystrom_attention make(const shape&) { return {.landmarks = 7}; }
  static void reference(const nystrom_attention& m, const problem& p) { fovea::reference::prefill(m, p); }
};
struct nystrom_skip : nystrom_case {
  static constexpr const char* name = "nystrom, 20 landmarks, a convolution of each head";
  std::vector<float> taps;
  bool accepts(const shape& s) const { return s.n == s.m; }
  nystrom_attention make(const shape& s) {
    taps = weights(s.H * 5, 8);
    return {.landmarks = 20, .iterations = 4, .scale = 0.3, .skip = bhnd<const float>(taps.data(), 1, s.H, 1, 5)};
  }
};

/// Every item has padding; the same lengths whatever the batch.
struct nystrom_padded : nystrom_case {
  static constexpr const char* name =
      "nystrom, 7 landmarks, a third of the keys and a quarter of the queries are padding";
  std::vector<std::int32_t> keys, queries;
  nystrom_attention make(const shape& s) {
    keys.assign(static_cast<std::size_t>(s.B), static_cast<std::int32_t>(s.m - s.m / 3));
    queries.assign(static_cast<std::size_t>(s.B), static_cast<std::int32_t>(s.n - s.n / 4));
    return {.landmarks = 7, .lengths = keys, .query_lengths = queries};
  }
};

using law_cases = std::tuple<per_head, shared_key_value, mean_pool, convolution, block_causal, block_causal_mean,
                             efficient_full, efficient_causal, scaling_full, scaling_causal, kfree_efficient,
                             kfree_channel, nystrom_case, nystrom_skip, nystrom_padded>;

}  // namespace

#define FOVEA_LAWS_OF "lowrank"
#include "laws/suite.hpp"
