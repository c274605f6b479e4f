// SPDX-License-Identifier: MIT
#pragma once
/// @file  `any_attention`: one mechanism of any kind behind one type, for callers that choose per layer and head at run time.
///
///   any_attention a = any_attention::hold(softmax_attention{...});       what the program knows
///   any_attention b = any_attention::make(configuration, weights);       what a file says: needs <fovea/any_attention.hpp>
///   prefill(exec, b, q, k, v, out);   step(exec, b, q, k, v, out, state);
///
/// Contract   copies share one immutable mechanism and whatever keeps its weights alive. A capability that the mechanism lacks
///            (a state, merge, a cost) is answered by a contract_error that says so; ask `streaming()` and the like first.
///            Optional members of a mechanism that are picked up where they exist:
///              bool trained() const                 false: its weights were drawn, not learned
///              static constexpr bool has_lse        it can write problem::lse
///              double macs(shape), step_macs(shape) multiply-adds;  std::size_t state_bytes(shape)
///              void load_state(state&, const arrays&) const;   arrays store_state(const state&) const     (S0, z0 in; S, z out)
/// Cost       one virtual call per prefill or step.

#include <fovea/core/backward.hpp>
#include <fovea/core/configuration.hpp>
#include <fovea/core/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

class any_attention {
 public:
  /// `keep_alive` owns the memory that the mechanism's views point to.
  template <mechanism M>
    requires(!std::same_as<M, any_attention>)
  static any_attention hold(M m, std::shared_ptr<const void> keep_alive = {}) {
    any_attention a;
    a.model_ = std::make_shared<const model<M>>(std::move(m), std::move(keep_alive));
    a.config_ = std::make_shared<const configuration>(configuration{M::name, {}});
    a.inputs_ = std::make_shared<const std::set<std::string>>();
    return a;
  }
  /// Looks the mechanism up by name and refuses what it does not know. Defined in <fovea/any_attention.hpp>.
  static any_attention make(const configuration& c, const arrays& tensors = {});

  const char* name() const { return get().name(); }
  /// What it was made from (its name alone if it was made by `hold`).
  const configuration& config() const { return *config_; }
  /// Names of the tensors that come with each call: g, beta, b, w (call_options::gates), S0, z0 (load_state).
  const std::set<std::string>& call_inputs() const { return *inputs_; }

  bool streaming() const { return get().streaming(); }
  bool mergeable() const { return get().mergeable(); }
  bool differentiable() const { return get().differentiable(); }
  bool has_lse() const { return get().has_lse(); }
  bool trained() const { return get().trained(); }
  bool loads_state() const { return get().loads_state(); }
  bool stores_state() const { return get().stores_state(); }

  void check(const problem& p) const { get().check(p); }
  std::size_t workspace_size(const shape& s, int threads) const { return get().workspace_size(s, threads); }
  void prefill(exec_ref exec, const problem& p, arena scratch) const { get().prefill(exec, p, scratch); }

  std::size_t state_workspace_size(const shape& s, int threads) const { return get().state_workspace_size(s, threads); }
  bool takes_positions() const { return get().takes_positions(); }
  bool takes_skipped() const { return get().takes_skipped(); }
  void check(const backward_problem& p) const { get().check(p); }
  std::size_t workspace_size_backward(const shape& s, int threads) const {
    return get().workspace_size_backward(s, threads);
  }
  void backward(exec_ref exec, const backward_problem& p, arena scratch) const { get().backward(exec, p, scratch); }

  state make_state(const shape& s) const { return get().make_state(s); }
  std::uint64_t tag() const { return get().tag(); }
  void check(const problem& p, const state& s) const { get().check(p, s); }
  void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const { get().prefill(exec, p, s, scratch); }
  void merge(state& earlier, const state& later) const { get().merge(earlier, later); }
  void load_state(state& s, const arrays& from) const { get().load_state(s, from); }
  arrays store_state(const state& s) const { return get().store_state(s); }

  double macs(const shape& s) const { return get().macs(s); }
  double step_macs(const shape& s) const { return get().step_macs(s); }
  std::size_t state_bytes(const shape& s) const { return get().state_bytes(s); }

  /// The mechanism itself, if it is an M.
  template <mechanism M>
  const M* as() const {
    const auto* m = dynamic_cast<const model<M>*>(model_.get());
    return m == nullptr ? nullptr : &m->held;
  }

 private:
  struct interface {
    virtual ~interface() = default;
    virtual const char* name() const = 0;
    virtual bool streaming() const = 0;
    virtual bool mergeable() const = 0;
    virtual bool differentiable() const = 0;
    virtual bool has_lse() const = 0;
    virtual bool trained() const = 0;
    virtual bool loads_state() const = 0;
    virtual bool stores_state() const = 0;
    virtual void check(const problem&) const = 0;
    virtual std::size_t workspace_size(const shape&, int) const = 0;
    virtual void prefill(exec_ref, const problem&, arena) const = 0;
    virtual std::size_t state_workspace_size(const shape&, int) const = 0;
    virtual bool takes_positions() const = 0;
    virtual bool takes_skipped() const = 0;
    virtual void check(const backward_problem&) const = 0;
    virtual std::size_t workspace_size_backward(const shape&, int) const = 0;
    virtual void backward(exec_ref, const backward_problem&, arena) const = 0;
    virtual state make_state(const shape&) const = 0;
    virtual std::uint64_t tag() const = 0;
    virtual void check(const problem&, const state&) const = 0;
    virtual void prefill(exec_ref, const problem&, state&, arena) const = 0;
    virtual void merge(state&, const state&) const = 0;
    virtual void load_state(state&, const arrays&) const = 0;
    virtual arrays store_state(const state&) const = 0;
    virtual double macs(const shape&) const = 0;
    virtual double step_macs(const shape&) const = 0;
    virtual std::size_t state_bytes(const shape&) const = 0;
  };

