// SPDX-License-Identifier: MIT
#pragma once
/// @file  Bytes that say what they are: a header with magic, version, lengths and a checksum, then the payload.
///
/// Contract   `unseal` refuses what is truncated, foreign, of another version or damaged, in a sentence that names the kind of thing.
/// Layout     header (40 bytes, as the machine stores numbers), the fields of the kind (8 bytes each), the payload.

#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include <fovea/core/contract.hpp>

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

struct saved_header {
  char magic[8];
  std::uint32_t version, type;
  std::uint64_t tag, payload, check;
};

template <std::size_t Fields>
struct saved {
  saved_header header{};
  std::int64_t fields[Fields]{};
  std::span<const std::byte> payload;

  /// Over the header (its own field as 0), the fields and the payload: damaged sizes must be noticed too.
  std::uint64_t check() const {
    saved_header h = header;
    h.check = 0;
    return fingerprint{}.bytes(&h, sizeof h).bytes(fields, sizeof fields).bytes(payload.data(), payload.size()).value;
  }
};

/// `fill` writes `payload` bytes to the address it is given.
template <std::size_t Fields, class Fill>
std::vector<std::byte> seal(const char (&magic)[8], std::uint32_t version, std::uint32_t type, std::uint64_t tag,
                            const std::int64_t (&fields)[Fields], std::size_t payload, Fill&& fill) {
  saved<Fields> s;
  std::memcpy(s.header.magic, magic, sizeof s.header.magic);
  s.header.version = version, s.header.type = type, s.header.tag = tag, s.header.payload = payload;
  std::memcpy(s.fields, fields, sizeof s.fields);
  constexpr std::size_t front = sizeof s.header + sizeof s.fields;
  std::vector<std::byte> out(front + payload);
  if (payload > 0) fill(out.data() + front);
  s.payload = std::span(out).subspan(front);
  s.header.check = s.check();
  std::memcpy(out.data(), &s.header, sizeof s.header);
  std::memcpy(out.data() + sizeof s.header, s.fields, sizeof s.fields);
  return out;
}

/// `what` is "state", "ring store" and so on. The payload is a view into `bytes`; no field is negative.
template <std::size_t Fields>
saved<Fields> unseal(const char* what, const char (&magic)[8], std::uint32_t version,
                     std::span<const std::byte> bytes) {
  saved<Fields> s;
  constexpr std::size_t front = sizeof s.header + sizeof s.fields;
  require(bytes.size() >= front, "a saved ", what, " of ", bytes.size(), " bytes is shorter than its header of ",
          front);
  std::memcpy(&s.header, bytes.data(), sizeof s.header);
  require(std::memcmp(s.header.magic, magic, sizeof s.header.magic) == 0, "these bytes are not a saved ", what,
          ": wrong magic");
  require(s.header.version == version, "the saved ", what, " has version ", s.header.version,
          "; this build reads version ", version);
  require(s.header.payload == bytes.size() - front, "the saved ", what, " announces ", s.header.payload,
          " bytes and holds ", bytes.size() - front);
  std::memcpy(s.fields, bytes.data() + sizeof s.header, sizeof s.fields);
  s.payload = bytes.subspan(front);
  require(s.header.check == s.check(), "the saved ", what, " is damaged: checksum differs");
  bool sound = s.header.type <= static_cast<std::uint32_t>(dtype::i8);
  for (const std::int64_t field : s.fields) sound = sound && field >= 0;
  require(sound, "the saved ", what, "'s header is damaged");
  return s;
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
