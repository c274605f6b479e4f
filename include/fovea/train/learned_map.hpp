// SPDX-License-Identifier: MIT
#pragma once
/// @file  A feature map as a vector of numbers to be learned: its layout, its start, the map that it makes, the tensors it is saved as.
///
///   of one KV head with R query heads:   t2r, hedgehog   [R query heads][key], each W then b (feature_map::weights)
///                                        dijiang         ln |D| [r], t [r], for queries and keys alike
///                                        then            log_weight [R], query_gate [R][d], with a window only
///
/// Contract   t2r starts at a seeded uniform draw, Hedgehog at the identity (feature/learned.hpp), DiJiang at its own draw with D = 1.
///            Saved tensors are those that any_attention reads: W of all heads, per query head and per KV head.

#include <fovea/core/configuration.hpp>
#include <fovea/dijiang/features.hpp>
#include <fovea/feature/basic.hpp>
#include <fovea/feature/learned.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace train {

enum class map_kind : unsigned char { t2r, hedgehog, hedgehog_two, dijiang };
inline const char* name_of(map_kind k) {
  constexpr const char* names[] = {"t2r", "hedgehog", "hedgehog_two", "dijiang"};
  return names[static_cast<int>(k)];
}

class learned_map {
 public:
  /// `features`: 0 takes d for t2r and dijiang, 2 d for Hedgehog.
  learned_map(map_kind kind, isize d, isize heads, isize features, bool gated, std::uint64_t seed)
      : kind_(kind), d_(d), heads_(heads), gated_(gated), seed_(seed) {
    require(d >= 1 && heads >= 1 && features >= 0, "learned_map: d, heads, features are ", d, ", ", heads, ", ",
            features, "; wanted positive sizes");
    r_ = features > 0 ? features : hedgehog_like() ? 2 * d : d;
    require(!hedgehog_like() || r_ % 2 == 0, "features is ", r_, "; Hedgehog has pairs of them");
    require(kind != map_kind::dijiang || (r_ % d == 0 && r_ <= 64 * d), "features is ", r_,
            "; DiJiang takes a multiple of the width ", d);
    rows_ = hedgehog_like() ? r_ / 2 : r_;
    if (kind == map_kind::dijiang) drawn_ = make_dijiang_tables({.head_dim = d, .features = r_, .seed = seed});
  }

  map_kind kind() const { return kind_; }
  isize features() const { return r_; }
  isize heads() const { return heads_; }
  bool gated() const { return gated_; }
  bool log_scaled() const { return kind_ == map_kind::dijiang; }
  /// Learned numbers of one head on one side, as feature_map::weights counts them.
  isize of_head() const { return kind_ == map_kind::dijiang ? 2 * r_ : rows_ * (d_ + 1); }
  isize of_map() const { return kind_ == map_kind::dijiang ? 2 * r_ : (heads_ + 1) * of_head(); }
  isize size() const { return of_map() + (gated_ ? heads_ * (d_ + 1) : 0); }
  isize log_weight_at(isize h) const { return of_map() + h; }
  isize gate_at(isize h) const { return of_map() + heads_ + h * d_; }

  std::vector<float> start(isize kv_head) const {
    std::vector<float> x(static_cast<std::size_t>(size()), 0.0F);
    if (kind_ == map_kind::dijiang) {
      for (isize f = 0; f < r_; ++f) x[static_cast<std::size_t>(r_ + f)] = drawn_->t[static_cast<std::size_t>(f)];
      return x;
    }
    feature::random_source rng(seed_ + 1000003ULL * static_cast<std::uint64_t>(kv_head + 1));
    const double bound = 1 / std::sqrt(static_cast<double>(d_));
    for (isize h = 0; h <= heads_; ++h)
      for (isize j = 0; j < rows_; ++j)
        for (isize c = 0; c <= d_; ++c) {  // c == d: the bias
          float& w = x[static_cast<std::size_t>(h * of_head() + (c < d_ ? j * d_ + c : rows_ * d_ + j))];
          w = hedgehog_like()
                  ? (c == j % d_ ? static_cast<float>(std::sqrt(std::sqrt(1.0 / static_cast<double>(d_))) * 2) : 0.0F)
                  : static_cast<float>((2 * rng.uniform() - 1) * (c < d_ ? 2 * bound : bound));
        }
    return x;
  }

