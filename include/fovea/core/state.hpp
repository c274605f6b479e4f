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
#include <string_view>
#include <vector>

#include <fovea/core/contract.hpp>
#include <fovea/core/workspace.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

namespace detail {
/// FNV-1a, for fingerprints and for finding damaged files; not for security.
struct fingerprint {
  std::uint64_t value = 0xcbf29ce484222325ULL;
  fingerprint& bytes(const void* p, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) value = (value ^ static_cast<const unsigned char*>(p)[i]) * 0x100000001b3ULL;
    return *this;
  }
  fingerprint& text(std::string_view s) { return bytes(s.data(), s.size()).number(static_cast<double>(s.size())); }
  fingerprint& number(double x) { return bytes(&x, sizeof x); }
};
}  // namespace detail

class state {
 public:
  state() = default;
  /// `bytes` of zeroed payload for `sizes`; sizes.m is the capacity in tokens where the mechanism keeps tokens, else 0.
  state(std::uint64_t tag, const shape& sizes, std::size_t bytes) : tag_(tag), sizes_(sizes), data_(bytes) {
    if (bytes > 0) std::memset(data_.data(), 0, bytes);
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
    const header h = make_header();
    std::vector<std::byte> out(sizeof h + data_.size());
    std::memcpy(out.data(), &h, sizeof h);
    if (data_.size() > 0) std::memcpy(out.data() + sizeof h, data_.data(), data_.size());
    return out;
  }

  static state restore(std::span<const std::byte> saved) {
    header h;
    require(saved.size() >= sizeof h, "a saved state of ", saved.size(), " bytes is shorter than its header of ",
            sizeof h);
    std::memcpy(&h, saved.data(), sizeof h);
    require(std::memcmp(h.magic, "FOVEAST", 8) == 0, "these bytes are not a saved state: wrong magic");
    require(h.version == version, "the saved state has version ", h.version, "; this build reads version ", version);
    require(h.payload == saved.size() - sizeof h, "the saved state announces ", h.payload, " bytes and holds ",
            saved.size() - sizeof h);
    require(h.check == check_of(h, saved.data() + sizeof h), "the saved state is damaged: checksum differs");
    require(h.type <= 3 && h.tokens >= 0, "the saved state's header is damaged");
    for (const std::int64_t size : h.sizes) require(size >= 0, "the saved state's header is damaged");
    state s(h.tag,
            {h.sizes[0], h.sizes[1], h.sizes[2], h.sizes[3], h.sizes[4], h.sizes[5], h.sizes[6],
             static_cast<dtype>(h.type)},
            h.payload);
    s.tokens_ = h.tokens;
    if (h.payload > 0) std::memcpy(s.data_.data(), saved.data() + sizeof h, h.payload);
    return s;
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
  struct header {
    char magic[8];
    std::uint32_t version, type;
    std::uint64_t tag, payload, check;
    std::int64_t tokens, sizes[7];
  };
  header make_header() const {
    header h{};
    std::memcpy(h.magic, "FOVEAST", 8);
    h.version = version;
    h.type = static_cast<std::uint32_t>(sizes_.type);
    h.tag = tag_, h.payload = data_.size(), h.tokens = tokens_;
    const isize s[7] = {sizes_.B, sizes_.H, sizes_.G, sizes_.n, sizes_.m, sizes_.d, sizes_.e};
    for (int i = 0; i < 7; ++i) h.sizes[i] = s[i];
    h.check = check_of(h, data_.data());
    return h;
  }
  /// Over the header (its own field as 0) and the payload: damaged sizes or token counts must be noticed too.
  static std::uint64_t check_of(header h, const std::byte* payload) {
    h.check = 0;
    return detail::fingerprint{}.bytes(&h, sizeof h).bytes(payload, h.payload).value;
  }

  std::uint64_t tag_ = 0;
  shape sizes_;
  isize tokens_ = 0;
  buffer data_;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
