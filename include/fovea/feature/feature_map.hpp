// SPDX-License-Identifier: MIT
#pragma once
/// @file  Feature maps phi: small policies that turn a block of query or key rows of one head into feature rows.
///
///   out[t][:] * exp(log_scale[t]) = phi(x[t])        t < rows <= feature_rows
///
/// A feature map policy is a trivially copyable struct with
///   isize features(d)                     r, the width of phi of rows of width d
///   isize scratch(d)                      elements of scratch that `apply` needs for one block
///   void apply<Arch, Acc>(block, scratch) the features of the block; writes log_scale exactly if `log_scaled`
///   double define(site, x, d, out)        the same for one row in plain double loops, the definition that tests compare with:
///                                         writes out[r], returns the logarithm of the factor that they lack (0 for most)
///   static constexpr bool log_scaled      features may leave the range of float: they come as mantissa rows and a log-scale
///   void check(shape)                     throws contract_error if the map does not fit the problem
///   void fingerprint(f)                   adds the hyper-parameters that two states must share (not the weights)
/// and optionally
///   static constexpr bool identity        phi(x) = x: rows may be read where they lie (default false)
///   static constexpr bool positional      phi depends on the position: `position` of the block is used (default false)
///   bool surveys()                        a number is wanted from all keys before any feature is made, so no state can be kept
///   Acc survey<Arch, Acc>(block, scratch) that number for one block of keys (the largest over the blocks is handed to `apply`)
///   double define_survey(site, x, d)      the same for one row
///   double macs(d)                        multiply-adds of one row, for reports (default 0)
///   bool trained()                        false: the weights were drawn, not learned (default true)
///   void derive<Arch, Acc>(block, gradient, scratch)   the derivative (feature_gradient says of what); without it, no backward pass
///   isize derive_scratch(d)               elements of scratch that `derive` needs for one block
///   isize weights(d)                      learned numbers of one head on one side, in the order in which the map documents them
///
/// Contract   rows are independent: row t of the result depends on row t of the input alone (and on `survey`). A NaN stays in its row.
/// Cost       one indirect call per block of tokens and head; features of a whole sequence are never stored.

#include <concepts>
#include <cstddef>
#include <new>
#include <type_traits>

#include <fovea/core/state.hpp>
#include <fovea/simd/arch.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// The most rows that a map is asked for at once.
inline constexpr isize feature_rows = 64;

template <class Acc>
struct feature_block {
  const Acc* x = nullptr;  ///< [rows][width], rows x_stride apart
  isize x_stride = 0, rows = 0, width = 0;
  isize head = 0;      ///< query head; on the key side of a query group, its first query head
  isize kv_head = 0;   ///< head of k
  isize position = 0;  ///< of row 0, counted from 0
  bool key = false;    ///< a block of keys, else of queries
  Acc* out = nullptr;  ///< [rows][r], rows out_stride apart
  isize out_stride = 0;
  Acc* log_scale = nullptr;  ///< [rows]; used by log_scaled maps only
  Acc survey = Acc(0);       ///< of all keys of the head; see surveys()
};

/// Where one row stands: what `define` is told.
struct feature_site {
  isize head = 0, kv_head = 0, position = 0;
  bool key = false;
  double survey = 0.0;
};

/// What `derive` takes beside a block that `apply` has filled, and what it gives.
template <class Acc>
struct feature_gradient {
  Acc* dphi = nullptr;  ///< [rows][r] of the loss by phi, times e^log_scale where a map is log-scaled; overwritten
  isize dphi_stride = 0;
  Acc* dx = nullptr;  ///< [rows][width], written; a map with weights takes null: not wanted
  isize dx_stride = 0;
  Acc* dweights = nullptr;  ///< [weights(d)], added to; null: not wanted
};

template <class P>
concept feature_map_policy = std::is_trivially_copyable_v<P> &&
    requires(const P& p, isize d, const shape& s, const feature_block<float>& b, float* scratch, const feature_site& at,
             double* x, detail::fingerprint& f) {
  { p.features(d) } -> std::same_as<isize>;
  { p.scratch(d) } -> std::same_as<isize>;
  p.template apply<simd::native, float>(b, scratch);
  { p.define(at, static_cast<const double*>(x), d, x) } -> std::same_as<double>;
  { P::log_scaled } -> std::convertible_to<bool>;
  p.check(s);
  p.fingerprint(f);
};

