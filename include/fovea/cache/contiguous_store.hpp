// SPDX-License-Identifier: MIT
#pragma once
/// @file  A KV store of one sequence in one block: room for `capacity` tokens, token j in row j.
///
/// Contract   a value: a copy is a fork, assigning it back is a rollback. append refuses what does not fit, before anything is written.
///            shift drops tokens [keep, keep + count) and turns the keys behind them back by count positions (llama.cpp's context shift);
///            int8 keys are read, turned and quantised again, which adds up to one more rounding step of the row's scale.
/// Cost       append: one pass over the new rows; shift: one over the rows behind `keep`; truncate: nothing. bytes():
///            docs/mechanisms/kv_stores.md.

#include <vector>

#include <fovea/cache/saved_shape.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

class contiguous_store {
 public:
  contiguous_store(const kv_shape& s, isize capacity) {
    detail::check_kv_shape("contiguous_store", s);
    require(capacity >= 0, "contiguous_store: the capacity is ", capacity, " tokens; it must not be negative");
    layout_ = kv_layout(s, capacity);
    memory_ = buffer(layout_.bytes());
    scratch_.resize(static_cast<std::size_t>(s.d > s.e ? s.d : s.e));
  }

  const kv_shape& shape() const { return layout_.shape(); }
  isize capacity() const { return layout_.rows(); }
  isize tokens() const { return tokens_; }
  std::size_t bytes() const { return layout_.bytes(); }
  isize most_at_once() const { return PTRDIFF_MAX; }  ///< tokens that one append may bring and be attended exactly

  /// Refuses what `append` would refuse.
  void check_append(const tensor_ref& k, const tensor_ref& v, const key_positions& at) const {
    detail::check_append("contiguous store", shape(), k, v, at);
    require(k.length <= capacity() - tokens_, "the contiguous store holds ", tokens_, " of at most ", capacity(),
            " tokens; ", k.length, " more do not fit");
  }
  void append(const tensor_ref& k, const tensor_ref& v, const key_positions& at) {
    check_append(k, v, at);
    const detail::row_writer writer(shape(), scratch_.data());
    detail::write_tokens(layout_, writer, k, v, 0, shape().heads, 0, 0, k.length, at, [&](isize i, isize& row) {
      row = tokens_ + i;
      return memory_.data();
    });
    tokens_ += k.length;
  }
  /// Keys are turned (if at all) to the positions behind those held.
  void append(const tensor_ref& k, const tensor_ref& v, const rope* turn = nullptr) {
    append(k, v, key_positions{turn, tokens_, nullptr});
  }

  void truncate(isize tokens) {
    require(tokens >= 0 && tokens <= tokens_, "truncate to ", tokens, " tokens; the contiguous store holds ", tokens_);
    tokens_ = tokens;
  }

  void shift(isize count, isize keep = 0, const rope* turn = nullptr) {
    detail::check_shift("contiguous store", shape(), tokens_, count, keep, turn);
    const detail::row_writer writer(shape(), scratch_.data());
    for (isize g = 0; g < shape().heads && count > 0; ++g)
      for (isize j = keep + count; j < tokens_; ++j) {
        writer.move(layout_.key(memory_.data(), g, j), shape().d, turn, count,
                    layout_.key(memory_.data(), g, j - count));
        if (!shape().values_in_keys)
          writer.move(layout_.value(memory_.data(), g, j), shape().e, nullptr, 0,
                      layout_.value(memory_.data(), g, j - count));
      }
    tokens_ -= count;
  }

  kv_sequence view() const { return layout_.sequence(memory_.data(), 0, shape().heads, tokens_); }

  /// The rows held, nothing else.
  std::vector<std::byte> save() const {
    const kv_shape& s = shape();
    const std::int64_t fields[6] = {s.heads, s.d, s.e, detail::saved_flags(s), capacity(), tokens_};
    const kv_layout held(s, tokens_);
    return detail::seal(magic, version, detail::saved_type(s), 0, fields, held.bytes(),
                        [&](std::byte* to) { detail::copy_rows(layout_, memory_.data(), held, to, tokens_); });
  }
  static contiguous_store restore(std::span<const std::byte> bytes) {
    const auto s = detail::unseal<6>("contiguous store", magic, version, bytes);
    const kv_shape shape = detail::saved_shape("contiguous store", s);
    const isize capacity = s.fields[4], tokens = s.fields[5];
    const kv_layout held(shape, tokens);
    require(tokens <= capacity && held.bytes() == s.payload.size(), "the saved contiguous store holds ",
            s.payload.size(), " bytes of rows and room for ", capacity, " tokens; its header counts ", tokens,
            " tokens of ", held.bytes(), " bytes");
    contiguous_store to(shape, capacity);
    to.tokens_ = tokens;
    detail::copy_rows(held, s.payload.data(), to.layout_, to.memory_.data(), tokens);
    return to;
  }

 private:
  static constexpr char magic[8] = "FOVEAKV";
  static constexpr std::uint32_t version = 1;

  kv_layout layout_;
  isize tokens_ = 0;
  buffer memory_;
  std::vector<double> scratch_;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
