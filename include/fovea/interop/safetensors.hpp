// SPDX-License-Identifier: MIT
#pragma once
/// @file  Safetensors: named arrays in a file, read with distrust and written whole.
///
///   safetensors_file f = read_safetensors("in.safetensors");      f.tensors["q"], f.metadata["model"]
///   safetensors_reader r("large.safetensors");                    r.load("q") reads that tensor alone
///   write_safetensors("out.safetensors", {{"o", o}}, {{"made_by", "fovea"}});
///
/// Layout     8 bytes: length L of the header, little-endian; L bytes of JSON; data, row-major, little-endian.
///            Header: {"q": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"key": "text"}}
/// Contract   everything in the header is checked before a byte of data is read: L against the file, offsets against the data,
///            product(shape) * size against the offsets without overflow, no duplicate names, no two tensors on the same bytes,
///            no bytes without a tensor. Types: F64 F32 F16 BF16 U8 BOOL I32 I64 U32.
/// Errors     file_error: "PATH: tensor "q": ..."          Source  https://github.com/huggingface/safetensors (format)

#include <bit>
#include <tuple>

#include <fovea/interop/safetensors_header.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian; this machine is not");

struct safetensors_file {
  arrays tensors;
  safetensors_metadata metadata;
};

/// An open file with a checked header; tensors are read when asked for.
class safetensors_reader {
 public:
  explicit safetensors_reader(const std::string& path) : path_(path) {
    std::uint64_t size = 0, length = 0;
    std::tie(in_, size) = open_for_reading(path);
    if (size < 8)
      throw file_error(
          path, "is " + std::to_string(size) + " bytes long; a safetensors file begins with 8 bytes of header length");
    read(&length, sizeof length);
    if (length > size - 8)
      throw file_error(path, "announces a header of " + std::to_string(length) + " bytes and has " +
                                 std::to_string(size - 8) + " bytes after the length");
    if (length > detail::safetensors_header_limit)
      throw file_error(path, "announces a header of " + std::to_string(length) + " bytes; at most " +
                                 std::to_string(detail::safetensors_header_limit) + " are read");
    std::string text(static_cast<std::size_t>(length), '\0');
    read(text.data(), text.size());
    data_ = 8 + length;
    header_ = parse_safetensors_header(text, size - data_, path);
  }

  const std::map<std::string, safetensors_entry>& entries() const { return header_.entries; }
  const safetensors_metadata& metadata() const { return header_.metadata; }
  bool contains(const std::string& name) const { return header_.entries.contains(name); }

  array load(const std::string& name) {
    const auto at = header_.entries.find(name);
    if (at == header_.entries.end()) throw file_error(path_, "has no tensor \"" + name + "\"");
    const safetensors_entry& e = at->second;
    array a(e.type, e.dims);
    in_.clear();
    in_.seekg(static_cast<std::streamoff>(data_ + e.begin));
    read(a.mutable_data(), a.bytes());
    return a;
  }

 private:
  void read(void* into, std::size_t bytes) {
    in_.read(static_cast<char*>(into), static_cast<std::streamsize>(bytes));
    if (in_.gcount() != static_cast<std::streamsize>(bytes)) throw file_error(path_, "could not be read to its end");
  }
  std::string path_;
  std::ifstream in_;
  std::uint64_t data_ = 0;
  safetensors_header header_;
};

inline safetensors_file read_safetensors(const std::string& path) {
  safetensors_reader reader(path);
  safetensors_file f{{}, reader.metadata()};
  for (const auto& [name, entry] : reader.entries()) f.tensors.emplace(name, reader.load(name));
  return f;
}

namespace detail {

inline std::string json_string(const std::string& s) {
  constexpr char hex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : s) {
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\')
      out += '\\', out += c;
    else if (u < 0x20)
      out += "\\u00", out += hex[u >> 4], out += hex[u & 15];
    else
      out += c;
  }
  return out + '"';
}

/// The JSON of a header for these arrays, in this order, padded so that the data is aligned.
inline std::string safetensors_header_text(const std::vector<const arrays::value_type*>& order,
                                           const safetensors_metadata& metadata) {
  std::string text = "{";
  const auto put = [&](std::initializer_list<std::string_view> parts) {
    if (text.back() != '{') text += ',';
    for (const std::string_view part : parts) text += part;
  };
  if (!metadata.empty()) {
    text += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) put({json_string(key), ":", json_string(value)});
    text += '}';
  }
  std::uint64_t at = 0;
  for (const auto* t : order) {
    const array& a = t->second;
    const auto* type = std::find_if(std::begin(safetensors_types), std::end(safetensors_types),
                                    [&](const auto& x) { return x.second == a.type(); });
    put({json_string(t->first), ":{\"dtype\":\"", type->first, "\",\"shape\":", list(a.dims()), ",\"data_offsets\":[",
         std::to_string(at), ",", std::to_string(at + a.bytes()), "]}"});
    at += a.bytes();
  }
  text += '}';
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

}  // namespace detail

inline void write_safetensors(const std::string& path, const arrays& tensors,
                              const safetensors_metadata& metadata = {}) {
  std::vector<const arrays::value_type*> order;
  for (const auto& t : tensors) order.push_back(&t);
  // Large elements first, so that every tensor of a mapped file is aligned to its element.
  std::stable_sort(order.begin(), order.end(),
                   [](const auto* a, const auto* b) { return size_of(a->second.type()) > size_of(b->second.type()); });
  const std::string text = detail::safetensors_header_text(order, metadata);
  write_whole(path, [&](std::ofstream& out) {
    const std::uint64_t length = text.size();
    out.write(reinterpret_cast<const char*>(&length), sizeof length);
    out.write(text.data(), static_cast<std::streamsize>(text.size()));
    for (const auto* t : order)
      if (t->second.bytes() > 0)
        out.write(static_cast<const char*>(t->second.data()), static_cast<std::streamsize>(t->second.bytes()));
  });
}

}  // namespace FOVEA_ABI
}  // namespace fovea
