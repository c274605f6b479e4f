// SPDX-License-Identifier: MIT
#pragma once
/// @file  Weights of a learned map: y = W x + b, one matrix for all heads or one a head, held ready for blocks of rows.
///
///   projection w(W, heads, r, d, b);     W [heads, r, d], b [heads, r] or null, both f32; heads = 1 serves every head
///   t2r map{.query = w.ref(), .key = w.ref()};
///
/// Contract   `projection` owns a transposed copy of the weights ([heads][d][r], in float and in double) that its copies share;
///            a `projection_ref` points to it and is what the trivially copyable maps hold: keep the projection alive.
///            Weights that were drawn rather than learned say so (`trained`), and so do the maps and mechanisms that use them.
///            Query weights are per query head or shared, key weights per KV head or shared; one projection that serves both
///            sides is per KV head or shared.

#include <cmath>
#include <memory>
#include <vector>

#include <fovea/core/contract.hpp>
#include <fovea/feature/feature_map.hpp>
#include <fovea/feature/random.hpp>
#include <fovea/tile/gemm.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

namespace detail {
struct projection_table {
  isize heads = 1, rows = 0, width = 0;
  bool has_bias = false, trained = true;
  std::vector<float> w32, b32;  // [heads][width][rows], [heads][rows]
  std::vector<double> w64, b64;
  template <class Acc>
  const Acc* weights(isize head) const {
    const auto at = static_cast<std::size_t>(head * rows * width);
    if constexpr (std::is_same_v<Acc, double>)
      return w64.data() + at;
    else
      return w32.data() + at;
  }
  template <class Acc>
  const Acc* bias(isize head) const {
    const auto at = static_cast<std::size_t>(head * rows);
    if (!has_bias) return nullptr;
    if constexpr (std::is_same_v<Acc, double>)
      return b64.data() + at;
    else
      return b32.data() + at;
  }
};
}  // namespace detail

struct projection_ref {
  const detail::projection_table* table = nullptr;

  explicit operator bool() const { return table != nullptr; }
  isize heads() const { return table->heads; }
  isize rows() const { return table->rows; }
  isize width() const { return table->width; }
  double macs() const { return static_cast<double>(rows() * width()); }
  bool trained() const { return table->trained; }
  isize pick(isize head) const { return table->heads == 1 ? 0 : head; }

  /// out [rows of b][r] = x W^T, without the bias.
  template <class Arch, class Acc>
  void apply(isize head, const Acc* x, isize x_stride, isize count, Acc* out, isize out_stride) const noexcept {
    tile::gemm<Arch, Acc>(count, table->rows, table->width, x, x_stride, isize{1}, table->weights<Acc>(pick(head)),
                          table->rows, out, out_stride, false);
  }
  template <class Acc>
  const Acc* bias(isize head) const {
    return table->bias<Acc>(pick(head));
  }
  /// scale * W x + b in plain loops.
  void define(isize head, const double* x, double scale, double* out) const {
    const double* w = table->weights<double>(pick(head));
    const double* b = table->bias<double>(pick(head));
    for (isize j = 0; j < rows(); ++j) {
      double s = 0;
      for (isize c = 0; c < width(); ++c) s += scale * x[c] * w[c * rows() + j];
      out[j] = s + (b != nullptr ? b[j] : 0.0);
    }
  }
  void check(const char* name, isize wanted_heads, const char* of, isize d) const {
    require(width() == d, name, " takes rows of width ", width(), " and q, k are ", d, " wide");
    require(heads() == 1 || heads() == wanted_heads, name, " has weights for ", heads(),
            " heads; wanted 1 (shared) or ", wanted_heads, " (", of, ")");
  }
};

class projection {
 public:
  projection() = default;
  projection(const float* w, isize heads, isize rows, isize width, const float* b = nullptr, bool trained = true) {
    require(w != nullptr && heads >= 1 && rows >= 1 && width >= 1, "projection: W is ", w == nullptr ? "null, " : "",
            "[", heads, ", ", rows, ", ", width, "]; wanted memory and positive sizes");
    auto t = std::make_shared<detail::projection_table>();
    t->heads = heads, t->rows = rows, t->width = width, t->has_bias = b != nullptr, t->trained = trained;
    const auto size = static_cast<std::size_t>(heads * rows * width);
    t->w32.resize(size), t->w64.resize(size);
    for (isize h = 0; h < heads; ++h)
      for (isize j = 0; j < rows; ++j)
        for (isize c = 0; c < width; ++c) {
          const float x = w[(h * rows + j) * width + c];
          require(std::isfinite(x), "projection: W(", h, ", ", j, ", ", c, ") is ", x, "; weights must be finite");
          const auto at = static_cast<std::size_t>((h * width + c) * rows + j);
          t->w32[at] = x, t->w64[at] = static_cast<double>(x);
        }
    if (b != nullptr) {
      t->b32.assign(b, b + heads * rows);
      for (const float x : t->b32) require(std::isfinite(x), "projection: a bias is ", x, "; weights must be finite");
      t->b64.assign(t->b32.begin(), t->b32.end());
    }
    table_ = std::move(t);
  }

  /// Untrained weights: uniform in +-1/sqrt(d), the usual start of a linear layer, bias included.
  static projection random(isize heads, isize rows, isize width, std::uint64_t seed, bool with_bias = true) {
    feature::random_source rng(seed);
    const double bound = 1 / std::sqrt(static_cast<double>(width));
    std::vector<float> w(static_cast<std::size_t>(heads * rows * width)), b(static_cast<std::size_t>(heads * rows));
    for (auto& x : w) x = static_cast<float>((2 * rng.uniform() - 1) * bound);
    for (auto& x : b) x = static_cast<float>((2 * rng.uniform() - 1) * bound);
    return {w.data(), heads, rows, width, with_bias ? b.data() : nullptr, false};
  }
  /// The identity, where distillation of Hedgehog maps starts.
  static projection identity(isize width) {
    std::vector<float> w(static_cast<std::size_t>(width * width));
    for (isize c = 0; c < width; ++c) w[static_cast<std::size_t>(c * width + c)] = 1.0F;
    return {w.data(), 1, width, width, nullptr, false};
  }

  projection_ref ref() const { return {table_.get()}; }
  std::shared_ptr<const void> owner() const { return table_; }

 private:
  std::shared_ptr<const detail::projection_table> table_;
};

namespace detail {
/// The rules of heads above, for a map with a query and a key projection.
inline void check_pair(const char* name, projection_ref query, projection_ref key, const shape& s) {
  require(query && key, name, " has no weights; give it a query and a key projection");
  require(query.rows() == key.rows(), name, " makes ", query.rows(), " features of a query and ", key.rows(),
          " of a key; they must be equal");
  key.check(name, s.G, "the KV heads", s.d);
  if (query.table == key.table)
    query.check(name, s.G, "the KV heads, as it serves queries and keys", s.d);
  else
    query.check(name, s.H, "the query heads", s.d);
}
/// Which weights a block uses: one projection for both sides goes by KV head.
template <class At>
isize pair_head(projection_ref query, projection_ref key, const At& at) {
  return at.key || query.table == key.table ? at.kv_head : at.head;
}
}  // namespace detail

}  // namespace FOVEA_ABI
}  // namespace fovea