  /// The map itself, with query heads 0 ... R - 1 of KV head 0, and what it points to.
  struct made {
    projection query, key;
    std::shared_ptr<const dijiang_tables> tables;
    feature_map map = identity_map{};
  };
  made make(const std::vector<float>& x) const {
    made m;
    if (kind_ == map_kind::dijiang) {
      m.tables = tables_of(x);
      m.map = dijiang_map{m.tables.get()};
      return m;
    }
    const auto W = rows_of(x, 0, heads_, false), b = rows_of(x, 0, heads_, true), K = rows_of(x, heads_, 1, false),
               c = rows_of(x, heads_, 1, true);
    m.query = projection(W.data(), heads_, rows_, d_, b.data()), m.key = projection(K.data(), 1, rows_, d_, c.data());
    if (kind_ == map_kind::t2r)
      m.map = t2r{m.query.ref(), m.key.ref(), 1.0};
    else
      m.map = hedgehog{m.query.ref(), m.key.ref(),
                       kind_ == map_kind::hedgehog ? hedgehog_form::joint : hedgehog_form::separate};
    return m;
  }

  /// From the gradient by the numbers of each side (`derive` added to them) to that by x. D is learned as ln |D|.
  void gather(const std::vector<float>& x, const std::vector<float>& of_queries, const std::vector<float>& of_key,
              std::vector<float>& gradient) const {
    const auto w = static_cast<std::size_t>(of_head());
    if (kind_ != map_kind::dijiang) {
      std::copy(of_queries.begin(), of_queries.end(), gradient.begin());
      std::copy(of_key.begin(), of_key.end(), gradient.begin() + static_cast<std::ptrdiff_t>(of_queries.size()));
      return;
    }
    for (std::size_t i = 0; i < w; ++i) {
      float sum = of_key[i];
      for (isize h = 0; h < heads_; ++h) sum += of_queries[static_cast<std::size_t>(h) * w + i];
      gradient[i] = sum * (i < w / 2 ? std::exp(x[i]) : 1.0F);
    }
  }

  /// Tensors of all KV heads, one vector of numbers each, as any_attention reads them.
  arrays tensors(const std::vector<std::vector<float>>& x) const {
    const isize G = static_cast<isize>(x.size());
    arrays out;
    const auto put = [&](const char* name, std::vector<isize> dims, auto&& part) {
      std::vector<float> all;
      for (const auto& one : x) {
        const std::vector<float> piece = part(one);
        all.insert(all.end(), piece.begin(), piece.end());
      }
      out.emplace(name, array(std::move(dims), all));
    };
    if (kind_ == map_kind::dijiang) {
      put("D", {G, r_}, [&](const auto& one) { return tables_of(one)->D; });
      put("r", {G, r_}, [&](const auto& one) { return tables_of(one)->t; });
      out.emplace("signs", array({r_ / d_, d_}, drawn_->signs));
    } else {
      put("Wq", {G * heads_, rows_, d_}, [&](const auto& one) { return rows_of(one, 0, heads_, false); });
      put("bq", {G * heads_, 1, rows_}, [&](const auto& one) { return rows_of(one, 0, heads_, true); });
      put("Wk", {G, rows_, d_}, [&](const auto& one) { return rows_of(one, heads_, 1, false); });
      put("bk", {G, 1, rows_}, [&](const auto& one) { return rows_of(one, heads_, 1, true); });
    }
    if (!gated_) return out;
    const auto piece = [&](const std::vector<float>& one, isize first, isize count) {
      return std::vector<float>(one.begin() + first, one.begin() + first + count);
    };
    put("log_weight", {G * heads_}, [&](const auto& one) { return piece(one, log_weight_at(0), heads_); });
    put("query_gate", {G * heads_, d_}, [&](const auto& one) { return piece(one, gate_at(0), heads_ * d_); });
    return out;
  }

 private:
  bool hedgehog_like() const { return kind_ == map_kind::hedgehog || kind_ == map_kind::hedgehog_two; }
  std::vector<float> rows_of(const std::vector<float>& x, isize first, isize count, bool bias) const {
    std::vector<float> out;
    for (isize h = first; h < first + count; ++h) {
      const auto at = x.begin() + h * of_head() + (bias ? rows_ * d_ : 0);
      out.insert(out.end(), at, at + (bias ? rows_ : rows_ * d_));
    }
    return out;
  }
  std::shared_ptr<const dijiang_tables> tables_of(const std::vector<float>& x) const {
    dijiang_options o{.head_dim = d_, .features = r_};
    o.signs = drawn_->signs;
    o.D.resize(static_cast<std::size_t>(r_)), o.t.assign(x.begin() + r_, x.begin() + 2 * r_);
    for (std::size_t f = 0; f < o.D.size(); ++f) o.D[f] = std::exp(x[f]);
    return make_dijiang_tables(o);
  }

  map_kind kind_;
  isize d_, heads_, r_ = 0, rows_ = 0;
  bool gated_;
  std::uint64_t seed_;
  std::shared_ptr<const dijiang_tables> drawn_;
};

}  // namespace train
}  // namespace FOVEA_ABI
}  // namespace fovea
