// SPDX-License-Identifier: MIT
#pragma once
/// @file  How much attention keys receive from a superblock of query rows: mass_j += sum_i e^(s_ij - lse_i).
///
/// Contract   mass [keys][W]: sums of a key, one for each lane of a register; the caller starts them at zero and adds the lanes up.
///            A row adds nothing to a key that it does not see, whatever they hold.
/// Cost       2 d flops for each visible pair; scratch depends on neither n nor m.

#include <fovea/kernel/softmax_backward_panels.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

/// mass [count][W] += P = 2^(S - shift) of a run's keys; s [count][R] at the run's first vector.
template <class Arch, class Acc, bool Masked>
FOVEA_NOINLINE void add_probabilities(isize count, isize vectors, const Acc* s, const Acc* shift,
                                      const std::uint64_t* lanes, isize lane, Acc* mass) noexcept {
  using P = simd::pack<Acc, Arch>;
  for (isize k = 0; k < count; ++k, s += gradient_tile<Arch, Acc>::rows, mass += P::size) {
    P sum = P::load(mass);
    for (isize v = 0; v < vectors; ++v) {
      P x = simd::exp2(P::load(s + v * P::size) - P::load(shift + v * P::size));
      if constexpr (Masked)
        x = simd::select(static_cast<simd::lane_bits>(lanes[k] >> (lane + v * P::size)), x, P(Acc(0)));
      sum = sum + x;
    }
    sum.store(mass);
  }
}

}  // namespace detail

template <class Arch, class Acc>
class key_mass {
  using T = detail::gradient_tile<Arch, Acc>;
  using tiles = query_tiles<Arch, Acc>;
  static constexpr isize R = T::rows, W = T::W;

 public:
  static isize superblock(isize rows) { return rows < 256 ? ceil_div(rows, R) * R : 256; }

  key_mass(arena& memory, isize rows, isize d) : d_(d), q_(memory, superblock(rows), d) {
    shift_ = memory.take<Acc>(superblock(rows));
    s_ = memory.take<Acc>(T::keys * R), k_ = memory.take<Acc>(T::keys * d);
    lanes_ = memory.take<std::uint64_t>(T::keys);
    runs_ = memory.take<key_run>(T::keys);
  }

  void begin(const query_rows& rows, const tensor_ref& lse, double scale) noexcept {
    at_.place(rows);
    lse_from_ = lse, scale_ = scale, loaded_ = false;
  }
  /// Keys [j0, j1) of a set; mass: sums of key j0. The set's values are not read.
  void absorb(const key_set<Acc>& set, isize j0, isize j1, Acc* mass) noexcept {
    for (isize j = j0; j < j1; j += T::keys) {
      const isize last = j + T::keys < j1 ? j + T::keys : j1;
      const Acc* k = nullptr;
      isize stride = 0;
      for (isize t = 0; t < at_.used(); ++t) {
        const isize runs = at_.look(set, t, j, last, lanes_, runs_);
        if (runs == 0) continue;
        if (!loaded_) load();
        if (k == nullptr) k = block_of_rows<Arch, Acc>(set.k, j, last, d_, k_, stride);
        for (isize n = 0; n < runs; ++n) add(set, t, j, k, stride, runs_[n], mass + (j - j0) * W);
      }
    }
  }

 private:
  void load() noexcept {
    loaded_ = true;
    load_shift(at_, lse_from_, shift_);
    q_.load(at_, at_.rows().q, static_cast<Acc>(scale_ * 1.4426950408889634074), shift_, true);
  }
  void add(const key_set<Acc>& set, isize t, isize j0, const Acc* k, isize stride, const key_run& run,
           Acc* mass) noexcept {
    const isize lane = run.vector * W;
    Acc* s = s_ + lane;
    detail::score_product<Arch, Acc>(run.count, run.vectors, d_, k + run.first * stride, stride, q_.columns(t) + lane,
                                     s, R);
    if (set.modify != nullptr)
      at_.for_segments(t, [&](const typename tiles::segment& g) {
        set.modify->template apply<Acc>(tiles::site(set, g), g.i, g.count, j0 + run.first, j0 + run.first + run.count,
                                        s_ + g.lane, R);
      });
    const auto call = [&](auto f) {
      f(run.count, run.vectors, s, shift_ + t * R + lane, lanes_ + run.first, lane, mass + run.first * W);
    };
    run.masked ? call(detail::add_probabilities<Arch, Acc, true>) : call(detail::add_probabilities<Arch, Acc, false>);
  }

  isize d_;
  tiles at_;
  turned_rows<Arch, Acc> q_;
  tensor_ref lse_from_;
  double scale_ = 1;
  bool loaded_ = false;
  Acc *shift_, *s_, *k_;
  std::uint64_t* lanes_;
  key_run* runs_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