namespace detail {

template <class P>
concept surveying_map = requires(const P& p, const feature_block<float>& b, float* scratch, const feature_site& at,
                                 const double* x, isize d) {
  { p.surveys() } -> std::same_as<bool>;
  { p.template survey<simd::native, float>(b, scratch) } -> std::same_as<float>;
  { p.define_survey(at, x, d) } -> std::same_as<double>;
};

template <class P>
concept differentiable_map = requires(const P& p, const feature_block<float>& b, const feature_gradient<float>& g,
                                      float* scratch, isize d) {
  p.template derive<simd::native, float>(b, g, scratch);
  { p.derive_scratch(d) } -> std::same_as<isize>;
  { p.weights(d) } -> std::same_as<isize>;
};

template <class P>
constexpr bool positional_map() {
  if constexpr (requires { P::positional; }) return P::positional;
  return false;
}

template <class P>
constexpr bool map_of_identity() {
  if constexpr (requires { P::identity; }) return P::identity;
  return false;
}

struct feature_map_table {
  bool log_scaled, positional, identity, differentiable;
  isize (*features)(const void*, isize);
  isize (*scratch)(const void*, isize);
  void (*apply_f32)(const void*, const feature_block<float>&, float*);
  void (*apply_f64)(const void*, const feature_block<double>&, double*);
  bool (*surveys)(const void*);
  float (*survey_f32)(const void*, const feature_block<float>&, float*);
  double (*survey_f64)(const void*, const feature_block<double>&, double*);
  double (*define)(const void*, const feature_site&, const double*, isize, double*);
  double (*define_survey)(const void*, const feature_site&, const double*, isize);
  double (*macs)(const void*, isize);
  bool (*trained)(const void*);
  void (*check)(const void*, const shape&);
  void (*fingerprint)(const void*, detail::fingerprint&);
  isize (*derive_scratch)(const void*, isize);
  isize (*weights)(const void*, isize);
  void (*derive_f32)(const void*, const feature_block<float>&, const feature_gradient<float>&, float*);
  void (*derive_f64)(const void*, const feature_block<double>&, const feature_gradient<double>&, double*);
};

template <feature_map_policy P, class Acc>
Acc survey_of(const void* p, const feature_block<Acc>& b, Acc* scratch) {
  if constexpr (surveying_map<P>) return static_cast<const P*>(p)->template survey<simd::native, Acc>(b, scratch);
  (void)p, (void)b, (void)scratch;
  return Acc(0);
}

template <feature_map_policy P, class Acc>
void derive_of(const void* p, const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) {
  if constexpr (differentiable_map<P>) static_cast<const P*>(p)->template derive<simd::native, Acc>(b, g, scratch);
  (void)p, (void)b, (void)g, (void)scratch;
}

template <feature_map_policy P>
inline constexpr feature_map_table feature_map_table_of{
    P::log_scaled,
    positional_map<P>(),
    map_of_identity<P>(),
    differentiable_map<P>,
    [](const void* p, isize d) { return static_cast<const P*>(p)->features(d); },
    [](const void* p, isize d) { return static_cast<const P*>(p)->scratch(d); },
    [](const void* p, const feature_block<float>& b, float* s) {
      static_cast<const P*>(p)->template apply<simd::native, float>(b, s);
    },
    [](const void* p, const feature_block<double>& b, double* s) {
      static_cast<const P*>(p)->template apply<simd::native, double>(b, s);
    },
    [](const void* p) {
      if constexpr (surveying_map<P>) return static_cast<const P*>(p)->surveys();
      (void)p;
      return false;
    },
    [](const void* p, const feature_block<float>& b, float* s) { return survey_of<P, float>(p, b, s); },
    [](const void* p, const feature_block<double>& b, double* s) { return survey_of<P, double>(p, b, s); },
    [](const void* p, const feature_site& at, const double* x, isize d, double* out) {
      return static_cast<const P*>(p)->define(at, x, d, out);
    },
    [](const void* p, const feature_site& at, const double* x, isize d) {
      if constexpr (surveying_map<P>) return static_cast<const P*>(p)->define_survey(at, x, d);
      (void)p, (void)at, (void)x, (void)d;
      return 0.0;
    },
    [](const void* p, isize d) {
      if constexpr (requires { static_cast<const P*>(p)->macs(d); })
        return static_cast<double>(static_cast<const P*>(p)->macs(d));
      (void)p, (void)d;
      return 0.0;
    },
    [](const void* p) {
      if constexpr (requires { static_cast<const P*>(p)->trained(); }) return static_cast<const P*>(p)->trained();
      (void)p;
      return true;
    },
    [](const void* p, const shape& s) { static_cast<const P*>(p)->check(s); },
    [](const void* p, detail::fingerprint& f) { static_cast<const P*>(p)->fingerprint(f); },
    [](const void* p, isize d) {
      if constexpr (differentiable_map<P>) return static_cast<const P*>(p)->derive_scratch(d);
      (void)p, (void)d;
      return isize{0};
    },
    [](const void* p, isize d) {
      if constexpr (differentiable_map<P>) return static_cast<const P*>(p)->weights(d);
      (void)p, (void)d;
      return isize{0};
    },
    derive_of<P, float>,
    derive_of<P, double>};

}  // namespace detail

