// SPDX-License-Identifier: MIT
#pragma once
/// @file  The header of a safetensors file: its JSON, parsed and checked against the bytes that follow it.
///
/// Contract   offsets against the data's length, product(shape) * size against the offsets without overflow, no duplicate names,
///            no two tensors on the same bytes, no bytes without a tensor. Nesting, numbers and ranks are bounded.
/// Errors     file_error with the byte at fault. Files: interop/safetensors.hpp.

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fovea/core/configuration.hpp>
#include <fovea/interop/file.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

using safetensors_metadata = std::map<std::string, std::string>;

/// Where one tensor stands in the data.
struct safetensors_entry {
  element type = element::f32;
  std::vector<isize> dims;
  std::uint64_t begin = 0, end = 0;
};

struct safetensors_header {
  std::map<std::string, safetensors_entry> entries;
  safetensors_metadata metadata;
};

namespace detail {

inline constexpr std::uint64_t safetensors_header_limit = 100'000'000;  // as in the original implementation
inline constexpr std::size_t safetensors_rank_limit = 16;

inline constexpr std::pair<const char*, element> safetensors_types[] = {
    {"F64", element::f64},   {"F32", element::f32}, {"F16", element::f16},
    {"BF16", element::bf16}, {"U8", element::u8},   {"BOOL", element::boolean},
    {"I32", element::i32},   {"I64", element::i64}, {"U32", element::u32}};

/// The JSON of a safetensors header and nothing more: objects two deep, strings, lists of non-negative integers.
class header_parser {
 public:
  header_parser(std::string_view text, std::string path) : text_(text), path_(std::move(path)) {}

  safetensors_header parse() {
    safetensors_header h;
    if (text_.empty() || text_[0] != '{') stop("wanted '{'");
    object([&](const std::string& key) {
      if (key == "__metadata__") return metadata(h.metadata);
      context_ = "tensor " + quoted(key) + ": ";
      if (h.entries.contains(key)) stop("is there twice");
      h.entries.emplace(key, entry());
      context_.clear();
    });
    if (skip_space() != text_.size()) stop("wanted nothing after the header's closing brace");
    return h;
  }

 private:
  [[noreturn]] void stop(const std::string& what) const {
    throw file_error(path_, context_ + what + " (header byte " + std::to_string(at_) + ")");
  }
  static std::string quoted(const std::string& s) {
    std::string out = "\"";
    for (const char c : s.substr(0, 80))
      out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;  // one line, always
    return out + (s.size() > 80 ? "...\"" : "\"");
  }

  std::size_t skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
    return at_;
  }
  bool next_is(char c) { return skip_space() < text_.size() && text_[at_] == c; }
  bool take(char c) {
    if (!next_is(c)) return false;
    ++at_;
    return true;
  }
  void want(char c) {
    if (!take(c)) stop(std::string("wanted '") + c + "'");
  }

  template <class Member>
  void object(Member&& member) {
    want('{');
    if (take('}')) return;
    do {
      const std::string key = string();
      want(':');
      member(key);
    } while (take(','));
    want('}');
  }

  void metadata(safetensors_metadata& into) {
    context_ = "__metadata__: ";
    if (seen_metadata_) stop("is there twice");
    seen_metadata_ = true;
    object([&](const std::string& key) {
      if (!next_is('"')) stop("the value of " + quoted(key) + " must be a string");
      if (!into.emplace(key, string()).second) stop(quoted(key) + " is there twice");
    });
    context_.clear();
  }

  safetensors_entry entry() {
    safetensors_entry e;
    bool dtype = false, shape = false, offsets = false;
    const auto once = [&](bool& seen, const std::string& key) {
      if (std::exchange(seen, true)) stop(key + " is there twice");
    };
    object([&](const std::string& key) {
      if (key == "dtype") {
        once(dtype, key);
        e.type = type();
      } else if (key == "shape") {
        once(shape, key);
        for (const std::uint64_t x : integers(safetensors_rank_limit)) {
          if (x > static_cast<std::uint64_t>(PTRDIFF_MAX))
            stop("a dimension of " + std::to_string(x) + " is too large");
          e.dims.push_back(static_cast<isize>(x));
        }
      } else if (key == "data_offsets") {
        once(offsets, key);
        const auto pair = integers(2);
        if (pair.size() != 2) stop("data_offsets holds " + std::to_string(pair.size()) + " numbers; wanted 2");
        e.begin = pair[0], e.end = pair[1];
      } else {
        stop("field " + quoted(key) + " is unknown; wanted dtype, shape, data_offsets");
      }
    });
    if (!dtype || !shape || !offsets)
      stop(std::string(!dtype ? "dtype" : !shape ? "shape" : "data_offsets") + " is missing");
    return e;
  }

  element type() {
    const std::string name = string();
    std::vector<std::string> known;
    for (const auto& [text, value] : safetensors_types) {
      if (name == text) return value;
      known.emplace_back(text);
    }
    stop("dtype " + quoted(name) + " is not supported; known: " + join(known));
  }

