// SPDX-License-Identifier: MIT
/// @file  The laws of hybrid_attention: patterns, given masks, selections, pooled tokens.
///
/// A state is promised where the contract gives it the same answer as one prefill: patterns, given masks, selection for each query.

#include <fovea/hybrid.hpp>
#include <fovea/hybrid/reference.hpp>

#include "laws/laws.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;

constexpr laws::promise causal_stream{.causal = true, .lse = true, .streams = true, .c = 64};
constexpr laws::promise causal_only{.causal = true, .lse = true, .c = 64};
constexpr laws::promise both_ways{.lse = true, .c = 64};

struct hybrid_base {
  static void reference(const hybrid_attention& m, const problem& p) { fovea::reference::prefill(m, p); }
};

template <hsa_mode Mode>
struct pattern_case : hybrid_base {
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true, .logits = true};
  hybrid_attention make(const shape&) { return hybrid_attention::hsa(Mode, 12); }
};
struct local_case : pattern_case<hsa_mode::local> {
  static constexpr const char* name = "hybrid, local pattern";
};
struct strided_case : pattern_case<hsa_mode::strided> {
  static constexpr const char* name = "hybrid, strided pattern";
};
struct sparse_case : pattern_case<hsa_mode::sparse> {
  static constexpr const char* name = "hybrid, sparse pattern";
};
struct fixed_case : pattern_case<hsa_mode::fixed> {
  static constexpr const char* name = "hybrid, fixed pattern";
};

/// A random mask, its own for each KV head, with whatever is done about the blocks left out.
struct given_base : hybrid_base {
  std::vector<std::uint8_t> table;
  hybrid_attention given(const shape& s, isize block_q, isize block_k, bool is_causal, compensation rest) {
    const isize rows = ceil_div(s.n, block_q), columns = ceil_div(s.m, block_k);
    test::random r(5);
    table.resize(static_cast<std::size_t>(s.G * rows * columns));
    for (auto& x : table) x = r.coin(0.4);
    auto m = hybrid_attention::over(bhnd<const std::uint8_t>(table.data(), 1, s.G, rows, columns), block_q, block_k,
                                    is_causal);
    m.compensate = rest;
    return m;
  }
};
struct given_causal : given_base {
  static constexpr const char* name = "hybrid, given mask 16 x 8, causal, zeroth";
  static constexpr laws::promise promises{
      .causal = true, .lse = true, .streams = true, .logits = true, .c = 64};  // one maximum for exact and pooled
  hybrid_attention make(const shape& s) { return given(s, 16, 8, true, compensation::zeroth); }
  bool accepts(const shape& s) const {
    return s.m >= s.n;
  }  // a row that sees nothing but pooled blocks has something to see
};
struct given_full : given_base {
  static constexpr const char* name = "hybrid, given mask 5 x 12, cumulant";
  static constexpr laws::promise promises = both_ways;
  hybrid_attention make(const shape& s) { return given(s, 5, 12, false, compensation::cumulant); }
};
struct given_drop : given_base {
  static constexpr const char* name = "hybrid, given mask 64 x 64";
  static constexpr laws::promise promises = both_ways;
  hybrid_attention make(const shape& s) { return given(s, 64, 64, false, compensation::none); }
};