  template <class M>
  struct model final : interface {
    model(M m, std::shared_ptr<const void> keep) : held(std::move(m)), keep_alive(std::move(keep)) {}
    M held;
    std::shared_ptr<const void> keep_alive;

    static constexpr bool streams = streaming_mechanism<M>;
    static constexpr bool merges = mergeable_mechanism<M>;
    static constexpr bool differentiates = differentiable_mechanism<M>;
    static constexpr bool loads = requires(const M& m, state& s, const arrays& a) { m.load_state(s, a); };
    static constexpr bool stores = requires(const M& m, const state& s) {
      { m.store_state(s) } -> std::same_as<arrays>;
    };

    const char* name() const override { return M::name; }
    std::size_t state_workspace_size(const shape& s, int threads) const override {
      return detail::state_workspace(held, s, threads);
    }
    bool takes_positions() const override { return detail::takes_positions(held); }
    bool takes_skipped() const override { return detail::takes_skipped(held); }
    // A streaming mechanism may have settings without a state: it says so itself.
    bool streaming() const override {
      if constexpr (streams && requires(const M& m) {
                      { m.streaming() } -> std::same_as<bool>;
                    })
        return held.streaming();
      else
        return streams;
    }
    bool mergeable() const override {
      if constexpr (merges && requires(const M& m) {
                      { m.mergeable() } -> std::same_as<bool>;
                    })
        return streaming() && held.mergeable();
      else
        return merges && streaming();
    }
    bool differentiable() const override { return differentiates; }
    bool loads_state() const override { return loads; }
    bool stores_state() const override { return stores; }
    bool has_lse() const override {
      if constexpr (requires {
                      { M::has_lse } -> std::convertible_to<bool>;
                    })
        return M::has_lse;
      else
        return false;
    }
    bool trained() const override {
      if constexpr (requires(const M& m) {
                      { m.trained() } -> std::convertible_to<bool>;
                    })
        return held.trained();
      else
        return true;
    }

    void check(const problem& p) const override { held.check(p); }
    std::size_t workspace_size(const shape& s, int threads) const override { return held.workspace_size(s, threads); }
    void prefill(exec_ref exec, const problem& p, arena scratch) const override { held.prefill(exec, p, scratch); }

    void check(const backward_problem& p) const override {
      if constexpr (differentiates)
        held.check(p);
      else
        lacks("backward pass: no gradients");
    }
    std::size_t workspace_size_backward(const shape& s, int threads) const override {
      if constexpr (differentiates)
        return held.workspace_size_backward(s, threads);
      else
        lacks("backward pass: no gradients");
    }
    void backward(exec_ref exec, const backward_problem& p, arena scratch) const override {
      if constexpr (differentiates)
        held.backward(exec, p, scratch);
      else
        lacks("backward pass: no gradients");
    }

    state make_state(const shape& s) const override {
      if constexpr (streams)
        return held.make_state(s);
      else
        lacks("state");
    }
    std::uint64_t tag() const override {
      if constexpr (streams)
        return held.tag();
      else
        lacks("state");
    }
    void check(const problem& p, const state& s) const override {
      if constexpr (streams)
        held.check(p, s);
      else
        lacks("state");
    }
    void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const override {
      if constexpr (streams)
        held.prefill(exec, p, s, scratch);
      else
        lacks("state");
    }
    void merge(state& earlier, const state& later) const override {
      if constexpr (merges)
        held.merge(earlier, later);
      else
        lacks("merge of states");
    }
    void load_state(state& s, const arrays& from) const override {
      if constexpr (loads)
        held.load_state(s, from);
      else
        lacks("initial state given as tensors");
    }
    arrays store_state(const state& s) const override {
      if constexpr (stores)
        return held.store_state(s);
      else
        lacks("final state given as tensors");
    }
    double macs(const shape& s) const override {
      if constexpr (requires(const M& m) {
                      { m.macs(s) } -> std::convertible_to<double>;
                    })
        return held.macs(s);
      else
        lacks("count of multiply-adds");
    }
    double step_macs(const shape& s) const override {
      if constexpr (requires(const M& m) {
                      { m.step_macs(s) } -> std::convertible_to<double>;
                    })
        return held.step_macs(s);
      else
        lacks("count of multiply-adds of a step");
    }
    std::size_t state_bytes(const shape& s) const override {
      if constexpr (requires(const M& m) {
                      { m.state_bytes(s) } -> std::convertible_to<std::size_t>;
                    })
        return held.state_bytes(s);
      else
        lacks("state size");
    }
    [[noreturn]] static void lacks(const char* what) { fail(std::string(M::name) + " has no " + what); }
  };

  const interface& get() const {
    require(model_ != nullptr, "any_attention is empty; make one by any_attention::make or any_attention::hold");
    return *model_;
  }

  std::shared_ptr<const interface> model_;
  std::shared_ptr<const configuration> config_ = std::make_shared<const configuration>();
  std::shared_ptr<const std::set<std::string>> inputs_ = std::make_shared<const std::set<std::string>>();
};

static_assert(mergeable_mechanism<any_attention> && differentiable_mechanism<any_attention>);

}  // namespace FOVEA_ABI
}  // namespace fovea
