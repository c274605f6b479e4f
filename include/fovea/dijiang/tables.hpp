// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a DiJiang map is made of: cosine transform, radii t, signs, weights D; drawn from a seed or given.
///
///   form       logarithm of feature b d + j of x, C the orthonormal DCT-II matrix, s the signs of block b
///   paper      ln |D_j| + t_j (C (s x))_j                                              Eq 12;  s = 1 in the first block
///   released   softmax over all features of t_j (C^T (s x))_j                          published code;  s = 1 in the first block
///   unbiased   ln |D_j| + t_j (C (s y))_j - |y|^2 / 2 - ln(r) / 2,   y = x d^-1/4      E phi(q).phi(k) = e^(q.k / sqrt d)
///
/// Contract   r = blocks * d. t and D [r] serve all heads; [G, r] are per KV head. Only D^2 matters (the same D is on both sides), so
///            its sign is dropped; D_j = 0 switches a feature off. The tables are the float numbers that are stored here: arithmetic
///            in double starts from them too.
/// Source     docs/mechanisms/dijiang.md

#include <memory>
#include <optional>
#include <vector>

#include <fovea/dijiang/sampling.hpp>
#include <fovea/feature/cosine_transform.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

enum class dijiang_form : unsigned char { paper, released, unbiased };

/// How to make a DiJiang mechanism. What is left empty is drawn (t, signs), 1 (D), or absent (gamma, log_d1, log_d2).
struct dijiang_options {
  isize head_dim = 0;
  isize features = 0;  ///< a multiple of head_dim; 0: head_dim
  std::uint64_t seed = 1;
  dijiang_form form = dijiang_form::unbiased;
  dijiang_sampling sampling = dijiang_sampling::stratified;
  bool is_causal = true;
  std::optional<bool> normalise = {};  ///< divide by the row sum; default: in the unbiased form only, as published
  std::vector<float> t = {};           ///< [features] or [KV heads, features]
  std::vector<float> signs = {};       ///< [blocks, head_dim], each 1 or -1
  std::vector<float> D = {};           ///< [features] or [KV heads, features]
  std::vector<double> gamma = {};      ///< decay per token in (0, 1]: one number, or one per KV head (released code)
  std::vector<float> log_d1 =
      {};  ///< [H, positions] logarithm of the query gain of each position (released code, trained)
  std::vector<float> log_d2 = {};  ///< [KV heads, positions] the same for keys
  isize positions = 0;             ///< width of log_d1 and log_d2
};

namespace detail {

template <class T>
struct dijiang_constants {
  std::vector<T> before, after, offset;  // [r] on x; [heads][r] on the transform; [heads][r] added to the logarithm
};

}  // namespace detail

struct dijiang_tables {
  dijiang_form form = dijiang_form::unbiased;
  isize d = 0, blocks = 0, r = 0;
  isize t_heads = 1, D_heads = 1;
  bool trained = false;  ///< D, t or gains were given
  std::vector<float> t, signs, D;
  std::vector<double> gamma;
  std::vector<float> log_d1, log_d2;
  isize positions = 0;
  feature::cosine_transform transform;
  detail::dijiang_constants<float> single;
  detail::dijiang_constants<double> wide;

  isize heads() const { return t_heads > D_heads ? t_heads : D_heads; }
  isize pick(isize kv_head) const { return heads() == 1 ? 0 : kv_head; }
  bool logarithmic() const { return form != dijiang_form::released; }
  bool gains() const { return positions > 0; }
  template <class T>
  const detail::dijiang_constants<T>& constants() const {
    if constexpr (std::is_same_v<T, double>)
      return wide;
    else
      return single;
  }

  /// The definition, in plain loops: logarithms of the features of one row.
  void define(isize kv_head, const double* x, double* log_phi) const {
    const double pi = 3.14159265358979323846, width = static_cast<double>(d);
    const double shrink = form == dijiang_form::unbiased ? std::pow(width, -0.25) : 1.0;
    double square = 0;
    for (isize n = 0; n < d; ++n) square += shrink * x[n] * shrink * x[n];
    for (isize b = 0; b < blocks; ++b)
      for (isize j = 0; j < d; ++j) {
        double y = 0;
        for (isize n = 0; n < d; ++n) {
          const isize k = form == dijiang_form::released ? n : j, at = form == dijiang_form::released ? j : n;
          const double c = std::sqrt((k == 0 ? 1.0 : 2.0) / width) *
                           std::cos(pi * static_cast<double>((2 * at + 1) * k % (4 * d)) / (2 * width));
          y += c * static_cast<double>(signs[static_cast<std::size_t>(b * d + n)]) * shrink * x[n];
        }
        const isize f = b * d + j;
        log_phi[f] = static_cast<double>(t[static_cast<std::size_t>((t_heads == 1 ? 0 : kv_head) * r + f)]) * y;
        if (form != dijiang_form::released)
          log_phi[f] += std::log(
              std::fabs(static_cast<double>(D[static_cast<std::size_t>((D_heads == 1 ? 0 : kv_head) * r + f)])));
        if (form == dijiang_form::unbiased) log_phi[f] -= square / 2 + std::log(static_cast<double>(r)) / 2;
      }
    if (form != dijiang_form::released) return;
    double top = log_phi[0], sum = 0;
    for (isize f = 0; f < r; ++f) top = std::fmax(top, log_phi[f]);
    for (isize f = 0; f < r; ++f) sum += std::exp(log_phi[f] - top);
    for (isize f = 0; f < r; ++f) log_phi[f] -= top + std::log(sum);
  }
};

