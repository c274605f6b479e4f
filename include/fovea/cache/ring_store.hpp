// SPDX-License-Identifier: MIT
#pragma once
/// @file  A KV store of one sequence that keeps its first tokens and the last ones, in constant memory: StreamingLLM, sliding windows.
///
/// Contract   a value: a copy is a fork. Room for first + window + chunk - 1 tokens: a call that appends up to `chunk` tokens and attends
///            with the mask window{window, first} gives exactly what a store of all tokens would. append drops the oldest tokens but the
///            first; truncate goes back as far as no key is missing that the next token would see, and refuses to go further.
///            shift(count) numbers tokens anew, as if tokens [first, first + count) had never been: those already dropped go first, and
///            cost nothing but the turning of the keys that stay (so that positions remain within a rope's table on an endless stream).
/// Cost       as contiguous_store; bytes() does not grow with the tokens.
/// Source     Xiao et al., Efficient streaming language models with attention sinks, arXiv 2309.17453.

#include <vector>

#include <fovea/cache/ring.hpp>
#include <fovea/cache/saved_shape.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct ring_size {
  isize window = 0;  ///< keys that a token sees, its own included, besides the first
  isize first = 0;   ///< first tokens, never dropped (attention sinks)
  isize chunk = 1;   ///< most tokens of one call
};

class ring_store {
 public:
  ring_store(const kv_shape& s, const ring_size& r) : size_(r) {
    detail::check_kv_shape("ring_store", s);
    constexpr isize most = isize{1} << 60;
    require(r.window >= 1 && r.first >= 0 && r.chunk >= 1 && r.window <= most && r.first <= most && r.chunk <= most,
            "ring_store: window, first, chunk are ", r.window, ", ", r.first, ", ", r.chunk,
            "; wanted at least 1, 0, 1, and at most 2^60");
    index_.first = r.first, index_.size = r.window + r.chunk - 1;
    layout_ = kv_layout(s, index_.slots());
    memory_ = buffer(layout_.bytes());
    std::memset(memory_.data(), 0, layout_.bytes());  // save() writes all of it
    scratch_.resize(static_cast<std::size_t>(s.d > s.e ? s.d : s.e));
  }

  const kv_shape& shape() const { return layout_.shape(); }
  const ring_size& size() const { return size_; }
  isize tokens() const { return index_.tokens; }  ///< that the sequence has, dropped ones included
  isize dropped() const { return index_.dropped(); }
  std::size_t bytes() const { return layout_.bytes(); }
  isize most_at_once() const { return size_.chunk; }

  void check_append(const tensor_ref& k, const tensor_ref& v, const key_positions& at) const {
    detail::check_append("ring store", shape(), k, v, at);
  }
  /// Any number of tokens; of more than the ring holds only the last are written.
  void append(const tensor_ref& k, const tensor_ref& v, const key_positions& at) {
    check_append(k, v, at);
    const detail::row_writer writer(shape(), scratch_.data());
    const auto place = [&](isize i, isize& row) {
      row = index_.slot(index_.tokens + i);
      return memory_.data();
    };
    const isize n = k.length, room = size_.first - index_.tokens, head = room < 0 ? 0 : room < n ? room : n;
    const isize tail = n - head < index_.size ? head : n - index_.size;
    detail::write_tokens(layout_, writer, k, v, 0, shape().heads, 0, 0, head, at, place);
    detail::write_tokens(layout_, writer, k, v, 0, shape().heads, 0, tail, n - tail, at, place);
    index_.append(n);
  }
  void append(const tensor_ref& k, const tensor_ref& v, const rope* turn = nullptr) {
    append(k, v, key_positions{turn, tokens(), nullptr});
  }

  void truncate(isize tokens) {
    require(tokens >= 0 && tokens <= index_.tokens, "truncate to ", tokens, " tokens; the ring store holds ",
            index_.tokens);
    require(index_.can_truncate(tokens, size_.window), "truncate to ", tokens,
            " tokens: the next one would see keys from ", tokens - size_.window + 1,
            " on, and the ring store holds none between ", size_.first, " and ", index_.oldest(),
            "; a larger chunk lets it go back further");
    index_.truncate(tokens);
  }

  void shift(isize count, const rope* turn = nullptr) {
    detail::check_shift("ring store", shape(), index_.tokens, count, count > 0 ? size_.first : 0, turn);
    if (count == 0) return;
    const isize from = size_.first + count > index_.oldest() ? size_.first + count : index_.oldest();
    const detail::row_writer writer(shape(), scratch_.data());
    for (isize g = 0; g < shape().heads && turn != nullptr; ++g)
      for (isize j = from; j < index_.tokens; ++j) {
        const auto at = layout_.key(memory_.data(), g, index_.slot(j));
        writer.move(at, shape().d, turn, count, at);
      }
    index_.shift(count);
  }

  kv_sequence view() const { return index_.view(layout_.sequence(memory_.data(), 0, shape().heads, 0)); }

  std::vector<std::byte> save() const {
    const kv_shape& s = shape();
    const ring_index& x = index_;
    const std::int64_t fields[10] = {
        s.heads, s.d, s.e, detail::saved_flags(s), size_.window, size_.first, size_.chunk, x.origin, x.tokens, x.low};
    return detail::seal(magic, version, detail::saved_type(s), 0, fields, layout_.bytes(),
                        [&](std::byte* to) { std::memcpy(to, memory_.data(), layout_.bytes()); });
  }
  static ring_store restore(std::span<const std::byte> bytes) {
    const auto s = detail::unseal<10>("ring store", magic, version, bytes);
    const auto& f = s.fields;
    ring_store to(detail::saved_shape("ring store", s), {f[4], f[5], f[6]});
    to.index_.origin = f[7], to.index_.tokens = f[8], to.index_.low = f[9];
    require(to.bytes() == s.payload.size() && to.index_.sound(), "the saved ring store's header is damaged");
    std::memcpy(to.memory_.data(), s.payload.data(), s.payload.size());
    return to;
  }

 private:
  static constexpr char magic[8] = "FOVEARG";
  static constexpr std::uint32_t version = 1;

  ring_size size_;
  ring_index index_;
  kv_layout layout_;
  buffer memory_;
  std::vector<double> scratch_;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
