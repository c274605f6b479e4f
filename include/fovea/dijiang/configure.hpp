// SPDX-License-Identifier: MIT
#pragma once
/// @file  dijiang_attention from a configuration.
///
/// Keys       form ("paper" | "released" | "unbiased"), causal, normalise, blocks (features / head_dim), head_dim, features, seed,
///            sampling ("monte_carlo" | "stratified" | "sobol" | "halton"), gamma (one number, or one per KV head).
/// Tensors    t, or r in the unbiased form, [features] or [KV heads, features]; signs [blocks, head_dim]; D as t; gamma;
///            log_d1 [H, positions], log_d2 [KV heads, positions].
/// Defaults   those of dijiang_options. head_dim need not be given with signs, or with t and blocks.

#include <fovea/core/any.hpp>
#include <fovea/dijiang.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline void configure_dijiang_sizes(configuration_reader& c, dijiang_options& o, const array* t, const array* signs) {
  const isize blocks = c.integer("blocks", signs != nullptr && signs->rank() == 2 ? signs->dim(0) : 0);
  o.head_dim = c.integer("head_dim", 0), o.features = c.integer("features", 0);
  require(blocks >= 0 && o.head_dim >= 0 && o.features >= 0, "blocks, head_dim, features are ", blocks, ", ", o.head_dim, ", ", o.features, "; they must not be negative");
  if (o.features == 0 && t != nullptr) o.features = t->dim(-1);
  if (o.head_dim == 0 && signs != nullptr) o.head_dim = signs->dim(-1);
  if (o.head_dim == 0 && o.features > 0) o.head_dim = o.features / (blocks > 0 ? blocks : 1);
  require(o.head_dim >= 1, "dijiang needs head_dim, or tensors (t, r, signs) that show it");
  if (o.features == 0) o.features = o.head_dim * (blocks > 0 ? blocks : 1);
  require(blocks == 0 || o.features == blocks * o.head_dim, "blocks is ", blocks, " and features is ", o.features, "; with head_dim = ", o.head_dim, " wanted features = ",
          blocks * o.head_dim);
}

inline void configure_dijiang_gains(configuration_reader& c, dijiang_options& o) {
  const array *d1 = c.tensor("log_d1"), *d2 = c.tensor("log_d2"), *gamma = c.tensor("gamma");
  o.gamma = c.numbers("gamma");
  require(gamma == nullptr || o.gamma.empty(), "gamma was given as a key and as a tensor; wanted one of them");
  if (gamma != nullptr) o.gamma = gamma->doubles();
  require((d1 == nullptr) == (d2 == nullptr), "tensors log_d1 and log_d2 go together; only one was given");
  if (d1 == nullptr) return;
  require(d1->rank() >= 1 && d1->dim(-1) == d2->dim(-1) && d1->size() > 0, "log_d1 is ", d1->describe(), " and log_d2 is ", d2->describe(), "; wanted [heads, positions] of one length");
  o.log_d1 = d1->floats(), o.log_d2 = d2->floats(), o.positions = d1->dim(-1);
}

}  // namespace detail

inline any_attention configure_dijiang(configuration_reader& c) {
  dijiang_options o;
  o.form = c.choice("form", {{"paper", dijiang_form::paper}, {"released", dijiang_form::released}, {"unbiased", dijiang_form::unbiased}}, o.form);
  o.sampling = c.choice("sampling",
                        {{"monte_carlo", dijiang_sampling::monte_carlo}, {"stratified", dijiang_sampling::stratified}, {"sobol", dijiang_sampling::sobol},
                         {"halton", dijiang_sampling::halton}},
                        o.sampling);
  o.is_causal = c.flag("causal", true);
  if (c.has("normalise")) o.normalise = c.flag("normalise", true);
  const isize seed = c.integer("seed", 1);
  require(seed >= 0, "seed is ", seed, "; it must not be negative");
  o.seed = static_cast<std::uint64_t>(seed);
  const array *t = c.tensor(o.form == dijiang_form::unbiased ? "r" : "t"), *signs = c.tensor("signs"), *D = c.tensor("D");
  detail::configure_dijiang_sizes(c, o, t, signs);
  if (t != nullptr) o.t = t->floats();
  if (signs != nullptr) o.signs = signs->floats();
  if (D != nullptr) o.D = D->floats();
  detail::configure_dijiang_gains(c, o);
  return any_attention::hold(dijiang_attention::make(o));
}

}  // namespace FOVEA_ABI
}  // namespace fovea
