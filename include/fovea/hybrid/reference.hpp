// SPDX-License-Identifier: MIT
#pragma once
/// @file  Hybrid sparse attention from its definition, in double: plain loops, nothing shared with the vector path.
///
/// Contract   slow on purpose. `reference::block_fates` is the selection of one query head: 0 skipped, 1 computed, 2 pooled.
///            Shares below 2^-126 count as zero (f64 storage: 2^-1022), as they do in the vector path.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <fovea/hybrid.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

namespace hybrid_detail {

/// One stretch of keys with its means: a block, or a part of one. `count` leaves the kept keys out, and so do the means (but where
/// every key is kept).
struct block_of_keys {
  isize first, last, count;
  std::vector<double> mean_k, mean_v, var, low, high;
};

/// kept[j]: key j is computed by every row whose selection skips its block.
inline std::vector<bool> kept_keys_of(const hybrid_attention& m, const problem& p, isize b, isize g) {
  std::vector<bool> kept(static_cast<std::size_t>(p.k.length), false);
  if (m.kept_share() == 0) return kept;
  const isize keys = static_cast<isize>(std::ceil(1 / m.keep_small - 1e-9)),
              stretch = (keys + m.block_k - 1) / m.block_k * m.block_k;
  const isize count = std::max<isize>(1, static_cast<isize>(m.keep_small * static_cast<double>(stretch) + 0.5));
  for (isize first = 0; first + stretch <= p.k.length; first += stretch) {
    std::vector<std::pair<double, isize>> order;
    for (isize j = first; j < first + stretch; ++j) {
      double square = 0;
      for (isize c = 0; c < p.v.width; ++c) square += std::pow(p.v.get(b, g, j, c), 2);
      order.emplace_back(square, j);
    }
    std::sort(order.begin(), order.end());
    for (isize x = 0; x < std::min(count, stretch); ++x)
      kept[static_cast<std::size_t>(order[static_cast<std::size_t>(x)].second)] = true;
  }
  return kept;
}

/// Stretches of `size` keys; `kept` keys are left out of counts and means.
inline std::vector<block_of_keys> blocks_of(isize size, const problem& p, isize b, isize g,
                                            const std::vector<bool>& kept) {
  std::vector<block_of_keys> all;
  const isize keys = p.k.length, d = p.k.width, e = p.v.width;
  for (isize first = 0; first < keys; first += size) {
    block_of_keys x{first, std::min(first + size, keys), 0, {}, {}, {}, {}, {}};
    std::vector<isize> in;
    for (isize j = x.first; j < x.last; ++j)
      if (!kept[static_cast<std::size_t>(j)]) in.push_back(j);
    x.count = static_cast<isize>(in.size());
    for (isize j = x.first; j < x.last && x.count == 0; ++j) in.push_back(j);  // nothing pooled: what a score looks at
    const double count = static_cast<double>(in.size());
    for (isize c = 0; c < d; ++c) {
      double sum = 0, square = 0, low = std::numeric_limits<double>::infinity(), high = -low;
      for (isize j = x.first; j < x.last; ++j) {
        const double k = p.k.get(b, g, j, c);
        low = std::min(low, k), high = std::max(high, k);
      }
      for (const isize j : in) sum += p.k.get(b, g, j, c);
      for (const isize j : in) square += std::pow(p.k.get(b, g, j, c) - sum / count, 2);
      x.mean_k.push_back(sum / count), x.var.push_back(square / count), x.low.push_back(low), x.high.push_back(high);
    }
    for (isize c = 0; c < e; ++c) {
      double sum = 0;
      for (const isize j : in) sum += p.v.get(b, g, j, c);
      x.mean_v.push_back(sum / count);
    }
    all.push_back(std::move(x));
  }
  return all;
}

/// What stands for skipped blocks, or parts of them: means, or with compensation::sampled a member, drawn by the rule that defines it.
inline std::vector<block_of_keys> pools_of(const hybrid_attention& m, const problem& p, isize b, isize g,
                                           const std::vector<bool>& kept) {
  std::vector<block_of_keys> all = blocks_of(m.block_k / m.parts, p, b, g, kept);
  if (m.compensate != compensation::sampled) return all;
  for (std::size_t x = 0; x < all.size(); ++x) {
    std::vector<isize> members;
    for (isize j = all[x].first; j < all[x].last; ++j)
      if (!kept[static_cast<std::size_t>(j)]) members.push_back(j);
    if (members.empty()) continue;
    std::uint64_t z = m.seed + 0x9e3779b97f4a7c15ULL * (x + 1);  // splitmix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    z ^= z >> 31;
    const isize j = members[((z >> 32) * members.size()) >> 32];
    for (isize c = 0; c < p.k.width; ++c) all[x].mean_k[static_cast<std::size_t>(c)] = p.k.get(b, g, j, c);
    for (isize c = 0; c < p.v.width; ++c) all[x].mean_v[static_cast<std::size_t>(c)] = p.v.get(b, g, j, c);
  }
  return all;
}

/// A row rounded to `levels` on either side of zero, in units of its largest element. Which integer is nearest is asked in the
/// precision of the vector path, so that both round alike.
template <class T>
std::vector<double> rounded(const std::vector<double>& x, double levels) {
  double top = 0;
  for (const double y : x) top = std::max(top, std::fabs(y));
  std::vector<double> out;
  for (const double y : x) {
    const T quotient = static_cast<T>(y) * static_cast<T>(levels) / static_cast<T>(top);
    out.push_back(top > 0 ? std::nearbyint(static_cast<double>(quotient)) * top / levels : 0.0);
  }
  return out;
}
inline std::vector<double> rounded(const std::vector<double>& x, double levels, dtype type) {
  return type == dtype::f64 ? rounded<double>(x, levels) : rounded<float>(x, levels);
}

inline std::vector<double> row_of(const tensor_ref& t, isize b, isize h, isize i) {
  std::vector<double> x;
  for (isize c = 0; c < t.width; ++c) x.push_back(t.get(b, h, i, c));
  return x;
}

inline double dot(const std::vector<double>& x, const std::vector<double>& y) {
  double sum = 0;
  for (std::size_t c = 0; c < x.size(); ++c) sum += x[c] * y[c];
  return sum;
}

/// The estimated log-mass of a block for query row i.
inline double log_mass(const hybrid_attention& m, const problem& p, const block_of_keys& x,
                       const std::vector<bool>& kept, isize b, isize h, isize i) {
  const shape s = p.shape();
  const double scale = m.scale_for(s), log_n = std::log(static_cast<double>(x.last - x.first));
  const std::vector<double> q = row_of(p.q, b, h, i);
  if (m.select == block_selector::mean) return scale * dot(q, x.mean_k) + log_n;
  if (m.select == block_selector::variance) {
    double var = 0;
    const double nominal =
        static_cast<double>(x.count > 0 ? x.count : x.last - x.first) / static_cast<double>(x.last - x.first);
    for (std::size_t c = 0; c < q.size(); ++c) var += q[c] * q[c] * x.var[c] * nominal;
    return scale * dot(q, x.mean_k) + scale * scale * var / 4 + log_n;
  }
  if (m.select == block_selector::bound) {
    double top = 0;
    for (std::size_t c = 0; c < q.size(); ++c) top += std::max(q[c] * x.low[c], q[c] * x.high[c]);
    return scale * top + log_n;
  }
  const double levels = m.select == block_selector::int8 ? 127 : m.select == block_selector::int4 ? 7 : 0;
  std::vector<double> logits;
  for (isize j = x.first; j < x.last; ++j) {
    if (kept[static_cast<std::size_t>(j)]) continue;
    const std::vector<double> k = row_of(p.k, b, h / s.group(), j);
    logits.push_back(scale *
                     (levels > 0 ? dot(rounded(q, levels, p.q.type), rounded(k, levels, p.q.type)) : dot(q, k)));
  }
  if (logits.empty()) return -std::numeric_limits<double>::infinity();
  const double top = *std::max_element(logits.begin(), logits.end());
  if (levels > 0) {  // rounded scores are summed by chords of 2^x between whole numbers: kernel/code_pass.hpp
    const double log2e = 1.4426950408889634074, peak = std::floor(top * log2e);
    double chords = 0;
    for (const double y : logits) {
      const double z = y * log2e - peak, whole = std::floor(z);
      chords += std::exp2(whole) * (1 + z - whole);
    }
    return peak / log2e + std::log(chords);
  }
  double sum = 0;
  for (const double y : logits) sum += std::exp(y - top);
  return top + std::log(sum);
}

/// One row that votes alone: the order of its log-masses, which cannot underflow.
inline bool votes_are_logs(const hybrid_attention& m) { return m.block_q == 1 && !m.share_group && m.top_p == 0; }

/// How many of the candidates, best first, leave at most 1 - top_p of all votes behind.
inline isize wanted_by_mass(const hybrid_attention& m, const std::vector<double>& vote,
                            const std::vector<isize>& best) {
  double all = 0, left = 0;
  for (const double x : vote) all += x;
  for (const isize J : best) left += vote[static_cast<std::size_t>(J)];
  isize wanted = 0;
  for (const isize J : best) {
    if (left <= (1 - m.top_p) * all) break;
    left -= vote[static_cast<std::size_t>(J)], ++wanted;
  }
  return wanted;
}

/// The vote of rows [i0, i1) on blocks [0, past).
inline std::vector<double> votes(const hybrid_attention& m, const problem& p, const std::vector<block_of_keys>& blocks,
                                 const std::vector<bool>& kept, isize past, isize b, isize h, isize i0, isize i1) {
  const double least = p.q.type == dtype::f64 ? 0x1p-1022 : 0x1p-126;
  std::vector<double> vote(static_cast<std::size_t>(past), 0.0);
  for (isize i = i0; i < i1; ++i) {
    std::vector<double> mass;
    for (isize J = 0; J < past; ++J) mass.push_back(log_mass(m, p, blocks[static_cast<std::size_t>(J)], kept, b, h, i));
    if (hybrid_detail::votes_are_logs(m)) return mass;
    const double top = past > 0 ? *std::max_element(mass.begin(), mass.end()) : 0;
    if (top == -std::numeric_limits<double>::infinity()) continue;  // kept keys alone
    double sum = 0;
    for (const double x : mass) sum += std::exp(x - top);
    for (std::size_t J = 0; J < mass.size(); ++J) {
      const double share = std::exp(mass[J] - top) / sum;
      vote[J] += share < least ? 0.0 : share;
    }
  }
  return vote;
}

}  // namespace hybrid_detail

