// SPDX-License-Identifier: MIT
#pragma once
/// @file  The header of a safetensors file: its JSON, parsed and checked against the bytes that follow it.
///
/// Contract   offsets against the data's length, product(shape) * size against the offsets without overflow, no duplicate names,
///            no two tensors on the same bytes, no bytes without a tensor. Nesting, numbers and ranks are bounded. JSON by nlohmann-json.
/// Errors     file_error. Files: interop/safetensors.hpp.

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fovea/core/configuration.hpp>
#include <fovea/interop/file.hpp>
#include <fovea/interop/json.hpp>

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

inline std::string quoted_name(const std::string& s) {
  std::string out = "\"";
  for (const char c : s.substr(0, 80))
    out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;  // one line, always
  return out + (s.size() > 80 ? "...\"" : "\"");
}

/// From the header's JSON to its meaning; the syntax, duplicates and nesting are parse_json's affair.
class header_reader {
 public:
  explicit header_reader(std::string path) : path_(std::move(path)) {}

  safetensors_header read(std::string_view text) {
    if (text.empty() || text[0] != '{') stop("the header does not start with '{'");
    safetensors_header h;
    const nlohmann::json j = parse_json(text, path_, 3);
    for (const auto& [key, value] : j.items()) {
      if (key == "__metadata__") {
        h.metadata = metadata(value);
        continue;
      }
      context_ = "tensor " + quoted_name(key) + ": ";
      h.entries.emplace(key, entry(value));
      context_.clear();
    }
    return h;
  }

 private:
  [[noreturn]] void stop(const std::string& what) const { throw file_error(path_, context_ + what); }

  safetensors_metadata metadata(const nlohmann::json& j) const {
    if (!j.is_object()) stop("__metadata__ must be an object of strings");
    safetensors_metadata m;
    for (const auto& [key, value] : j.items()) {
      if (!value.is_string()) stop("__metadata__: the value of " + quoted_name(key) + " must be a string");
      m.emplace(key, value.get<std::string>());
    }
    return m;
  }

  safetensors_entry entry(const nlohmann::json& j) const {
    if (!j.is_object()) stop("wanted an object with dtype, shape, data_offsets");
    for (const auto& [key, value] : j.items())
      if (key != "dtype" && key != "shape" && key != "data_offsets")
        stop("field " + quoted_name(key) + " is unknown; wanted dtype, shape, data_offsets");
    for (const char* key : {"dtype", "shape", "data_offsets"})
      if (!j.contains(key)) stop(std::string(key) + " is missing");
    safetensors_entry e;
    e.type = type(j["dtype"]);
    for (const std::uint64_t x : integers(j["shape"], safetensors_rank_limit)) {
      if (x > static_cast<std::uint64_t>(PTRDIFF_MAX)) stop("a dimension of " + std::to_string(x) + " is too large");
      e.dims.push_back(static_cast<isize>(x));
    }
    const auto pair = integers(j["data_offsets"], 2);
    if (pair.size() != 2) stop("data_offsets holds " + std::to_string(pair.size()) + " numbers; wanted 2");
    e.begin = pair[0], e.end = pair[1];
    return e;
  }

  element type(const nlohmann::json& j) const {
    if (!j.is_string()) stop("dtype must be a string");
    const auto name = j.get<std::string>();
    std::vector<std::string> known;
    for (const auto& [text, value] : safetensors_types) {
      if (name == text) return value;
      known.emplace_back(text);
    }
    stop("dtype " + quoted_name(name) + " is not supported; known: " + join(known));
  }

  std::vector<std::uint64_t> integers(const nlohmann::json& j, std::size_t limit) const {
    if (!j.is_array()) stop("shape and data_offsets must be lists");
    if (j.size() > limit) stop("a list of more than " + std::to_string(limit) + " numbers");
    std::vector<std::uint64_t> out;
    for (const auto& x : j) {
      if (!x.is_number_unsigned()) stop("wanted non-negative integers of at most 64 bits, found " + x.dump());
      out.push_back(x.get<std::uint64_t>());
    }
    return out;
  }

  std::string path_, context_;
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
  safetensors_header h = detail::header_reader(path).read(text);
  detail::check_offsets(path, h, data_bytes);
  return h;
}

}  // namespace FOVEA_ABI
}  // namespace fovea
