// SPDX-License-Identifier: MIT
#pragma once
/// @file  A mechanism described by plain data: named arrays (weights), a configuration (name and parameters), and its reader.
///
/// Contract   a `configuration_reader` remembers what it was asked for; `finish()` refuses every key and tensor that was given and
///            never asked for, so that nothing is silently ignored. Numbers are finite. Text, JSON and files: interop/.
/// Errors     contract_error naming the key, its value and what was wanted.

#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <fovea/core/contract.hpp>
#include <fovea/core/workspace.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// Element types of arrays: the storage types of kernels, and the integers of masks and tables.
enum class element : std::uint8_t { f32, f64, bf16, f16, u8, boolean, i32, i64, u32 };

constexpr std::size_t size_of(element t) {
  switch (t) {
    case element::f64:
    case element::i64: return 8;
    case element::f32:
    case element::i32:
    case element::u32: return 4;
    case element::bf16:
    case element::f16: return 2;
    case element::u8:
    case element::boolean: return 1;
  }
  return 0;
}
constexpr const char* name_of(element t) {
  constexpr const char* names[] = {"f32", "f64", "bf16", "f16", "u8", "bool", "i32", "i64", "u32"};
  return names[static_cast<int>(t)];
}
constexpr bool is_float(element t) { return t <= element::f16; }

namespace detail {
template <class T>
inline constexpr int element_index = -1;
template <>
inline constexpr int element_index<float> = static_cast<int>(element::f32);
template <>
inline constexpr int element_index<double> = static_cast<int>(element::f64);
template <>
inline constexpr int element_index<bf16> = static_cast<int>(element::bf16);
template <>
inline constexpr int element_index<f16> = static_cast<int>(element::f16);
template <>
inline constexpr int element_index<std::uint8_t> = static_cast<int>(element::u8);
template <>
inline constexpr int element_index<std::int32_t> = static_cast<int>(element::i32);
template <>
inline constexpr int element_index<std::int64_t> = static_cast<int>(element::i64);
template <>
inline constexpr int element_index<std::uint32_t> = static_cast<int>(element::u32);

inline std::string list(const std::vector<isize>& dims) {
  std::string s = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) s += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  return s + "]";
}
/// No negative dimension, and a byte count far from overflow, in whatever order the factors come.
inline void check_dims(const std::vector<isize>& dims, isize element_size) {
  isize bytes = element_size;
  for (const isize x : dims) {
    require(x >= 0, "an array of dimensions ", list(dims), "; they must not be negative");
    require(x <= PTRDIFF_MAX / 8 / bytes, "an array of dimensions ", list(dims), "; that is too large");
    bytes *= x > 1 ? x : 1;
  }
}
}  // namespace detail

/// A dense row-major array of any rank. Copies share the bytes, which never change once shared.
class array {
 public:
  array() = default;
  /// Zeroed memory; fill it through `mutable_data` before the first copy.
  array(element type, std::vector<isize> dims) : type_(type), dims_(std::move(dims)) {
    detail::check_dims(dims_, static_cast<isize>(size_of(type)));
    bytes_ = std::make_shared<buffer>(static_cast<std::size_t>(size()) * size_of(type));
    if (bytes_->size() > 0) std::memset(bytes_->data(), 0, bytes_->size());
  }
  template <class T>
    requires(detail::element_index<T> >= 0)
  array(std::vector<isize> dims, const std::vector<T>& values)
      : array(static_cast<element>(detail::element_index<T>), std::move(dims)) {
    require(static_cast<isize>(values.size()) == size(), values.size(), " values for an array of dimensions ",
            detail::list(dims_));
    if (!values.empty()) std::memcpy(bytes_->data(), values.data(), bytes_->size());
  }

