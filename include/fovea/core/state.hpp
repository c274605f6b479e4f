// SPDX-License-Identifier: MIT
#pragma once
/// @file  What a streaming mechanism remembers between calls: a value that is copied, saved and restored whole.
///
/// Contract   a state belongs to the mechanism and shape that made it: `tag` is a fingerprint of the mechanism's name and
///            hyper-parameters, and a call with a foreign state is refused. A copy is a snapshot; assigning it back is the
///            rollback. `save` gives bytes with a versioned, checked header; `restore` refuses what is truncated or foreign.
/// Layout     header (104 bytes, little-endian as the machine), then the payload.

#include <cstring>
#include <span>
#include <vector>

#include <fovea/core/saved.hpp>
#include <fovea/core/workspace.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

class state {
 public:
  state() = default;
  /// `bytes` of zeroed payload for `sizes`; sizes.m is the capacity in tokens where the mechanism keeps tokens, else 0.
  state(std::uint64_t tag, const shape& sizes, std::size_t bytes) : tag_(tag), sizes_(sizes), data_(bytes) {
    if (bytes > 0) std::memset(data_.data(), 0, bytes);
  }

  /// A state whose payload is a part of another's, or scratch; as it stands there.
  static state over(std::uint64_t tag, const shape& sizes, isize tokens, std::span<std::byte> memory) {
    state s;
    s.tag_ = tag, s.sizes_ = sizes, s.tokens_ = tokens, s.data_ = buffer::over(memory);
    return s;
  }

  std::uint64_t tag() const { return tag_; }
  const shape& sizes() const { return sizes_; }
  isize tokens() const { return tokens_; }  ///< how many tokens it has seen
  void set_tokens(isize count) { tokens_ = count; }
  std::size_t bytes() const { return data_.size(); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.data());
  }

  std::vector<std::byte> save() const {
    const shape& z = sizes_;
    const std::int64_t fields[8] = {tokens_, z.B, z.H, z.G, z.n, z.m, z.d, z.e};
    return detail::seal(magic, version, static_cast<std::uint32_t>(z.type), tag_, fields, data_.size(),
                        [&](std::byte* to) { std::memcpy(to, data_.data(), data_.size()); });
  }

  static state restore(std::span<const std::byte> bytes) {
    const auto s = detail::unseal<8>("state", magic, version, bytes);
    const auto& f = s.fields;
    state to(s.header.tag, {f[1], f[2], f[3], f[4], f[5], f[6], f[7], static_cast<dtype>(s.header.type)},
             s.payload.size());
    to.tokens_ = f[0];
    if (!s.payload.empty()) std::memcpy(to.data_.data(), s.payload.data(), s.payload.size());
    return to;
  }

  /// Refuses a state that another mechanism, or another shape, has made.
  void check(std::uint64_t tag, const shape& call, const char* mechanism) const {
    require(tag_ == tag, "the state was not made by this ", mechanism,
            " (another mechanism, or other hyper-parameters); use make_state");
    require(sizes_.B == call.B && sizes_.H == call.H && sizes_.G == call.G && sizes_.d == call.d && sizes_.e == call.e,
            "the state was made for B, H, G, d, e = ", sizes_.B, ", ", sizes_.H, ", ", sizes_.G, ", ", sizes_.d, ", ",
            sizes_.e, "; the call has ", call.B, ", ", call.H, ", ", call.G, ", ", call.d, ", ", call.e);
    require((sizes_.type == dtype::f64) == (call.type == dtype::f64), "the state was made for ", name_of(sizes_.type),
            " and the call is ", name_of(call.type));
  }

 private:
  static constexpr std::uint32_t version = 1;
  static constexpr char magic[8] = "FOVEAST";

  std::uint64_t tag_ = 0;
  shape sizes_;
  isize tokens_ = 0;
  buffer data_;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
