// SPDX-License-Identifier: MIT
#pragma once
/// @file  Reads tests/data/golden: third-party answers in float64 for stored float32 inputs (see tests/data/README.md).
///
///   for (const golden::test_case& c : golden::family("softmax")) { c.name, c.params["scale"], c.at("q"), ... }

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "support/tensors.hpp"

namespace golden {

using fovea::dtype;
using fovea::isize;

struct test_case {
  std::string name, made_by;
  nlohmann::json params;
  std::vector<std::string> inputs, outputs;
  std::map<std::string, test::array> tensors;

  bool has(const std::string& key) const { return tensors.count(key) != 0; }
  const test::array& at(const std::string& key) const {
    const auto found = tensors.find(key);
    if (found == tensors.end()) throw std::out_of_range("golden case " + name + " has no tensor " + key);
    return found->second;
  }
  double number(const char* key, double otherwise) const {
    return params.contains(key) ? params[key].get<double>() : otherwise;
  }
  isize integer(const char* key, isize otherwise) const {
    return params.contains(key) ? params[key].get<isize>() : otherwise;
  }
  bool flag(const char* key, bool otherwise = false) const {
    return params.contains(key) ? params[key].get<double>() != 0 : otherwise;
  }
  std::string text(const char* key, const std::string& otherwise) const {
    return params.contains(key) ? params[key].get<std::string>() : otherwise;
  }

  /// [B, H, n, w] (or [B, H, n]) as a tensor of any storage type and layout.
  test::tensor tensor(const std::string& key, dtype type, test::layout l = test::layout::bhnd) const {
    return test::copy_of(at(key), type, l);
  }
  template <class T>
  std::vector<T> list(const std::string& key) const {
    std::vector<T> out;
    for (double x : at(key).data) out.push_back(static_cast<T>(x));
    return out;
  }
};

namespace detail {
inline std::string folder() { return FOVEA_TEST_DATA_DIR "/golden/"; }

template <class T>
void widen(const char* p, isize count, std::vector<double>& out) {
  for (isize i = 0; i < count; ++i) {
    T x;
    std::memcpy(&x, p + i * static_cast<isize>(sizeof(T)), sizeof(T));
    out.push_back(static_cast<double>(x));
  }
}

/// Deliberately not the library's reader, so that neither hides a fault of the other.
inline std::map<std::string, test::array> read_safetensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  const std::string raw{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  std::uint64_t length = 0;
  std::memcpy(&length, raw.data(), sizeof length);
  const nlohmann::json head = nlohmann::json::parse(raw.substr(8, length));
  std::map<std::string, test::array> out;
  for (const auto& [key, info] : head.items()) {
    if (key == "__metadata__") continue;
    test::array& a = out[key];
    a.dims = info["shape"].get<std::vector<isize>>();
    const isize count = test::product(a.dims);
    a.data.reserve(static_cast<std::size_t>(count));
    const char* p = raw.data() + 8 + length + info["data_offsets"][0].get<std::size_t>();
    const std::string type = info["dtype"];
    if (type == "F64")
      widen<double>(p, count, a.data);
    else if (type == "F32")
      widen<float>(p, count, a.data);
    else if (type == "I32")
      widen<std::int32_t>(p, count, a.data);
    else if (type == "I64")
      widen<std::int64_t>(p, count, a.data);
    else if (type == "U8" || type == "BOOL")
      widen<std::uint8_t>(p, count, a.data);
    else
      throw std::runtime_error(path + ": " + key + " has type " + type);
  }
  return out;
}
}  // namespace detail

/// All cases of softmax, linear, dijiang, lowrank or sparse, in file order. Read once.
inline const std::vector<test_case>& family(const std::string& name) {
  static std::map<std::string, std::vector<test_case>> families;
  const auto found = families.find(name);
  if (found != families.end()) return found->second;
  const auto data = detail::read_safetensors(detail::folder() + name + ".safetensors");
  std::ifstream file(detail::folder() + name + ".json");
  const nlohmann::json info = nlohmann::json::parse(file);
  std::vector<test_case>& cases = families[name];
  for (const auto& entry : info["cases"]) {
    test_case c;
    c.name = entry["name"];
    c.made_by = entry.value("made_by", "");
    c.params = entry["params"];
    for (const char* side : {"inputs", "outputs"})
      for (const auto& [key, unused] : entry[side].items()) {
        (side[0] == 'i' ? c.inputs : c.outputs).push_back(key);
        c.tensors[key] = data.at(c.name + "/" + key);
        (void)unused;
      }
    cases.push_back(std::move(c));
  }
  return cases;
}

inline const test_case& find(const std::string& family_name, const std::string& case_name) {
  for (const test_case& c : family(family_name))
    if (c.name == case_name) return c;
  throw std::out_of_range("no golden case " + family_name + "/" + case_name);
}

}  // namespace golden