  element type() const { return type_; }
  const std::vector<isize>& dims() const { return dims_; }
  isize rank() const { return static_cast<isize>(dims_.size()); }
  /// Dimension i; negative i counts from the end. 1 where the array has no such dimension, as in broadcasting.
  isize dim(isize i) const {
    const isize at = i < 0 ? i + rank() : i;
    return at < 0 || at >= rank() ? 1 : dims_[static_cast<std::size_t>(at)];
  }
  isize size() const {
    isize n = 1;
    for (const isize x : dims_) n = x == 0 || n == 0 ? 0 : n * x;
    return n;
  }
  std::size_t bytes() const { return bytes_ ? bytes_->size() : 0; }
  const void* data() const { return bytes_ ? bytes_->data() : nullptr; }
  void* mutable_data() { return bytes_ ? bytes_->data() : nullptr; }
  /// The elements as T, which must be the stored type (u8 reads bool too).
  template <class T>
  const T* as() const {
    const bool same = static_cast<int>(type_) == detail::element_index<T> ||
                      (type_ == element::boolean && std::is_same_v<T, std::uint8_t>);
    require(same, "an array of ", name_of(type_), " was read as another type");
    return static_cast<const T*>(data());
  }
  /// The same elements under other dimensions of the same size.
  array reshaped(std::vector<isize> dims) const {
    array a = *this;
    a.dims_ = std::move(dims);
    require(a.size() == size(), "an array of ", describe(), " cannot be reshaped to ", detail::list(a.dims_));
    return a;
  }
  /// Whoever holds this keeps the bytes alive.
  std::shared_ptr<const void> owner() const { return bytes_; }

  double at(isize i) const {
    switch (type_) {
      case element::f32: return static_cast<double>(static_cast<const float*>(data())[i]);
      case element::f64: return static_cast<const double*>(data())[i];
      case element::bf16: return load_as_double(dtype::bf16, data(), i);
      case element::f16: return load_as_double(dtype::f16, data(), i);
      case element::u8:
      case element::boolean: return static_cast<const std::uint8_t*>(data())[i];
      case element::i32: return static_cast<const std::int32_t*>(data())[i];
      case element::i64: return static_cast<double>(static_cast<const std::int64_t*>(data())[i]);
      case element::u32: return static_cast<const std::uint32_t*>(data())[i];
    }
    return 0.0;
  }
  std::vector<float> floats() const { return convert<float>(); }
  std::vector<double> doubles() const { return convert<double>(); }

  std::string describe() const { return detail::list(dims_) + " " + name_of(type_); }

 private:
  template <class T>
  std::vector<T> convert() const {
    std::vector<T> out(static_cast<std::size_t>(size()));
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<T>(at(static_cast<isize>(i)));
    return out;
  }
  element type_ = element::f32;
  std::vector<isize> dims_ = {0};
  std::shared_ptr<buffer> bytes_;
};

using arrays = std::map<std::string, array>;

using configuration_value = std::variant<bool, double, std::string, std::vector<double>>;

struct configuration {
  std::string mechanism;
  std::map<std::string, configuration_value> values;
};

namespace detail {
inline std::string number_text(double x) {
  std::ostringstream out;
  out.precision(17);
  out << x;
  return out.str();
}
inline std::string describe(const configuration_value& v) {
  if (const auto* b = std::get_if<bool>(&v)) return *b ? "true" : "false";
  if (const auto* x = std::get_if<double>(&v)) return number_text(*x);
  if (const auto* s = std::get_if<std::string>(&v)) return '"' + *s + '"';
  return "a list of " + std::to_string(std::get<std::vector<double>>(v).size()) + " numbers";
}
template <class Names>
std::string join(const Names& names) {
  std::string s;
  for (const auto& name : names) s += (s.empty() ? "" : ", ") + std::string(name);
  return s.empty() ? "none" : s;
}
}  // namespace detail

/// Hands out the values of one configuration. Asking for a key or tensor, present or not, makes it known.
class configuration_reader {
 public:
  configuration_reader(const configuration& c, const arrays& tensors) : configuration_(&c), tensors_(&tensors) {}

  const std::string& mechanism() const { return configuration_->mechanism; }
  /// Is the key there? Makes it known, as do all the readers below.
  bool has(const std::string& key) { return find(key) != nullptr; }

