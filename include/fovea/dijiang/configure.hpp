// SPDX-License-Identifier: MIT
#pragma once
/// @file  dijiang_attention from a configuration.
///
/// Keys       form ("paper" | "released" | "unbiased"), causal, normalise, blocks (features / head_dim), head_dim, features, seed,
///            sampling ("monte_carlo" | "stratified" | "sobol" | "halton"), gamma (one number, or one per KV head).
/// Tensors    t, or r in the unbiased form, [features] or [KV heads, features]; signs [blocks, head_dim]; D as t; gamma;
///            log_d1 [H, positions], log_d2 [KV heads, positions].
/// Defaults   those of dijiang_options. Where neither head_dim nor a tensor tells the width, tables are drawn for the width of the
///            first call (once for each width that is seen, by the check that precedes a call), from the same seed.

#include <map>
#include <mutex>

#include <fovea/core/any.hpp>
#include <fovea/dijiang.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// A DiJiang mechanism whose head_dim is that of the call.
struct dijiang_of_any_width {
  static constexpr const char* name = "dijiang";

  struct made_so_far {
    std::mutex mutex;
    std::map<isize, dijiang_attention> by_width;
  };
  dijiang_options options;
  isize blocks = 1;
  std::shared_ptr<made_so_far> made = std::make_shared<made_so_far>();

  const dijiang_attention& of(isize d) const {
    std::lock_guard lock(made->mutex);
    const auto found = made->by_width.find(d);
    if (found != made->by_width.end()) return found->second;
    dijiang_options o = options;
    o.head_dim = d;
    if (o.features == 0) o.features = blocks * d;
    return made->by_width.emplace(d, dijiang_attention::make(o)).first->second;
  }
  void check(const problem& p) const { of(p.q.width).check(p); }
  std::size_t workspace_size(const shape& s, int threads) const { return of(s.d).workspace_size(s, threads); }
  void prefill(exec_ref exec, const problem& p, arena scratch) const { of(p.q.width).prefill(exec, p, scratch); }
  bool streaming() const { return options.is_causal; }
  state make_state(const shape& s) const { return of(s.d).make_state(s); }
  std::uint64_t tag() const {
    return detail::fingerprint{}.text("dijiang of any width").number(static_cast<double>(options.seed)).value;
  }
  void check(const problem& p, const state& s) const { of(p.q.width).check(p, s); }
  void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const {
    of(p.q.width).prefill(exec, p, s, scratch);
  }
  void merge(state& earlier, const state& later) const { of(earlier.sizes().d).merge(earlier, later); }
  double macs(const shape& s) const { return of(s.d).macs(s); }
  double step_macs(const shape& s) const { return of(s.d).step_macs(s); }
  std::size_t state_bytes(const shape& s) const { return of(s.d).state_bytes(s); }
  bool trained() const { return false; }
};

/// Returns the blocks of features; head_dim stays 0 where nothing tells it.
inline isize configure_dijiang_sizes(configuration_reader& c, dijiang_options& o, const array* t, const array* signs) {
  isize blocks = c.integer("blocks", signs != nullptr && signs->rank() == 2 ? signs->dim(0) : 0);
  o.head_dim = c.integer("head_dim", 0), o.features = c.integer("features", 0);
  require(blocks >= 0 && blocks <= 64 && o.head_dim >= 0 && o.features >= 0, "blocks, head_dim, features are ", blocks,
          ", ", o.head_dim, ", ", o.features, "; wanted 0 to 64 blocks and no negative size");
  const bool given = blocks > 0;
  if (!given) blocks = 1;
  if (o.features == 0 && t != nullptr) o.features = t->dim(-1);
  if (o.head_dim == 0 && signs != nullptr) o.head_dim = signs->dim(-1);
  if (o.head_dim == 0 && t != nullptr) o.head_dim = o.features / blocks;
  if (o.head_dim == 0) return blocks;
  if (o.features == 0) o.features = o.head_dim * blocks;
  require(!given || o.features == blocks * o.head_dim, "blocks is ", blocks, " and features is ", o.features,
          "; with head_dim = ", o.head_dim, " wanted features = ", blocks * o.head_dim);
  return blocks;
}

inline void configure_dijiang_gains(configuration_reader& c, dijiang_options& o) {
  const array *d1 = c.tensor("log_d1"), *d2 = c.tensor("log_d2"), *gamma = c.tensor("gamma");
  o.gamma = c.numbers("gamma");
  require(gamma == nullptr || o.gamma.empty(), "gamma was given as a key and as a tensor; wanted one of them");
  if (gamma != nullptr) o.gamma = gamma->doubles();
  require((d1 == nullptr) == (d2 == nullptr), "tensors log_d1 and log_d2 go together; only one was given");
  if (d1 == nullptr) return;
  require(d1->rank() >= 1 && d1->dim(-1) == d2->dim(-1) && d1->size() > 0, "log_d1 is ", d1->describe(),
          " and log_d2 is ", d2->describe(), "; wanted [heads, positions] of one length");
  o.log_d1 = d1->floats(), o.log_d2 = d2->floats(), o.positions = d1->dim(-1);
}

}  // namespace detail

inline any_attention configure_dijiang(configuration_reader& c) {
  dijiang_options o;
  o.form = c.choice(
      "form",
      {{"paper", dijiang_form::paper}, {"released", dijiang_form::released}, {"unbiased", dijiang_form::unbiased}},
      o.form);
  o.sampling = c.choice("sampling",
                        {{"monte_carlo", dijiang_sampling::monte_carlo},
                         {"stratified", dijiang_sampling::stratified},
                         {"sobol", dijiang_sampling::sobol},
                         {"halton", dijiang_sampling::halton}},
                        o.sampling);
  o.is_causal = c.flag("causal", true);
  if (c.has("normalise")) o.normalise = c.flag("normalise", true);
  const isize seed = c.integer("seed", 1);
  require(seed >= 0, "seed is ", seed, "; it must not be negative");
  o.seed = static_cast<std::uint64_t>(seed);
  const array *t = c.tensor(o.form == dijiang_form::unbiased ? "r" : "t"), *signs = c.tensor("signs"),
              *D = c.tensor("D");
  const isize blocks = detail::configure_dijiang_sizes(c, o, t, signs);
  if (t != nullptr) o.t = t->floats();
  if (signs != nullptr) o.signs = signs->floats();
  if (D != nullptr) o.D = D->floats();
  detail::configure_dijiang_gains(c, o);
  if (o.head_dim > 0) return any_attention::hold(dijiang_attention::make(o));
  require(D == nullptr && o.log_d1.empty(), "dijiang: D, log_d1 and log_d2 were learned for one head_dim; give it");
  detail::check_dijiang_values(o);
  return any_attention::hold(detail::dijiang_of_any_width{o, blocks});
}

}  // namespace FOVEA_ABI
}  // namespace fovea