/// fates[I][J] of query block I and key block J for head h.
inline std::vector<std::vector<int>> block_fates(const hybrid_attention& m, const problem& p, isize b, isize h) {
  const shape s = p.shape();
  const auto kept = hybrid_detail::kept_keys_of(m, p, b, h / s.group());
  const auto blocks = hybrid_detail::blocks_of(m.block_k, p, b, h / s.group(), kept);
  const isize count = static_cast<isize>(blocks.size());
  const isize stretch_keys = m.kept_share() > 0 ? static_cast<isize>(std::ceil(1 / m.keep_small - 1e-9)) : 1,
              stretch = (stretch_keys + m.block_k - 1) / m.block_k * m.block_k;
  std::vector<std::vector<int>> fates;
  for (isize i0 = 0; i0 < s.n; i0 += m.block_q) {
    const isize i1 = std::min(i0 + m.block_q, s.n), shift = m.align.position({b, h, s.n, s.m, s.H, s.G}, 0),
                p0 = i0 + shift, p1 = i1 - 1 + shift;
    std::vector<int> fate(static_cast<std::size_t>(count), 0);
    const auto at = [&](isize J) -> int& { return fate[static_cast<std::size_t>(J)]; };
    const int rest = m.compensate == compensation::none ? 0 : 2;
    if (m.select == block_selector::given) {
      for (isize J = 0; J < count; ++J) {
        const isize head = m.blocks.heads == 1 ? 0 : m.blocks.heads == s.H ? h : h / s.group();
        const bool past = !m.is_causal || (J + 1) * m.block_k - 1 <= p0;
        at(J) = m.blocks(m.blocks.batch == 1 ? 0 : b, head, i0 / m.block_q, J) != 0 ? 1 : past ? rest : 0;
      }
      fates.push_back(fate);
      continue;
    }
    // Own blocks hold a row's position or keys that some row may not see; blocks before them are the past.
    isize past = count, own = 0;
    if (m.is_causal) {
      past = 0;
      while (past < count && (past + 1) * m.block_k <= std::max<isize>(p0, 0) / m.block_k * m.block_k) ++past;
      for (isize J = past; J < count && J * m.block_k <= p1; ++J) at(J) = 1, ++own;
    }
    std::vector<isize> candidates;
    for (isize J = 0; J < past; ++J) {
      bool always = false;
      for (isize j = J * m.block_k; j < (J + 1) * m.block_k; ++j) {
        always = always || j < m.first;
        for (isize i = i0; i < i1 && m.window > 0; ++i)
          always = always || (j > i + shift - m.window && (m.is_causal || j < i + shift + m.window));
      }
      if (m.kept_share() > 0 && m.is_causal) always = always || (J * m.block_k / stretch + 1) * stretch > p0;
      at(J) = always ? 1 : rest;
      if (!always) candidates.push_back(J);
    }
    const isize all = static_cast<isize>(candidates.size());
    isize wanted = static_cast<isize>(std::ceil(m.budget * static_cast<double>(all) * (1 - 1e-12)));
    if (m.top > 0) wanted = std::max<isize>(m.top - own, 0);
    wanted = std::min(all, std::max(wanted, (m.at_least + m.block_k - 1) / m.block_k));
    // Votes leave kept keys out: blocks of a stretch that is not over have no share, which keys they keep is not known yet.
    isize counted = past;
    while (m.select != block_selector::bound && m.is_causal && m.kept_share() > 0 && counted > 0 &&
           ((counted - 1) * m.block_k / stretch + 1) * stretch > p0)
      --counted;
    std::vector<double> vote(static_cast<std::size_t>(past), 0.0);
    const isize h0 = m.share_group ? h / s.group() * s.group() : h, h1 = m.share_group ? h0 + s.group() : h + 1;
    for (isize x = h0; x < h1; ++x) {
      const auto one = hybrid_detail::votes(m, p, blocks, kept, counted, b, x, i0, i1);
      for (std::size_t J = 0; J < one.size(); ++J) vote[J] += one[J];
    }
    std::stable_sort(candidates.begin(), candidates.end(), [&](isize x, isize y) {
      return vote[static_cast<std::size_t>(x)] > vote[static_cast<std::size_t>(y)];
    });
    if (m.top_p > 0)
      wanted = std::max(hybrid_detail::wanted_by_mass(m, vote, candidates),
                        std::min(all, (m.at_least + m.block_k - 1) / m.block_k));
    for (isize x = 0; x < wanted; ++x) at(candidates[static_cast<std::size_t>(x)]) = 1;
    fates.push_back(fate);
  }
  return fates;
}