  std::vector<std::uint64_t> integers(std::size_t limit) {
    std::vector<std::uint64_t> out;
    want('[');
    if (take(']')) return out;
    do {
      if (out.size() == limit) stop("a list of more than " + std::to_string(limit) + " numbers");
      out.push_back(integer());
    } while (take(','));
    want(']');
    return out;
  }
  std::uint64_t integer() {
    const std::size_t first = skip_space();
    std::uint64_t x = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      const auto digit = static_cast<std::uint64_t>(text_[at_] - '0');
      if (x > (UINT64_MAX - digit) / 10) stop("a number does not fit 64 bits");
      x = x * 10 + digit;
    }
    if (at_ == first || (text_[first] == '0' && at_ > first + 1)) stop("wanted a non-negative integer");
    return x;
  }

  std::string string() {
    want('"');
    std::string out;
    for (;;) {
      if (at_ >= text_.size()) stop("a string does not end");
      const char c = text_[at_++];
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) stop("a control character in a string");
      if (c != '\\')
        out += c;
      else
        escape(out);
    }
  }
  void escape(std::string& out) {
    constexpr std::string_view from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
    const char c = at_ < text_.size() ? text_[at_++] : '\0';
    if (const auto i = from.find(c); i != std::string_view::npos && c != '\0') {
      out += to[i];
      return;
    }
    if (c != 'u') stop("an unknown escape in a string");
    std::uint32_t u = hex4();
    if (u >= 0xd800 && u < 0xdc00) {
      if (text_.substr(at_, 2) != "\\u") stop("half a surrogate pair in a string");
      at_ += 2;
      const std::uint32_t low = hex4();
      if (low < 0xdc00 || low > 0xdfff) stop("half a surrogate pair in a string");
      u = 0x10000 + ((u - 0xd800) << 10) + (low - 0xdc00);
    } else if (u >= 0xdc00 && u < 0xe000) {
      stop("half a surrogate pair in a string");
    }
    append_utf8(out, u);
  }
  std::uint32_t hex4() {
    std::uint32_t u = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = at_ < text_.size() ? text_[at_++] : '\0';
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) stop("wanted four hexadecimal digits after \\u");
      u = u * 16 + static_cast<std::uint32_t>(digit);
    }
    return u;
  }
  static void append_utf8(std::string& out, std::uint32_t u) {
    const auto put = [&](std::uint32_t x) { out += static_cast<char>(static_cast<unsigned char>(x)); };
    if (u < 0x80) return put(u);
    if (u < 0x800) return put(0xc0 | (u >> 6)), put(0x80 | (u & 0x3f));
    if (u < 0x10000) return put(0xe0 | (u >> 12)), put(0x80 | ((u >> 6) & 0x3f)), put(0x80 | (u & 0x3f));
    put(0xf0 | (u >> 18)), put(0x80 | ((u >> 12) & 0x3f)), put(0x80 | ((u >> 6) & 0x3f)), put(0x80 | (u & 0x3f));
  }

  std::string_view text_;
  std::string path_, context_;
  std::size_t at_ = 0;
  bool seen_metadata_ = false;
};

/// Offsets against shapes and the data's length; together they must cover the data once.
inline void check_offsets(const std::string& path, const safetensors_header& h, std::uint64_t data_bytes) {
  std::vector<std::pair<const safetensors_entry*, const std::string*>> order;
  for (const auto& [name, e] : h.entries) {
    const auto bad = [&, &name = name](const std::string& what) {
      throw file_error(path, "tensor \"" + name + "\": " + what);
    };
    const std::string offsets = "data_offsets [" + std::to_string(e.begin) + ", " + std::to_string(e.end) + "]";
    if (e.begin > e.end) bad(offsets + " end before they begin");
    if (e.end > data_bytes)
      bad(offsets + " lie outside the file, which has " + std::to_string(data_bytes) + " bytes of data");
    // The zeros of an empty tensor come last: its other dimensions must be sane too.
    std::uint64_t bytes = size_of(e.type);
    for (const isize x : e.dims) {
      const auto factor = static_cast<std::uint64_t>(x > 1 ? x : 1);
      if (factor > static_cast<std::uint64_t>(PTRDIFF_MAX) / 8 / bytes) bad("shape " + list(e.dims) + " is too large");
      bytes *= factor;
    }
    if (std::find(e.dims.begin(), e.dims.end(), 0) != e.dims.end()) bytes = 0;
    if (e.end - e.begin != bytes)
      bad(offsets + " hold " + std::to_string(e.end - e.begin) + " bytes; shape " + list(e.dims) + " of " +
          name_of(e.type) + " needs " + std::to_string(bytes));
    order.emplace_back(&e, &name);
  }
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first->begin, a.first->end) < std::pair(b.first->begin, b.first->end);
  });
  std::uint64_t covered = 0;
  for (const auto& [e, name] : order) {
    if (e->begin < covered && e->end > e->begin)
      throw file_error(path, "tensor \"" + *name + "\" shares bytes with another one");
    if (e->begin > covered)
      throw file_error(
          path, "data bytes " + std::to_string(covered) + " to " + std::to_string(e->begin) + " belong to no tensor");
    covered = std::max(covered, e->end);
  }
  if (covered != data_bytes)
    throw file_error(
        path, "data bytes " + std::to_string(covered) + " to " + std::to_string(data_bytes) + " belong to no tensor");
}

}  // namespace detail

/// The header's text, checked against `data_bytes` bytes of data that follow it. `path` is named in errors.
inline safetensors_header parse_safetensors_header(std::string_view text, std::uint64_t data_bytes,
                                                   const std::string& path) {
  safetensors_header h = detail::header_parser(text, path).parse();
  detail::check_offsets(path, h, data_bytes);
  return h;
}

}  // namespace FOVEA_ABI
}  // namespace fovea
