// SPDX-License-Identifier: MIT
#pragma once
/// @file  A feature map from a configuration: key "map" and the weights it names.
///
///   map              tensors                                              keys
///   identity, elu1, relu
///   t2r              W [H, r, d] or [r, d], b; or Wq, Wk, bq, bk          query_scale (default d^-1/2 with W, 1 with Wq and Wk)
///   mlp              W1, b1, W2, b2; or W1q, b1q, W2q, b2q, W1k, ...      query_scale (the same)
///   hedgehog         W, b; or Wq, Wk, bq, bk; none: the identity          (joint softmax)
///   hedgehog_two     the same                                             (two softmaxes)
///   hedgehog_exp     the same                                             (exponentials)
///   favor            W [r, d]                                             feature_eps (1e-4)
///   favor_plain      W [r, d]
///   cosformer                                                             M
///   taylor2, taylor2_packed, square, square_packed
///
/// Contract   without W, t2r and favor draw their weights: keys head_dim, features (default head_dim) and seed (default 1); such a map
///            says that it is untrained. A map holds pointers: `keep_alive` owns what they point to.

#include <optional>

#include <fovea/core/configuration.hpp>
#include <fovea/feature/basic.hpp>
#include <fovea/feature/cosformer.hpp>
#include <fovea/feature/favor.hpp>
#include <fovea/feature/learned.hpp>
#include <fovea/feature/merge_map.hpp>
#include <fovea/feature/polynomial.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

namespace detail {

/// A weight [heads, r, d] or [r, d] and its bias (any shape that ends in r) as a projection; empty if the weight is absent.
inline projection configure_projection(configuration_reader& c, const std::string& w_name, const std::string& b_name) {
  const array* w = c.tensor(w_name);
  const array* b = c.tensor(b_name);
  if (w == nullptr) {
    require(b == nullptr, "tensor ", b_name, " was given without ", w_name);
    return {};
  }
  require(w->rank() == 2 || w->rank() == 3, "tensor ", w_name, " is ", w->describe(),
          "; wanted [r, d], or [heads, r, d]");
  const isize heads = w->dim(-3), r = w->dim(-2), d = w->dim(-1);
  require(b == nullptr || (b->dim(-1) == r && b->size() == heads * r), "tensor ", b_name, " is ",
          b == nullptr ? "" : b->describe(), "; ", w_name, " is ", w->describe(), " and takes ", heads, " x ", r,
          " numbers");
  const std::vector<float> weights = w->floats(), bias = b == nullptr ? std::vector<float>{} : b->floats();
  return {weights.data(), heads, r, d, b == nullptr ? nullptr : bias.data()};
}

struct projection_pair {
  projection query, key;
  bool tied = false;
};
/// Either one weight for both sides (`stem`), or one a side (`stem` + q, `stem` + k).
inline projection_pair configure_pair(configuration_reader& c, const std::string& w, const std::string& b) {
  const projection both = configure_projection(c, w, b);
  const projection query = configure_projection(c, w + "q", b + "q"), key = configure_projection(c, w + "k", b + "k");
  require(static_cast<bool>(query.ref()) == static_cast<bool>(key.ref()), "tensors ", w, "q and ", w,
          "k go together; only one was given");
  require(!both.ref() || !query.ref(), "tensors ", w, " and ", w, "q, ", w,
          "k were given; the map takes one or the other");
  if (both.ref()) return {both, both, true};
  return {query, key, false};
}
struct drawn_sizes {
  isize d, r;
  std::uint64_t seed;
};
inline drawn_sizes configure_drawn(configuration_reader& c, const char* map) {
  const isize d = c.integer("head_dim", 0), r = c.integer("features", d), seed = c.integer("seed", 1);
  require(d >= 1 && r >= 1, "map ", map, " without weights needs head_dim and features >= 1 to draw them; they are ", d,
          " and ", r);
  return {d, r, static_cast<std::uint64_t>(seed)};
}

struct configured_weights {
  projection_pair first, second;
};

}  // namespace detail