namespace hybrid_detail {

/// One logit of the joint softmax and where its value comes from: key j, or (j < 0) the block.
struct candidate {
  double logit;
  isize j;
  const block_of_keys* block;
};

/// The logarithm of what the linear rest gives to key j.
inline double linear_logit(const hybrid_attention& m, const problem& p, isize b, isize h, isize i, isize j) {
  const isize group = p.shape().group(), g = h / group;
  const std::vector<double> q = row_of(p.q, b, h, i);
  std::vector<double> phi_q(static_cast<std::size_t>(m.map.features(p.q.width))), phi_k = phi_q;
  m.map.define({h, g, 0, false, 0.0}, q.data(), p.q.width, phi_q.data());
  m.map.define({g * group, g, 0, true, 0.0}, row_of(p.k, b, g, j).data(), p.q.width, phi_k.data());
  double level = m.log_weight.data != nullptr ? static_cast<double>(*m.log_weight.row(0, h, 0)) : 0.0;
  for (isize c = 0; c < p.q.width && m.query_gate.data != nullptr; ++c)
    level += static_cast<double>(m.query_gate.row(0, h, 0)[c]) * q[static_cast<std::size_t>(c)];
  return level + std::log(dot(phi_q, phi_k));
}

inline std::vector<candidate> row_candidates(const hybrid_attention& m, const problem& p,
                                             const std::vector<std::vector<int>>& fates,
                                             const std::vector<block_of_keys>& pools, const std::vector<bool>& kept,
                                             isize b, isize h, isize i) {
  const shape s = p.shape();
  const double scale = m.scale_for(s);
  const isize position = m.align.position({b, h, s.n, s.m, s.H, s.G}, i);
  std::vector<candidate> all;
  const std::vector<double> q = row_of(p.q, b, h, i);
  for (isize j = 0; j < s.m; ++j) {
    if (m.is_causal && j > position) continue;
    if (m.select == block_selector::pattern) {
      const isize gap = position - j, r = m.stride;
      const bool near = gap < r, far = gap % r == 0, fixed = position / r == j / r || j % r == r - 1;
      if (!(m.pattern == hsa_mode::local     ? near
            : m.pattern == hsa_mode::strided ? far
            : m.pattern == hsa_mode::sparse  ? near || far
                                             : fixed))
        continue;
    } else if (fates[static_cast<std::size_t>(i / m.block_q)][static_cast<std::size_t>(j / m.block_k)] != 1 &&
               !kept[static_cast<std::size_t>(j)]) {
      continue;
    }
    all.push_back({scale * dot(q, row_of(p.k, b, h / s.group(), j)), j, nullptr});
  }
  for (const block_of_keys& x : pools) {
    if (m.select == block_selector::pattern || x.count == 0) continue;
    if (fates[static_cast<std::size_t>(i / m.block_q)][static_cast<std::size_t>(x.first / m.block_k)] != 2) continue;
    if (m.compensate == compensation::linear) {
      for (isize j = x.first; j < x.last; ++j)
        if (!kept[static_cast<std::size_t>(j)]) all.push_back({linear_logit(m, p, b, h, i, j), j, nullptr});
      continue;
    }
    const double logit = scale * dot(q, x.mean_k) + std::log(static_cast<double>(x.count));
    double variance = 0;
    for (std::size_t c = 0; c < q.size() && m.compensate == compensation::cumulant; ++c)
      variance += m.variance_share * scale * scale / 2 * q[c] * q[c] * x.var[c];
    all.push_back({logit + std::min(variance, m.variance_cap), -1, &x});
  }
  return all;
}

}  // namespace hybrid_detail

