// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a draw is run with: numbers, rope, rules of every call, poison; and the judge that asks the twin.

#include <atomic>
#include <optional>
#include <stdexcept>

#include <fovea/position/rope_table.hpp>
#include <fovea/softmax.hpp>

#include "draws/rules.hpp"

namespace draws {

/// Something is not as it must be: not an error of the test.
struct wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};
template <class... Args>
void demand(bool holds, const Args&... args) {
  if (!holds) throw wrong(fovea::detail::sentence(args...));
}

/// Rows of one item: [heads][tokens][width], already rounded to the type of the call.
struct numbers {
  isize heads = 0, tokens = 0, width = 0;
  std::vector<double> data;
  numbers() = default;
  numbers(isize h, isize n, isize w) : heads(h), tokens(n), width(w), data(static_cast<std::size_t>(h * n * w)) {}
  double* row(isize h, isize j) { return data.data() + (h * tokens + j) * width; }
  const double* row(isize h, isize j) const { return data.data() + (h * tokens + j) * width; }
};

struct problem_of_draw {
  const draw& d;
  sabotage wanted;
  std::atomic<bool> applied{false};
  std::vector<std::unique_ptr<rules>> of_call;
  std::vector<numbers> k, v;                        // [item], all tokens that ever come
  std::vector<std::vector<numbers>> q;              // [call][item]
  std::vector<std::vector<std::int32_t>> at;        // [item] positions of all tokens, where they are given or not
  std::vector<std::vector<std::uint8_t>> poisoned;  // [item][g * tokens + j]
  std::vector<float> sinks;
  std::optional<rope_table> table;
  rope turn_, late_;
  bool turns = false;  ///< rows can be turned: there is a rope, and nothing is wrong with it

  problem_of_draw(const draw& x, sabotage s);

  isize tokens(isize b) const { return k[static_cast<std::size_t>(b)].tokens; }
  isize shared_tokens(isize b) const;  ///< that item b has in common with item 0
  const rope* turn() const { return table ? &turn_ : nullptr; }
  /// The mechanism of a call, as the library gets it.
  softmax_attention mechanism(std::size_t call);
  /// What a sabotage does to a mechanism, to sequences, to the outputs of a call.
  void spoil(softmax_attention& m, std::size_t call);
  void spoil(std::vector<kv_sequence>& kv);
  void spoil(struct outputs& y);
  /// Rows [first, first + count) of all items as a tensor of the call's type, in the draw's layout.
  test::tensor tensor_of(const std::vector<const numbers*>& from, isize first, isize count) const;
  /// Row j of the keys of item b as a store of `type` has to hold it (not for int8): turned, then rounded.
  std::vector<double> stored_key(isize b, isize g, isize j, dtype type) const;
  std::vector<double> stored_value(isize b, isize g, isize j, dtype type) const;
  std::vector<double> turned(const double* row, isize position) const;

  /// Compares rows of item b of a call with the twin. `keys`, `values`: what the rows lie on, in double [1, G, m, .]; `held`: row i of
  /// the call may find token j.
  void judge(std::size_t call, isize b, const tensor_ref& out, const tensor_ref& lse, const test::tensor& keys,
             const test::tensor& values, const std::function<bool(isize i, isize j)>& held) const;

 private:
  std::vector<std::unique_ptr<rules>> other_rules_;
  std::vector<std::unique_ptr<fovea::mask>> masks_;
  std::vector<std::unique_ptr<fovea::score>> scores_;
  std::vector<std::int32_t> pages_;

  void make_positions();
  void make_numbers();
  void plant_poison();
};

/// Pools that live as long as the program.
exec_ref threads_of(int count);
/// Scratch of exactly so many bytes, with a guard behind it; or none.
class scratch {
 public:
  scratch(const draw& d, std::size_t need) {
    if (!d.workspace || need == 0) return;
    const std::size_t given = d.fault == fault::workspace ? need - 1 : need;
    memory_ = buffer(given + 64);
    std::memset(memory_.data(), 0xff, memory_.size());
    span_ = {memory_.data(), given};
  }
  std::span<std::byte> span() const { return span_; }
  void check() const {
    for (std::size_t x = span_.size(); x < memory_.size(); ++x)
      demand(memory_.data()[x] == std::byte{0xff}, "memory behind the workspace was written");
  }

 private:
  buffer memory_;
  std::span<std::byte> span_;
};

/// Outputs of a call: NaN before it; refusing leaves every byte.
struct outputs {
  test::tensor out, lse;
  std::vector<std::byte> before_out, before_lse;
  outputs(const draw& d, isize B, isize n)
      : out(test::unwritten(out_type(d), B, d.H, n, d.e, d.layout)),
        lse(test::unwritten(d.type == dtype::f64 ? dtype::f64 : dtype::f32, B, d.H, n, 1, d.layout)),
        before_out(out.bytes()),
        before_lse(lse.bytes()) {}
  static dtype out_type(const draw& d) {
    return d.fault != fault::out ? d.out : d.type == dtype::f64 ? dtype::f32 : dtype::f64;
  }
  tensor_mut lse_of(const draw& d) { return d.lse ? lse.ref() : tensor_mut{}; }
  tensor_ref lse_of(const draw& d, isize b) { return d.lse ? tensor_ref(lse.ref()).part(b, 0, d.H) : tensor_ref{}; }
  tensor_ref out_of(isize b) { return tensor_ref(out.ref()).part(b, 0, out.heads()); }
  /// Runs the call; if it is refused, nothing may have been written.
  template <class F>
  void call(F&& f) {
    try {
      f();
    } catch (const contract_error&) {
      demand(out.bytes() == before_out && lse.bytes() == before_lse, "a refused call has written");
      throw;
    }
    demand(out.guards_intact() && lse.guards_intact(), "memory beside the outputs was written");
  }
};

void run_views(problem_of_draw& p);
void run_state(problem_of_draw& p);
void run_append(problem_of_draw& p);
void run_sequences(problem_of_draw& p);
void run_backward(problem_of_draw& p, const softmax_attention& m, const test::tensor& q, const test::tensor& k,
                  const test::tensor& v, const outputs& y);

}  // namespace draws