hybrid_attention selected(block_selector select, isize block_q, compensation rest) {
  return {.select = select,
          .block_q = block_q,
          .block_k = 8,
          .is_causal = true,
          .budget = 0.3,
          .at_least = 0,
          .first = 4,
          .window = 10,
          .compensate = rest};
}
struct moba_case : hybrid_base {
  static constexpr const char* name = "hybrid, MoBA";
  static constexpr laws::promise promises = causal_stream;
  hybrid_attention make(const shape&) { return hybrid_attention::moba(8, 3); }
};
template <block_selector Select, compensation Rest>
struct each_query : hybrid_base {
  static constexpr laws::promise promises = causal_stream;
  hybrid_attention make(const shape&) { return selected(Select, 1, Rest); }
};
struct int8_each : each_query<block_selector::int8, compensation::zeroth> {
  static constexpr const char* name = "hybrid, int8 selection for each query, zeroth";
};
struct variance_each : each_query<block_selector::variance, compensation::cumulant> {
  static constexpr const char* name = "hybrid, variance selection for each query, cumulant";
};
struct bound_each : each_query<block_selector::bound, compensation::none> {
  static constexpr const char* name = "hybrid, bound selection for each query";
};
struct sampled_each : hybrid_base {
  static constexpr const char* name = "hybrid, int8 selection for each query, two sampled keys a block";
  static constexpr laws::promise promises = causal_stream;
  hybrid_attention make(const shape&) {
    hybrid_attention m = selected(block_selector::int8, 1, compensation::sampled);
    m.parts = 2, m.seed = 9;
    return m;
  }
};
template <block_selector Select, compensation Rest>
struct shared : hybrid_base {
  static constexpr laws::promise promises = causal_only;
  hybrid_attention make(const shape&) { return selected(Select, 7, Rest); }
};
struct exact_shared : shared<block_selector::exact, compensation::zeroth> {
  static constexpr const char* name = "hybrid, exact selection shared by 7 rows, zeroth";
};
struct linear_shared : shared<block_selector::mean, compensation::linear> {
  static constexpr const char* name = "hybrid, mean selection shared by 7 rows, linear rest";
};
struct int4_shared : shared<block_selector::int4, compensation::none> {
  static constexpr const char* name = "hybrid, int4 selection shared by 7 rows";
};
struct two_way : hybrid_base {
  static constexpr const char* name = "hybrid, mean selection, not causal, shared by 80 rows";
  static constexpr laws::promise promises = both_ways;
  hybrid_attention make(const shape&) {
    hybrid_attention m = selected(block_selector::mean, 80, compensation::zeroth);
    m.is_causal = false;
    return m;
  }
};
/// The selection's scores are those of the pooled tokens: query blocks of a whole vector, and of rows that share one with others.
struct mean_pooled : hybrid_base {
  static constexpr const char* name = "hybrid, mean selection shared by 16 rows and the group, zeroth, kept keys";
  static constexpr laws::promise promises = causal_only;
  hybrid_attention make(const shape&) {
    hybrid_attention m = selected(block_selector::mean, 16, compensation::zeroth);
    m.keep_small = 1.0 / 16, m.share_group = true;
    return m;
  }
};
struct mean_apart : shared<block_selector::mean, compensation::zeroth> {
  static constexpr const char* name = "hybrid, mean selection shared by 7 rows, zeroth";
};
struct defaults : hybrid_base {
  static constexpr const char* name = "hybrid, default recipe, causal, floor of 32 keys";
  static constexpr laws::promise promises = causal_only;
  hybrid_attention make(const shape&) { return {.is_causal = true, .at_least = 32, .window = 20}; }
};

using law_cases = std::tuple<local_case, strided_case, sparse_case, fixed_case, given_causal, given_full, given_drop,
                             moba_case, int8_each, variance_each, bound_each, sampled_each, exact_shared, linear_shared,
                             int4_shared, two_way, mean_pooled, mean_apart, defaults>;

}  // namespace

#define FOVEA_LAWS_OF "hybrid"
#include "laws/suite.hpp"

TEST_CASE("hybrid: what a stretch will keep changes no row before its end") {
  const isize n = 192, d = 8;  // stretches of 64; query block [144, 160) lies in the last one
  for (const block_selector select : {block_selector::mean, block_selector::variance, block_selector::int8})
    for (std::uint64_t seed = 1; seed <= 12; ++seed) {
      test::random r(seed);
      const test::tensor q = test::normal(r, dtype::f32, 1, 1, n, d, test::layout::bhnd, 2.0);
      test::tensor k = test::normal(r, dtype::f32, 1, 1, n, d), v = test::normal(r, dtype::f32, 1, 1, n, d);
      for (isize c = 0; c < d; ++c) k.set(0, 0, 130, c, 10 * k.get(0, 0, 130, c)), v.set(0, 0, 130, c, 1e-3);
      const hybrid_attention m = {.select = select, .is_causal = true, .budget = 0.2, .at_least = 0, .window = 8};
      test::tensor before = test::unwritten(dtype::f32, 1, 1, n, d), after = test::unwritten(dtype::f32, 1, 1, n, d);
      prefill(serial, m, q, k, v, before);
      for (isize c = 0; c < d; ++c) v.set(0, 0, 190, c, 0.0);  // kept in place of key 130
      prefill(serial, m, q, k, v, after);
      bool same = true;
      for (isize i = 0; i < 160; ++i)
        for (isize c = 0; c < d; ++c) same = same && before.get(0, 0, i, c) == after.get(0, 0, i, c);
      CHECK(same);
    }
}