/// fates of rows that came one by one and used a selection m.refresh times: blocks that are whole since it was made are computed.
inline void keep_selections(const hybrid_attention& m, std::vector<std::vector<int>>& fates) {
  for (isize i = 0; i < static_cast<isize>(fates.size()); ++i) {
    const isize made = i / m.refresh * m.refresh;
    std::vector<int>& fate = fates[static_cast<std::size_t>(i)];
    for (isize J = 0; J < static_cast<isize>(fate.size()); ++J) {
      const bool known = J < made / m.block_k;
      fate[static_cast<std::size_t>(J)] =
          known ? fates[static_cast<std::size_t>(made)][static_cast<std::size_t>(J)] : J * m.block_k <= i;
    }
  }
}

/// With the fates that fates_of(b, h) gives, as block_fates gives them.
template <class F>
void prefill_by(const hybrid_attention& m, const problem& p, F&& fates_of) {
  const shape s = p.shape();
  const double none = -std::numeric_limits<double>::infinity();
  for (isize b = 0; b < s.B; ++b)
    for (isize h = 0; h < s.H; ++h) {
      const auto kept = hybrid_detail::kept_keys_of(m, p, b, h / s.group());
      const auto pools = hybrid_detail::pools_of(m, p, b, h / s.group(), kept);
      const std::vector<std::vector<int>> fates = fates_of(b, h);
      for (isize i = 0; i < s.n; ++i) {
        const auto all = hybrid_detail::row_candidates(m, p, fates, pools, kept, b, h, i);
        double top = none, sum = 0;
        for (const auto& x : all)
          if (!(x.logit <= top)) top = x.logit;
        std::vector<double> o(static_cast<std::size_t>(s.e), 0.0);
        for (const auto& x : all) {
          const double w = x.logit == none ? 0.0 : std::exp(x.logit - top);
          sum += w;
          for (isize c = 0; c < s.e; ++c)
            o[static_cast<std::size_t>(c)] += w * (x.block == nullptr ? p.v.get(b, h / s.group(), x.j, c)
                                                                      : x.block->mean_v[static_cast<std::size_t>(c)]);
        }
        for (isize c = 0; c < s.e; ++c) p.out.set(b, h, i, c, all.empty() ? 0.0 : o[static_cast<std::size_t>(c)] / sum);
        if (p.lse) p.lse.set(b, h, i, 0, all.empty() ? none : top + std::log(sum));
      }
    }
}

/// in_steps: the rows came one by one to a state, block_q = 1, as many as keys.
inline void prefill(const hybrid_attention& m, const problem& p, bool in_steps = false) {
  prefill_by(m, p, [&](isize b, isize h) {
    if (m.select == block_selector::pattern) return std::vector<std::vector<int>>{};
    auto fates = block_fates(m, p, b, h);
    if (in_steps && m.refresh > 1) keep_selections(m, fates);
    return fates;
  });
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