/// Any feature map policy, held by value (up to 96 bytes, no allocation; weights stay the caller's).
class feature_map {
 public:
  template <feature_map_policy P>
    requires(!std::same_as<P, feature_map>)
  feature_map(const P& p) : table_(&detail::feature_map_table_of<P>) {  // NOLINT(google-explicit-constructor)
    static_assert(sizeof(P) <= sizeof storage_,
                  "a feature map may hold up to 96 bytes; keep weights outside and point to them");
    ::new (static_cast<void*>(storage_)) P(p);
  }

  bool log_scaled() const { return table_->log_scaled; }
  bool positional() const { return table_->positional; }
  bool identity() const { return table_->identity; }
  bool surveys() const { return table_->surveys(storage_); }
  isize features(isize d) const { return table_->features(storage_, d); }
  isize scratch(isize d) const { return table_->scratch(storage_, d); }
  double macs(isize d) const { return table_->macs(storage_, d); }
  bool trained() const { return table_->trained(storage_); }
  void check(const shape& s) const { table_->check(storage_, s); }
  void fingerprint(detail::fingerprint& f) const { table_->fingerprint(storage_, f); }

  void apply(const feature_block<float>& b, float* scratch) const { table_->apply_f32(storage_, b, scratch); }
  void apply(const feature_block<double>& b, double* scratch) const { table_->apply_f64(storage_, b, scratch); }
  bool differentiable() const { return table_->differentiable; }
  isize derive_scratch(isize d) const { return table_->derive_scratch(storage_, d); }
  isize weights(isize d) const { return table_->weights(storage_, d); }
  void derive(const feature_block<float>& b, const feature_gradient<float>& g, float* scratch) const {
    table_->derive_f32(storage_, b, g, scratch);
  }
  void derive(const feature_block<double>& b, const feature_gradient<double>& g, double* scratch) const {
    table_->derive_f64(storage_, b, g, scratch);
  }
  float survey(const feature_block<float>& b, float* scratch) const { return table_->survey_f32(storage_, b, scratch); }
  double survey(const feature_block<double>& b, double* scratch) const {
    return table_->survey_f64(storage_, b, scratch);
  }
  double define(const feature_site& at, const double* x, isize d, double* out) const {
    return table_->define(storage_, at, x, d, out);
  }
  double define_survey(const feature_site& at, const double* x, isize d) const {
    return table_->define_survey(storage_, at, x, d);
  }

 private:
  const detail::feature_map_table* table_;
  alignas(16) std::byte storage_[96]{};
};

}  // namespace FOVEA_ABI
}  // namespace fovea