/// Empty if the configuration names no map.
inline std::optional<feature_map> configure_map(configuration_reader& c, std::shared_ptr<const void>& keep_alive) {
  enum class kind {
    none,
    identity,
    elu1,
    relu,
    t2r,
    mlp,
    hedgehog,
    hedgehog_two,
    hedgehog_exp,
    favor,
    favor_plain,
    cosformer,
    taylor2,
    taylor2_packed,
    square,
    square_packed
  };
  const kind k = c.choice<kind>("map",
                                {{"identity", kind::identity},
                                 {"elu1", kind::elu1},
                                 {"relu", kind::relu},
                                 {"t2r", kind::t2r},
                                 {"mlp", kind::mlp},
                                 {"hedgehog", kind::hedgehog},
                                 {"hedgehog_two", kind::hedgehog_two},
                                 {"hedgehog_exp", kind::hedgehog_exp},
                                 {"favor", kind::favor},
                                 {"favor_plain", kind::favor_plain},
                                 {"cosformer", kind::cosformer},
                                 {"taylor2", kind::taylor2},
                                 {"taylor2_packed", kind::taylor2_packed},
                                 {"square", kind::square},
                                 {"square_packed", kind::square_packed}},
                                kind::none);
  switch (k) {
    case kind::none: return std::nullopt;
    case kind::identity: return identity_map{};
    case kind::elu1: return elu1{};
    case kind::relu: return relu_map{};
    case kind::cosformer: return cosformer{c.integer("M", 0)};
    case kind::taylor2: return taylor2{};
    case kind::taylor2_packed: return taylor2{true};
    case kind::square: return square_map{};
    case kind::square_packed: return square_map{true};
    default: break;
  }
  auto weights = std::make_shared<detail::configured_weights>();
  keep_alive = weights;
  auto& [first, second] = *weights;
  if (k == kind::mlp) {
    first = detail::configure_pair(c, "W1", "b1"), second = detail::configure_pair(c, "W2", "b2");
    require(static_cast<bool>(first.key.ref()) && static_cast<bool>(second.key.ref()),
            "map mlp needs tensors W1 and W2 (or W1q, W1k, W2q, W2k)");
    const double scale =
        c.number("query_scale", first.tied ? 1 / std::sqrt(static_cast<double>(first.key.ref().width())) : 1.0);
    return mlp_map{first.query.ref(), second.query.ref(), first.key.ref(), second.key.ref(), scale};
  }
  first = detail::configure_pair(c, "W", "b");
  if (k == kind::favor || k == kind::favor_plain) {
    if (!first.key.ref()) {
      const auto [d, r, seed] = detail::configure_drawn(c, "favor");
      const auto w = feature::orthogonal_directions(r, d, seed);
      first.key = projection(w.data(), 1, r, d, nullptr, false);
    } else {
      require(first.tied, "map favor takes one tensor W for queries and keys; Wq and Wk were given");
    }
    if (k == kind::favor_plain) return favor_plain{first.key.ref()};
    return favor{first.key.ref(), c.number("feature_eps", 1e-4)};
  }
  if (k == kind::t2r) {
    if (!first.key.ref()) {
      const auto [d, r, seed] = detail::configure_drawn(c, "t2r");
      first.query = first.key = projection::random(1, r, d, seed);
      first.tied = true;
    }
    return t2r{first.query.ref(), first.key.ref(),
               c.number("query_scale", first.tied ? 1 / std::sqrt(static_cast<double>(first.key.ref().width())) : 1.0)};
  }
  const auto form = k == kind::hedgehog       ? hedgehog_form::joint
                    : k == kind::hedgehog_two ? hedgehog_form::separate
                                              : hedgehog_form::paired;
  return hedgehog{first.query.ref(), first.key.ref(), form};
}

}  // namespace FOVEA_ABI
}  // namespace fovea
