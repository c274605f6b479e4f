// SPDX-License-Identifier: MIT
#pragma once
/// @file  A learned map merged into the model's own query and key projections: the wide queries and keys are never made.
///
///   q = P h + c,   phi(q) = ReLU(s W q + b) = ReLU((s W P) h + (s W c + b))        T2R: then relu_map takes the merged rows
///                  phi(q) = softmax pair of W q + b                                Hedgehog: then hedgehog{} does, in the same form
///                  phi(q) = e^{...} of signs * q                                   DiJiang: then one made with signs of 1
///
///   merged_projection q = merge_query_map(map, H, G, P, c);     rows q.weight [H r, model] and q.bias [H r] for the model's layer
///   linear_attention m{.map = relu_map{}};                      over merged q and k, both r wide
///
/// Contract   P [1, heads, d, model] are the rows of the model's projection, c [heads d] its bias or null; heads is H for queries, G
///            for keys. Not where something stands between projection and map: RoPE or a norm of q and k makes the merged map wrong
///            (W R_t P depends on the position t).
/// Numerics   products in double, rounded once to float: outputs differ from the unmerged ones by rounding of float only.
/// Source     T2R: Kasai et al., Finetuning Pretrained Transformers into RNNs, arXiv 2103.13076, figure 1.

#include <fovea/feature/learned.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// phi(x) = max(x, 0), for rows that a merged projection has made. r = d.
struct relu_map {
  static constexpr bool log_scaled = false;
  isize features(isize d) const { return d; }
  isize scratch(isize) const { return 0; }
  void check(const shape&) const {}
  void fingerprint(detail::fingerprint& f) const { f.text("relu"); }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc*) const noexcept {
    for (isize t = 0; t < b.rows; ++t)
      feature::row_relu<Arch, Acc>(b.x + t * b.x_stride, static_cast<const Acc*>(nullptr), b.width, Acc(1),
                                   b.out + t * b.out_stride);
  }
  isize derive_scratch(isize) const { return 0; }
  isize weights(isize) const { return 0; }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc*) const noexcept {
    for (isize t = 0; t < b.rows; ++t)
      for (isize c = 0; c < b.width; ++c)
        g.dx[t * g.dx_stride + c] = b.x[t * b.x_stride + c] > 0 ? g.dphi[t * g.dphi_stride + c] : Acc(0);
  }
  double define(const feature_site&, const double* x, isize d, double* out) const {
    for (isize c = 0; c < d; ++c) out[c] = x[c] > 0 ? x[c] : 0.0;
    return 0.0;
  }
};

struct merged_projection {
  isize heads = 0, rows = 0, model = 0;
  std::vector<float> weight;  ///< [heads * rows][model]
  std::vector<float> bias;    ///< [heads * rows]; empty: none
};

namespace detail {

/// (scale W P, scale W c + b) head by head; `pick(h)` names the head of W.
template <class Pick>
merged_projection merge_projection(projection_ref w, double scale, const view<const float>& P, const float* c,
                                   Pick&& pick) {
  require(static_cast<bool>(w), "merge_map: the map has no weights; there is nothing to merge");
  require(P.data != nullptr && P.batch == 1 && P.heads >= 1 && P.length == w.width() && P.width >= 1,
          "merge_map: the projection is [", P.batch, ", ", P.heads, ", ", P.length, ", ", P.width,
          "]; wanted [1, heads, ", w.width(), ", model]");
  merged_projection out{P.heads, w.rows(), P.width, {}, {}};
  out.weight.resize(static_cast<std::size_t>(P.heads * w.rows() * P.width));
  const bool biased = c != nullptr || w.bias<double>(0) != nullptr;
  if (biased) out.bias.resize(static_cast<std::size_t>(P.heads * w.rows()));
  std::vector<double> row(static_cast<std::size_t>(w.width())), made(static_cast<std::size_t>(w.rows()));
  for (isize h = 0; h < P.heads; ++h) {
    const isize head = pick(h);
    const double* b = w.bias<double>(w.pick(head));
    for (isize m = 0; m < P.width + (biased ? 1 : 0); ++m) {  // a column of the projection, and then its bias
      for (isize x = 0; x < w.width(); ++x)
        row[static_cast<std::size_t>(x)] = m < P.width    ? static_cast<double>(P.row(0, h, x)[m])
                                           : c != nullptr ? static_cast<double>(c[h * w.width() + x])
                                                          : 0.0;
      w.define(head, row.data(), scale, made.data());
      for (isize j = 0; j < w.rows(); ++j) {
        const double own =
            b != nullptr && m < P.width ? made[static_cast<std::size_t>(j)] - b[j] : made[static_cast<std::size_t>(j)];
        if (m < P.width)
          out.weight[static_cast<std::size_t>((h * w.rows() + j) * P.width + m)] = static_cast<float>(own);
        else
          out.bias[static_cast<std::size_t>(h * w.rows() + j)] = static_cast<float>(own);
      }
    }
  }
  return out;
}

inline merged_projection merge_side(projection_ref query, projection_ref key, bool is_key, double scale, isize H,
                                    isize G, const view<const float>& P, const float* c) {
  require(G >= 1 && H >= G && H % G == 0 && P.heads == (is_key ? G : H), "merge_map: the projection makes ", P.heads,
          " heads for H, G = ", H, ", ", G, "; wanted one for each ", is_key ? "KV" : "query", " head");
  return merge_projection(is_key ? key : query, scale, P, c, [&](isize h) {
    return is_key || query.table != key.table ? h : h / (H / G);  // as detail::pair_head
  });
}

}  // namespace detail

/// T2R. Then relu_map.
inline merged_projection merge_query_map(const t2r& map, isize H, isize G, const view<const float>& P,
                                         const float* c = nullptr) {
  return detail::merge_side(map.query, map.key, false, map.query_scale, H, G, P, c);
}
inline merged_projection merge_key_map(const t2r& map, isize H, isize G, const view<const float>& P,
                                       const float* c = nullptr) {
  return detail::merge_side(map.query, map.key, true, 1.0, H, G, P, c);
}
/// Hedgehog. Then hedgehog{{}, {}, map.form}, without weights.
inline merged_projection merge_query_map(const hedgehog& map, isize H, isize G, const view<const float>& P,
                                         const float* c = nullptr) {
  return detail::merge_side(map.query, map.key, false, 1.0, H, G, P, c);
}
inline merged_projection merge_key_map(const hedgehog& map, isize H, isize G, const view<const float>& P,
                                       const float* c = nullptr) {
  return detail::merge_side(map.query, map.key, true, 1.0, H, G, P, c);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