  double number(const std::string& key, double fallback) {
    const auto* v = find(key);
    return v == nullptr ? fallback : as_number(key, *v);
  }
  std::optional<double> number(const std::string& key) {
    const auto* v = find(key);
    return v == nullptr ? std::nullopt : std::optional<double>(as_number(key, *v));
  }
  isize integer(const std::string& key, isize fallback) {
    const auto* v = find(key);
    if (v == nullptr) return fallback;
    const double x = as_number(key, *v);
    if (x != std::floor(x) || std::abs(x) > 9007199254740992.0) refuse(key, *v, "a whole number");
    return static_cast<isize>(x);
  }
  bool flag(const std::string& key, bool fallback) {
    const auto* v = find(key);
    if (v == nullptr) return fallback;
    if (!std::holds_alternative<bool>(*v)) refuse(key, *v, "true or false");
    return std::get<bool>(*v);
  }
  std::string text(const std::string& key, const std::string& fallback) {
    const auto* v = find(key);
    if (v == nullptr) return fallback;
    if (!std::holds_alternative<std::string>(*v)) refuse(key, *v, "a text");
    return std::get<std::string>(*v);
  }
  /// A list of numbers, or one number as a list of one; empty if absent.
  std::vector<double> numbers(const std::string& key) {
    const auto* v = find(key);
    if (v == nullptr) return {};
    if (!std::holds_alternative<std::vector<double>>(*v)) return {as_number(key, *v)};
    const auto& list = std::get<std::vector<double>>(*v);
    for (const double x : list) require(std::isfinite(x), where(), key, " holds ", x, "; wanted finite numbers");
    return list;
  }
  /// choice("align", {{"bottom_right", a}, {"none", b}}, a)
  template <class Value>
  Value choice(const std::string& key, std::initializer_list<std::pair<const char*, std::type_identity_t<Value>>> names,
               Value fallback) {
    const auto* v = find(key);
    if (v == nullptr) return fallback;
    std::vector<std::string> known;
    for (const auto& [name, value] : names) {
      if (const auto* s = std::get_if<std::string>(v); s != nullptr && *s == name) return value;
      known.push_back('"' + std::string(name) + '"');
    }
    refuse(key, *v, "one of " + detail::join(known));
  }

  /// A weight of the mechanism, or null. The pointer lives as long as the `arrays` that were given.
  const array* tensor(const std::string& name) {
    known_tensors_.insert(name);
    const auto at = tensors_->find(name);
    return at == tensors_->end() ? nullptr : &at->second;
  }
  /// The same for one that must be there.
  const array& need(const std::string& name, const std::string& why) {
    const array* a = tensor(name);
    require(a != nullptr, where(), "tensor ", name, " is missing; ", why);
    return *a;
  }
  /// Says that a tensor of this name comes with each call (g, beta, b, w, S0, z0), not with the mechanism.
  void call_input(const std::string& name) {
    known_tensors_.insert(name);
    call_inputs_.insert(name);
  }
  const std::set<std::string>& call_inputs() const { return call_inputs_; }

  /// Refuses a key or a tensor that nobody asked for.
  void finish() const {
    for (const auto& [key, value] : configuration_->values)
      require(known_keys_.contains(key), where(), "key \"", key, "\" (", detail::describe(value),
              ") is not supported; known here: ", detail::join(known_keys_));
    for (const auto& [name, value] : *tensors_)
      require(known_tensors_.contains(name), where(), "tensor \"", name, "\" ", value.describe(),
              " is not supported; known here: ", detail::join(known_tensors_));
  }

  /// refuse("window", value, "at least 1") for values whose limits only the mechanism knows.
  [[noreturn]] void refuse(const std::string& key, const configuration_value& v, const std::string& wanted) const {
    fail(where() + key + " is " + detail::describe(v) + "; wanted " + wanted);
  }

 private:
  std::string where() const { return "configuration of " + configuration_->mechanism + ": "; }
  const configuration_value* find(const std::string& key) {
    known_keys_.insert(key);
    const auto at = configuration_->values.find(key);
    return at == configuration_->values.end() ? nullptr : &at->second;
  }
  double as_number(const std::string& key, const configuration_value& v) const {
    const auto* x = std::get_if<double>(&v);
    if (x == nullptr) refuse(key, v, "a number");
    require(std::isfinite(*x), where(), key, " is ", *x, "; wanted a finite number");
    return *x;
  }

  const configuration* configuration_;
  const arrays* tensors_;
  std::set<std::string> known_keys_, known_tensors_, call_inputs_;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