namespace detail {

template <class T>
void fill_dijiang_constants(const dijiang_tables& m, dijiang_constants<T>& out) {
  const auto size = static_cast<std::size_t>(m.heads() * m.r);
  out.before.resize(static_cast<std::size_t>(m.r)), out.after.resize(size), out.offset.resize(size);
  const double shrink = m.form == dijiang_form::unbiased ? std::pow(static_cast<double>(m.d), -0.25) : 1.0;
  for (isize f = 0; f < m.r; ++f) {
    const bool inverse = m.form == dijiang_form::released;  // type 3 is scaled before the transform, type 2 after it
    const double scale = m.transform.scale(f % m.d);
    out.before[static_cast<std::size_t>(f)] =
        static_cast<T>(static_cast<double>(m.signs[static_cast<std::size_t>(f)]) * shrink * (inverse ? scale : 1.0));
    for (isize h = 0; h < m.heads(); ++h) {
      const auto at = static_cast<std::size_t>(h * m.r + f);
      const double t = static_cast<double>(m.t[static_cast<std::size_t>((m.t_heads == 1 ? 0 : h) * m.r + f)]);
      const double D = static_cast<double>(m.D[static_cast<std::size_t>((m.D_heads == 1 ? 0 : h) * m.r + f)]);
      out.after[at] = static_cast<T>(inverse ? t : t * scale);
      out.offset[at] = static_cast<T>(inverse ? 0.0
                                              : std::log(std::fabs(D)) - (m.form == dijiang_form::unbiased
                                                                              ? 0.5 * std::log(static_cast<double>(m.r))
                                                                              : 0.0));
    }
  }
}

inline isize dijiang_heads(const char* name, std::size_t size, isize r) {
  const isize count = static_cast<isize>(size);
  require(count > 0 && count % r == 0, "dijiang: ", name, " holds ", count, " numbers; wanted ", r,
          " (features), or a multiple of it (KV heads x features)");
  return count / r;
}
template <class T>
void require_all_finite(const char* name, const std::vector<T>& x) {
  for (const T value : x) require(std::isfinite(value), "dijiang: ", name, " holds ", value, "; wanted finite numbers");
}

/// All that does not depend on the sizes.
inline void check_dijiang_values(const dijiang_options& o) {
  require_all_finite("t", o.t), require_all_finite("D", o.D), require_all_finite("log_d1", o.log_d1),
      require_all_finite("log_d2", o.log_d2);
  for (const float s : o.signs) require(s == 1.0F || s == -1.0F, "dijiang: a sign is ", s, "; wanted 1 or -1");
  for (const double g : o.gamma) require(g > 0 && g <= 1, "dijiang: gamma holds ", g, "; wanted numbers in (0, 1]");
  require(o.positions >= 0, "dijiang: positions is ", o.positions, "; it must not be negative");
  require(o.log_d1.empty() == o.log_d2.empty() && o.log_d1.empty() == (o.positions == 0),
          "dijiang: log_d1, log_d2 and positions go together");
  require(o.gamma.empty() || o.log_d1.empty(),
          "dijiang: gamma and the gains log_d1, log_d2 were given; the gains contain the decay");
  require(o.is_causal || (o.gamma.empty() && o.log_d1.empty()),
          "dijiang: gamma or gains with is_causal = false; decay by position needs an order");
}

inline void check_dijiang_sizes(const dijiang_options& o) {
  require(o.head_dim >= 1 && o.head_dim <= 1024, "dijiang: head_dim is ", o.head_dim, "; wanted 1 to 1024");
  require(o.features >= 0 && o.features % o.head_dim == 0 && o.features <= 64 * o.head_dim, "dijiang: features is ",
          o.features, "; wanted a multiple of head_dim = ", o.head_dim, ", at most 64 times it");
}

}  // namespace detail

inline std::shared_ptr<const dijiang_tables> make_dijiang_tables(const dijiang_options& o) {
  detail::check_dijiang_sizes(o), detail::check_dijiang_values(o);
  auto m = std::make_shared<dijiang_tables>();
  m->form = o.form, m->d = o.head_dim, m->r = o.features == 0 ? o.head_dim : o.features, m->blocks = m->r / m->d;
  m->trained = !o.D.empty() || !o.t.empty() || !o.log_d1.empty();
  feature::random_source rng(o.seed);
  m->signs = o.signs;
  if (o.signs.empty()) {
    m->signs.assign(static_cast<std::size_t>(m->r), 1.0F);
    for (isize f = o.form == dijiang_form::unbiased ? 0 : m->d; f < m->r; ++f)
      m->signs[static_cast<std::size_t>(f)] = static_cast<float>(rng.sign());
  }
  require(static_cast<isize>(m->signs.size()) == m->r, "dijiang: signs holds ", m->signs.size(), " numbers; wanted ",
          m->blocks, " x ", m->d);
  m->t = !o.t.empty()                       ? o.t
         : o.form == dijiang_form::unbiased ? detail::chi_radii(o.sampling, m->blocks, m->d, rng)
                                            : detail::normal_radii(o.sampling, m->blocks, m->d, rng);
  m->D = o.D.empty() ? std::vector<float>(static_cast<std::size_t>(m->r), 1.0F) : o.D;
  m->t_heads = detail::dijiang_heads("t", m->t.size(), m->r),
  m->D_heads = detail::dijiang_heads("D", m->D.size(), m->r);
  require(m->t_heads == 1 || m->D_heads == 1 || m->t_heads == m->D_heads, "dijiang: t is for ", m->t_heads,
          " heads and D for ", m->D_heads, "; wanted the same, or 1");
  m->gamma = o.gamma, m->log_d1 = o.log_d1, m->log_d2 = o.log_d2, m->positions = o.positions;
  m->transform = feature::cosine_transform(m->d);
  detail::fill_dijiang_constants(*m, m->single), detail::fill_dijiang_constants(*m, m->wide);
  return m;
}

}  // namespace FOVEA_ABI
}  // namespace fovea
